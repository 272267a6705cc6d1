"""What an active layer does in a call: the host's forward, then one compiled kernel a seed, blended by law 2.

The plan is immutable and rebuilt at every commit, so a call follows it and decides nothing: it compiles nothing,
touches no disk or network, waits for no lock and reads no tensor's contents on the host (law 3). A fault of a seed is
noted on the seed and its span is the host's (law 1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from esper_triton.kasmina.autograd import SeedBlend
from esper_triton.kasmina.blending import Contribution, make_call, run_seeds, sample
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.operator import blend, name_plan
from esper_triton.kasmina.plan import ActiveSeed, Plan, draw_dropout_seeds
from esper_triton.kasmina.prepared import Prepared, prepare
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.views import Extents, empty_output, extents_of, matches, matrix, settle

__all__ = ["Dispatch"]

_log = logging.getLogger("esper_triton.kasmina")


class Dispatch:
    """The instance `forward` of a layer with an active seed."""

    def __init__(self, layer: nn.Module, host_forward: Callable[..., Any], plan: Plan) -> None:
        self.layer = layer
        self.record: LayerRecord = layer._kasmina  # type: ignore[assignment]  # only adopted layers have a dispatch
        self.host_forward = host_forward
        self.plan = plan
        self._name = name_plan(plan)
        self._is_final = all(active.seed.state is SeedLifecycleState.FOSSILIZED for active in plan.seeds)
        self._dtype = plan.seeds[0].program.dtype
        self._reads_x = any("x" in active.program.inputs for active in plan.seeds)
        self._follows_mode, self._draws = plan.follows_mode, plan.draws
        self._prepared: Prepared | None = None  # for the shapes of the last call that could be prepared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan, result = self.plan, self.host_forward(*args, **kwargs)
        x = args[0] if args else kwargs.get(plan.x_name)
        if plan.first_of_tuple and type(result) is tuple:
            return (self._blended(x, result[0]), *result[1:])
        return self._blended(x, result)

    def _blended(self, x: Any, h: Any) -> Any:
        """The host's output with every seed's share."""
        if torch.compiler.is_compiling():
            return self._cast(x, h) if self._is_autocast(h) else self._in_graph(h, x)
        self.record.forward_calls_active += 1
        prepared = self._prepared
        training = self._follows_mode and self.layer.training
        # Calls that are checked for what is not finite go the general way.
        if prepared is not None and self.record.nonfinite is None and prepared.fits(h, x):
            return prepared(h, x if self._reads_x else None, training)
        if _is_recorded():
            self._warn_of_recording()
            _count_misses(self.plan.seeds, h)
            return h
        if type(h) is Tensor and h.is_nested:
            return self._packed(x, h, training)
        if self._is_autocast(h):
            self.record.forward_calls_active -= 1  # counted again
            return self._cast(x, h)
        if all(_fits(self.plan, active, x, h) for active in self.plan.seeds):
            self._prepared = prepare(self.plan, h, x)
        return _dispatch(self.plan, x, h, training)

    def _is_autocast(self, h: Any) -> bool:
        """Whether the host has computed in a narrower type, as autocast had it do."""
        return (
            isinstance(h, Tensor)
            and h.dtype is not self._dtype
            and h.is_floating_point()
            and torch.is_autocast_enabled(h.device.type)
        )

    def _cast(self, x: Any, h: Tensor) -> Tensor:
        """Seeds compute in the type of their parameters, as autocast does with operations that need their precision."""
        x = x.to(self._dtype) if self._reads_x and isinstance(x, Tensor) and x.is_floating_point() else x
        out: Tensor = self._blended(x, h.to(self._dtype)).to(h.dtype)
        return out

    def _in_graph(self, h: Any, x: Any) -> Any:
        """The call as `torch.compile` and `torch.export` record it."""
        if torch.compiler.is_exporting() and not self._is_final:
            # What is exported outlives the plan of a seed that goes on changing.
            self._warn_of_recording()
            _count_misses(self.plan.seeds, h)
            return h
        if not _fits_in_graph(self.plan, h, x if self._reads_x else None):
            return h
        training = self._follows_mode and self.layer.training
        # Drawn as an operation of the graph, which torch runs again, or not, as it does with its own dropout.
        seeds = draw_dropout_seeds(len(self.plan.seeds), h.device) if training and self._draws else None
        return blend(self.plan, self._name, h, x if self._reads_x else None, seeds, training)

    def _packed(self, x: Any, h: Tensor, training: bool) -> Tensor:
        """A padded batch that nn.TransformerEncoder has packed, as it does in eval mode where nothing of its first
        layer trains. Every sequence of the pack is a matrix of its own. The next attention refuses a pack that is to
        have a gradient, so there is none where the host has none."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and h.requires_grad):
            parts = h.unbind()
            inputs: Sequence[Tensor | None] = x.unbind() if type(x) is Tensor and x.is_nested else ()
            if len(inputs) != len(parts):
                inputs = (None,) * len(parts)
            blended = [_dispatch(self.plan, own, part, training) for own, part in zip(inputs, parts, strict=True)]
            out = torch.nested.as_nested_tensor(blended)
        if torch.is_grad_enabled() and not h.requires_grad:
            self._warn_of_packing()
        return out

    def _warn_of_packing(self) -> None:
        if not self.record.warned_of_packing and any(
            p.requires_grad for a in self.plan.seeds for p in a.parameters.values()
        ):
            self.record.warned_of_packing = True
            _log.warning(
                "layer %r: torch has packed a padded batch as for inference, and seeds get no gradient of it; to train "
                "them call train(), or make nn.TransformerEncoder with enable_nested_tensor=False",
                self.record.name,
            )

    def _warn_of_recording(self) -> None:
        if not self.record.warned_of_recording:
            self.record.warned_of_recording = True
            _log.warning(
                "layer %r: this call is being traced or exported, which a kernel cannot be: the host alone is recorded",
                self.record.name,
            )


def _is_recorded() -> bool:
    """Whether operations are being written down (`torch.jit.trace`, `make_fx`, `torch.export`) instead of only being
    run. A kernel writes to memory behind torch's back, so the record would hold an output that nothing has written."""
    return torch._C._is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _count_misses(seeds: Sequence[ActiveSeed], h: Any) -> None:
    for active in seeds:
        active.seed.miss(getattr(h, "dtype", None), getattr(h, "device", None))


def _dispatch(plan: Plan, x: Any, h: Any, training: bool, extents: Extents | None = None) -> Any:
    """The host's output with every seed's share, the general way. `extents` where they are not those of `h`."""
    try:
        blend = _blend(plan, x, h, training, extents)
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


def _blend(
    plan: Plan, x: Any, h: Any, training: bool, extents: Extents | None
) -> tuple[Tensor, list[Contribution], Tensor | None] | None:
    """The blended output, what its seeds leave for backward, and the input where one of them read it; None where no
    seed contributed."""
    sampled = plan.sampler is not None and plan.sampler.due and torch.is_grad_enabled()
    fitting = [active for active in plan.seeds if _fits(plan, active, x, h, extents)]
    _count_misses([active for active in plan.seeds if active not in fitting], h)
    if not fitting:
        return None
    reads_x = any("x" in active.program.inputs for active in fitting)
    with torch.no_grad():
        call = make_call(plan, h, training, extents)
        h2 = matrix(h, plan.axes)
        out, out2 = empty_output(h, plan.axes)
        x2 = matrix(x, plan.axes) if reads_x else None
        contributions = run_seeds(plan, fitting, x2, h2, out2, call)
        if sampled:
            sample(plan, contributions, x2, h2)
        settle(out, out2, plan.axes)
    return (out, contributions, x if reads_x else None) if contributions else None


def _is_plain(value: Any) -> bool:
    # A subclass (DTensor, a fake tensor) may have no memory of its own for a kernel to read; one that functorch has
    # wrapped, or that carries a tangent, needs a rule that a kernel does not have.
    if type(value) is not Tensor and type(value) is not nn.Parameter:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value) and forward_ad._current_level < 0


def _fits_in_graph(plan: Plan, h: Any, x: Any) -> bool:
    """`_fits` of every seed, for tensors that stand for others in a graph."""
    if not isinstance(h, Tensor) or not matches(h, plan.width, plan.axes.feature_dim):
        return False
    if any(active.program.layout == "image" for active in plan.seeds) and not _is_image(plan, h):
        return False
    if any(h.dtype != active.program.dtype or h.device != active.program.device for active in plan.seeds):
        return False
    if h.device != plan.seeds[0].alpha.device:
        return False
    if x is None:
        return True
    widths = {active.program.x_width for active in plan.seeds if active.program.x_width is not None}
    return (
        isinstance(x, Tensor)
        and x.dtype == h.dtype
        and x.device == h.device
        and all(matches(x, width, plan.axes.feature_dim, like=h) for width in widths)
    )


def _is_image(plan: Plan, h: Tensor) -> bool:
    return extents_of(h.shape, plan.axes).image_height > 0


def _fits(plan: Plan, active: ActiveSeed, x: Any, h: Any, extents: Extents | None = None) -> bool:
    program = active.program
    if not _is_plain(h) or h.layout is not torch.strided or not matches(h, plan.width, plan.axes.feature_dim):
        return False
    if program.layout != "rows" and not program.takes(extents or extents_of(h.shape, plan.axes)):
        return False
    # The seed's state has moved with the layer, and its kernel has not.
    if h.dtype != program.dtype or h.device != active.alpha.device or h.device != program.device:
        return False
    if "x" not in program.inputs:
        return True
    return (
        _is_plain(x)
        and not x.is_nested
        and x.layout is torch.strided
        and x.dtype == program.dtype
        and x.device == h.device
        and program.x_width is not None
        and matches(x, program.x_width, plan.axes.feature_dim, like=h)
    )
