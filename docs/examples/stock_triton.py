"""Somebody else's Triton on a CPU. Nothing of Esper is imported: the package has registered itself with Triton.

The kernel is the fused softmax of Triton's tutorials, with a row in each program, as it is written for a GPU.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def softmax_kernel(out_ptr, in_ptr, in_row_stride, out_row_stride, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_cols
    x = tl.load(in_ptr + row * in_row_stride + offsets, mask=mask, other=-float("inf"))
    numerator = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * out_row_stride + offsets, numerator / tl.sum(numerator, axis=0), mask=mask)


x = torch.randn(1000, 781)
out = torch.empty_like(x)
block = triton.next_power_of_2(x.shape[1])
compiled = softmax_kernel[(x.shape[0],)](out, x, x.stride(0), out.stride(0), x.shape[1], BLOCK_SIZE=block)

print("ran on:", triton.runtime.driver.active.get_current_target().backend)
print("machine code:", len(compiled.asm["o"]), "bytes")
print("largest difference from torch:", float((out - torch.softmax(x, 1)).abs().max()))
