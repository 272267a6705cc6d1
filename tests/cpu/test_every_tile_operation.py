"""Every operation on whole tiles, on every type that it accepts: reductions, scans, sorting, and what moves elements.

Sums and products are of numbers so small that they are exact in whatever order they are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from drawn_tiles import (
    BF16,
    ELEMENTS,
    F32,
    F64,
    INTS,
    UINTS,
    Element,
    as_tensor,
    as_values,
    assert_same,
    converted,
    values,
    wrapped,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from releases import RELEASE

# Not shrinking: every step of it would compile, and a failure tells the operation and its operand.
PHASES = (Phase.reuse, Phase.generate)


_REORDERS = tl.constexpr(RELEASE < (3, 9))  # since then tl.cat keeps the order


@triton.jit
def _last_set(a, b):
    """Associative, and not commutative: what scans may rely on, and reductions may not."""
    return tl.where(b != 0, b, a)


@triton.jit
def _apply(OP: tl.constexpr, x, index, AXIS: tl.constexpr, KEEP: tl.constexpr, HALF: tl.constexpr, TWICE: tl.constexpr):
    if OP == "sum":
        r = tl.sum(x, AXIS, keep_dims=KEEP)
    elif OP == "sum_all":
        r = tl.sum(x, None, keep_dims=True)
    elif OP == "sum_as":
        r = tl.sum(x, AXIS, keep_dims=KEEP, dtype=tl.float64)
    elif OP == "max":
        r = tl.max(x, AXIS, keep_dims=KEEP)
    elif OP == "min":
        r = tl.min(x, AXIS, keep_dims=KEEP)
    elif OP == "max_all":
        r = tl.max(x, None, keep_dims=True)
    elif OP == "argmax":
        r = tl.argmax(x, AXIS, keep_dims=KEEP)
    elif OP == "argmin":
        r = tl.argmin(x, AXIS, keep_dims=KEEP)
    elif OP == "max_at_any":
        _, at = tl.max(x, AXIS, return_indices=True, return_indices_tie_break_left=False, keep_dims=True)
        r = tl.gather(x, at, AXIS)
    elif OP == "min_at_any":
        _, at = tl.min(x, AXIS, return_indices=True, return_indices_tie_break_left=False, keep_dims=True)
        r = tl.gather(x, at, AXIS)
    elif OP == "xor_sum":
        r = tl.xor_sum(x, AXIS, keep_dims=KEEP)
    elif OP == "reduce_or":
        r = tl.reduce_or(x, AXIS, keep_dims=KEEP)
    elif OP == "cumsum":
        r = tl.cumsum(x, AXIS)
    elif OP == "cumsum_reverse":
        r = tl.cumsum(x, AXIS, reverse=True)
    elif OP == "cumprod":
        r = tl.cumprod(x, AXIS)
    elif OP == "scan":
        r = tl.associative_scan(x, AXIS, _last_set)
    elif OP == "scan_reverse":
        r = tl.associative_scan(x, AXIS, _last_set, reverse=True)
    elif OP == "sort":
        r = tl.sort(x)
    elif OP == "sort_descending":
        r = tl.sort(x, descending=True)
    elif OP == "topk":
        r = tl.topk(x, HALF)
    elif OP == "flip":
        r = tl.flip(x, AXIS)
    elif OP == "gather":
        r = tl.gather(x, index, AXIS)
    elif OP == "histogram":
        r = tl.histogram(x & 7, 8)
    elif OP == "trans":
        r = tl.trans(x)
    elif OP == "permute":
        r = tl.permute(x, (2, 0, 1))
    elif OP == "ravel":
        r = tl.ravel(x)
    elif OP == "view":
        r = x.reshape((x.numel // HALF, HALF))
    elif OP == "join":
        r = tl.join(x, x)
    elif OP == "split":
        _, r = tl.split(tl.reshape(x, (x.numel // 2, 2)))
    elif OP == "interleave":
        r = tl.interleave(x, x)
    elif OP == "cat":
        r = tl.cat(x, x, can_reorder=_REORDERS)
    elif OP == "expand":
        r = tl.broadcast_to(tl.expand_dims(x, 0), TWICE)
    return r


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["x_ptr"])
def _whole_tiles(
    x_ptr, index_ptr, mask_ptr, outs, stride, OPS: tl.constexpr, SHAPE: tl.constexpr, TOTAL: tl.constexpr,
    AXIS: tl.constexpr, KEEP: tl.constexpr, HALF: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, TOTAL)
    x = tl.reshape(tl.load(x_ptr + at * stride, mask=tl.load(mask_ptr + at), other=0.0), SHAPE)
    index = tl.reshape(tl.load(index_ptr + at), SHAPE)
    for k in tl.static_range(len(OPS)):
        r = _apply(tl.constexpr(OPS[k]), x, index, AXIS, KEEP, HALF, TWICE)
        if len(r.shape) == 0:
            tl.store(outs[k], r)
        else:
            tl.store(outs[k] + tl.arange(0, r.numel), tl.reshape(r, (r.numel,)))


Values = np.ndarray
INDEX = Element("int", 32, torch.int32, tl.int32)  # the type of results that are not made of the operand's elements


@dataclass(frozen=True)
class Whole:
    """An operation on a whole tile.

    Attributes:
        expected: of x, its axis, and an index of its shape. accepts: a type. fits: a rank and a number of elements.
        result: the type that it has then. operand: "any" numbers, "ordered" ones without NaN, "small" ones to add, or
            "signs" to multiply.
    """

    expected: Callable[[Values, int, Values, Element], Values]
    accepts: Callable[[Element], bool] = lambda element: True
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: True
    result: Callable[[Element], Element] = lambda element: element
    operand: str = "any"


def is_integer(element: Element) -> bool:
    return not element.is_float


def is_standard(element: Element) -> bool:
    return element.kind != "fp8"


def fits_float64(element: Element) -> bool:
    return element.kind == "float" or (not element.is_float and element.bits <= 32)


def is_number_of_a_byte_or_more(element: Element) -> bool:
    return element.bits >= 8


def of_sum(element: Element) -> Element:
    """Integers of less than 32 bits are added in 32."""
    if element.is_float or element.bits >= 32:
        return element
    return INTS[2] if element.kind == "int" else UINTS[2]


def of_cumulative_sum(element: Element) -> Element:
    return F32 if element == BF16 else of_sum(element)


def of_product(element: Element) -> Element:
    return F32 if element == BF16 else element


def of_maximum(element: Element) -> Element:
    if element.bits >= 32:
        return element
    return F32 if element.is_float else INTS[2]


def folded(f: Callable[[Values, Values], Values], *, keep_all: bool, reverse: bool = False) -> Callable[..., Values]:
    """Elements along an axis put together one by one, in integers of Python or in float64."""

    def expected(x: Values, axis: int, index: Values, t: Element) -> Values:
        rows = np.moveaxis(x if t.is_float else x.astype(object), axis, 0)
        rows = rows[::-1] if reverse else rows
        results = [rows[0]]
        for row in rows[1:]:
            results.append(f(results[-1], row))
        folded = results[-1]
        if keep_all:
            stacked = np.stack([np.asarray(row, rows.dtype) for row in results])
            folded = np.moveaxis(stacked[::-1] if reverse else stacked, 0, axis)
        folded = np.asarray(folded)
        return folded.astype(np.float64) if t.is_float else wrapped([int(n) for n in folded.flat], t, folded.shape)

    return expected


def last_set(a: Values, b: Values) -> Values:
    return np.where(b != 0, b, a)


def over_all(f: Callable[[Values], Values]) -> Callable[..., Values]:
    return lambda x, axis, index, t: np.reshape(f(x.reshape(-1)), (1,))


def kept(f: Callable[..., Values]) -> Callable[..., Values]:
    return lambda x, axis, index, t: f(x, axis=axis, keepdims=True)


def sums(x: Values, axis: int, index: Values, t: Element) -> Values:
    return folded(lambda a, b: a + b, keep_all=False)(x, axis, index, t)


def sum_of_all(x: Values, axis: int, index: Values, t: Element) -> Values:
    return sums(x.reshape(-1), 0, index, t).reshape(1)


def rank(*ranks: int) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: len(shape) in ranks


def has_histogram(t: Element) -> bool:
    """Of integers; since Triton 3.9 of those of 32 bits only."""
    return not t.is_float and (t.bits == 32 if RELEASE >= (3, 9) else t.bits >= 8)


OPERATIONS: dict[str, Whole] = {
    "sum": Whole(sums, is_standard, result=of_sum, operand="small"),
    "sum_all": Whole(sum_of_all, is_standard, result=of_sum, operand="small"),
    "sum_as": Whole(lambda x, axis, index, t: x.sum(axis), fits_float64, result=lambda t: F64,
                    operand="small"),
    "max": Whole(lambda x, axis, index, t: np.fmax.reduce(x, axis=axis), result=of_maximum, operand="nonzero"),
    "min": Whole(lambda x, axis, index, t: np.fmin.reduce(x, axis=axis), result=of_maximum, operand="nonzero"),
    "max_all": Whole(over_all(np.fmax.reduce), result=of_maximum, operand="nonzero"),
    "argmax": Whole(lambda x, axis, index, t: x.argmax(axis), result=lambda t: INDEX, operand="ordered"),
    "argmin": Whole(lambda x, axis, index, t: x.argmin(axis), result=lambda t: INDEX, operand="ordered"),
    "max_at_any": Whole(kept(np.max), operand="ordered"),
    "min_at_any": Whole(kept(np.min), operand="ordered"),
    "xor_sum": Whole(folded(lambda a, b: a ^ b, keep_all=False), is_integer),
    "reduce_or": Whole(folded(lambda a, b: a | b, keep_all=False), is_integer),
    "cumsum": Whole(folded(lambda a, b: a + b, keep_all=True), is_standard, result=of_cumulative_sum, operand="small"),
    "cumsum_reverse": Whole(folded(lambda a, b: a + b, keep_all=True, reverse=True), is_standard,
                            result=of_cumulative_sum, operand="small"),
    "cumprod": Whole(folded(lambda a, b: a * b, keep_all=True), is_standard, result=of_product, operand="signs"),
    "scan": Whole(folded(last_set, keep_all=True), is_standard),
    "scan_reverse": Whole(folded(last_set, keep_all=True, reverse=True), is_standard),
    "sort": Whole(lambda x, axis, index, t: np.sort(x, -1), is_number_of_a_byte_or_more, operand="ordered"),
    "sort_descending": Whole(lambda x, axis, index, t: np.sort(x, -1)[..., ::-1], is_number_of_a_byte_or_more,
                             operand="ordered"),
    "topk": Whole(lambda x, axis, index, t: np.sort(x, -1)[..., ::-1][..., : max(x.shape[-1] // 2, 1)],
                  is_number_of_a_byte_or_more, lambda shape: np.prod(shape[:-1]) * (shape[-1] // 2) > 1,
                  of_maximum, "ordered"),
    "flip": Whole(lambda x, axis, index, t: np.flip(x, axis), is_number_of_a_byte_or_more, lambda shape: shape != (1,)),
    "gather": Whole(lambda x, axis, index, t: np.take_along_axis(x, index.astype(np.int64), axis)),
    "histogram": Whole(lambda x, axis, index, t: np.bincount((x & 7).astype(np.int64), minlength=8),
                       has_histogram, rank(1), lambda t: INDEX),
    "trans": Whole(lambda x, axis, index, t: x.T, fits=rank(2)),
    "permute": Whole(lambda x, axis, index, t: x.transpose(2, 0, 1), fits=rank(3)),
    "ravel": Whole(lambda x, axis, index, t: x),
    "view": Whole(lambda x, axis, index, t: x),
    "join": Whole(lambda x, axis, index, t: np.stack([x, x], -1)),
    "split": Whole(lambda x, axis, index, t: x.reshape(-1)[1::2], fits=lambda shape: np.prod(shape) > 1),
    "interleave": Whole(lambda x, axis, index, t: np.repeat(x, 2, -1)),
    "cat": Whole(lambda x, axis, index, t: np.concatenate([x, x]), fits=rank(1)),
    "expand": Whole(lambda x, axis, index, t: np.stack([x, x])),
}  # fmt: skip


def operand(rng: np.random.Generator, kind: str, element: Element, total: int) -> Values:
    if kind == "signs" and element.is_float:
        return rng.choice([1.0, -1.0], total)
    if kind == "small" and element.is_float:
        return rng.integers(-1, 2, total).astype(np.float64)
    x = values(rng, element, total)
    if kind in ("ordered", "nonzero") and element.is_float:
        x = x + 0.0  # which of two zeros a comparison prefers is left open
        if kind == "ordered":
            x = np.where(np.isnan(x), 1.0, x)
        # So that there are equal ones.
        x = np.where(rng.random(total) < 0.3, rng.choice(x, total), x)
    return x


OPERANDS = ("any", "ordered", "nonzero", "small", "signs")
BATCH = 3  # sets of values that each compiled kernel is run on


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@given(
    shape=st.sampled_from([(1,), (2,), (16,), (64,), (1, 8), (4, 1), (8, 16), (2, 32), (2, 4, 8), (4, 1, 2)]),
    kind=st.sampled_from(OPERANDS),
    axis=st.integers(0, 2),
    keep=st.booleans(),
    stride=st.sampled_from([1, 1, 2, -1, -3]),
    index_type=st.sampled_from([INTS[0], UINTS[0], INTS[2], INTS[3]]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=7, deadline=None, phases=PHASES)
def test_every_operation_on_a_whole_tile(element, shape, kind, axis, keep, stride, index_type, seed):
    check(element, shape, kind, axis, keep, stride, index_type, seed)


@np.errstate(all="ignore")  # numpy warns of signalling NaN
def check(
    element: Element, shape: tuple[int, ...], kind: str, axis: int, keep: bool, stride: int, index_type: Element,
    seed: int,
) -> None:  # fmt: skip
    """Run a kernel of all operations that fit, on several sets of values, and compare."""
    rng, axis, total = np.random.default_rng(seed), axis % len(shape), int(np.prod(shape))
    names = [name for name, op in OPERATIONS.items() if op.operand == kind and op.accepts(element) and op.fits(shape)]
    results = [OPERATIONS[name].result(element) for name in names]
    for _ in range(BATCH):
        x = operand(rng, kind, element, total)
        mask = rng.random(total) < 0.8
        index = rng.integers(0, shape[axis], shape).astype(index_type.numpy)
        memory = np.ones(abs(stride) * (total - 1) + 1, dtype=element.numpy)
        start = 0 if stride > 0 else memory.size - 1
        memory[start + stride * np.arange(total)] = x
        given_x = np.where(mask, x, np.zeros((), x.dtype)).reshape(shape)
        expected = []
        for name, result in zip(names, results, strict=True):
            source = element if result is INDEX else result
            expected.append(OPERATIONS[name].expected(converted(given_x, element, source), axis, index, source))
        outs = [as_tensor(np.ones(e.size, dtype=r.numpy), r) for e, r in zip(expected, results, strict=True)]
        _whole_tiles[(1,)](
            as_tensor(memory, element)[start:], as_tensor(index, index_type), torch.from_numpy(mask), tuple(outs),
            stride, OPS=tuple(names), SHAPE=shape, TOTAL=total, AXIS=axis, KEEP=keep, HALF=max(shape[-1] // 2, 1),
            TWICE=(2, *shape),
        )  # fmt: skip
        for name, result, out, right in zip(names, results, outs, expected, strict=True):
            assert_same(as_values(out, result), right.reshape(-1).astype(result.numpy), f"{name} of {element} {shape}")


@triton.jit
def _smooth(
    x_ptr, softmax_ptr, sigmoid_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    if KEEP:  # since Triton 3.9 they are kept in any case
        softmax = tl.softmax(x, AXIS, keep_dims=True)
    else:
        softmax = tl.softmax(x, AXIS)
    tl.store(softmax_ptr + at, softmax)
    tl.store(sigmoid_ptr + at, tl.sigmoid(x))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)])
@given(
    m=st.sampled_from([1, 4, 32]), n=st.sampled_from([1, 2, 64]), axis=st.sampled_from([0, 1]), seed=st.integers(0, 999)
)
@settings(max_examples=6, deadline=None, phases=PHASES)
def test_softmax_and_sigmoid(dtype, eps, m, n, axis, seed):
    x = np.random.default_rng(seed).uniform(-8, 8, (m, n)).astype(np.float32)
    softmax, sigmoid = torch.zeros((m, n), dtype=dtype), torch.zeros((m, n), dtype=dtype)
    _smooth[(1,)](torch.from_numpy(x).to(dtype), softmax, sigmoid, M=m, N=n, AXIS=axis, KEEP=RELEASE < (3, 9))
    exact = np.exp(x.astype(np.longdouble) - x.max(axis, keepdims=True))
    # Differences of up to 16 are off by half a unit, exponentials by two, and sums of 64 by 63 halves at most.
    bound = (16 + 2 * 4 + 64) * eps
    np.testing.assert_allclose(softmax.double(), exact / exact.sum(axis, keepdims=True), rtol=bound, atol=0)
    np.testing.assert_allclose(sigmoid.double(), 1 / (1 + np.exp(-x.astype(np.longdouble))), rtol=8 * eps, atol=0)
