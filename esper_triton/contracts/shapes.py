"""The shape rules of the operations: what each one's result is, and what it expects of its arguments.

A rule notes every fault in its `Call` and returns None where nothing can be said of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from esper_triton.contracts.expressions import symbols
from esper_triton.contracts.values import Call, Extent, SymbolicType, common_level

Rule = Callable[[Call], SymbolicType | None]


def same(call: Call) -> SymbolicType:
    return next(iter(call.types))


def clamp(call: Call) -> SymbolicType:
    low, high = call.attributes["min"], call.attributes["max"]
    if low is None and high is None:
        call.fault("has neither min nor max")
    elif isinstance(low, float) and isinstance(high, float) and low > high:
        call.fault(f"min {low:g} is above max {high:g}")
    return same(call)


def binary(call: Call) -> SymbolicType | None:
    return call.broadcast(*call.arguments)


def compare(call: Call) -> SymbolicType | None:
    kind = call.broadcast(*call.arguments)
    return kind and SymbolicType(kind.level, kind.shape, mask=True)


def where(call: Call) -> SymbolicType | None:
    if not call["mask"].mask:
        call.fault(f"{call.name('mask')} is {call['mask']}, expected a mask, as gt, ge, lt, le and eq give")
    return call.broadcast("mask", "a", "b")


def linear(call: Call) -> SymbolicType | None:
    kind = call["a"]
    if not call.rank("a", 1):
        return None
    k = kind.shape[-1]
    transposed = bool(call.attributes.get("transposed"))
    if not call.expect("weight", *((k, "n") if transposed else ("n", k))):
        return None
    n = call["weight"].shape[1 if transposed else 0]
    if "bias" in call:
        call.expect("bias", n)
    return SymbolicType(kind.level, (*kind.shape[:-1], n))


def matmul(call: Call) -> SymbolicType | None:
    a, b = call["a"], call["b"]
    if not (call.rank("a", 1) and call.rank("b", 2)):
        return None
    vector = len(a.shape) == 1
    if vector and (b.level is not None or len(b.shape) != 2):
        call.fault(f"{call.name('a')} is {a}, expected at least 2 inner dims to meet {call.name('b')} {b}")
        return None
    if a.shape[-1] != b.shape[-2]:
        call.fault(
            f"{call.name('a')} is {a} and {call.name('b')} is {b}, expected [.., m, k] and [.., k, n] with one k: "
            f"{a.shape[-1].text} against {b.shape[-2].text}"
        )
        return None
    if vector:
        return SymbolicType(a.level, (b.shape[-1],))
    outer = Call(
        {name: (given, SymbolicType(kind.level, kind.shape[:-2])) for name, (given, kind) in call.arguments.items()},
        {},
        call.assignments,
        exact=call.exact,
    )
    together = outer.broadcast("a", "b")
    call.faults += outer.faults
    return together and SymbolicType(together.level, (*together.shape, a.shape[-2], b.shape[-1]))


def last(call: Call) -> SymbolicType | None:
    if not call.rank("a", 1):
        return None
    for argument in ("weight", "bias"):
        if argument in call:
            call.expect(argument, call["a"].shape[-1])
    return call["a"]


def reduce(call: Call) -> SymbolicType | None:
    if not call.rank("a", 1):
        return None
    kind = call["a"]
    return SymbolicType(kind.level, (*kind.shape[:-1], call.extent("1")))


def pool_mean(call: Call) -> SymbolicType | None:
    return SymbolicType("batch", call["a"].shape) if call.activation("a") else None


def channel_gate(call: Call) -> SymbolicType | None:
    if not (call.activation("a") and call.rank("a", 1)):
        return None
    width = call["a"].shape[-1]
    if call.expect("w1", "r", width):
        r = call["w1"].shape[0]
        call.expect("b1", r)
        call.expect("w2", width, r)
    call.expect("b2", width)
    return call["a"]


def channels(call: Call) -> Extent | None:
    if not call.activation("a"):
        return None
    if len(call["a"].shape) != 1:
        call.fault(f"{call.name('a')} is {call['a']}, expected one inner dim, the channels")
        return None
    return call["a"].shape[0]


def odd(call: Call, *taps: Extent) -> None:
    for extent in taps:
        if extent.never(lambda taps: taps % 2 == 1):
            call.fault(f"{call.name('weight')} is {call['weight']}, expected an odd kernel, found {extent.text}")


def depthwise(axes: int) -> Rule:
    def rule(call: Call) -> SymbolicType | None:
        width = channels(call)
        if width is None:
            return None
        if call.expect("weight", width, *("kernel", "kh", "kw")[axes - 1 : 2 * axes - 1]):
            odd(call, *call["weight"].shape[1:])
        if "bias" in call:
            call.expect("bias", width)
        return call["a"]

    return rule


def convolution(*taps: str) -> Rule:
    def rule(call: Call) -> SymbolicType | None:
        width = channels(call)
        if width is None:
            return None
        if not call.expect("weight", "n", width, *(call.extent(t) if t.isdigit() else t for t in taps)):
            return None
        odd(call, *call["weight"].shape[2:])
        n = call["weight"].shape[0]
        if "bias" in call:
            call.expect("bias", n)
        return SymbolicType("rows", (n,))

    return rule


def concat(call: Call) -> SymbolicType | None:
    ranks = [call.rank(argument, 1) for argument in call.arguments]
    if not all(ranks):
        return None
    first, *others = call.types
    last = first.shape[-1]
    for kind in others:
        if kind.shape[:-1] != first.shape[:-1]:
            found = ", ".join(f"{given} {kind}" for given, kind in call.arguments.values())
            call.fault(f"{found} differ in more than the last inner dim")
            return None
        last = last + kind.shape[-1]
    return SymbolicType(common_level(call.types), (*first.shape[:-1], last))


def slice_(call: Call) -> SymbolicType | None:
    if not call.rank("a", 1):
        return None
    kind = call["a"]
    start, stop = call.extent(call.attributes["start"]), call.extent(call.attributes["stop"])
    bounds = zip(start.values, stop.values, kind.shape[-1].values, strict=True)
    if not any(0 <= a < b <= width for a, b, width in bounds):
        call.fault(
            f"slices {start.text} to {stop.text} of {call.name('a')} {kind}, expected 0 <= start < stop <= the width"
        )
        return None
    return SymbolicType(kind.level, (*kind.shape[:-1], stop - start))


def reshape(call: Call) -> SymbolicType | None:
    wanted = call.attributes["shape"]
    assert isinstance(wanted, tuple)
    shape = tuple(call.extent(item) for item in wanted)
    found = [math.prod(values) for values in zip(*(e.values for e in call["a"].shape), strict=True)]
    asked = [math.prod(values) for values in zip(*(e.values for e in shape), strict=True)]
    ones = [1] * len(call.assignments)
    if (found or ones) != (asked or ones) or any(extent.never(lambda n: n >= 1) for extent in shape):
        call.fault(f"{call.name('a')} is {call['a']}, which does not have the elements of {SymbolicType(None, shape)}")
        return None
    return SymbolicType(call["a"].level, shape)


def transpose(call: Call) -> SymbolicType | None:
    if not call.rank("a", 2):
        return None
    kind = call["a"]
    *outer, m, n = kind.shape
    return SymbolicType(kind.level, (*outer, n, m))


def attention(call: Call) -> SymbolicType | None:
    fit = [call.activation(name) and call.rank(name, 1) for name in ("q", "k", "v")]
    if not all(fit):
        return None
    q, k, v = call["q"], call["k"], call["v"]
    heads = call.extent(call.attributes["heads"])
    if any(len(kind.shape) != 1 for kind in (q, k, v)):
        found = ", ".join(f"{call.name(name)} {call[name]}" for name in ("q", "k", "v"))
        call.fault(f"{found}: expected one inner dim each, heads times the width of a head")
        return None
    if q.shape != k.shape:
        call.fault(f"{call.name('q')} is {q} and {call.name('k')} is {k}, expected one shape")
    if heads.never(lambda n: n >= 1):
        call.fault(f"heads is {heads.text}, expected at least 1")
        return None
    if call.exact or not (symbols(heads.text) | symbols(q.shape[-1].text) | symbols(v.shape[-1].text)):
        for name in ("q", "v"):
            width = call[name].shape[-1]
            if any(w % n for w, n in zip(width.values, heads.values, strict=True)):
                call.fault(f"{call.name(name)} is {call[name]}, expected a multiple of heads = {heads.text}")
    return v


def gather(call: Call) -> SymbolicType | None:
    index = call["index"]
    if index.level is None or not index.shape or not index.shape[-1].is_one:
        call.fault(f"{call.name('index')} is {index}, expected an activation whose last inner dim is 1")
        return None
    return (
        SymbolicType(index.level, (*index.shape[:-1], call["table"].shape[1]))
        if call.expect("table", "n", "d")
        else None
    )
