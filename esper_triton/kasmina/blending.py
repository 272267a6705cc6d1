"""The seeds of a blend, one after the other, in both directions, on matrices [rows, width]: law 2, the general way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esper_triton.kasmina.plan import ActiveSeed, Call, Plan, draw_dropout_seeds
from esper_triton.kasmina.views import Extents, add_share, extents_of

__all__ = ["Contribution", "add_gradients", "make_call", "run_seeds", "sample"]


class Contribution(NamedTuple):
    """What a seed that ran leaves for backward: what its forward has saved, and the call's extents and mode. `rejected`
    is a 0-d bool on the device under guard: the call's output was not finite where the host's was, and was selected
    away."""

    active: ActiveSeed
    saved: Mapping[str, Tensor]
    rejected: Tensor | None
    extents: Extents | None
    training: bool


def make_call(plan: Plan, h: Tensor, training: bool, extents: Extents | None = None) -> Call:
    """What a call with this host output has beside its matrices, with dropout seeds drawn for it. `extents` where they
    are not those of `h`."""
    if extents is None and plan.has_positions:
        extents = extents_of(h.shape, plan.axes)
    seeds = draw_dropout_seeds(len(plan.seeds), h.device) if training and plan.draws else None
    return Call(extents, training, seeds)


def run_seeds(
    plan: Plan, fitting: Sequence[ActiveSeed], x: Tensor | None, h: Tensor, out: Tensor, call: Call
) -> list[Contribution]:
    """Writes the blend into `out`, [rows, width], and returns what the seeds that ran leave for backward. A seed that
    fails is told so, and its span is the host's."""
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
            contribution = _run_seed(plan, active, x, h_span, target, call)
        except Exception as error:
            active.seed.fault(error)
            if not plan.overlapping:
                out_span.copy_(h_span)
            continue
        if plan.overlapping:
            add_share(out_span, target, h_span)
        contributions.append(contribution)
    return contributions


def _run_seed(plan: Plan, active: ActiveSeed, x: Tensor | None, h: Tensor, target: Tensor, call: Call) -> Contribution:
    inputs = {"h": h} if x is None else {"h": h, "x": x}
    dropout_seed = None
    if active.program.draws and call.dropout_seeds is not None:
        dropout_seed = call.dropout_seeds[plan.seeds.index(active)].view(1)
    began = time.perf_counter_ns() if plan.timed else 0
    saved = active.program.forward(
        inputs,
        active.parameters,
        active.alpha,
        target,
        extents=call.extents,
        training=call.training,
        dropout_seed=dropout_seed,
    )
    if plan.timed:
        active.seed.latency_ns += time.perf_counter_ns() - began
        active.seed.timed_calls += 1
    rejected, flag = None, active.seed.nonfinite_flag
    if plan.guard or flag is not None:
        broken = (h.isfinite() & ~target.isfinite()).any()
        if flag is not None:
            flag.logical_or_(broken)
    if plan.guard:
        rejected = broken
        target.copy_(torch.where(rejected, h, target))
    return Contribution(active, saved, rejected, call.extents, call.training)


def sample(plan: Plan, contributions: Sequence[Contribution], x: Tensor | None, h: Tensor) -> None:
    """Takes what the seeds of a call have put out into their statistics, where they are due. `x` and `h` as for
    `run_seeds`."""
    if plan.sampler is None:
        return
    for contribution in contributions:
        active = contribution.active
        plan.sampler.sample(
            active,
            x,
            h[:, active.start : active.stop],
            contribution.extents,
            contribution.training,
            contribution.saved.get("dropout_seed"),
        )


def add_gradients(
    plan: Plan,
    contribution: Contribution,
    g: Tensor,
    h: Tensor,
    x: Tensor | None,
    parameters: Mapping[str, Tensor],
    grad_h: Tensor | None,
    grad_x: Tensor | None,
) -> dict[str, Tensor] | None:
    """Takes one seed into `grad_h`, which begins as `g`, and `grad_x`, which begins as zeros (all [rows, width]; None
    where nobody asks), and returns the gradients of its parameters; None where its backward fails, which it is told."""
    active = contribution.active
    span = slice(active.start, active.stop)
    try:
        to_h, to_x, to_parameters = _seed_backward(contribution, g[:, span], h[:, span], x, parameters)
    except Exception as error:
        active.seed.fault(error)
        return None
    if grad_h is not None:
        if plan.overlapping:
            grad_h[:, span] += to_h - g[:, span]
        else:
            grad_h[:, span] = to_h
    if grad_x is not None and to_x is not None:
        grad_x += to_x
    return to_parameters


def _seed_backward(
    contribution: Contribution, g: Tensor, h: Tensor, x: Tensor | None, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Gradients with respect to the seed's span of h, [rows, width of the span], to x, [rows, width of x], where the
    seed reads it, and to its parameters, given that of its span of the output."""
    active = contribution.active
    inputs = {"h": h} if x is None else {"h": h, "x": x}
    to_inputs, to_parameters = active.program.backward(
        g,
        inputs,
        parameters,
        active.alpha,
        contribution.saved,
        extents=contribution.extents,
        training=contribution.training,
    )
    # Kernels that read only x leave the host's own share of the blend to us: d(h + alpha * (k - h)) / dh with k
    # constant.
    to_h = to_inputs["h"] if "h" in to_inputs else (1 - active.alpha) * g
    to_x = to_inputs.get("x")
    if contribution.rejected is not None:
        to_h = torch.where(contribution.rejected, g, to_h)
        to_x = None if to_x is None else torch.where(contribution.rejected, torch.zeros_like(to_x), to_x)
        to_parameters = {
            name: torch.where(contribution.rejected, torch.zeros_like(grad), grad)
            for name, grad in to_parameters.items()
        }
    return to_h, to_x, to_parameters
