"""Seeds in TRAINING: they learn on copies of what passes through their layer, and touch nothing of it.

While a layer has a seed in TRAINING, each of its training calls (train mode, gradients enabled) leaves one detached
copy of the host's output, and of the input where a seed reads it: the cost is that copy. `seed_loss` then runs the
seeds on the last call's copies. A layer without such a seed has nothing in its call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_triton.kasmina.dispatch import Dispatch, _dispatch, _is_plain, _is_recorded
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.plan import ActiveSeed, Plan, axes_for
from esper_triton.kasmina.record import LayerRecord, Observed
from esper_triton.kasmina.sampling import ActivationSampler
from esper_triton.kasmina.seed import LoadedKernel, Seed
from esper_triton.kasmina.views import ROWS, Axes, Extents, extents_of, matches, matrix

__all__ = ["HostObserver", "observe_call", "relative_reconstruction_error", "run_alone", "seed_loss"]

_S = SeedLifecycleState


def relative_reconstruction_error(k: Tensor, h: Tensor) -> Tensor:
    """||k - h||^2 / ||h||^2, 0-d: the loss of a seed that was given no other. Its root is what the gate looks at."""
    tiny = torch.finfo(h.dtype).tiny
    return (k - h).square().sum() / h.square().sum().clamp_min(tiny)


def trains(record: LayerRecord) -> bool:
    """Whether a seed of the layer is in TRAINING with a kernel."""
    return any(seed.state is _S.TRAINING and seed.kernel is not None for seed in record.seeds)


def watches_drift(record: LayerRecord) -> bool:
    """Whether a ramp of the layer goes by the drift of its output."""
    return any(seed.schedule is not None and "drift" in seed.schedule.needs for seed in record.seeds)


class HostObserver:
    """The host's forward of a layer that has an active seed and one in TRAINING: the latter learns from what the host
    computes, not from the blend."""

    def __init__(self, layer: nn.Module, record: LayerRecord, forward: Callable[..., Any]) -> None:
        self.layer, self.record, self.forward = layer, record, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        h = self.forward(*args, **kwargs)
        if self.layer.training and torch.is_grad_enabled():
            _keep(self.record, args, kwargs, h)
        return h


def observe_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A forward hook of layers whose training calls are looked at. It also keeps `nn.TransformerEncoderLayer` from its
    fast path."""
    record: LayerRecord = layer._kasmina  # type: ignore[assignment]  # only adopted layers get this hook
    if not layer.training or not torch.is_grad_enabled():
        return
    if trains(record) and not isinstance(layer.__dict__.get("forward"), Dispatch):
        _keep(record, args, kwargs, output)
    h, kind = _tensor_of(record, output), record.kind
    if watches_drift(record) and _is_plain(h) and h.numel() and matches(h, kind.width, kind.feature_dim):
        record.output_mean_now = matrix(h.detach(), Axes(kind.feature_dim)).mean(0)


def _keep(record: LayerRecord, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> None:
    kind = record.kind
    h = _tensor_of(record, h)
    if not _is_plain(h) or _is_recorded() or h.is_nested or not matches(h, kind.width, kind.feature_dim):
        return
    x = args[0] if args else kwargs.get(kind.x_name)
    programs = [s.kernel.program for s in record.seeds if s.state is _S.TRAINING and s.kernel is not None]
    reads_x = any("x" in program.inputs for program in programs)
    axes = axes_for(kind, programs)
    with torch.no_grad():
        copied = matrix(x, axes).clone() if reads_x and isinstance(x, Tensor) and _is_plain(x) else None
        record.observed = Observed(copied, matrix(h, axes).clone(), extents_of(h.shape, axes))


def _tensor_of(record: LayerRecord, output: Any) -> Any:
    return output[0] if record.kind.first_of_tuple and type(output) is tuple else output


def seed_loss(record: LayerRecord) -> Tensor | None:
    """The sum of the losses of the layer's seeds in TRAINING over its last training call, 0-d, with a graph to their
    parameters alone; None where there is none. Uses the call up: the next loss needs another one.

    A seed that fails here gives no loss, and is culled at the next boundary.
    """
    observed, record.observed = record.observed, None
    if observed is None:
        return None
    total: Tensor | None = None
    for seed in record.seeds:
        if seed.state is _S.TRAINING and seed.kernel is not None:
            loss = _loss_of(record.sampler, seed, seed.kernel, observed)
            if loss is not None:
                total = loss if total is None else total + loss
    return total


def run_alone(
    seed: Seed,
    kernel: LoadedKernel,
    parameters: Mapping[str, nn.Parameter],
    x: Tensor | None,
    h: Tensor,
    extents: Extents,
    *,
    training: bool = False,
) -> Tensor | None:
    """k of a seed's kernel, [rows, span], for `h` of its own span: law 2 for one seed at alpha 1. None where the kernel
    failed, which the seed has noted then, or is not for such tensors."""
    width = h.shape[-1]
    one = torch.ones((), device=h.device)
    active = ActiveSeed(seed, kernel.program, 0, width, one, dict(parameters))
    plan = Plan(
        width=width,
        axes=ROWS,
        x_name="",
        first_of_tuple=False,
        seeds=(active,),
        gaps=(),
        overlapping=False,
        guard=False,
        timed=False,
    )
    before = seed.pending_faults, seed.specialisation_misses
    k: Tensor = _dispatch(plan, x, h, training=training, extents=extents)
    return k if (seed.pending_faults, seed.specialisation_misses) == before else None


def _loss_of(sampler: ActivationSampler, seed: Seed, kernel: LoadedKernel, observed: Observed) -> Tensor | None:
    h = observed.h[..., slice(*seed.span)]
    with torch.enable_grad():
        k = run_alone(seed, kernel, seed.parameters, observed.x, h, observed.extents, training=True)
        if k is None:
            return None
        if sampler.due:
            sampler.sample_output(seed, k.detach())
        loss = relative_reconstruction_error(k, h) if seed.loss is None else seed.loss(k, h)
    with torch.no_grad():
        error = relative_reconstruction_error(k.detach().float(), h.float()).sqrt()
        # Below 0 where the host itself was not finite: that is no fault of the seed, and no measurement either.
        seed.measured_error = torch.where(h.isfinite().all(), error, -1.0)
    return loss
