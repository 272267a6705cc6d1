"""Every element-wise operation on every type that it accepts, mixed or not, over drawn shapes, strides and masks.

Expected values come from Python's integers, from fractions, and from float64 rounded once. That is exact: sums,
products, quotients and square roots of numbers of 24 bits or fewer, rounded to 53 bits and then to theirs, are as if
rounded once. Division by zero is an exception, and its tests are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from drawn_tiles import (
    BF16,
    BOOL,
    ELEMENTS,
    F16,
    F32,
    F64,
    FLOATS,
    INTEGERS,
    INTS,
    Element,
    Layout,
    as_tensor,
    as_values,
    assert_same,
    converted,
    layouts,
    rounded,
    rounded_exactly,
    shapes,
    truncated,
    values,
    wrapped,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from releases import RELEASE

PHASES = (
    Phase.reuse,
    Phase.generate,
)  # not shrinking: every step of it would compile, and a failure tells the operands


@triton.jit
def _apply(OP: tl.constexpr, x, y, z, TO: tl.constexpr):
    if OP == "add":
        r = x + y
    elif OP == "sub":
        r = x - y
    elif OP == "mul":
        r = x * y
    elif OP == "truediv":
        r = x / y
    elif OP == "less":
        r = x < y
    elif OP == "less_equal":
        r = x <= y
    elif OP == "greater":
        r = x > y
    elif OP == "greater_equal":
        r = x >= y
    elif OP == "equal":
        r = x == y
    elif OP == "not_equal":
        r = x != y
    elif OP == "maximum":
        r = tl.maximum(x, y)
    elif OP == "minimum":
        r = tl.minimum(x, y)
    elif OP == "maximum_nan":
        r = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "minimum_nan":
        r = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "where":
        r = tl.where(x > y, x, y)
    elif OP == "floordiv":
        r = x // y
    elif OP == "mod":
        r = x % y
    elif OP == "cdiv":
        r = tl.cdiv(x, y)
    elif OP == "and":
        r = x & y
    elif OP == "or":
        r = x | y
    elif OP == "xor":
        r = x ^ y
    elif OP == "shl":
        r = x << y
    elif OP == "shr":
        r = x >> y
    elif OP == "umulhi":
        r = tl.umulhi(x, y)
    elif OP == "fdiv":
        r = tl.fdiv(x, y)
    elif OP == "div_rn":
        r = tl.div_rn(x, y)
    elif OP == "fma":
        r = tl.fma(x, y, z)
    elif OP == "clamp":
        r = tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z))
    elif OP == "clamp_nan":
        r = tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z), propagate_nan=tl.PropagateNan.ALL)
    elif OP == "sqrt":
        r = tl.sqrt(x)
    elif OP == "sqrt_rn":
        r = tl.sqrt_rn(x)
    elif OP == "floor":
        r = tl.floor(x)
    elif OP == "ceil":
        r = tl.ceil(x)
    elif OP == "neg":
        r = -x
    elif OP == "abs":
        r = tl.abs(x)
    elif OP == "invert":
        r = ~x
    elif OP == "add_one":
        r = x + 1
    elif OP == "times_tenth":
        r = x * 0.1
    elif OP == "cast":
        r = x.to(TO)
    elif OP == "cast_rtz":
        r = x.to(TO, fp_downcast_rounding="rtz")
    elif OP == "bitcast":
        r = x.to(TO, bitcast=True)
    return r


@triton.jit
def _at(row, column, M: tl.constexpr, N: tl.constexpr):
    if N == 0:
        at = row * 0
    elif M == 0:
        at = tl.arange(0, N) * column
    else:
        at = tl.arange(0, M)[:, None] * row + tl.arange(0, N)[None, :] * column
    return at


STRIDES = [f"{name}_{axis}" for name in ("x", "y", "z", "out") for axis in ("row", "column")]


@triton.jit(
    do_not_specialize=STRIDES, do_not_specialize_on_alignment=["x_ptr", "y_ptr", "z_ptr", "read_ptr", "write_ptr"]
)
def _elementwise(
    x_ptr, y_ptr, z_ptr, read_ptr, write_ptr, outs, x_row, x_column, y_row, y_column, z_row, z_column, out_row,
    out_column, OPS: tl.constexpr, TO: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    flat = _at(N, 1, M, N)
    read, write = tl.load(read_ptr + flat), tl.load(write_ptr + flat)
    x = tl.load(x_ptr + _at(x_row, x_column, M, N), mask=read, other=1.0)
    y = tl.load(y_ptr + _at(y_row, y_column, M, N), mask=read, other=1.0)
    z = tl.load(z_ptr + _at(z_row, z_column, M, N), mask=read, other=1.0)
    for k in tl.static_range(len(OPS)):
        tl.store(outs[k] + _at(out_row, out_column, M, N), _apply(tl.constexpr(OPS[k]), x, y, z, TO), mask=write)


Values = np.ndarray
Reference = Callable[[Values, Values, Values, Element], Values]


@dataclass(frozen=True)
class Operation:
    """An operation.

    Attributes:
        accepts: whether it takes operands of these two types. result: the type that it has then.
        expected: of x, y, z, which are of the type `operand`, and of that type.
        operand: what operands are converted to. nonzero: y must not be zero.
    """

    accepts: Callable[[Element, Element], bool]
    expected: Reference
    operand: Callable[[Element, Element], Element]
    result: Callable[[Element], Element] = lambda element: element
    nonzero: bool = False


def promoted(a: Element, b: Element, division: bool = False) -> Element | None:
    """The type that an operation on two types is done in, if there is one."""
    for wide in (F64, F32):
        if wide in (a, b):
            return wide
    if F16 in (a, b):
        return F32 if division else F16
    if BF16 in (a, b):
        return BF16 if a == b and not division else F32
    if "fp8" in (a.kind, b.kind):
        if a.kind != b.kind:
            return None
        return a if a == b else F16
    signed = [e.kind == "int" for e in (a, b)]
    if signed[0] == signed[1]:
        return a if a.bits >= b.bits else b
    unsigned, other = (b, a) if signed[0] else (a, b)
    return unsigned if unsigned.bits >= other.bits else other


def any_two(a: Element, b: Element) -> bool:
    return promoted(a, b) is not None


def standard(a: Element, b: Element) -> bool:
    return any_two(a, b) and "fp8" not in (a.kind, b.kind)


def integers(a: Element, b: Element) -> bool:
    return not a.is_float and not b.is_float


def same_sign(a: Element, b: Element) -> bool:
    return integers(a, b) and (a.kind == "int") == (b.kind == "int")


def same_integers(a: Element, b: Element) -> bool:
    return integers(a, b) and a == b


def one_of(*elements: Element) -> Callable[[Element, Element], bool]:
    return lambda a, b: a == b and a in elements


def exact(f: Callable[..., int]) -> Reference:
    """An operation on Python's integers, wrapped."""
    return lambda x, y, z, t: wrapped([f(int(p), int(q)) for p, q in zip(x.flat, y.flat, strict=True)], t, x.shape)


def arithmetic(of_floats: Callable[..., Values], of_integers: Callable[..., int]) -> Reference:
    def expected(x: Values, y: Values, z: Values, t: Element) -> Values:
        return rounded(of_floats(x, y), t) if t.is_float else exact(of_integers)(x, y, z, t)

    return expected


def compared(f: Callable[..., Values]) -> Operation:
    return Operation(any_two, lambda x, y, z, t: f(x, y).astype(np.uint8), promoted, lambda t: BOOL)


def larger(x: Values, y: Values, *, propagate: bool) -> Values:
    """-0 is below +0. NaN is preferred where it is propagated, and else whatever is not NaN."""
    chosen = np.where((x > y) | ((x == y) & np.signbit(y.astype(float))), x, y)
    if x.dtype != np.float64:
        return chosen
    if propagate:
        return np.where(np.isnan(x) | np.isnan(y), np.nan, chosen)
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, chosen))


def smaller(x: Values, y: Values, *, propagate: bool) -> Values:
    if x.dtype == np.float64:
        return -larger(-x, -y, propagate=propagate)
    return np.where(x < y, x, y)


def clamped(x: Values, y: Values, z: Values, *, propagate: bool) -> Values:
    low, high = smaller(y, z, propagate=False), larger(y, z, propagate=False)
    return smaller(larger(x, low, propagate=propagate), high, propagate=propagate)


def quotient(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def ceiling(x: Values, y: Values, z: Values, t: Element) -> Values:
    """By its definition, whose sum wraps."""
    above = exact(lambda a, b: a + b - 1)(x, y, z, t)
    return exact(quotient)(above, y, z, t)


def shifted_left(x: Values, y: Values, z: Values, t: Element) -> Values:
    return exact(lambda a, n: a << n if 0 <= n < t.bits else 0)(x, y, z, t)


def shifted_right(x: Values, y: Values, z: Values, t: Element) -> Values:
    return exact(lambda a, n: a >> n if 0 <= n < t.bits else -int(a < 0))(x, y, z, t)


def high_half(x: Values, y: Values, z: Values, t: Element) -> Values:
    return exact(lambda a, b: (a % 2**t.bits) * (b % 2**t.bits) >> t.bits)(x, y, z, t)


def fused(x: Values, y: Values, z: Values, t: Element) -> Values:
    results = []
    for a, b, c in zip(x.flat, y.flat, z.flat, strict=True):
        plain = a * b + c
        if np.isfinite([a, b]).all() and not np.isfinite(c):  # the product may be too large for float64, and is none
            plain = c
        elif np.isfinite([a, b, c]).all():
            number = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
            # Exactly zero, all factors are zero or it is +0: either way the sign is what separate operations give,
            # unless the product is too small for them.
            plain = rounded_exactly(number, t) if number else (plain if 0 in (a, b) else 0.0)
        results.append(plain)
    return np.array(results).reshape(x.shape)


def whole(f: Callable[..., Values]) -> Operation:
    return Operation(one_of(F32, F64), lambda x, y, z, t: f(x), promoted)


def remainder(x: Values, y: Values, z: Values, t: Element) -> Values:
    """With the sign of the dividend, as C's `fmod`."""
    return rounded(np.fmod(x, y), t) if t.is_float else exact(lambda a, b: a - b * quotient(a, b))(x, y, z, t)


def by_division(a: Element, b: Element) -> Element:
    if not a.is_float and not b.is_float:
        return F32
    return promoted(a, b, division=True)


def with_integer(a: Element, b: Element) -> Element:
    return INTS[2] if a is BOOL else a


def with_float(a: Element, b: Element) -> Element:
    return a if a.is_float else F32


def every(a: Element, b: Element) -> bool:
    return a == b


def negated(x: Values, y: Values, z: Values, t: Element) -> Values:
    """-x since Triton 3.8; before that 0 - x, which makes +0 of +0, on every device."""
    if t.is_float and RELEASE >= (3, 8):
        return -x
    return arithmetic(np.subtract, lambda a, b: a - b)(np.zeros_like(x), x, z, t)


def with_number(
    of_floats: Callable[..., Values], of_integers: Callable[..., int], number: float
) -> Callable[..., Values]:
    """With a number of the kernel's text, which is a float32 before it is anything narrower."""

    def expected(x: Values, y: Values, z: Values, t: Element) -> Values:
        constant = number if t is F64 or not t.is_float else rounded(np.float64(np.float32(number)), t)
        return arithmetic(of_floats, of_integers)(x, np.full_like(x, constant), z, t)

    return expected


OPERATIONS: dict[str, Operation] = {
    "add": Operation(any_two, arithmetic(np.add, lambda a, b: a + b), promoted),
    "sub": Operation(any_two, arithmetic(np.subtract, lambda a, b: a - b), promoted),
    "mul": Operation(any_two, arithmetic(np.multiply, lambda a, b: a * b), promoted),
    "truediv": Operation(lambda a, b: same_sign(a, b) or (standard(a, b) and (a.is_float or b.is_float)),
                         arithmetic(np.divide, quotient), by_division),
    "less": compared(np.less),
    "less_equal": compared(np.less_equal),
    "greater": compared(np.greater),
    "greater_equal": compared(np.greater_equal),
    "equal": compared(np.equal),
    "not_equal": compared(np.not_equal),
    "maximum": Operation(any_two, lambda x, y, z, t: larger(x, y, propagate=False), promoted),
    "minimum": Operation(any_two, lambda x, y, z, t: smaller(x, y, propagate=False), promoted),
    "maximum_nan": Operation(any_two, lambda x, y, z, t: larger(x, y, propagate=True), promoted),
    "minimum_nan": Operation(any_two, lambda x, y, z, t: smaller(x, y, propagate=True), promoted),
    "where": Operation(any_two, lambda x, y, z, t: np.where(x > y, x, y), promoted),
    "floordiv": Operation(same_sign, exact(quotient), promoted, nonzero=True),
    "mod": Operation(lambda a, b: same_sign(a, b) or (standard(a, b) and (a.is_float or b.is_float)), remainder,
                     lambda a, b: promoted(a, b, division=True), nonzero=True),
    "cdiv": Operation(lambda a, b: same_integers(a, b) and a.bits >= 32, ceiling, promoted, nonzero=True),
    "and": Operation(integers, exact(lambda a, b: a & b), promoted),
    "or": Operation(integers, exact(lambda a, b: a | b), promoted),
    "xor": Operation(integers, exact(lambda a, b: a ^ b), promoted),
    "shl": Operation(same_integers, shifted_left, promoted),
    "shr": Operation(same_integers, shifted_right, promoted),
    "umulhi": Operation(lambda a, b: same_integers(a, b) and a.bits >= 32, high_half, promoted),
    "fdiv": Operation(one_of(*FLOATS), arithmetic(np.divide, quotient), promoted),
    "div_rn": Operation(one_of(F32), arithmetic(np.divide, quotient), promoted),
    "fma": Operation(one_of(*FLOATS), fused, promoted),
    "clamp": Operation(one_of(*FLOATS), lambda x, y, z, t: clamped(x, y, z, propagate=False), promoted),
    "clamp_nan": Operation(one_of(*FLOATS), lambda x, y, z, t: clamped(x, y, z, propagate=True), promoted),
    "sqrt": Operation(one_of(F32, F64), lambda x, y, z, t: rounded(np.sqrt(x), t), promoted),
    "sqrt_rn": Operation(one_of(F32), lambda x, y, z, t: rounded(np.sqrt(x), t), promoted),
    "floor": whole(np.floor),
    "ceil": whole(np.ceil),
    "neg": Operation(every, negated, promoted),
    "abs": Operation(every, lambda x, y, z, t: np.abs(x) if t.is_float else exact(lambda a, b: abs(a))(x, y, z, t),
                     promoted),
    "invert": Operation(same_integers, exact(lambda a, b: ~a), promoted),
    "add_one": Operation(one_of(*INTEGERS, *FLOATS), with_number(np.add, lambda a, b: a + b, 1), with_integer),
    "times_tenth": Operation(one_of(*INTEGERS, *FLOATS), with_number(np.multiply, lambda a, b: a * b, 0.1), with_float),
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    shape: tuple[int, int]
    layouts: tuple[Layout, Layout, Layout]
    out: Layout
    seed: int
    masked: bool


@st.composite
def operands(draw: st.DrawFn) -> Operands:
    shape = draw(shapes())
    three = tuple(draw(layouts(shape)) for _ in range(3))
    return Operands(shape, three, draw(layouts(shape, apart=True)), draw(st.integers(0, 2**32)), draw(st.booleans()))


BATCH = 4  # sets of values that each compiled kernel is run on


@np.errstate(all="ignore")  # numpy warns of overflow and of signalling NaN
def check(drawn: Operands, names: list[str], elements: tuple[Element, Element, Element], to: Element = F32) -> None:
    """Run a kernel of all these operations, on several sets of values, and compare."""
    rng = np.random.default_rng(drawn.seed)
    shape = drawn.out.shape
    results = [result_of(name, elements, to) for name in names]
    for _ in range(BATCH):
        memory = [values(rng, e, layout.size) for e, layout in zip(elements, drawn.layouts, strict=True)]
        if any(name in OPERATIONS and OPERATIONS[name].nonzero for name in names) and not elements[1].is_float:
            memory[1] = np.where(memory[1] == 0, 1, memory[1]).astype(memory[1].dtype)
        read, write = (rng.random(shape) < (0.8 if drawn.masked else 2) for _ in range(2))
        tensors = [as_tensor(m, e) for m, e in zip(memory, elements, strict=True)]
        outs = [as_tensor(np.ones(drawn.out.size, dtype=r.numpy), r) for r in results]
        at = [strides for layout in (*drawn.layouts, drawn.out) for strides in layout.strides]
        _elementwise[(1,)](
            *(tensor[layout.start :] for tensor, layout in zip(tensors, drawn.layouts, strict=True)),
            torch.from_numpy(read), torch.from_numpy(write), tuple(out[drawn.out.start :] for out in outs), *at,
            OPS=tuple(names), TO=to.triton, M=drawn.shape[0], N=drawn.shape[1],
        )  # fmt: skip
        loaded = [
            np.where(read, m[layout.index], np.ones((), m.dtype))
            for m, layout in zip(memory, drawn.layouts, strict=True)
        ]
        if names == ["bitcast"]:  # whose operand may be NaN with any bits: those in memory
            bits = as_values(tensors[0].view(to.torch), to)[drawn.layouts[0].index]
            one = as_values(as_tensor(np.ones((1,), memory[0].dtype), elements[0]).view(to.torch), to)
            loaded[0] = np.where(read, bits, one)
        for name, result, out in zip(names, results, outs, strict=True):
            expected = np.ones(drawn.out.size, dtype=result.numpy)
            expected[drawn.out.index[write]] = expected_of(name, loaded, elements, to)[write]
            of = f"{name} of {', '.join(map(str, elements))}"
            assert_same(as_values(out, result), expected, f"{of} to {to}" if name not in OPERATIONS else of)


def result_of(name: str, elements: tuple[Element, ...], to: Element) -> Element:
    if name not in OPERATIONS:
        return to
    operation = OPERATIONS[name]
    return operation.result(operation.operand(*elements[:2]))


def expected_of(name: str, loaded: list[Values], elements: tuple[Element, ...], to: Element) -> Values:
    if name in CASTS:
        return CASTS[name](loaded[0], elements[0], to)
    operation = OPERATIONS[name]
    operand = operation.operand(*elements[:2])
    x, y, z = (converted(v, e, operand) for v, e in zip(loaded, elements, strict=True))
    return operation.expected(x, y, z, operand)


CASTS: dict[str, Callable[[Values, Element, Element], Values]] = {
    "cast": converted,
    "cast_rtz": lambda x, source, to: truncated(x, to),
    "bitcast": lambda x, source, to: x,
}


def casts(source: Element, to: Element) -> list[str]:
    """Eight-bit floats are converted from floats and to floats only, and to each other."""
    names = [] if {source.kind, to.kind} in ({"fp8", kind} for kind in ("int", "uint", "bool")) else ["cast"]
    if source.is_float and to.is_float and to.bits < source.bits:
        names.append("cast_rtz")
    return names


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@given(drawn=operands())
@settings(max_examples=4, deadline=None, phases=PHASES)
def test_every_operation_on_two_of_a_type(element, drawn):
    check(drawn, [name for name, op in OPERATIONS.items() if op.accepts(element, element)], (element,) * 3)


@given(drawn=operands(), pair=st.tuples(*[st.sampled_from(ELEMENTS)] * 2), data=st.data())
@settings(max_examples=50, deadline=None, phases=PHASES)
def test_operations_on_two_types(drawn, pair, data):
    names = [name for name, op in OPERATIONS.items() if op.accepts(*pair)]
    if names:
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
        check(drawn, chosen, (*pair, pair[0]))


@pytest.mark.parametrize("source", ELEMENTS, ids=str)
@given(drawn=operands(), targets=st.permutations(ELEMENTS))
@settings(max_examples=2, deadline=None, phases=PHASES)
def test_every_type_is_converted_to_every_other(source, drawn, targets):
    for to in targets:
        check(drawn, [name for name in casts(source, to) if name != "bitcast"], (source,) * 3, to)
        if source.bits == to.bits:
            check(drawn, ["bitcast"], (source,) * 3, to)
