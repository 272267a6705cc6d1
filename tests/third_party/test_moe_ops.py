"""moe-ops: tokens to their experts and back, forwards and backwards."""

from __future__ import annotations

import itertools

import torch
from agreement import assert_agrees
from moe_ops.fused_topk_softmax_ops import fused_topk_softmax
from moe_ops.grouped_gemm_ops import grouped_gemm
from moe_ops.permute_ops import permute
from moe_ops.unpermute_ops import unpermute
from torch import Tensor

TOKENS, EXPERTS, CHOSEN = 20, 8, 2


def test_weights_of_the_best_experts(launched, rng):
    logits = torch.randn(TOKENS, EXPERTS, generator=rng)
    assert_agrees(lambda x: fused_topk_softmax(x, CHOSEN)[0], lambda x: x.topk(CHOSEN).values.softmax(-1), logits)
    assert torch.equal(fused_topk_softmax(logits, CHOSEN)[1].long(), logits.topk(CHOSEN).indices)
    assert launched == {"_fused_topk_softmax_fwd_kernel_2d", "_fused_topk_softmax_bwd_kernel_2d"}


def test_tokens_are_sorted_by_expert_and_weighed_on_their_way_back(launched, rng):
    experts = torch.randn(TOKENS, EXPERTS, generator=rng).topk(CHOSEN).indices.int()
    x, weights = torch.randn(TOKENS, 32, generator=rng), torch.rand(TOKENS, CHOSEN, generator=rng)
    sorted_tokens = permute(x, experts, 0, EXPERTS)[0]
    counts = experts.flatten().long().bincount(minlength=EXPERTS)
    for expert, rows in enumerate(sorted_tokens.split(counts.tolist())):
        own = x[(experts == expert).any(1)]
        assert sorted(rows.tolist()) == sorted(own.tolist())  # in the order in which programs came

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        tokens, rows, *_ = permute(x, experts, 0, EXPERTS)
        return unpermute(tokens, rows, weights, TOKENS, CHOSEN)

    assert_agrees(there_and_back, lambda x, w: x * w.sum(1, keepdim=True), x, weights)
    assert launched == {
        "_group_offsets_kernel", "_permute_countsort_kernel", "_unpermute_kernel", "_unpermute_bwd_kernel",
    }  # fmt: skip


def test_each_expert_multiplies_its_own_rows(launched, rng):
    bounds = [0, 10, 25, 40]

    def reference(x: Tensor, weights: Tensor) -> Tensor:
        parts = x.split([stop - start for start, stop in itertools.pairwise(bounds)])
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])

    assert_agrees(
        lambda *i: grouped_gemm(*i, torch.tensor(bounds, dtype=torch.int32), True),
        reference,
        torch.randn(40, 64, generator=rng),
        torch.randn(3, 32, 64, generator=rng),
    )
    assert launched == {"gmm_forward_kernel", "gmm_gradB_kernel"}
