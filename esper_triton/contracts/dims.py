"""Symbolic dimensions of a blueprint: their limits, and numbers that stand for all that they allow."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.expressions import Expression, ExpressionError, evaluate, symbols

__all__ = ["Dim", "assignments_within", "dim_faults", "filled_dims"]

# Where the search for primes starts, once for each assignment. From small to large, so that of two dims each is once
# the smaller one; odd, as the kernels of convolutions are.
_STARTS = (3, 101, 1009)
# Beyond this any odd number serves as a prime: limits may be of any size, and the search is not to hang on them.
_LARGE = 1_000_000


class Dim(BaseModel):
    """Limits of one symbolic dimension, both included, and the number that it has where none is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = Field(default=1, ge=1)
    max: int = Field(default=65536, ge=1)
    default: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Dim:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        if self.default is not None and not self.min <= self.default <= self.max:
            raise ValueError(f"default {self.default} is not within {self.min} to {self.max}")
        return self


def dim_faults(limits: Mapping[str, Dim], dims: Mapping[str, int]) -> list[str]:
    """What is wrong with numbers given for dims: one that is unknown, missing, no integer, or outside of its limits."""
    faults = [f"unknown dim {name!r}{nearest(name, limits)}" for name in dims if name not in limits]
    for name, dim in limits.items():
        if name not in dims:
            faults.append(f"dim {name!r} is missing; it takes {dim.min} to {dim.max}")
        elif isinstance(dims[name], bool) or not isinstance(dims[name], int):
            faults.append(f"dim {name!r} is {dims[name]!r}, an integer is expected")
        elif not dim.min <= dims[name] <= dim.max:
            faults.append(f"dim {name!r} is {dims[name]}, expected {dim.min} to {dim.max}")
    return faults


def filled_dims(limits: Mapping[str, Dim], dims: Mapping[str, int]) -> dict[str, int]:
    """The numbers given, and the defaults of dims that none is given for."""
    return {name: dim.default for name, dim in limits.items() if dim.default is not None} | dict(dims)


def assignments_within(limits: Mapping[str, Dim], expressions: Iterable[Expression]) -> list[dict[str, int]]:
    """A few assignments of distinct numbers to all dims, always the same.

    They are primes, so that different products differ, where the limits allow it. A dim that one of the expressions
    divides is a multiple of the divisor, as it will have to be: `d` is 3 * 7 where `d // heads` stands and `heads` is
    3.
    """
    divisors = _divisors(expressions)
    ordered = _divisors_first(list(limits), divisors)
    found = []
    for turn, start in enumerate(_STARTS):
        dims: dict[str, int] = {}
        order = ordered if turn % 2 == 0 else _divisors_first(list(limits)[::-1], divisors)
        for name in order:
            factor = 1
            for text in divisors.get(name, ()):
                try:
                    factor = math.lcm(factor, max(evaluate(text, dims), 1))
                except ExpressionError:  # names a dim that comes only later: they divide each other
                    continue
            dims[name] = _number(limits[name], factor, start, set(dims.values()))
        found.append(dims)
    return found


def _divisors(expressions: Iterable[Expression]) -> dict[str, list[str]]:
    divisors: dict[str, list[str]] = {}
    for expression in expressions:
        for node in ast.walk(ast.parse(expression.text.strip(), mode="eval")):
            match node:
                case ast.BinOp(left=ast.Name(id=name), op=ast.FloorDiv(), right=right):
                    divisors.setdefault(name, []).append(ast.unparse(right))
    return divisors


def _divisors_first(names: Sequence[str], divisors: Mapping[str, Sequence[str]]) -> list[str]:
    order: list[str] = []
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in order or name in visiting or name not in names:
            return
        visiting.add(name)
        for text in divisors.get(name, ()):
            for symbol in sorted(symbols(text)):
                visit(symbol)
        order.append(name)

    for name in names:
        visit(name)
    return order


def _number(dim: Dim, factor: int, start: int, taken: set[int]) -> int:
    """A multiple of `factor` within the limits: by an odd prime near `start`, and one that no other dim has, if any
    is."""
    low, high = -(-dim.min // factor), dim.max // factor
    upwards, downwards = range(max(start, low), high + 1), range(min(start - 1, high), low - 1, -1)
    primes = (n for n in itertools.chain(upwards, downwards) if _is_odd_prime(n))
    shortlist = [n * factor for n in itertools.islice(primes, len(taken) + 1)]
    for number in shortlist:
        if number not in taken:
            return number
    if shortlist:
        return shortlist[0]
    return high * factor if high >= low else dim.max


def _is_odd_prime(number: int) -> bool:
    if number > _LARGE:
        return number % 2 == 1
    return number > 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
