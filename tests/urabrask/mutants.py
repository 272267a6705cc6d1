"""Broken variants of shipped kernels, made by editing what the forge has written: each is a mistake that somebody makes.

An edit names the kernel, what stands there and what stands there instead; one that fits nothing is an error, so that a
change of what is written cannot make a mutant an unbroken kernel.
"""

# ruff: noqa: E501  # lines of the source, whole

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from unittest import mock

import graphs_of_mutants

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.report import Level
from esper_triton.tezzeret import plan as planning
from esper_triton.tezzeret.forge import Forged, forge
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.targets import parse_target
from esper_triton.tezzeret.writing import Choice, tiles_for, write

__all__ = ["MUTANTS", "Mutant", "blueprint_of", "forged"]

SIZES = {"d": 48, "d_in": 24, "r": 8, "heads": 4, "hidden_width": 40}


@dataclass(frozen=True)
class Mutant:
    """`edits` are (old, new) in the text of `kernel`, every occurrence; `dims` are other than `SIZES`; `level` is the
    first that has to find it."""

    name: str
    blueprint: str
    kernel: str
    edits: tuple[tuple[str, str], ...]
    dims: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    level: Level = "fast"

    def edited(self, source: str) -> str:
        """The source with the mistake in it. Raises ValueError where an edit does not fit."""
        start = source.index(f"def {self.kernel}(")
        stop = min(k for k in (source.find("@triton.jit", start), source.find("\ndef forward(", start)) if k > 0)
        text = source[start:stop]
        for old, new in self.edits:
            if old not in text:
                raise ValueError(f"{self.name}: {old!r} is not in {self.kernel} of {self.blueprint}:\n{text}")
            text = text.replace(old, new)
        return source[:start] + text + source[stop:]


def blueprint_of(name: str) -> Blueprint:
    """A shipped blueprint, or one of `graphs_of_mutants`."""
    text = graphs_of_mutants.GRAPHS.get(name)
    return Blueprint.load(shipped()[name]) if text is None else Blueprint.from_text(text)


def dims_of(blueprint: Blueprint, dims: Mapping[str, int]) -> dict[str, int]:
    return {name: dims.get(name, SIZES[name]) for name in blueprint.dims}


def forged(mutant: Mutant) -> Forged:
    """The mutant compiled for this CPU, not committed: it says that it is the unbroken blueprint."""
    blueprint = blueprint_of(mutant.blueprint)

    def edited(*args: object) -> Blueprint:
        written = write(*args)  # type: ignore[arg-type]
        return written.model_copy(update={"source_text": mutant.edited(written.source_text)})

    target = parse_target("cpu")
    with mock.patch.object(planning, "write", edited):
        dims = dims_of(blueprint, mutant.dims)
        plan = planning.plan_build(blueprint, dims, mutant.dtype, target, "fast", Choice(tiles=tiles_for(target)))
    return forge(plan)


_LOAD_X = "x = tl.load(x_ptr + row * x_row_stride + d_in_at[None, :], mask=row_ok & d_in_ok, other=0.0)"
_BIAS = "linear + tl.load(bias_ptr + d_at[None, :], mask=d_ok, other=0.0)"
_OUT = "tl.store(out_ptr + row * out_row_stride + d_at[None, :], tl.where(alpha == 0.0, h, where), mask=row_ok & d_ok)"
_GELU = "gelu = linear_2 * (0.5 + (0.5 * tl.erf((linear_2 * 0.7071067811865476))))"
_TANH = "gelu = linear_2 * tl.sigmoid(1.5957691216057308 * (linear_2 + 0.044715 * linear_2 * linear_2 * linear_2))"


def _linear(
    name: str, *edits: tuple[str, str], kernel: str = "forward_rows", level: Level = "fast", **dims: int
) -> Mutant:
    return Mutant(name, "linear", kernel, edits, dims, level=level)


MUTANTS = (
    # ---- which rows and columns
    _linear("one row too many is written", ("row_ok = row < rows", "row_ok = row <= rows")),
    _linear("the last row is left out", ("row_ok = row < rows", "row_ok = row < rows - 1")),
    _linear("the last column is left out", ("(d_at < 48)", "(d_at < 47)")),
    _linear("one column too many is written", ("(d_at < 48)", "(d_at < 49)")),
    _linear("one element too many of x is read", ("(d_in_at < 24)", "(d_in_at < 25)")),
    _linear("the last element of x is not read", ("(d_in_at < 24)", "(d_in_at < 23)")),
    _linear("blocks overlap by a row", ("* BLOCK_ROWS +", "* (BLOCK_ROWS - 1) +")),
    _linear("only the first block is computed", ("tl.program_id(0).to(tl.int64) * BLOCK_ROWS +", "")),
    _linear("a single row is left out", ("row_ok = row < rows", "row_ok = (row < rows) & (rows != 1)")),
    _linear("an odd last row is left out", ("row_ok = row < rows", "row_ok = row < rows // 2 * 2 + (rows == 1)")),
    _linear("rows are counted in 32 bits", ("tl.program_id(0).to(tl.int64) * BLOCK_ROWS", "tl.program_id(0) * BLOCK_ROWS"),
            ("x_ptr + row * x_row_stride", "x_ptr + (row * x_row_stride).to(tl.int32)"), level="standard"),
    _linear("the output's address is counted in 32 bits",
            ("out_ptr + row * out_row_stride", "out_ptr + (row * out_row_stride).to(tl.int32)"), level="standard"),
    # ---- strides
    _linear("x has the stride of h", ("row * x_row_stride", "row * h_row_stride")),
    _linear("x is taken to be contiguous", ("row * x_row_stride", "row * 24")),
    _linear("h is taken to be contiguous", ("row * h_row_stride", "row * 48")),
    _linear("the output is taken to be contiguous", ("row * out_row_stride", "row * 48")),
    _linear("the gradient at the output is taken to be contiguous", ("row * grad_out_row_stride", "row * 48"),
            kernel="backward_rows"),
    _linear("a parameter's gradient takes x to be contiguous", ("row * x_row_stride", "row * 24"),
            kernel="backward_columns"),
    # ---- what is computed
    _linear("the bias is missing", (_BIAS, "linear")),
    _linear("the bias is subtracted", (_BIAS, _BIAS.replace("linear +", "linear -"))),
    _linear("all columns have the first one's bias", (_BIAS, "linear + tl.load(bias_ptr)")),
    _linear("the weight is transposed", ("d_at[:, None] * 24 + d_in_at[None, :]", "d_in_at[None, :] * 48 + d_at[:, None]")),
    _linear("the sum ends before its last block", ("range(0, 600, BLOCK_D_IN)", "range(0, 600 - BLOCK_D_IN, BLOCK_D_IN)"),
            d_in=600),
    _linear("the sum begins with what the second block has", ("range(0, 600, BLOCK_D_IN)", "range(BLOCK_D_IN, 600, BLOCK_D_IN)"),
            d_in=600),
    _linear("sums are kept in float16", (", linear, input_precision=\"ieee\")", ", linear, input_precision=\"ieee\").to(tl.float16).to(tl.float32)"),
            d_in=600),
    _linear("operands are rounded to bfloat16", (_LOAD_X, _LOAD_X + ".to(tl.bfloat16).to(tl.float32)")),
    _linear("sums of one column are off by a ten-thousandth", (_BIAS, "linear * tl.where(d_at[None, :] == 7, 1.0001, 1.0) + " + _BIAS.split(" + ", 1)[1])),
    _linear("results beyond a hundred are cut off", (_BIAS, "tl.minimum(" + _BIAS + ", 100.0)")),
    _linear("negative zeros and small numbers are taken for none", (_LOAD_X, _LOAD_X + "\n    x = tl.where(tl.abs(x) < 1e-9, 0.0, x)")),
    _linear("NaN is taken for zero", (_LOAD_X, _LOAD_X + "\n    x = tl.where(x == x, x, 0.0)")),
    _linear("infinity is taken for the largest number", (_BIAS, "tl.clamp(" + _BIAS + ", -3.4e38, 3.4e38)")),
    # ---- the blend
    _linear("alpha does nothing", ("(alpha * (linear_2 - h))", "(linear_2 - h)")),
    _linear("alpha is applied twice", ("(alpha * (linear_2 - h))", "(alpha * alpha * (linear_2 - h))")),
    _linear("a seed that is off is multiplied by 0", ("tl.where(alpha == 0.0, h, where)", "where")),
    _linear("at alpha 1 the host's output remains", ("tl.where(alpha == 1.0, linear_2,", "tl.where(alpha == 1.0, h,")),
    # ---- memory
    _linear("the output is never written", (_OUT, "pass")),
    _linear("the output is read before it is written", ("tl.load(h_ptr + row * h_row_stride", "tl.load(out_ptr + row * out_row_stride")),
    _linear("x is overwritten", (_OUT, _OUT + "\n    tl.store(x_ptr + row * x_row_stride + d_in_at[None, :], x * 0.5, mask=row_ok & d_in_ok)")),
    _linear("h is overwritten where the seed is off", (_OUT, _OUT + "\n    tl.store(h_ptr + row * h_row_stride + d_at[None, :], where, mask=row_ok & d_ok & (alpha == 0.0))")),
    _linear("a parameter is overwritten", (_OUT, _OUT + "\n    tl.store(bias_ptr + d_at[None, :], 0.0, mask=d_ok)")),
    _linear("the row before the output is written", (_OUT, _OUT + "\n    tl.store(out_ptr - 1 + tl.arange(0, 1), 0.0)")),
    _linear("rows of another program are written first",
            ("    alpha = tl.load(alpha_ptr)", "    alpha = tl.load(alpha_ptr)\n    tl.store(out_ptr + (row + BLOCK_ROWS) * out_row_stride + d_at[None, :], alpha, mask=(row + BLOCK_ROWS < rows) & d_ok)")),
    _linear("programs add to one another's output",
            (_OUT, _OUT + "\n    tl.store(out_ptr + d_at[None, :], tl.load(out_ptr + d_at[None, :], mask=d_ok, other=0.0) + 1e-3, mask=d_ok & (tl.program_id(0) == 1))")),
    # ---- gradients
    _linear("the gradient at x lacks alpha", ("(alpha * grad_out)", "grad_out"), kernel="backward_rows"),
    _linear("the gradient at x is never written", ("mask=row_ok & d_in_ok)", "mask=row_ok & d_in_ok & (alpha < 0.0))"), kernel="backward_rows"),
    _linear("the gradient at x goes on where the seed is off", ("tl.where(alpha == 0.0, 0.0, linear)", "linear + tl.where(alpha == 0.0, 1.0, 0.0)"), kernel="backward_rows"),
    _linear("the gradient of a square weight is transposed", ("tl.dot(tl.trans(mul_2), x,", "tl.dot(tl.trans(x), mul_2,"), kernel="backward_columns", d_in=48),
    _linear("a sum over rows ends with its last whole block", ("range(0, rows, DEPTH)", "range(0, rows // DEPTH * DEPTH, DEPTH)"), kernel="backward_columns"),
    _linear("a sum over rows is kept in float16", ("input_precision=\"ieee\")", "input_precision=\"ieee\").to(tl.float16).to(tl.float32)"), kernel="backward_columns"),
    _linear("the bias's gradient is a mean", ("grad_bias += tl.sum(tl.where(row_ok & d_ok, mul, 0.0), axis=0, keep_dims=True)",
            "grad_bias += tl.sum(tl.where(row_ok & d_ok, mul, 0.0), axis=0, keep_dims=True) / rows"), kernel="backward_columns"),
    _linear("programs race for the bias's gradient",
            ("tl.where(alpha == 0.0, 0.0, grad_bias), mask=d_ok & (tl.program_id(1) == 0))", "tl.where(alpha == 0.0, 0.0, grad_bias + tl.program_id(1) * 1e-2), mask=d_ok)"),
            kernel="backward_columns", d_in=300),
    # ---- of so many parameters that calls are drawn about fewer numbers
    _linear("a wide layer's output is taken to be contiguous", ("row * out_row_stride", "row * 260"), d_in=256, d=260),
    _linear("a wide layer's gradient is right at alpha 1 alone", ("mul = alpha * grad_out", "mul = grad_out"), kernel="backward_columns", d_in=256, d=260),
    _linear("one gradient of a wide weight is off by a thousandth", ("0.0, grad_weight)", "0.0, grad_weight * tl.where((d_at[:, None] == 200) & (d_in_at[None, :] == 100), 1.001, 1.0))"),
            kernel="backward_columns", d_in=256, d=260),
    _linear("a wide layer's sum over rows ends with its first block", ("row_ok = row < rows", "row_ok = row < tl.minimum(rows, DEPTH)"), kernel="backward_columns", d_in=256, d=260),
    # ---- norms
    Mutant("epsilon is a hundred times as large", "layernorm", "forward_rows", (("1e-05", "1e-03"),)),
    Mutant("epsilon is missing", "layernorm", "forward_rows", (("1e-05", "0.0"),)),
    Mutant("the mean is of the block, not of the row", "layernorm", "forward_rows", (("(rsum * 0.020833333333333332)", "(rsum / BLOCK_D)"),)),
    Mutant("the mean is not subtracted", "layernorm", "forward_rows", (("sub = x - (rsum * 0.020833333333333332)", "sub = x"),)),
    Mutant("what is beyond the row counts for the variance", "layernorm", "forward_rows", (("tl.where(d_ok, (sub * sub), 0.0)", "sub * sub"),)),
    Mutant("the gradient of the mean is missing", "layernorm", "backward_rows", (("(mul - (rsum_2 * 0.020833333333333332))", "mul"),)),
    Mutant("the gradient of the variance is missing", "layernorm", "backward_rows", (("- (mul_4 * (rsum * 0.020833333333333332))", ""),)),
    Mutant("a gradient is not scaled by the deviation", "layernorm", "backward_rows", (("(rsqrt * sub)", "sub"),)),
    Mutant("the weight's gradient is of x", "layernorm", "backward_columns", (("(mul * ((x - mul_2) * tl.rsqrt((mul_3 + 1e-05))))", "(mul * x)"),)),
    Mutant("the last row's deviation is not kept", "layernorm", "forward_rows", (("tl.store(rsum_kept_2_ptr + row, rsum_2, mask=row_ok)", "tl.store(rsum_kept_2_ptr + row, rsum_2, mask=row < rows - 1)"),)),
    # ---- products of products
    Mutant("gelu is the tanh's, not the error function's", "bottleneck_adapter", "forward_rows", ((_GELU, _TANH),)),
    Mutant("gelu's derivative lacks a term", "bottleneck_adapter", "backward_rows", (("(add + (linear_2 * mul_2))", "add"),)),
    Mutant("gelu's derivative has a sign wrong", "bottleneck_adapter", "backward_rows", (("(add + (linear_2 * mul_2))", "(add - (linear_2 * mul_2))"),)),
    Mutant("the residual is missing", "bottleneck_adapter", "forward_rows", (("(h + (alpha * linear_4))", "(alpha * linear_4)"),)),
    Mutant("the residual's gradient is missing", "bottleneck_adapter", "backward_rows", (("(grad_out + linear_3)", "linear_3"),)),
    Mutant("a kept product has its bias already", "bottleneck_adapter", "forward_rows", (("r_at[None, :], linear, mask", "r_at[None, :], linear_2, mask"),)),
    Mutant("the inner gradient skips the activation", "bottleneck_adapter", "backward_rows", (("r_at[None, :], mul_3, mask", "r_at[None, :], linear, mask"),)),
    Mutant("a gradient is taken from the wrong tensor", "lora", "backward_columns_2", (("tl.load(linear_kept_2_ptr", "tl.load(linear_kept_ptr"), ("    linear_kept_2_ptr,", "    linear_kept_2_ptr, linear_kept_ptr,"))),
    Mutant("the wrong half is gated", "swiglu_ffn", "forward_rows", (("silu = linear * tl.sigmoid(linear)", "silu = linear_2 * tl.sigmoid(linear_2)"), ("mul = silu * linear_2", "mul = silu * linear"))),
    Mutant("sigmoid's derivative lacks a factor", "swiglu_ffn", "backward_rows", (("(sigmoid * (1.0 - sigmoid))", "sigmoid"),)),
    # ---- scales
    Mutant("the factor is applied twice", "channel_scale", "forward_rows", (("mul = factor * h", "mul = factor * factor * h"),)),
    Mutant("the host's share of a gradient is whole", "channel_scale", "backward_rows", (("((1.0 - alpha) * grad_out)", "grad_out"),)),
    Mutant("a gradient lacks alpha", "channel_scale", "backward_columns", (("mul = alpha * grad_out", "mul = grad_out"),)),
    # ---- positions
    Mutant("the mean of an item is its sum", "squeeze_excite", "forward_rows", (("pool_mean = pool_sum_kept / positions", "pool_mean = pool_sum_kept"),)),
    Mutant("the sum over an item ends early", "squeeze_excite", "forward_pool_sum", (("row_ok = position < length", "row_ok = position < length - 1"),)),
    Mutant("an item has its neighbour's gate", "squeeze_excite", "forward_rows_2", (("(row.to(tl.int32) // length)", "((row.to(tl.int32) + 1) // length)"),)),
    Mutant("an image's left edge has the row before", "conv3x3", "forward_rows", (("ok_m1 = row_ok & (x_at >= 1)", "ok_m1 = row_ok & (row >= 1)"),)),
    Mutant("an image's top has the image before", "conv3x3", "forward_rows", (("ok_m1_p0 = row_ok & (y >= 1)", "ok_m1_p0 = row_ok & (row >= image_width)"),)),
    Mutant("two taps of a convolution are swapped", "conv3x3", "forward_rows", (("weight_ptr + 3 +", "weight_ptr + 0 + 5 +"), ("weight_ptr + 5 +", "weight_ptr + 3 +"))),
    Mutant("a convolution's gradient is not turned over", "conv3x3", "backward_rows", (("weight_ptr + 8 +", "weight_ptr + 0 * 8 +"),)),
    # ---- attention
    Mutant("scores are not scaled", "multi_head_attention", "forward_attention", (("* 0.2886751345948129", ""),)),
    Mutant("keys beyond an item count", "multi_head_attention", "forward_attention", (("tl.where((keys[None, :] < length), scores, float('-inf'))", "scores"),)),
    Mutant("the largest score is not subtracted", "multi_head_attention", "forward_attention", (("higher = tl.maximum(most, tl.max(scores, axis=1))", "higher = most * 0.0"), ("most = tl.full([BLOCK_POSITIONS], float('-inf')", "most = tl.full([BLOCK_POSITIONS], 0.0"))),
    Mutant("heads have each other's values", "multi_head_attention", "forward_attention", (("* 144 + 96 + head * 12", "* 144 + 96 + (head ^ 1) * 12"),)),
    Mutant("all items are the first one", "multi_head_attention", "forward_attention", (("base = (tl.program_id(1) // 4).to(tl.int64) * length", "base = (tl.program_id(1) // 4).to(tl.int64) * 0"),)),
    Mutant("softmax's derivative lacks a term", "multi_head_attention", "backward_attention_grad", (("(rise - delta[:, None])", "rise"),)),
    # ---- dropout
    Mutant("the dropout seed is ignored", "dropped", "forward_rows", (("tl.load(dropout_seed_ptr)", "0"),)),
    Mutant("what is kept is not scaled up", "dropped", "forward_rows", (("1.3333333333333333", "1.0"),)),
    Mutant("eval mode drops too", "dropped", "forward_rows", (("training != 0", "training != 7"),)),
)  # fmt: skip
