"""flash-linear-attention: recurrences over time as its chunked, fused and recurrent kernels compute them.

References are the recurrences themselves, step by step in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import BFLOAT16, assert_agrees
from fla.modules.causal_conv1d import causal_conv1d
from fla.modules.norm.layernorm import layer_norm
from fla.modules.rotary import rotary_embedding
from fla.ops.attn import parallel_attn
from fla.ops.based import parallel_based
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.forgetting_attn import parallel_forgetting_attn
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from fla.ops.gsa import chunk_gsa
from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
from fla.ops.kda import chunk_kda
from fla.ops.linear_attn import fused_chunk_linear_attn
from fla.ops.rwkv6 import chunk_rwkv6
from fla.ops.simple_gla import chunk_simple_gla, parallel_simple_gla
from fla.ops.utils import mean_pooling
from torch import Tensor

BATCH, TIME, HEADS, KEYS, VALUES = 1, 100, 2, 32, 32


@pytest.fixture
def queries_keys_values(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H, K), keys of length 1, and values (B, T, H, V)."""
    queries, keys, values = (torch.randn(BATCH, TIME, HEADS, size, generator=rng) for size in (KEYS, KEYS, VALUES))
    return queries, F.normalize(keys, dim=-1), values


@pytest.fixture
def rates(rng: torch.Generator) -> Tensor:
    """Between 0 and 1, (B, T, H)."""
    return torch.rand(BATCH, TIME, HEADS, generator=rng)


@pytest.fixture
def decay(rng: torch.Generator) -> Tensor:
    """Logarithms, (B, T, H)."""
    return F.logsigmoid(torch.randn(BATCH, TIME, HEADS, generator=rng))


@pytest.fixture
def decay_by_key(rng: torch.Generator) -> Tensor:
    """Logarithms, (B, T, H, K)."""
    return F.logsigmoid(torch.randn(BATCH, TIME, HEADS, KEYS, generator=rng))


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    rates: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state decays, then gains k v', or with `rates` moves that far towards answering k with v; q reads it.

    With a `bonus` (H, K) it is read before it decays and gains, the present k v' counting by the bonus. Returns what
    is read (B, T, H, V) and the last state (B, H, K, V).
    """
    state = q.new_zeros(*q.shape[::2], q.shape[-1], v.shape[-1])
    read = []
    for t in range(q.shape[1]):
        key, value, query = k[:, t, :, :, None], v[:, t, :, None], q[:, t, :, None] * q.shape[-1] ** -0.5
        if bonus is not None:
            read.append(query @ (state + bonus[..., None] * key * value))
        if decay is not None:
            state = state * decay[:, t].exp().reshape(*q.shape[::2], -1, 1)
        if rates is not None:
            value = (value - key.mT @ state) * rates[:, t, :, None, None]
        state = state + key * value
        if bonus is None:
            read.append(query @ state)
    return torch.stack(read, 1).squeeze(-2), state


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Causal softmax attention, heads in the third axis; `bias` (B, H, T, T) is added to the logits."""
    logits = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5 + bias
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshv->bthv", logits.masked_fill(later, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(
    ("compute", "kernels"),
    [
        (chunk_gla, {"chunk_gla_fwd_A_kernel_intra_sub_inter", "chunk_gla_fwd_kernel_o", "chunk_gla_bwd_kernel_intra",
                     "chunk_gla_bwd_kernel_inter", "chunk_fwd_kernel_h", "chunk_bwd_kernel_dh",
                     "chunk_local_cumsum_vector_kernel"}),
        (fused_recurrent_gla, {"fused_recurrent_fwd_kernel", "fused_recurrent_bwd_kernel"}),
    ],
)  # fmt: skip
def test_gated_linear_attention(compute, kernels, launched, queries_keys_values, decay_by_key):
    assert_agrees(
        lambda q, k, v, g: compute(q, k, v, g, output_final_state=True), recurrence, *queries_keys_values, decay_by_key
    )
    assert launched >= kernels


def test_gated_linear_attention_of_sequences_laid_end_to_end(launched, queries_keys_values, decay_by_key):
    bounds = [0, 37, TIME]

    def each(*inputs: Tensor) -> Tensor:
        parts = itertools.pairwise(bounds)
        return torch.cat([recurrence(*(x[:, start:stop] for x in inputs))[0] for start, stop in parts], 1)

    assert_agrees(
        lambda *inputs: chunk_gla(*inputs, cu_seqlens=torch.tensor(bounds))[0],
        each,
        *queries_keys_values,
        decay_by_key,
    )
    assert "chunk_gla_fwd_kernel_o" in launched


def test_gated_linear_attention_in_bfloat16(launched, queries_keys_values, decay_by_key):
    inputs = [x.bfloat16() for x in (*queries_keys_values, decay_by_key)]
    assert_agrees(lambda *x: chunk_gla(*x)[0], lambda *x: recurrence(*x)[0], *inputs, tolerance=BFLOAT16)
    assert "chunk_gla_fwd_kernel_o" in launched


@pytest.mark.parametrize(
    ("compute", "kernels"),
    [
        (chunk_simple_gla, {"chunk_fwd_kernel_o", "chunk_bwd_kernel_dqkwg", "chunk_local_cumsum_scalar_kernel"}),
        (parallel_simple_gla, {"parallel_simple_gla_fwd_kernel", "parallel_simple_gla_bwd_kernel"}),
    ],
)
def test_one_decay_for_all_keys(compute, kernels, launched, queries_keys_values, decay):
    assert_agrees(
        lambda q, k, v, g: compute(q, k, v, g=g)[0], lambda *x: recurrence(*x)[0], *queries_keys_values, decay
    )
    assert launched >= kernels


def test_linear_attention_without_decay(launched, queries_keys_values):
    assert_agrees(
        lambda q, k, v: fused_chunk_linear_attn(q, k, v, normalize=False)[0],
        lambda *x: recurrence(*x)[0],
        *queries_keys_values,
    )
    assert launched >= {"fused_chunk_fwd_kernel", "fused_chunk_bwd_kernel"}


def test_the_delta_rule_step_by_step(launched, queries_keys_values, rates):
    assert_agrees(
        lambda q, k, v, b: fused_recurrent_delta_rule(q, k, v, b, output_final_state=True),
        lambda q, k, v, b: recurrence(q, k, v, rates=b),
        *queries_keys_values,
        rates,
    )
    assert launched >= {"fused_recurrent_delta_rule_fwd_kernel", "fused_recurrent_delta_rule_bwd_kernel"}


def test_the_delta_rule_in_chunks_of_bfloat16(launched, queries_keys_values, rates):
    assert_agrees(
        lambda q, k, v, b: chunk_delta_rule(q, k, v, b, output_final_state=True),
        lambda q, k, v, b: recurrence(q, k, v, rates=b),
        *(x.bfloat16() for x in (*queries_keys_values, rates)),
        tolerance=BFLOAT16,
    )
    assert launched >= {"chunk_scaled_dot_kkt_fwd_kernel", "merge_16x16_to_64x64_inverse_kernel"}


def test_the_gated_delta_rule(launched, queries_keys_values, decay, rates):
    assert_agrees(
        lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b, output_final_state=True),
        recurrence,
        *queries_keys_values,
        decay,
        rates,
    )
    assert launched >= {
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64", "recompute_w_u_fwd_kernel", "prepare_wy_repr_bwd_kernel",
        "chunk_bwd_kernel_dv_local",
    }  # fmt: skip


def test_kimi_delta_attention(launched, queries_keys_values, decay_by_key, rates):
    assert_agrees(
        lambda q, k, v, g, b: chunk_kda(q, k, v, g, b, output_final_state=True),
        recurrence,
        *queries_keys_values,
        decay_by_key,
        rates,
    )
    assert launched >= {
        "chunk_kda_fwd_kernel_intra_token_parallel", "chunk_kda_fwd_kernel_inter_solve_fused",
        "chunk_kda_bwd_kernel_intra", "chunk_kda_bwd_kernel_wy_dqkg_fused", "chunk_kda_bwd_kernel_dAv",
    }  # fmt: skip


def test_rwkv6(launched, rng, queries_keys_values, decay_by_key):
    assert_agrees(
        lambda q, k, v, w, u: chunk_rwkv6(q, k, v, w, u)[0],
        lambda q, k, v, w, u: recurrence(q, k, v, w, bonus=u)[0],
        *queries_keys_values,
        decay_by_key,
        torch.randn(HEADS, KEYS, generator=rng),
    )
    assert launched >= {"chunk_rwkv6_fwd_cumsum_kernel", "chunk_rwkv6_fwd_A_kernel_intra_sub_inter"}


def test_gated_slot_attention(launched, rng, queries_keys_values):
    """Two recurrences: slots are written by weight and looked up by softmax, with what they read as the queries."""
    slots = torch.randn(BATCH, TIME, HEADS, 16, generator=rng)
    decay = F.logsigmoid(torch.randn(BATCH, TIME, HEADS, 16, generator=rng))

    def reference(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Tensor:
        by_key, by_slot, read = q.new_zeros(BATCH, HEADS, KEYS, 16), q.new_zeros(BATCH, HEADS, 16, VALUES), []
        for t in range(TIME):
            kept, slot = g[:, t].exp(), s[:, t]
            by_key = by_key * kept[:, :, None] + k[:, t, :, :, None] * slot[:, :, None]
            by_slot = by_slot * kept[..., None] + slot[..., None] * v[:, t, :, None]
            weights = (q[:, t, :, None] * KEYS**-0.5 @ by_key).softmax(-1)
            read.append((weights @ by_slot).squeeze(-2))
        return torch.stack(read, 1)

    assert_agrees(lambda *x: chunk_gsa(*x)[0], reference, *queries_keys_values, slots, decay)
    assert launched >= {"chunk_gsa_fwd_kernel_intra", "chunk_gsa_bwd_kernel_dqkvg", "softmax_fwd_kernel"}


@pytest.mark.parametrize(
    ("compute", "kernels"),
    [
        (chunk_hgrn, {"chunk_hgrn_fwd_kernel_h", "chunk_hgrn_bwd_kernel_o"}),
        (fused_recurrent_hgrn, {"fused_recurrent_hgrn_fwd_kernel", "fused_recurrent_hgrn_bwd_kernel"}),
    ],
)
def test_a_gated_recurrence_of_each_channel(compute, kernels, launched, rng):
    x, decay = torch.randn(2, TIME, 48, generator=rng), F.logsigmoid(torch.randn(2, TIME, 48, generator=rng))

    def reference(x: Tensor, decay: Tensor) -> Tensor:
        states = [x[:, 0]]
        for t in range(1, TIME):
            states.append(decay[:, t].exp() * states[-1] + x[:, t])
        return torch.stack(states, 1)

    assert_agrees(lambda x, g: compute(x, g)[0], reference, x, decay)
    assert launched >= kernels


def test_softmax_attention(launched, queries_keys_values):
    assert_agrees(parallel_attn, attention, *queries_keys_values)
    assert launched >= {"parallel_attn_fwd_kernel", "parallel_attn_bwd_kernel_dkv", "parallel_attn_bwd_kernel_dq"}


def test_attention_that_forgets(launched, queries_keys_values, decay):
    def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        total = g.cumsum(1).transpose(1, 2)
        return attention(q, k, v, total[..., :, None] - total[..., None, :])

    assert_agrees(parallel_forgetting_attn, reference, *queries_keys_values, decay)
    assert "chunk_global_cumsum_scalar_kernel" in launched


def test_attention_by_a_taylor_expansion(launched, rng):
    q, k, v = (torch.randn(BATCH, TIME, HEADS, 16, generator=rng) for _ in range(3))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bthk,bshk->bhts", q, k) / 4
        return torch.einsum("bhts,bshv->bthv", (1 + logits + logits**2 / 2).tril(), v)

    assert_agrees(lambda *x: parallel_based(*x, use_norm=False), reference, q, k, v)
    assert launched >= {"parallel_based_fwd_kernel", "parallel_based_bwd_kernel"}


def test_a_short_causal_convolution(launched, rng):
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((2, 50, 24), (24, 4), (24,)))

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x.mT, (3, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=24)).mT

    assert_agrees(lambda *i: causal_conv1d(*i, activation="silu", backend="triton")[0], reference, x, weight, bias)
    assert launched >= {"causal_conv1d_fwd_kernel", "causal_conv1d_bwd_kernel"}


def test_rotary_embedding(launched, queries_keys_values):
    angles = torch.outer(torch.arange(TIME), 10_000 ** -(torch.arange(0, KEYS, 2) / KEYS))

    def reference(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cosine, sine = (f(angles.double())[:, None] for f in (torch.cos, torch.sin))
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)

    assert_agrees(lambda x: rotary_embedding(x, angles.cos(), angles.sin()), reference, queries_keys_values[0])
    assert launched == {"rotary_embedding_kernel"}


def test_layer_norm(launched, rng):
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((6, 70), (70,), (70,)))
    assert_agrees(
        lambda *i: layer_norm(*i, eps=1e-5), lambda x, w, b: F.layer_norm(x, (70,), w, b, 1e-5), x, weight, bias
    )
    assert launched == {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"}


def test_mean_pooling_of_chunks(launched, queries_keys_values):
    assert_agrees(
        lambda x: mean_pooling(x, 32),
        lambda x: torch.stack([chunk.mean(1) for chunk in x.split(32, 1)], 1),
        queries_keys_values[0],
    )
    assert launched == {"mean_pooling_fwd_kernel", "mean_pooling_bwd_kernel"}
