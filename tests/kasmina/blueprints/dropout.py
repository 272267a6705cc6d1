"""A dropout with a learned scale, blended as `out = h + alpha * (k - h)`. A row a program.

N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014; kept elements
are scaled at training, so that nothing is at evaluation.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

P = tl.constexpr(0.25)


def reference(h: Tensor, *, scale: Tensor, rand: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """k for h [rows, d]; with `rand` in training mode."""
    if rand is None:
        return h * scale
    kept = rand(torch.arange(h.numel()).view_as(h)) >= 0.25
    return h * scale * kept / 0.75


@triton.jit
def factor(dropout_seed_ptr, training, row, d, D: tl.constexpr):
    """What each element of a row is multiplied by: the same in forward and backward, since the seed is."""
    drawn = tl.rand(tl.load(dropout_seed_ptr), row.to(tl.int64) * D + d)
    return tl.where(training != 0, tl.where(drawn >= P, 1.0 / (1.0 - P), 0.0), 1.0)


@triton.jit
def dropout_forward(
    h_ptr,
    h_row_stride,
    scale_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    dropout_seed_ptr,
    training,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    h = tl.load(h_ptr + row * h_row_stride + d, mask=d < D, other=0.0)
    scale = tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    k = h.to(tl.float32) * scale * factor(dropout_seed_ptr, training, row, d, D)
    blended = tl.where(alpha == 1.0, k, h.to(tl.float32) + alpha * (k - h.to(tl.float32))).to(h.dtype)
    tl.store(out_ptr + row * out_row_stride + d, tl.where(alpha == 0.0, h, blended), mask=d < D)


@triton.jit
def dropout_backward_rows(
    grad_out_ptr,
    grad_out_row_stride,
    scale_ptr,
    alpha_ptr,
    grad_h_ptr,
    grad_h_row_stride,
    dropout_seed_ptr,
    training,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    own = tl.load(grad_out_ptr + row * grad_out_row_stride + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    through = own * scale * factor(dropout_seed_ptr, training, row, d, D)
    grad = tl.where(alpha == 1.0, through, own + alpha * (through - own))
    tl.store(grad_h_ptr + row * grad_h_row_stride + d, tl.where(alpha == 0.0, own, grad), mask=d < D)


@triton.jit
def dropout_backward_scale(
    grad_out_ptr,
    grad_out_row_stride,
    h_ptr,
    h_row_stride,
    alpha_ptr,
    grad_scale_ptr,
    dropout_seed_ptr,
    training,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(rows):
        at = row.to(tl.int64)
        h = tl.load(h_ptr + at * h_row_stride + d, mask=d < D, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + at * grad_out_row_stride + d, mask=d < D, other=0.0).to(tl.float32)
        total += h * grad_out * factor(dropout_seed_ptr, training, row, d, D)
    tl.store(grad_scale_ptr + d, tl.where(alpha == 0.0, 0.0, alpha * total), mask=d < D)
