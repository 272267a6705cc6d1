"""liger-kernel: the layers and losses of a language model, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_kernel import ops
from torch import Tensor

FEW = settings(max_examples=4, deadline=None, derandomize=True)
# Of fewer columns a norm leaves next to nothing for the gradient.
ROWS, COLUMNS = st.integers(1, 6), st.integers(8, 300)


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@FEW
@given(rows=ROWS, columns=COLUMNS)
def test_layer_norm(rows, columns):
    assert_agrees(
        lambda *i: ops.LigerLayerNormFunction.apply(*i, 1e-3),
        lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-3),
        *normal((rows, columns), (columns,), (columns,)),
    )


@FEW
@given(rows=ROWS, columns=COLUMNS, offset=st.sampled_from([0.0, 1.0]), mode=st.sampled_from(["llama", "gemma", "none"]))
def test_rms_norm(rows, columns, offset, mode):
    assert_agrees(
        lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-6, offset, mode, False),
        lambda x, w: rms(x) * (w + offset),
        *normal((rows, columns), (columns,)),
    )


def test_rms_norm_of_many_short_rows(launched):
    assert_agrees(
        lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        lambda x, w: rms(x) * w,
        *normal((40_000, 32), (32,)),
    )
    assert launched == {"_block_rms_norm_forward_kernel", "_block_rms_norm_backward_kernel"}


def test_a_sum_and_its_norm(launched):
    assert_agrees(
        lambda *i: ops.LigerFusedAddRMSNormFunction.apply(*i, 1e-6, 0.0, "llama", False),
        lambda x, r, w: (rms(x + r) * w, x + r),
        *normal((6, 70), (6, 70), (70,)),
    )
    assert launched == {"_fused_add_rms_norm_forward_kernel", "_fused_add_rms_norm_backward_kernel"}


def test_group_norm(launched):
    assert_agrees(
        lambda *i: ops.LigerGroupNormFunction.apply(*i, 6, 3, 1e-5),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-5),
        *normal((2, 6, 5, 7), (6,), (6,)),
    )
    assert launched == {"_group_norm_forward_kernel", "_group_norm_backward_kernel"}


@FEW
@given(rows=ROWS, columns=COLUMNS)
def test_softmax(rows, columns):
    (x,) = normal((rows, columns))
    assert_agrees(ops.LigerSoftmaxFunction.apply, lambda x: x.softmax(-1), x)


def sparsemax(x: Tensor) -> Tensor:
    """The nearest distribution."""
    falling, count = x.sort(-1, descending=True)[0], torch.arange(1, x.shape[-1] + 1)
    excess = falling.cumsum(-1) - 1
    support = (count * falling > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0)


def test_sparsemax(launched):
    assert_agrees(lambda x: ops.LigerSparsemaxFunction.apply(x, -1), sparsemax, *normal((7, 100)))
    assert launched == {"_sparsemax_forward_kernel", "_sparsemax_backward_kernel"}


@pytest.mark.parametrize(
    ("apply", "gate", "name"),
    [
        (ops.LigerSiLUMulFunction.apply, F.silu, "_swiglu"),
        (ops.LigerGELUMulFunction.apply, lambda x: F.gelu(x, approximate="tanh"), "_geglu_tanh"),
    ],
    ids=["swiglu", "geglu"],
)
def test_gated_activations(apply, gate, name, launched):
    assert_agrees(apply, lambda a, b: gate(a) * b, *normal((5, 90), (5, 90)))
    assert launched == {f"{name}_forward_kernel", f"{name}_backward_kernel"}


def test_rotary_embedding(launched):
    angles = torch.outer(torch.arange(10.0), 10_000 ** -(torch.arange(0, 32, 2) / 32)).repeat(1, 2)[None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.double().cos() + torch.cat((-second, first), -1) * angles.double().sin()

    assert_agrees(
        lambda q, k: ops.LigerRopeFunction.apply(q, k, angles.cos(), angles.sin()),
        lambda q, k: (turned(q), turned(k)),
        *normal((1, 3, 10, 32), (1, 1, 10, 32)),
    )
    assert launched == {"_triton_rope"}


TARGETS = torch.tensor([1, 5, -100, 30, 99, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_cross_entropy(smoothing, cap, launched):
    def reference(x: Tensor) -> Tensor:
        logits = x if cap is None else cap * torch.tanh(x / cap)
        return F.cross_entropy(logits, TARGETS, label_smoothing=smoothing)

    assert_agrees(
        lambda x: ops.LigerCrossEntropyFunction.apply(x, TARGETS, None, -100, 0.0, smoothing, "mean", cap, False)[0],
        reference,
        *normal((6, 100)),
    )
    assert "liger_cross_entropy_kernel" in launched


def test_cross_entropy_of_a_linear_layer(launched):
    assert_agrees(
        lambda x, w: ops.LigerFusedLinearCrossEntropyFunction.apply(x, w, TARGETS)[0],
        lambda x, w: F.cross_entropy(x @ w.T, TARGETS),
        *normal((6, 40), (100, 40)),
    )
    assert launched == {"liger_cross_entropy_kernel", "element_mul_kernel"}


def test_divergences_of_distributions(launched):
    x, y = normal((6, 100), (6, 100))
    target = y.softmax(-1)
    assert_agrees(
        lambda x: ops.LigerKLDivLossFunction.apply(x.log_softmax(-1), target, "batchmean", False, 1e-10),
        lambda x: F.kl_div(x.log_softmax(-1), target.double(), reduction="batchmean"),
        x,
    )
    assert_agrees(
        lambda x: ops.LigerTVDLossFunction.apply(x.softmax(-1), target, None, "batchmean"),
        lambda x: (x.softmax(-1) - target.double()).abs().sum() / 2 / len(x),
        x,
    )
    assert launched == {"_kldiv_kernel_forward", "_kldiv_kernel_backward", "_tv_distance_kernel"}


def test_embedding(launched):
    tokens = torch.tensor([[3, 0, 19, 3], [3, 7, 7, 1]])
    assert_agrees(
        lambda e: ops.LigerEmbeddingFunction.apply(e, tokens), lambda e: F.embedding(tokens, e), *normal((20, 48))
    )
    assert launched == {"embedding_forward_kernel", "embedding_backward_kernel"}


def test_attention_to_neighbours(launched):
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        far = (at[:, None] - at).abs() > 3
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(far, float("-inf")).softmax(-1) @ v

    assert_agrees(
        lambda *i: ops.LigerFusedNeighborhoodAttentionFunction.apply(*i, 7, 1, None),
        reference,
        *normal(*[(1, 2, 40, 32)] * 3),
    )
    assert launched >= {"_fused_neighborhood_attention_qk_kernel", "_fused_neighborhood_attention_grad_v_kernel"}


def test_a_mixture_of_experts(launched):
    """Two experts for each of four tokens: routing by histogram and prefix sum, grouped products both ways."""
    experts = torch.tensor([[0, 1], [2, 0], [1, 2], [3, 1]])

    def reference(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.einsum("th,tkih->tki", x, gate_up[experts])
        gate, up = hidden.chunk(2, -1)
        return torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, down[experts], weights)

    assert_agrees(
        lambda x, w1, w2, s: ops.LigerFusedMoEFunction.apply(x, w1, w2, experts, s),
        reference,
        *normal((4, 48), (4, 64, 48), (4, 48, 32), (4, 2)),
    )
    assert launched >= {
        "_moe_router_histogram_kernel", "_moe_router_prefix_sum_kernel", "_moe_router_scatter_kernel",
        "_fused_up_proj_swiglu_kernel", "_fused_down_proj_kernel", "_token_gather_weighted_sum_kernel",
        "_moe_bwd_dW1_kernel", "_moe_bwd_dW2_kernel", "_moe_bwd_down_proj_kernel", "_moe_bwd_dX_expanded_kernel",
    }  # fmt: skip
