"""A depthwise convolution of three taps over a sequence, blended as `out = h + alpha * (k - h)`. A position a
program."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def reference(h: Tensor, *, weight: Tensor) -> Tensor:
    """k for h [batch, length, d]."""
    return F.conv1d(h.mT, weight[:, None, :], padding=1, groups=h.shape[-1]).mT


@triton.jit
def tap(weight_ptr, j: tl.constexpr, d, D: tl.constexpr):
    return tl.load(weight_ptr + d * 3 + j, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def row_at(ptr, stride, row, ok, d, D: tl.constexpr):
    return tl.load(ptr + row.to(tl.int64) * stride + d, mask=(d < D) & ok, other=0.0).to(tl.float32)


@triton.jit
def depthwise_forward(
    h_ptr,
    h_row_stride,
    weight_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0)
    row = tl.program_id(1) * length + t
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    k = tap(weight_ptr, 0, d, D) * row_at(h_ptr, h_row_stride, row - 1, t > 0, d, D)
    k += tap(weight_ptr, 1, d, D) * row_at(h_ptr, h_row_stride, row, t >= 0, d, D)
    k += tap(weight_ptr, 2, d, D) * row_at(h_ptr, h_row_stride, row + 1, t + 1 < length, d, D)
    h = tl.load(h_ptr + row.to(tl.int64) * h_row_stride + d, mask=d < D, other=0.0)
    blended = tl.where(alpha == 1.0, k, h.to(tl.float32) + alpha * (k - h.to(tl.float32))).to(h.dtype)
    tl.store(out_ptr + row.to(tl.int64) * out_row_stride + d, tl.where(alpha == 0.0, h, blended), mask=d < D)


@triton.jit
def depthwise_backward_rows(
    grad_out_ptr,
    grad_out_row_stride,
    weight_ptr,
    alpha_ptr,
    grad_h_ptr,
    grad_h_row_stride,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    t = row % length
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    through = tap(weight_ptr, 2, d, D) * row_at(grad_out_ptr, grad_out_row_stride, row - 1, t > 0, d, D)
    through += tap(weight_ptr, 1, d, D) * row_at(grad_out_ptr, grad_out_row_stride, row, t >= 0, d, D)
    through += tap(weight_ptr, 0, d, D) * row_at(grad_out_ptr, grad_out_row_stride, row + 1, t + 1 < length, d, D)
    own = row_at(grad_out_ptr, grad_out_row_stride, row, t >= 0, d, D)
    grad = tl.where(alpha == 1.0, through, own + alpha * (through - own))
    tl.store(grad_h_ptr + row.to(tl.int64) * grad_h_row_stride + d, tl.where(alpha == 0.0, own, grad), mask=d < D)


@triton.jit
def depthwise_backward_items(
    grad_out_ptr,
    grad_out_row_stride,
    h_ptr,
    h_row_stride,
    partial_ptr,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    for j in tl.static_range(3):
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for t in range(length):
            at = t + j - 1
            h = row_at(h_ptr, h_row_stride, item * length + at, (at >= 0) & (at < length), d, D)
            total += h * row_at(grad_out_ptr, grad_out_row_stride, item * length + t, t >= 0, d, D)
        tl.store(partial_ptr + (item * D + d) * 3 + j, total, mask=d < D)


@triton.jit
def depthwise_backward_weight(partial_ptr, alpha_ptr, grad_weight_ptr, batch, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    for j in tl.static_range(3):
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for item in range(batch):
            total += tl.load(partial_ptr + (item * D + d) * 3 + j, mask=d < D, other=0.0)
        tl.store(grad_weight_ptr + d * 3 + j, tl.where(alpha == 0.0, 0.0, alpha * total), mask=d < D)
