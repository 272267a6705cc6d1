"""What an active layer does in a call: the host's forward, then one compiled kernel a seed, blended by law 2.

The plan is immutable and rebuilt at every commit, so a call follows it and decides nothing: it compiles nothing,
touches no disk or network, waits for no lock and reads no tensor's contents on the host (law 3). A fault of a seed is
noted on the seed and its span is the host's (law 1).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from esper_triton.kasmina.autograd import SeedBlend
from esper_triton.kasmina.plan import ActiveSeed, Contribution, Plan, matrix
from esper_triton.kasmina.record import LayerRecord

__all__ = ["Dispatch"]

_log = logging.getLogger("esper_triton.kasmina")


class Dispatch:
    """The instance `forward` of a layer with an active seed."""

    def __init__(self, record: LayerRecord, host_forward: Callable[..., Any], plan: Plan) -> None:
        self.record = record
        self.host_forward = host_forward
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        h = self.host_forward(*args, **kwargs)
        self.record.forward_calls_active += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        if _is_recorded():
            self._warn_of_recording()
            _count_misses(self.plan.seeds)
            return h
        return _dispatch(self.plan, x, h)

    def _warn_of_recording(self) -> None:
        if not self.record.warned_of_recording:
            self.record.warned_of_recording = True
            _log.warning(
                "layer %r: this call is being traced or exported, which a kernel cannot be: the host alone is recorded",
                self.record.name,
            )


def _is_recorded() -> bool:
    """Whether operations are being written down (`torch.jit.trace`, `make_fx`, `torch.export`) instead of only being
    run. A kernel writes to memory behind torch's back, so the record would hold an output that nothing has written.
    `torch.compile` is no case of it: it leaves the kernel's call out of its graph."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _count_misses(seeds: Sequence[ActiveSeed]) -> None:
    for active in seeds:
        active.seed.specialisation_misses += 1


def _dispatch(plan: Plan, x: Any, h: Any) -> Any:
    if type(h) is Tensor and h.is_nested:
        # nn.TransformerEncoder packs padded batches so in eval mode; every sequence of the pack is a matrix of its own.
        return torch.nested.as_nested_tensor([_dispatch(plan, None, part) for part in h.unbind()])
    try:
        blend = _blend(plan, x, h)
    except Exception as error:
        for active in plan.seeds:
            active.seed.fault(error)
        return h
    if blend is None:
        return h
    out, contributions, x = blend
    parameters = [p for c in contributions for p in c.active.parameters.values()]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *parameters, *(() if x is None else (x,)))):
        # Not under the `try` above: this runs the hooks of whoever keeps saved tensors, and what they raise is not a
        # seed's fault. Activation checkpointing ends its recomputation by an exception from there.
        apply: Callable[..., Tensor] = SeedBlend.apply
        return apply(plan, contributions, (out,), h, x, *parameters)
    return out


def _blend(plan: Plan, x: Any, h: Any) -> tuple[Tensor, list[Contribution], Tensor | None] | None:
    """The blended output, what its seeds leave for backward, and the input where one of them read it; None where no
    seed contributed."""
    fitting = [active for active in plan.seeds if _fits(plan, active, x, h)]
    _count_misses([active for active in plan.seeds if active not in fitting])
    if not fitting:
        return None
    reads_x = any("x" in active.program.inputs for active in fitting)
    with torch.no_grad():
        h2 = matrix(h)
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        contributions = _run(plan, fitting, matrix(x) if reads_x else None, h2, out.view(h2.shape))
    return (out, contributions, x if reads_x else None) if contributions else None


def _is_plain(value: Any) -> bool:
    # A subclass (DTensor, a fake tensor) may have no memory of its own for a kernel to read; one that functorch has
    # wrapped, or that carries a tangent, needs a rule that a kernel does not have.
    if type(value) is not Tensor and type(value) is not nn.Parameter:
        return False
    if torch.compiler.is_compiling():
        return True
    return not torch._C._functorch.is_functorch_wrapped_tensor(value) and forward_ad._current_level < 0


def _fits(plan: Plan, active: ActiveSeed, x: Any, h: Any) -> bool:
    program = active.program
    if not _is_plain(h) or h.layout is not torch.strided or h.dim() == 0 or h.shape[-1] != plan.width:
        return False
    if h.dtype != program.dtype or h.device != active.alpha.device:
        return False
    if "x" not in program.inputs:
        return True
    return (
        _is_plain(x)
        and not x.is_nested
        and x.layout is torch.strided
        and x.dtype == program.dtype
        and x.device == h.device
        and x.dim() == h.dim()
        and x.shape[:-1] == h.shape[:-1]
        and x.shape[-1] == program.x_width
    )


def _run(plan: Plan, fitting: Sequence[ActiveSeed], x: Tensor | None, h: Tensor, out: Tensor) -> list[Contribution]:
    """Writes the blend into `out`, [rows, width], and returns what the seeds that ran leave for backward."""
    if plan.overlapping:
        out.copy_(h)
    else:
        for start, stop in plan.gaps:
            out[:, start:stop] = h[:, start:stop]
        for active in plan.seeds:
            if active not in fitting:
                out[:, active.start : active.stop] = h[:, active.start : active.stop]
    contributions = []
    for active in fitting:
        h_span = h[:, active.start : active.stop]
        out_span = out[:, active.start : active.stop]
        target = torch.empty(h_span.shape, dtype=h.dtype, device=h.device) if plan.overlapping else out_span
        try:
            contribution = _run_seed(plan, active, x, h_span, target)
        except Exception as error:
            active.seed.fault(error)
            if not plan.overlapping:
                out_span.copy_(h_span)
            continue
        if plan.overlapping:
            difference = target - h_span
            # Selected, not only added: -0.0 + 0.0 is 0.0, and a silent seed must leave every bit of the host's output.
            out_span.copy_(torch.where(difference == 0, out_span, out_span + difference))
        contributions.append(contribution)
    return contributions


def _run_seed(plan: Plan, active: ActiveSeed, x: Tensor | None, h: Tensor, target: Tensor) -> Contribution:
    inputs = {"h": h} if x is None else {"h": h, "x": x}
    began = time.perf_counter_ns() if plan.timed else 0
    saved = active.program.forward(inputs, active.parameters, active.alpha, target)
    if plan.timed:
        active.seed.latency_ns += time.perf_counter_ns() - began
        active.seed.timed_calls += 1
    rejected = None
    if plan.guard or active.nonfinite is not None:
        broken = (h.isfinite() & ~target.isfinite()).any()
        if active.nonfinite is not None:
            active.nonfinite.logical_or_(broken)
    if plan.guard:
        rejected = broken
        target.copy_(torch.where(rejected, h, target))
    return Contribution(active, saved, rejected)
