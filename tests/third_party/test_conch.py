"""conch: what a server of language models runs, forwards only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import FLOAT32, assert_agrees
from conch.ops.activation.gelu_tanh_and_mul import gelu_tanh_and_mul
from conch.ops.activation.silu_and_mul import silu_and_mul
from conch.ops.attention.paged_attention import paged_attention
from conch.ops.attention.varlen_attention import varlen_attention
from conch.ops.embedding.rotary_embedding import rotary_embedding
from conch.ops.normalization.gemma_rms_norm import gemma_rms_norm
from conch.ops.normalization.rms_norm import fused_add_rms_norm
from conch.ops.quantization.bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conch.ops.quantization.fp8 import scaled_fp8_quant
from conch.ops.quantization.gemm import mixed_precision_gemm, scaled_gemm
from conch.ops.quantization.int8 import scaled_int8_quant
from conch.ops.vision.nms import nms
from conch.ops.vllm.copy_blocks import copy_blocks
from conch.ops.vllm.reshape_and_cache import reshape_and_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FEW = settings(max_examples=4, deadline=None, derandomize=True)
PAGE, KV_HEADS, HEADS, WIDTH = 16, 2, 4, 32
PAGES = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32)  # of two sequences


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@FEW
@given(rows=st.integers(1, 6), columns=st.integers(1, 200))
def test_gated_activations(rows, columns):
    (x,) = normal((rows, 2 * columns))
    for compute, gate in (
        (gelu_tanh_and_mul, lambda x: F.gelu(x, approximate="tanh")),
        (silu_and_mul, F.silu),
    ):
        assert_agrees(compute, lambda x, g=gate: g(x[:, :columns]) * x[:, columns:], x, gradients=False)


@FEW
@given(rows=st.integers(1, 6), columns=st.integers(1, 300))
def test_norms(rows, columns):
    x, residual, weight = normal((rows, columns), (rows, columns), (columns,))
    assert_agrees(lambda *i: gemma_rms_norm(*i, 1e-6), lambda x, w: rms(x) * (1 + w), x, weight, gradients=False)
    assert_agrees(
        lambda *i: fused_add_rms_norm(*i, 1e-6),
        lambda x, r, w: (rms(x + r) * w, x + r),
        x, residual, weight,
        gradients=False,
    )  # fmt: skip


def test_rotary_embedding(launched):
    angles = torch.outer(torch.arange(128.0), 10_000 ** -(torch.arange(0, 64, 2) / 64))
    positions = torch.tensor([3, 1, 77, 5, 6])

    def turned(x: Tensor) -> Tensor:
        cosine, sine = (f(angles[positions].double())[:, None] for f in (torch.cos, torch.sin))
        first, second = x.reshape(5, -1, 64).chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).reshape(x.shape)

    assert_agrees(
        lambda q, k: rotary_embedding(positions, q, k, 64, torch.cat((angles.cos(), angles.sin()), -1)),
        lambda q, k: (turned(q), turned(k)),
        *normal((5, 128), (5, 64)),
        gradients=False,
    )
    assert launched == {"_rotary_embedding_kernel"}


def test_quantisation_to_8_bits(launched):
    (x,) = normal((7, 100))
    scale = torch.tensor([2.0**-6])  # so that the quotients are exact
    quotients = (x * 64).numpy()
    assert torch.equal(scaled_int8_quant(x, scale)[0], torch.from_numpy(quotients.clip(-128, 127).astype("int8")))
    eighths = scaled_fp8_quant(x, scale)[0]
    assert torch.equal(eighths.float(), (x * 64).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert launched == {"_static_scaled_int8_quant_kernel", "_static_scaled_fp8_quant_kernel"}


def test_four_bits_with_one_scale_for_each_block(launched):
    """The 16 levels of NF4 are given in the paper that names them (QLoRA, appendix E); half a gap is the error."""
    (x,) = normal((4096,))
    packed, state = quantize_4bit(x, quant_type="nf4", blocksize=64)
    assert packed.numel() == x.numel() // 2
    blocks = x.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip
    nearest = levels[((blocks / largest)[..., None] - levels).abs().argmin(-1)] * largest
    found = dequantize_4bit(packed, state, blocksize=64, quant_type="nf4").reshape(-1, 64)
    assert (found - nearest).abs().max() <= FLOAT32 * largest.max()
    assert launched == {"_quantize_blockwise_kernel", "_dequantize_blockwise_kernel"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_products_of_8_bit_matrices(dtype, launched):
    a, b = (x.mul(30).clamp(-127, 127).to(dtype) for x in normal((33, 128), (128, 64)))
    assert_agrees(
        lambda s, t: scaled_gemm(a, b, s, t, torch.float32),
        lambda s, t: s * (a.double() @ b.double()) * t,
        *(x.abs() for x in normal((33, 1), (1, 64))),
        gradients=False,
    )
    assert launched == {"_gemm_kernel"}


@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_packed_weights(bits, launched):
    rng = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 2**bits, (128, 64), generator=rng, dtype=torch.int32)
    x, scales = normal((33, 128), (2, 64))  # one scale for 64 rows of each column
    places = torch.arange(32 // bits, dtype=torch.int32)[:, None] * bits
    packed = torch.stack([(rows << places).sum(0) for rows in levels.split(32 // bits)]).to(torch.int32)
    weights = (levels - 2 ** (bits - 1)).double() * scales.double().repeat_interleave(64, 0)
    assert_agrees(
        lambda x: mixed_precision_gemm(x, packed, scales, None, bits, 2 ** (bits - 1), 64),
        lambda x: x @ weights,
        x,
        gradients=False,
    )
    assert launched == {"_gemm_kernel"}


def test_boxes_that_overlap_better_ones_are_left_out(launched):
    rng = torch.Generator().manual_seed(1)
    corners, sizes = torch.rand(60, 2, generator=rng) * 10, 1 + 3 * torch.rand(60, 2, generator=rng)
    boxes, scores = torch.cat((corners, corners + sizes), 1), torch.rand(60, generator=rng)
    kept: list[int] = []
    for box in scores.argsort(descending=True).tolist():
        overlap = [
            (
                torch.minimum(boxes[box, 2:], boxes[other, 2:]) - torch.maximum(boxes[box, :2], boxes[other, :2])
            ).clamp(min=0).prod().item()
            for other in kept
        ]  # fmt: skip
        area = sizes.prod(1)
        if all(o <= 0.3 * (area[box] + area[other] - o) for o, other in zip(overlap, kept, strict=True)):
            kept.append(box)
    assert 5 < len(kept) < 50
    assert nms(boxes, scores, 0.3).tolist() == kept
    assert launched == {"_create_iou_mask_kernel", "_nms_suppression_kernel"}


def of_sequence(cache: Tensor, sequence: int, length: int) -> Tensor:
    """Keys or values of one sequence (length, HEADS, WIDTH) out of the pages (pages, PAGE, KV_HEADS, WIDTH)."""
    pages = cache[PAGES[sequence].long()].reshape(-1, KV_HEADS, WIDTH)
    return pages[:length].repeat_interleave(HEADS // KV_HEADS, 1)


def test_attention_over_pages(launched):
    lengths = torch.tensor([40, 23], dtype=torch.int32)

    def reference(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        results = []
        for sequence, length in enumerate(lengths.tolist()):
            k, v = (of_sequence(cache, sequence, length) for cache in (keys, values))
            weights = (torch.einsum("hd,nhd->hn", q[sequence], k) * WIDTH**-0.5).softmax(-1)
            results.append(torch.einsum("hn,nhd->hd", weights, v))
        return torch.stack(results)

    assert_agrees(
        lambda *i: paged_attention(*i, PAGES, lengths),
        reference,
        *normal((2, HEADS, WIDTH), *[(6, PAGE, KV_HEADS, WIDTH)] * 2),
        gradients=False,
    )
    assert launched == {"_paged_attention_compute_splits_kernel", "_paged_attention_reduce_splits_kernel"}


def test_attention_of_sequences_of_several_lengths(launched):
    lengths = [40, 23]

    def reference(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        results = []
        for sequence, (own, length) in enumerate(zip(q.split(lengths), lengths, strict=True)):
            k, v = (of_sequence(cache, sequence, length) for cache in (keys, values))
            logits = torch.einsum("qhd,nhd->hqn", own, k) * WIDTH**-0.5
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            results.append(torch.einsum("hqn,nhd->qhd", logits.masked_fill(later, float("-inf")).softmax(-1), v))
        return torch.cat(results)

    starts, counts = (torch.tensor(x, dtype=torch.int32) for x in ([0, 40, 63], lengths))
    assert_agrees(
        lambda *i: varlen_attention(*i, starts, 40, counts, 40, PAGES, causal=True),
        reference,
        *normal((63, HEADS, WIDTH), *[(6, PAGE, KV_HEADS, WIDTH)] * 2),
        gradients=False,
    )
    assert launched == {"_varlen_attention_compute_splits_kernel"}


def test_a_cache_in_pages_is_filled_and_copied(launched):
    keys, values, new_keys, new_values = normal(*[(6, PAGE, KV_HEADS, WIDTH)] * 2, *[(5, KV_HEADS, WIDTH)] * 2)
    expected = [keys.clone(), values.clone()]
    slots = torch.tensor([3, 9, -1, 30, 0])  # where each token goes; -1 is nowhere
    for cache, new in zip(expected, (new_keys, new_values), strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache.view(-1, KV_HEADS, WIDTH)[slot] = new[token]
        cache[3], cache[2] = cache[0].clone(), cache[1].clone()
    reshape_and_cache(new_keys, new_values, keys, values, slots)
    copy_blocks([keys.flatten(1)], [values.flatten(1)], torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    assert launched == {"_reshape_and_cache_kernel", "_copy_blocks_kernel"}
