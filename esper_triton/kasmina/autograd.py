"""Gradients of the blend through the compiled backward kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esper_triton.kasmina.blending import Contribution, add_gradients
from esper_triton.kasmina.plan import Plan
from esper_triton.kasmina.views import from_matrix, matrix

__all__ = ["SeedBlend"]


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
        ctx.contributions = [c._replace(saved={}) for c in contributions]
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
            contribution = contribution._replace(saved=kept_tensors)
            grads = add_gradients(ctx.plan, contribution, g, h2, x2, own, grad_h, grad_x)
            parameter_grads.extend(None if grads is None else grads[name] for name in own)
        return (
            None,
            None,
            None,
            None if grad_h is None else from_matrix(grad_h, h, axes),
            None if grad_x is None else from_matrix(grad_x, x, axes),
            *(grad if needed else None for grad, needed in zip(parameter_grads, needs_parameters, strict=True)),
        )
