"""adasplash: entmax, a softmax that gives most elements no weight at all, alone and in attention."""

from __future__ import annotations

import pytest
import torch
from adasplash.adasplash_no_block_mask import sparse_attn
from adasplash.triton_entmax import triton_entmax
from adasplash.triton_entmax_v2 import triton_entmax as triton_entmax_by_histogram
from agreement import assert_agrees
from torch import Tensor


def entmax(x: Tensor, alpha: float) -> Tensor:
    """`max(0, (alpha - 1) x - t) ** (1 / (alpha - 1))`, with t found by bisection so that the sum is 1."""
    scaled, power = x * (alpha - 1), 1 / (alpha - 1)
    low = scaled.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(60):
        middle = (low + high) / 2
        above = (scaled - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (scaled - low).clamp(min=0).pow(power)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("compute", [triton_entmax, triton_entmax_by_histogram], ids=["newton", "histogram"])
def test_entmax(compute, alpha, launched, rng):
    x = torch.randn(9, 200, generator=rng)
    assert (entmax(x.double(), alpha) == 0).any()
    assert_agrees(lambda x: compute(x, alpha, 20), lambda x: entmax(x, alpha), x, tolerance=1e-4, gradients=False)
    assert launched == {"_fwd_entmax"}


def test_sparse_attention(launched, rng):
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(128, 128, dtype=torch.bool).triu(1)
        return entmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -1e9), 1.5) @ v

    q, k, v = (torch.randn(1, 2, 128, 32, generator=rng) for _ in range(3))
    assert_agrees(
        lambda *i: sparse_attn(*i, alpha=1.5, is_causal=True, niter=10), reference, q, k, v,
        tolerance=1e-4, gradients=False,
    )  # fmt: skip
    assert launched == {"_get_tau", "_get_output"}
