"""A product of low rank beside the layer, `k = h + up(down(x))`.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, h: Tensor, *, down: Tensor, up: Tensor) -> Tensor:
    """k for x [rows, d_in] and h [rows, d]."""
    return torch.add(h, F.linear(F.linear(x, down), up))


@triton.jit
def low_rank_forward(
    x_ptr,
    x_row_stride,
    h_ptr,
    h_row_stride,
    down_ptr,
    up_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    rows,
    D: tl.constexpr,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d, i, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_R)
    row_ok, d_ok, i_ok, r_ok = row < rows, d < D, i < D_IN, r < R
    ok = row_ok[:, None] & d_ok[None, :]
    alpha = tl.load(alpha_ptr)
    down = tl.load(down_ptr + r[:, None] * D_IN + i[None, :], mask=r_ok[:, None] & i_ok[None, :], other=0.0)
    up = tl.load(up_ptr + d[:, None] * R + r[None, :], mask=d_ok[:, None] & r_ok[None, :], other=0.0)
    x = tl.load(x_ptr + row[:, None] * x_row_stride + i[None, :], mask=row_ok[:, None] & i_ok[None, :], other=0.0)
    h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=ok, other=0.0)
    z = tl.dot(x, tl.trans(down), input_precision="ieee")
    step = tl.dot(z.to(up.dtype), tl.trans(up), input_precision="ieee")
    out = tl.where(alpha == 0.0, h, (h.to(tl.float32) + alpha * step).to(h.dtype))
    tl.store(out_ptr + row[:, None] * out_row_stride + d[None, :], out, mask=ok)


@triton.jit
def low_rank_backward(
    grad_out_ptr,
    grad_out_row_stride,
    x_ptr,
    x_row_stride,
    down_ptr,
    up_ptr,
    alpha_ptr,
    grad_h_ptr,
    grad_h_row_stride,
    grad_x_ptr,
    grad_x_row_stride,
    grad_down_ptr,
    grad_up_ptr,
    rows,
    D: tl.constexpr,
    D_IN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes everything."""
    d, i, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_R)
    d_ok, i_ok, r_ok = d < D, i < D_IN, r < R
    down_ok, up_ok = r_ok[:, None] & i_ok[None, :], d_ok[:, None] & r_ok[None, :]
    alpha = tl.load(alpha_ptr)
    down = tl.load(down_ptr + r[:, None] * D_IN + i[None, :], mask=down_ok, other=0.0)
    up = tl.load(up_ptr + d[:, None] * R + r[None, :], mask=up_ok, other=0.0)
    grad_down = tl.zeros([BLOCK_R, BLOCK_IN], dtype=tl.float32)
    grad_up = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_ok = row < rows
        ok, x_ok = row_ok[:, None] & d_ok[None, :], row_ok[:, None] & i_ok[None, :]
        g = tl.load(grad_out_ptr + row[:, None] * grad_out_row_stride + d[None, :], mask=ok, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_row_stride + i[None, :], mask=x_ok, other=0.0)
        tl.store(grad_h_ptr + row[:, None] * grad_h_row_stride + d[None, :], g, mask=ok)
        z = tl.dot(x, tl.trans(down), input_precision="ieee")
        z_grad = tl.dot(g, up, input_precision="ieee")
        grad_x = alpha * tl.dot(z_grad.to(down.dtype), down, input_precision="ieee")
        grad_x = tl.where(alpha == 0.0, 0.0, grad_x)
        tl.store(grad_x_ptr + row[:, None] * grad_x_row_stride + i[None, :], grad_x, mask=x_ok)
        grad_down = tl.dot(tl.trans(z_grad.to(x.dtype)), x, acc=grad_down, input_precision="ieee")
        grad_up = tl.dot(tl.trans(g), z.to(g.dtype), acc=grad_up, input_precision="ieee")
    grad_down = tl.where(alpha == 0.0, 0.0, alpha * grad_down)
    grad_up = tl.where(alpha == 0.0, 0.0, alpha * grad_up)
    tl.store(grad_down_ptr + r[:, None] * D_IN + i[None, :], grad_down, mask=down_ok)
    tl.store(grad_up_ptr + d[:, None] * R + r[None, :], grad_up, mask=up_ok)
