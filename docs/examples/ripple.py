"""The kernels of ripple.toml. A kernel computes the blend `out = h + alpha * (k - h)`, not k, and alpha is in memory.

Arguments are found by their names: `h_ptr` and `h_row_stride`, a parameter's name with `_ptr`, `grad_` before what is a
gradient, `alpha_ptr`, `rows`, and the constexprs that the blueprint defines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def reference(h: Tensor, *, amount: Tensor) -> Tensor:
    """k of h [rows, d]: what the kernels are proven against, in float64."""
    return h + amount * torch.sin(h).square()


@triton.jit
def ripple_forward(
    h_ptr, h_row_stride, amount_ptr, alpha_ptr, out_ptr, out_row_stride, rows,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows) & (d < D)[None, :]
    alpha = tl.load(alpha_ptr)
    h = tl.load(h_ptr + row * h_row_stride + d[None, :], mask=inside, other=0.0)
    amount = tl.load(amount_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    sine = tl.sin(h.to(tl.float32))
    blended = (h.to(tl.float32) + alpha * amount[None, :] * sine * sine).to(h.dtype)
    out = tl.where(alpha == 0.0, h, blended)  # selected, since 0 * inf would not be 0
    tl.store(out_ptr + row * out_row_stride + d[None, :], out, mask=inside)


@triton.jit
def ripple_backward(
    grad_out_ptr, grad_out_row_stride, h_ptr, h_row_stride, amount_ptr, alpha_ptr,
    grad_h_ptr, grad_h_row_stride, grad_amount_ptr, rows,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes columns of grad_h, and their grad_amount: one after the other, so two runs give the same."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    amount = tl.load(amount_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    grad_amount = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (d < D)[None, :]
        h = tl.load(h_ptr + row * h_row_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + row * grad_out_row_stride + d[None, :], mask=inside, other=0.0)
        grad = grad_out.to(tl.float32)
        sine = tl.sin(h)
        grad_h = grad + alpha * amount[None, :] * grad * 2.0 * sine * tl.cos(h)
        grad_h = tl.where(alpha == 0.0, grad_out, grad_h.to(grad_out.dtype))
        tl.store(grad_h_ptr + row * grad_h_row_stride + d[None, :], grad_h, mask=inside)
        grad_amount += tl.sum(grad * sine * sine, axis=0)
    tl.store(grad_amount_ptr + d, tl.where(alpha == 0.0, 0.0, alpha * grad_amount), mask=d < D)
