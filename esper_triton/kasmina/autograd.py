"""Gradients of the blend through the compiled backward kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esper_triton.kasmina.plan import Contribution, Plan
from esper_triton.kasmina.views import from_matrix, matrix

__all__ = ["SeedBlend", "add_gradients"]


class SeedBlend(torch.autograd.Function):
    """Attaches a blended output, already computed, to the graph of the host's output, the input and the seeds'
    parameters.

    Differentiable once: a second derivative is an error that says so. A seed whose backward fails is treated as if it
    had contributed nothing: its span's gradient passes to the host unchanged, and its parameters get none (law 1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        contributions: Sequence[Contribution],
        out: tuple[Tensor],
        h: Tensor,
        x: Tensor | None,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.plan = plan
        ctx.contributions = [replace(c, saved={}) for c in contributions]
        ctx.saved_names = [tuple(c.saved) for c in contributions]
        # Through autograd's own keeping, so that its hooks (offloading, checkpointing) and version checks apply.
        ctx.save_for_backward(h, x, *parameters, *(t for c in contributions for t in c.saved.values()))
        return out[0]  # in a tuple, so that autograd sees a result and not an input handed back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        h, x, *rest = ctx.saved_tensors
        kept = iter(rest)
        parameters = [{name: next(kept) for name in c.active.parameters} for c in ctx.contributions]
        saved = [{name: next(kept) for name in names} for names in ctx.saved_names]
        _, _, _, needs_h, needs_x, *needs_parameters = ctx.needs_input_grad

        axes = ctx.plan.axes
        g, h2, x2 = matrix(grad_out, axes), matrix(h, axes), None if x is None else matrix(x, axes)
        grad_h = g.clone(memory_format=torch.contiguous_format) if needs_h else None
        grad_x = torch.zeros_like(x2, memory_format=torch.contiguous_format) if needs_x and x2 is not None else None
        parameter_grads: list[Tensor | None] = []
        for contribution, own, kept_tensors in zip(ctx.contributions, parameters, saved, strict=True):
            grads = add_gradients(ctx.plan, contribution, g, h2, x2, own, kept_tensors, grad_h, grad_x)
            parameter_grads.extend(None if grads is None else grads[name] for name in own)
        return (
            None,
            None,
            None,
            None if grad_h is None else from_matrix(grad_h, h, axes),
            None if grad_x is None else from_matrix(grad_x, x, axes),
            *(grad if needed else None for grad, needed in zip(parameter_grads, needs_parameters, strict=True)),
        )


def add_gradients(
    plan: Plan,
    contribution: Contribution,
    g: Tensor,
    h: Tensor,
    x: Tensor | None,
    parameters: dict[str, Tensor],
    saved: dict[str, Tensor],
    grad_h: Tensor | None,
    grad_x: Tensor | None,
) -> dict[str, Tensor] | None:
    """Takes one seed into `grad_h`, which begins as `g`, and `grad_x`, which begins as zeros (all [rows, width]; None
    where nobody asks), and returns the gradients of its parameters; None where its backward fails, which is noted."""
    active = contribution.active
    span = slice(active.start, active.stop)
    try:
        to_h, to_x, to_parameters = _seed_backward(contribution, g[:, span], h[:, span], x, parameters, saved)
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
    contribution: Contribution,
    g: Tensor,
    h: Tensor,
    x: Tensor | None,
    parameters: dict[str, Tensor],
    saved: dict[str, Tensor],
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
        saved,
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
