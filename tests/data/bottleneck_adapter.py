"""Bottleneck adapter, `k = h + up(gelu(down(h)))`, blended as `out = h + alpha * (k - h)`.

N. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019. gelu is the exact one, `z * Phi(z)` with
Phi of the normal distribution. Since `k - h = up(...)`, the blend is `h + alpha * up(...)`: it gives k to the bit at
alpha = 1, and in between loses nothing to the difference of two close numbers.

At alpha = 0 every result is selected, not computed: `0 * inf` in a seed that has run away would be NaN. Sums are
float32, operands of products have the layer's dtype. No atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

SQRT_HALF = tl.constexpr(0.7071067811865476)
RSQRT_2PI = tl.constexpr(0.3989422804014327)


def reference(h: Tensor, *, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
    """k for h [rows, d]: what the kernels are proven against, in float64."""
    z = F.linear(h, down_weight, down_bias)
    return torch.add(h, F.linear(F.gelu(z), up_weight, up_bias))


@triton.jit
def adapter_forward(
    h_ptr,
    h_row_stride,
    down_weight_ptr,
    down_bias_ptr,
    up_weight_ptr,
    up_bias_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    z_ptr,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes BLOCK_ROWS rows of out, and of z for the backward."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    r_ok = r < R
    alpha = tl.load(alpha_ptr)

    z = tl.zeros([BLOCK_ROWS, BLOCK_R], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < D
        h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        down = tl.load(down_weight_ptr + r[:, None] * D + d[None, :], mask=r_ok[:, None] & d_ok[None, :], other=0.0)
        z = tl.dot(h, tl.trans(down), acc=z, input_precision="ieee")
    z += tl.load(down_bias_ptr + r, mask=r_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(z_ptr + row[:, None] * R + r[None, :], z, mask=row_ok[:, None] & r_ok[None, :])

    activated = z * (0.5 + 0.5 * tl.erf(z * SQRT_HALF))
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < D
        tile_ok = row_ok[:, None] & d_ok[None, :]
        up = tl.load(up_weight_ptr + d[:, None] * R + r[None, :], mask=d_ok[:, None] & r_ok[None, :], other=0.0)
        up_bias = tl.load(up_bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
        step = tl.dot(activated.to(up.dtype), tl.trans(up), input_precision="ieee") + up_bias[None, :]
        h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=tile_ok, other=0.0)
        blended = (h.to(tl.float32) + alpha * step).to(h.dtype)
        out = tl.where(alpha == 0.0, h, blended)
        tl.store(out_ptr + row[:, None] * out_row_stride + d[None, :], out, mask=tile_ok)


@triton.jit
def adapter_backward_rows(
    grad_out_ptr,
    grad_out_row_stride,
    down_weight_ptr,
    up_weight_ptr,
    alpha_ptr,
    z_ptr,
    grad_h_ptr,
    grad_h_row_stride,
    activated_ptr,
    z_grad_ptr,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes BLOCK_ROWS rows of grad_h, of the gradient at z (`z_grad`) and of gelu(z) (`activated`).

    Along the identity path `(1 - alpha) * grad_out + alpha * grad_out` is grad_out itself.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    r_ok = r < R
    hidden_ok = row_ok[:, None] & r_ok[None, :]
    alpha = tl.load(alpha_ptr)

    grad_activated = tl.zeros([BLOCK_ROWS, BLOCK_R], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < D
        grad_out = tl.load(
            grad_out_ptr + row[:, None] * grad_out_row_stride + d[None, :],
            mask=row_ok[:, None] & d_ok[None, :],
            other=0.0,
        )
        up = tl.load(up_weight_ptr + d[:, None] * R + r[None, :], mask=d_ok[:, None] & r_ok[None, :], other=0.0)
        grad_activated = tl.dot(grad_out, up, acc=grad_activated, input_precision="ieee")

    z = tl.load(z_ptr + row[:, None] * R + r[None, :], mask=hidden_ok, other=0.0)
    phi = 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
    slope = phi + z * RSQRT_2PI * tl.exp(-0.5 * z * z)
    z_grad = tl.where(alpha == 0.0, 0.0, alpha * grad_activated * slope)
    tl.store(activated_ptr + row[:, None] * R + r[None, :], z * phi, mask=hidden_ok)
    tl.store(z_grad_ptr + row[:, None] * R + r[None, :], z_grad, mask=hidden_ok)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < D
        tile_ok = row_ok[:, None] & d_ok[None, :]
        down = tl.load(down_weight_ptr + r[:, None] * D + d[None, :], mask=r_ok[:, None] & d_ok[None, :], other=0.0)
        through = tl.dot(z_grad.to(down.dtype), down, input_precision="ieee")
        grad_out = tl.load(grad_out_ptr + row[:, None] * grad_out_row_stride + d[None, :], mask=tile_ok, other=0.0)
        grad_h = (grad_out.to(tl.float32) + through).to(grad_out.dtype)
        grad_h = tl.where(alpha == 0.0, grad_out, grad_h)
        tl.store(grad_h_ptr + row[:, None] * grad_h_row_stride + d[None, :], grad_h, mask=tile_ok)


@triton.jit
def adapter_backward_weights(
    grad_out_ptr,
    grad_out_row_stride,
    h_ptr,
    h_row_stride,
    alpha_ptr,
    activated_ptr,
    z_grad_ptr,
    grad_down_weight_ptr,
    grad_down_bias_ptr,
    grad_up_weight_ptr,
    grad_up_bias_ptr,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes a tile of d of every weight gradient, over all rows; the first one also grad_down_bias."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    d_ok = d < D
    r_ok = r < R
    alpha = tl.load(alpha_ptr)

    grad_down = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    grad_up = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
    grad_down_bias = tl.zeros([BLOCK_R], dtype=tl.float32)
    grad_up_bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_ok = row < rows
        tile_ok = row_ok[:, None] & d_ok[None, :]
        hidden_ok = row_ok[:, None] & r_ok[None, :]
        h = tl.load(h_ptr + row[:, None] * h_row_stride + d[None, :], mask=tile_ok, other=0.0)
        grad_out = tl.load(grad_out_ptr + row[:, None] * grad_out_row_stride + d[None, :], mask=tile_ok, other=0.0)
        activated = tl.load(activated_ptr + row[:, None] * R + r[None, :], mask=hidden_ok, other=0.0)
        z_grad = tl.load(z_grad_ptr + row[:, None] * R + r[None, :], mask=hidden_ok, other=0.0)
        grad_down = tl.dot(tl.trans(z_grad.to(h.dtype)), h, acc=grad_down, input_precision="ieee")
        grad_up = tl.dot(tl.trans(grad_out), activated.to(h.dtype), acc=grad_up, input_precision="ieee")
        grad_down_bias += tl.sum(z_grad, axis=0)
        grad_up_bias += tl.sum(grad_out.to(tl.float32), axis=0)

    grad_down = tl.where(alpha == 0.0, 0.0, grad_down)
    grad_up = tl.where(alpha == 0.0, 0.0, alpha * grad_up)
    grad_up_bias = tl.where(alpha == 0.0, 0.0, alpha * grad_up_bias)
    tl.store(grad_down_weight_ptr + r[:, None] * D + d[None, :], grad_down, mask=r_ok[:, None] & d_ok[None, :])
    tl.store(grad_up_weight_ptr + d[:, None] * R + r[None, :], grad_up, mask=d_ok[:, None] & r_ok[None, :])
    tl.store(grad_up_bias_ptr + d, grad_up_bias, mask=d_ok)
    tl.store(grad_down_bias_ptr + r, grad_down_bias, mask=r_ok & (tl.program_id(0) == 0))
