"""A linear branch beside the layer, `k = x @ weight^T`, blended as `out = h + alpha * (k - h)`. A row a program."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, h: Tensor, *, weight: Tensor) -> Tensor:
    """k for x [rows, d_in]; h [rows, d] is what it is blended with."""
    return F.linear(x, weight)


@triton.jit
def branch_forward(
    x_ptr,
    x_row_stride,
    h_ptr,
    h_row_stride,
    weight_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    D: tl.constexpr,
    D_IN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_IN)
    tile_ok = (d < D)[:, None] & (i < D_IN)[None, :]
    alpha = tl.load(alpha_ptr)
    x = tl.load(x_ptr + row * x_row_stride + i, mask=i < D_IN, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d[:, None] * D_IN + i[None, :], mask=tile_ok, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * h_row_stride + d, mask=d < D, other=0.0)
    k = tl.sum(weight * x[None, :], axis=1)
    blended = tl.where(alpha == 1.0, k, h.to(tl.float32) + alpha * (k - h.to(tl.float32))).to(h.dtype)
    tl.store(out_ptr + row * out_row_stride + d, tl.where(alpha == 0.0, h, blended), mask=d < D)


@triton.jit
def branch_backward_rows(
    grad_out_ptr,
    grad_out_row_stride,
    weight_ptr,
    alpha_ptr,
    grad_x_ptr,
    grad_x_row_stride,
    grad_h_ptr,
    grad_h_row_stride,
    D: tl.constexpr,
    D_IN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_IN)
    tile_ok = (d < D)[:, None] & (i < D_IN)[None, :]
    alpha = tl.load(alpha_ptr)
    grad_out = tl.load(grad_out_ptr + row * grad_out_row_stride + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d[:, None] * D_IN + i[None, :], mask=tile_ok, other=0.0).to(tl.float32)
    grad_x = tl.where(alpha == 0.0, 0.0, alpha * tl.sum(weight * grad_out[:, None], axis=0))
    tl.store(grad_x_ptr + row * grad_x_row_stride + i, grad_x, mask=i < D_IN)
    grad_h = tl.where(alpha == 1.0, 0.0, grad_out * (1.0 - alpha))
    tl.store(grad_h_ptr + row * grad_h_row_stride + d, grad_h, mask=d < D)


@triton.jit
def branch_backward_weight(
    grad_out_ptr,
    grad_out_row_stride,
    x_ptr,
    x_row_stride,
    alpha_ptr,
    grad_weight_ptr,
    rows,
    D_IN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    d, i = tl.program_id(0), tl.arange(0, BLOCK_IN)
    alpha = tl.load(alpha_ptr)
    total = tl.zeros([BLOCK_IN], dtype=tl.float32)
    for row in range(rows):
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * x_row_stride + i, mask=i < D_IN, other=0.0).to(tl.float32)
        total += x * tl.load(grad_out_ptr + at * grad_out_row_stride + d).to(tl.float32)
    tl.store(grad_weight_ptr + d * D_IN + i, tl.where(alpha == 0.0, 0.0, alpha * total), mask=i < D_IN)
