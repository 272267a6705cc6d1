"""What is known of a graph's values before anything is computed, and the attributes that ops take.

A value of a graph is an activation, with a level and inner dims, or it depends on no input:

- level `rows`: one value for each row of the layer (batch times positions), shape [rows, *inner];
- level `batch`: one for each item of the batch, what pooling over its positions leaves, shape [batch, *inner];
- no level: a parameter, a number, or what was computed of these alone, shape [*inner].

Where values meet, an activation of a batch item counts for each of its rows, and inner dims broadcast right-aligned as
in numpy.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.expressions import ExpressionError, evaluate, symbols

__all__ = [
    "Attribute",
    "AttributeValue",
    "Call",
    "Domain",
    "Extent",
    "Level",
    "SymbolicType",
    "ValueType",
    "common_level",
    "normalize_extent",
]

Level = Literal["rows", "batch"]
# Where an operation looks at other rows than its own, and so which layouts it needs: `positions` takes either of the
# two.
Domain = Literal["row", "positions", "sequence", "image"]
AttributeValue = bool | int | float | str | tuple[int | float | str, ...] | None


@dataclass(frozen=True)
class ValueType:
    """What is known of a value for given dims: `shape` holds the inner dims (elements), without rows or batch. `mask`
    says that it holds truth values, which only `where` takes."""

    level: Level | None
    shape: tuple[int, ...]
    mask: bool = False


@dataclass(frozen=True)
class Extent:
    """An expression over dims, with what it comes to at each assignment of numbers to them. Two are equal where all
    their values are."""

    text: str = field(compare=False)
    values: tuple[int, ...]

    @classmethod
    def of(cls, text: str, assignments: Sequence[Mapping[str, int]]) -> Extent:
        """Raises ExpressionError."""
        return cls(text, tuple(evaluate(text, dims) for dims in assignments))

    def never(self, holds: Callable[[int], bool]) -> bool:
        """Whether no assignment fulfils it."""
        return not any(holds(value) for value in self.values)

    @property
    def is_one(self) -> bool:
        return all(value == 1 for value in self.values)

    def __add__(self, other: Extent) -> Extent:
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return Extent(_folded(f"{self.text} + {other.text}"), values)

    def __sub__(self, other: Extent) -> Extent:
        values = tuple(a - b for a, b in zip(self.values, other.values, strict=True))
        text = self.text if other.text == "0" else f"{self.text} - {_factor(other.text)}"
        return Extent(_folded(text), values)


def _factor(text: str) -> str:
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _folded(text: str) -> str:
    return text if symbols(text) else str(evaluate(text, {}))


def normalize_extent(value: object) -> str:
    """An integer or an expression over dims in one spelling. Raises ExpressionError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ExpressionError(f"{value!r} is not an integer or an expression over dims")
    symbols(str(value))
    return _folded(ast.unparse(ast.parse(str(value).strip(), mode="eval")))


@dataclass(frozen=True)
class SymbolicType:
    """As ValueType, with extents for numbers."""

    level: Level | None
    shape: tuple[Extent, ...]
    mask: bool = False

    def __str__(self) -> str:
        inner = ", ".join(extent.text for extent in self.shape)
        return ("mask " if self.mask else "") + (f"[{self.level}; {inner}]" if self.level else f"[{inner}]")


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A constant that an operation takes by keyword. `required` where it has no default; numbers lie in
    [`low`, `high`), a `choice` is one of `choices`; an `extent` is an expression over dims, `extents` several."""

    kind: Literal["flag", "number", "choice", "extent", "extents"]
    default: AttributeValue = None
    required: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def normalized(self, value: object) -> AttributeValue:
        """The value in the one form in which an op holds it. Raises ValueError that says what is expected."""
        if value is None and self.default is None and not self.required:
            return None
        match self.kind:
            case "flag" if isinstance(value, bool):
                return value
            case "number" if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                if self.low <= value < self.high:
                    return float(value)
                raise ValueError(f"{value!r}, expected a number in [{self.low:g}, {self.high:g})")
            case "choice" if isinstance(value, str):
                if value in self.choices:
                    return value
                raise ValueError(f"{value!r}{nearest(value, self.choices)}")
            case "extent":
                return normalize_extent(value)
            case "extents" if isinstance(value, list | tuple):
                return tuple(normalize_extent(item) for item in value)
        expected = {"flag": "true or false", "number": "a finite number", "choice": "a string", "extents": "a list"}
        raise ValueError(f"{value!r}, expected {expected[self.kind]}")


class Call:
    """One use of an operation while its shapes are worked out. A rule reads arguments by name, and notes every fault.

    `exact` says that the extents are numbers that were asked for, and not stand-ins for all that dims allow.
    """

    def __init__(
        self,
        arguments: Mapping[str, tuple[str, SymbolicType]],
        attributes: Mapping[str, AttributeValue],
        assignments: Sequence[Mapping[str, int]],
        *,
        exact: bool,
    ) -> None:
        self.arguments = arguments
        self.attributes = attributes
        self.assignments = assignments
        self.exact = exact
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def __contains__(self, argument: str) -> bool:
        return argument in self.arguments

    def __getitem__(self, argument: str) -> SymbolicType:
        return self.arguments[argument][1]

    @property
    def types(self) -> list[SymbolicType]:
        return [kind for _, kind in self.arguments.values()]

    def name(self, argument: str) -> str:
        """The argument with the name of the value given for it, for messages."""
        given = self.arguments[argument][0]
        return given if given == argument else f"{argument} {given}"

    def extent(self, value: AttributeValue) -> Extent:
        return Extent.of(str(value), self.assignments)

    def expect(self, argument: str, *shape: Extent | str) -> bool:
        """Whether an argument depends on no input and has this shape, strings standing for any extent; else a fault."""
        kind = self[argument]
        fits = kind.level is None and len(kind.shape) == len(shape)
        if fits:
            fits = all(isinstance(e, str) or e == found for e, found in zip(shape, kind.shape, strict=True))
        if not fits:
            expected = ", ".join(e if isinstance(e, str) else e.text for e in shape)
            of = "" if kind.level is None else " of parameters alone"
            self.fault(f"{self.name(argument)} is {kind}, expected [{expected}]{of}")
        return fits

    def activation(self, argument: str) -> bool:
        """Whether it has one value for each row, as what looks at other rows needs; else a fault."""
        if self[argument].level != "rows":
            self.fault(f"{self.name(argument)} is {self[argument]}, expected one value for each row")
            return False
        return True

    def rank(self, argument: str, least: int) -> bool:
        """Whether it has that many inner dims; else a fault."""
        if len(self[argument].shape) < least:
            self.fault(f"{self.name(argument)} is {self[argument]}, expected at least {least} inner dims")
            return False
        return True

    def broadcast(self, *arguments: str) -> SymbolicType | None:
        """What the arguments are together."""
        kinds = [self[argument] for argument in arguments]
        rank = max(len(kind.shape) for kind in kinds)
        one = Extent("1", (1,) * len(self.assignments))
        shape = [one] * rank
        for kind in kinds:
            for axis, extent in enumerate(kind.shape, start=rank - len(kind.shape)):
                if shape[axis].is_one:
                    shape[axis] = extent
                elif not extent.is_one and extent != shape[axis]:
                    found = " and ".join(f"{self.name(a)} {self[a]}" for a in arguments)
                    self.fault(f"{found} do not broadcast: {shape[axis].text} against {extent.text}")
                    return None
        return SymbolicType(common_level(kinds), tuple(shape))


def common_level(kinds: Sequence[SymbolicType]) -> Level | None:
    levels = {kind.level for kind in kinds}
    return "rows" if "rows" in levels else "batch" if "batch" in levels else None
