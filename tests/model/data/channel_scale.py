"""A scale and a shift of every channel, `k = scale * h + shift`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def reference(h: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
    """k for h [rows, d]."""
    return torch.add(h * scale, shift)


@triton.jit
def scale_forward(
    h_ptr,
    h_row_stride,
    scale_ptr,
    shift_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    ok = (row < rows)[:, None] & (d < D)[None, :]
    alpha = tl.load(alpha_ptr)
    scale = tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=ok, other=0.0)
    wide = h.to(tl.float32)
    blended = wide + alpha * (scale[None, :] * wide + shift[None, :] - wide)
    out = tl.where(alpha == 0.0, h, blended.to(h.dtype))
    tl.store(out_ptr + row[:, None] * out_row_stride + d[None, :], out, mask=ok)


@triton.jit
def scale_backward(
    grad_out_ptr,
    grad_out_row_stride,
    h_ptr,
    h_row_stride,
    scale_ptr,
    alpha_ptr,
    grad_h_ptr,
    grad_h_row_stride,
    grad_scale_ptr,
    grad_shift_ptr,
    rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes everything."""
    d = tl.arange(0, BLOCK_D)
    d_ok = d < D
    alpha = tl.load(alpha_ptr)
    scale = tl.load(scale_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    grad_scale = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_shift = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        ok = (row < rows)[:, None] & d_ok[None, :]
        h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad_out_ptr + row[:, None] * grad_out_row_stride + d[None, :], mask=ok, other=0.0)
        wide = g.to(tl.float32)
        grad_h = wide + alpha * (scale[None, :] * wide - wide)
        grad_h = tl.where(alpha == 0.0, g, grad_h.to(g.dtype))
        tl.store(grad_h_ptr + row[:, None] * grad_h_row_stride + d[None, :], grad_h, mask=ok)
        grad_scale += tl.sum(wide * h, axis=0)
        grad_shift += tl.sum(wide, axis=0)
    tl.store(grad_scale_ptr + d, tl.where(alpha == 0.0, 0.0, alpha * grad_scale), mask=d_ok)
    tl.store(grad_shift_ptr + d, tl.where(alpha == 0.0, 0.0, alpha * grad_shift), mask=d_ok)
