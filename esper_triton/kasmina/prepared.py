"""Calls of a plan with everything bound that does not change from one call to the next.

The general way through a call (`dispatch`, `autograd`) asks of every tensor what it is and makes views of it. Most
calls of a layer are like the one before: same shapes, contiguous. Those only compare, allocate and launch; kernels are
given addresses, and the views exist as offsets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from esper_triton.kasmina.launcher import Bound
from esper_triton.kasmina.plan import ActiveSeed, Plan, draw_dropout_seeds
from esper_triton.kasmina.sampling import ActivationSampler
from esper_triton.kasmina.views import Extents, extents_of

__all__ = ["Prepared", "prepare"]

_data_ptr = Tensor.data_ptr
_SPARE = 4  # buffers of a seed kept for reuse


class _PreparedSeed:
    """One seed's launches for inputs of one shape."""

    def __init__(self, active: ActiveSeed, place: int, extents: Extents, width: int, x_width: int) -> None:
        program = active.program
        self.active = active
        self.place = place  # in the plan
        self.program = program
        self.device = active.alpha.device
        self.parameters = tuple(active.parameters[name] for name in program.manifest.parameters)
        # Aliases keep the memory alive whatever becomes of the parameters, so that an address which is still a
        # parameter's own can be no other memory's.
        self.aliases = tuple(parameter.detach() for parameter in self.parameters)
        self.addresses = tuple(alias.data_ptr() for alias in self.aliases)
        self.extents = extents
        self.strides = {"h": width, "out": width, "grad_out": width, "x": x_width}
        self.offset = active.start * program.dtype.itemsize
        self.span = slice(active.start, active.stop)
        self.is_whole = active.start == 0 and active.stop == width
        self.forward = program.bind_forward(extents, self.strides)
        self.static = (active.alpha.data_ptr(), *self.addresses)
        self.saved = tuple(zip(self.forward.shapes.values(), self.forward.dtypes.values(), strict=True))
        self.reads_x = "x" in program.inputs
        self.draws, self.follows_mode = program.draws, program.follows_mode
        # On another device, a launch on another stream may still write to what this one has got back.
        self.reuses = self.device.type == "cpu"
        self.spare: list[list[Tensor]] = []  # what forward has saved for no backward, to be written over
        self._backward: Bound | None = None

    def allocate(self, recording: bool) -> list[Tensor]:
        """For what forward saves."""
        if not recording:
            try:
                return self.spare.pop()  # by one thread each
            except IndexError:
                pass
        return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.saved]

    @property
    def backward(self) -> Bound:
        """Bound when it is first asked for: not every run trains."""
        if self._backward is None:
            self._backward = self.program.bind_backward(self.extents, self.strides)
        return self._backward

    def dropout_seed(self, drawn: Tensor | None) -> tuple[Tensor, ...]:
        """Its one of those that were drawn for a call; nothing where it takes none."""
        zero = self.program.no_dropout_seed
        return () if zero is None else (zero if drawn is None else drawn[self.place].view(1),)


def _mode(dropout_seed: Sequence[Tensor], training: bool) -> tuple[int, int]:
    """The last values of a launch that follows the layer's mode."""
    return dropout_seed[0].data_ptr() if dropout_seed else 0, int(training)


class Prepared:
    """A plan for contiguous host outputs of one shape, and contiguous inputs of one shape where a seed reads them."""

    def __init__(self, plan: Plan, h: Tensor, x: Tensor | None) -> None:
        self.plan = plan
        self.shape, self.dtype, self.device = h.shape, h.dtype, h.device
        self.x_shape = None if x is None else x.shape
        extents = extents_of(h.shape, plan.axes)
        x_width = 0 if x is None else x.shape[-1]
        self.seeds = tuple(
            _PreparedSeed(active, place, extents, plan.width, x_width) for place, active in enumerate(plan.seeds)
        )
        self.draws = plan.draws
        self.parameters = tuple(parameter for seed in self.seeds for parameter in seed.parameters)
        self.addresses = tuple(address for seed in self.seeds for address in seed.addresses)
        self.timed = plan.timed
        self.sampler = plan.sampler

    def fits(self, h: Any, x: Any) -> bool:
        """Whether a call with this host output and input is one that this was prepared for."""
        if type(h) is not Tensor or h.is_nested or h.shape != self.shape or h.dtype is not self.dtype:
            return False
        if h.device != self.device or not h.is_contiguous() or not _is_ordinary(h):
            return False
        if self.x_shape is not None and not (
            (type(x) is Tensor or type(x) is nn.Parameter)
            and not x.is_nested
            and x.shape == self.x_shape
            and x.dtype is self.dtype
            and x.device == self.device
            and x.is_contiguous()
            and _is_ordinary(x)
        ):
            return False
        # A parameter that is elsewhere now may be anything.
        return tuple(map(_data_ptr, self.parameters)) == self.addresses

    def __call__(self, h: Tensor, x: Tensor | None, training: bool) -> Tensor:
        """The blended output; `training` where a seed follows the layer's mode. A seed whose launch fails is noted, and
        its span is the host's (law 1)."""
        recording = torch.is_grad_enabled() and self._needs_graph(h, x)
        out = torch.empty_like(h)
        if self.plan.gaps:
            self._fill_gaps(out, h)
        h_at, out_at = h.data_ptr(), out.data_ptr()
        inputs = () if x is None else (x.data_ptr(),)
        kept: list[Tensor] = []
        drawn = draw_dropout_seeds(len(self.seeds), self.device) if training and self.draws else None
        ran: tuple[_PreparedSeed, ...] = self.seeds
        for seed in self.seeds:
            saved = seed.allocate(recording)
            own = (h_at + seed.offset, *(inputs if seed.reads_x else ()), out_at + seed.offset)
            values = (*seed.forward.constants, *own, *seed.static, *map(_data_ptr, saved))
            dropout_seed: tuple[Tensor, ...] = ()
            if seed.follows_mode:
                dropout_seed = seed.dropout_seed(drawn)
                values = (*values, *_mode(dropout_seed, training))
            began = time.perf_counter_ns() if self.timed else 0
            try:
                for run, grid, pick in seed.forward.launches:
                    run(*grid, *pick(values))
            except Exception as error:
                seed.active.seed.fault(error)
                ran = tuple(other for other in ran if other is not seed)
                with torch.no_grad():
                    out[..., seed.span] = h[..., seed.span]
                continue
            if self.timed:
                record = seed.active.seed
                record.latency_ns += time.perf_counter_ns() - began
                record.timed_calls += 1
            if recording:
                kept += saved
                if dropout_seed:
                    kept += dropout_seed
            elif seed.reuses and len(seed.spare) < _SPARE:
                seed.spare.append(saved)
        if self.sampler is not None and self.sampler.due and torch.is_grad_enabled():
            self._sample(self.sampler, ran, h, x, training, drawn)
        if not ran:
            return h
        if not recording:
            return out
        apply: Any = _PreparedBlend.apply
        result: Tensor = apply(self, (ran, training), (out,), kept, h, x, *(p for seed in ran for p in seed.parameters))
        return result

    def _sample(
        self,
        sampler: ActivationSampler,
        ran: Sequence[_PreparedSeed],
        h: Tensor,
        x: Tensor | None,
        training: bool,
        drawn: Tensor | None,
    ) -> None:
        h2, x2 = h.view(-1, self.plan.width), None if x is None else x.view(-1, x.shape[-1])
        for seed in ran:
            own_x = x2 if seed.reads_x else None
            dropout_seed = drawn[seed.place].view(1) if drawn is not None and seed.draws else None
            sampler.sample(seed.active, own_x, h2[:, seed.span], seed.extents, training, dropout_seed)

    def _needs_graph(self, h: Tensor, x: Tensor | None) -> bool:
        return (
            h.requires_grad
            or (x is not None and x.requires_grad)
            or any(parameter.requires_grad for parameter in self.parameters)
        )

    def _fill_gaps(self, out: Tensor, h: Tensor) -> None:
        with torch.no_grad():
            for start, stop in self.plan.gaps:
                out[..., start:stop] = h[..., start:stop]


class _PreparedBlend(torch.autograd.Function):
    """`autograd.SeedBlend` for what has been prepared."""

    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        ran: tuple[tuple[_PreparedSeed, ...], bool],  # the seeds, and in which mode
        out: tuple[Tensor],
        kept: Sequence[Tensor],
        h: Tensor,
        x: Tensor | None,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.prepared, (ctx.seeds, ctx.training) = prepared, ran
        # Through autograd's own keeping, so that its hooks (offloading, checkpointing) and version checks apply.
        ctx.save_for_backward(h, x, *parameters, *kept)
        return out[0]  # in a tuple, so that autograd sees a result and not an input handed back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        prepared: Prepared = ctx.prepared
        h, x, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_h, needs_x, needs_parameters = needs[4], needs[5], needs[6:]
        g = grad_out.contiguous()
        whole = len(ctx.seeds) == 1 and ctx.seeds[0].is_whole
        grad_h = None if whole or not needs_h else g.clone()
        grad_x: Tensor | None = None
        grads: list[Tensor | None] = []
        count = sum(len(seed.parameters) for seed in ctx.seeds)
        parameters, saved = iter(rest[:count]), iter(rest[count:])
        for seed in ctx.seeds:
            own = [next(parameters) for _ in seed.parameters]
            kept = [next(saved) for _ in seed.saved]
            mode = _mode([next(saved)] if seed.draws else [], ctx.training) if seed.follows_mode else ()
            try:
                to_h, to_x, to_parameters = _seed_backward(prepared, seed, g, h, x, own, kept, mode)
            except Exception as error:
                seed.active.seed.fault(error)
                grads.extend(None for _ in own)
                if whole:
                    grad_h = g
                continue
            if needs_h:
                if to_h is None:
                    # Kernels that read only x leave the host's own share of the blend to us.
                    to_h = (1 - seed.active.alpha) * g[..., seed.span]
                if whole:
                    grad_h = to_h.view(h.shape)
                else:
                    assert grad_h is not None
                    grad_h[..., seed.span] = to_h.view(*h.shape[:-1], -1)
            if needs_x and to_x is not None:
                grad_x = to_x if grad_x is None else grad_x + to_x
            grads.extend(to_parameters)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape)
        return (
            *(None, None, None, None),
            grad_h if needs_h else None,
            grad_x,
            *(grad if needed else None for grad, needed in zip(grads, needs_parameters, strict=True)),
        )


def _seed_backward(
    prepared: Prepared,
    seed: _PreparedSeed,
    g: Tensor,
    h: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    mode: Sequence[int],
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    bound = seed.backward
    made = {
        name: torch.empty(shape, dtype=bound.dtypes[name], device=prepared.device)
        for name, shape in bound.shapes.items()
    }
    values = (
        *bound.constants,
        h.data_ptr() + seed.offset,
        *((x.data_ptr(),) if x is not None and seed.reads_x else ()),
        g.data_ptr() + seed.offset,
        seed.active.alpha.data_ptr(),
        *(tensor.data_ptr() for tensor in (*parameters, *saved, *made.values())),
        *mode,
    )
    for run, grid, pick in bound.launches:
        run(*grid, *pick(values))
    dtype = prepared.dtype
    to_parameters = [made[f"grad_{name}"] for name in seed.program.manifest.parameters]
    return (
        made.get("grad_h"),
        made.get("grad_x"),
        [grad if grad.dtype is dtype else grad.to(dtype) for grad in to_parameters],
    )


def prepare(plan: Plan, h: Any, x: Any) -> Prepared | None:
    """The plan for calls like this one, whose `h` and `x` fit its seeds; None where they have to go the general way."""
    if plan.overlapping or plan.guard or plan.axes.feature_dim != -1:
        return None
    if type(h) is not Tensor or h.numel() == 0 or not h.is_contiguous():
        return None
    if plan.axes.length_first and h.dim() == 3:  # its memory is not in the order of the rows
        return None
    reads_x = any("x" in active.program.inputs for active in plan.seeds)
    if reads_x and not x.is_contiguous():
        return None
    try:
        prepared = Prepared(plan, h, x if reads_x else None)
    except ValueError:  # too long for a kernel of 32-bit indices, which the general way tells of
        return None
    return prepared if prepared.fits(h, x) else None


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether its memory is all there is to it, and nothing watches what is done with it."""
    return (
        not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and forward_ad._current_level < 0
    )
