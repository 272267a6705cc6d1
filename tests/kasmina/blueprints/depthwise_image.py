"""A depthwise 3x3 convolution over an image, blended as `out = h + alpha * (k - h)`. A place a program."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


def reference(h: Tensor, *, weight: Tensor) -> Tensor:
    """k for h [batch, height, width, d]."""
    return F.conv2d(h.movedim(-1, 1), weight[:, None], padding=1, groups=h.shape[-1]).movedim(1, -1)


@triton.jit
def place(ptr, stride, row, ok, d, D: tl.constexpr):
    return tl.load(ptr + row.to(tl.int64) * stride + d, mask=(d < D) & ok, other=0.0).to(tl.float32)


@triton.jit
def convolved(ptr, stride, weight_ptr, row, y, x, height, width, d, SIGN: tl.constexpr, D: tl.constexpr):
    """The sum of weight[i, j] times the place at (y, x) + SIGN * (i - 1, j - 1)."""
    total = tl.zeros_like(d).to(tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            dy, dx = SIGN * (i - 1), SIGN * (j - 1)
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            weight = tl.load(weight_ptr + d * 9 + i * 3 + j, mask=d < D, other=0.0).to(tl.float32)
            total += weight * place(ptr, stride, row + dy * width + dx, inside, d, D)
    return total


@triton.jit
def depthwise_forward(
    h_ptr,
    h_row_stride,
    weight_ptr,
    alpha_ptr,
    out_ptr,
    out_row_stride,
    length,
    image_height,
    image_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    x, y = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * length + y * image_width + x
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    k = convolved(h_ptr, h_row_stride, weight_ptr, row, y, x, image_height, image_width, d, 1, D)
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
    image_height,
    image_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    x, y = row % image_width, (row // image_width) % image_height
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    through = convolved(grad_out_ptr, grad_out_row_stride, weight_ptr, row, y, x, image_height, image_width, d, -1, D)
    own = place(grad_out_ptr, grad_out_row_stride, row, x >= 0, d, D)
    grad = tl.where(alpha == 1.0, through, own + alpha * (through - own))
    tl.store(grad_h_ptr + row.to(tl.int64) * grad_h_row_stride + d, tl.where(alpha == 0.0, own, grad), mask=d < D)


@triton.jit
def depthwise_backward_weight(
    grad_out_ptr,
    grad_out_row_stride,
    h_ptr,
    h_row_stride,
    alpha_ptr,
    grad_weight_ptr,
    rows,
    image_height,
    image_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    alpha = tl.load(alpha_ptr)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(rows):
        x, y = row % image_width + j - 1, (row // image_width) % image_height + i - 1
        inside = (y >= 0) & (y < image_height) & (x >= 0) & (x < image_width)
        h = place(h_ptr, h_row_stride, row + (i - 1) * image_width + j - 1, inside, d, D)
        total += h * place(grad_out_ptr, grad_out_row_stride, row, row >= 0, d, D)
    tl.store(grad_weight_ptr + d * 9 + i * 3 + j, tl.where(alpha == 0.0, 0.0, alpha * total), mask=d < D)
