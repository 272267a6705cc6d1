"""Triton's IR as plain Python objects, read from MLIR's generic textual form.

Triton's Python bindings give no dense, array or enum attributes, no walk from a region to its blocks and no successors,
so the module is printed and the text is parsed (`generic_text`, then `parse`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

__all__ = [
    "Block",
    "Dense",
    "DialectAttribute",
    "FunctionType",
    "Location",
    "Module",
    "OpaqueType",
    "Operation",
    "PointerType",
    "Region",
    "ScalarType",
    "SymbolRef",
    "TensorType",
    "Type",
    "Value",
    "generic_text",
    "parse",
    "parse_type",
]

_FLOAT_BITS = {
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "f8E4M3FN": 8,
    "f8E5M2": 8,
    "f8E4M3FNUZ": 8,
    "f8E5M2FNUZ": 8,
    "f8E4M3B11FNUZ": 8,
}


class Type:
    """A type of MLIR. Types are values: equal when they mean the same, hashable."""


@dataclass(frozen=True)
class ScalarType(Type):
    """A number: `i1` to `i64` (or any width), `index`, or a float such as `f32` or `f8E4M3FN`."""

    name: str

    @property
    def is_float(self) -> bool:
        return self.name in _FLOAT_BITS

    @property
    def is_integer(self) -> bool:
        """True for integers of every width and for `index`."""
        return self.name not in _FLOAT_BITS

    @property
    def bits(self) -> int:
        if self.name == "index":
            return 64
        return _FLOAT_BITS.get(self.name) or int(self.name.lstrip("sui"))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PointerType(Type):
    """`!tt.ptr<pointee, address_space>`; Triton leaves address space 1 unsaid."""

    pointee: Type
    address_space: int = 1

    def __str__(self) -> str:
        return f"!tt.ptr<{self.pointee}>"


@dataclass(frozen=True)
class TensorType(Type):
    """A ranked tensor of static shape; rank 0 has the shape `()`."""

    shape: tuple[int, ...]
    element: Type

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"tensor<{''.join(f'{extent}x' for extent in self.shape)}{self.element}>"


@dataclass(frozen=True)
class FunctionType(Type):
    inputs: tuple[Type, ...]
    results: tuple[Type, ...]

    def __str__(self) -> str:
        results = ", ".join(map(str, self.results))
        return f"({', '.join(map(str, self.inputs))}) -> " + (results if len(self.results) == 1 else f"({results})")


@dataclass(frozen=True)
class OpaqueType(Type):
    """A type that nothing here takes apart, such as a tensor descriptor, as its text."""

    text: str

    def __str__(self) -> str:
        return self.text


class SymbolRef(str):
    """A reference `@name` to a function, as the bare name."""

    __slots__ = ()


@dataclass(frozen=True)
class DialectAttribute:
    """`#name<body>`, such as `#arith.fastmath<none>`, and any other attribute that has no Python counterpart."""

    name: str
    body: str = ""


@dataclass(frozen=True)
class Dense:
    """A constant tensor. `value` is one number when `splat`, otherwise all elements in row-major order."""

    type: Type
    value: Any
    splat: bool


@dataclass(frozen=True)
class Location:
    """A line of the kernel's source."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(eq=False, slots=True)
class Value:
    """The result of an operation, or an argument of a block. Two values are equal only if they are the same one.

    Attributes:
        users: the operations that take it as an operand, nested regions included, each once, in the order of the text.
        defining_op: the operation it is a result of, None for a block argument.
        block: the block it is an argument of, None for a result.
        index: its position among those results or arguments.
    """

    name: str
    type: Type
    users: list[Operation] = field(default_factory=list)
    defining_op: Operation | None = None
    block: Block | None = None
    index: int = 0

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(eq=False, slots=True)
class Operation:
    """One operation.

    Attributes:
        attributes: properties and discardable attributes together, as Python values: int, float, bool, str, tuple,
            dict, Type, SymbolRef, Dense, DialectAttribute; a unit attribute is True.
        successors: blocks that a terminator branches to; successor_operands: what it passes to each.
        block: the block it stands in (None for the module).
    """

    name: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any]
    regions: list[Region]
    successors: list[Block]
    successor_operands: list[list[Value]]
    location: Location | None
    block: Block | None

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def parent(self) -> Operation | None:
        """The operation whose region holds this one."""
        return self.block.region.parent if self.block else None

    def walk(self) -> Iterator[Operation]:
        """This operation and everything nested in it, parents first."""
        yield self
        for region in self.regions:
            for block in region.blocks:
                for operation in block.operations:
                    yield from operation.walk()

    def __repr__(self) -> str:
        results = ", ".join(value.name for value in self.results)
        return f"<{results}{' = ' if results else ''}{self.name}({', '.join(v.name for v in self.operands)})>"


@dataclass(eq=False, slots=True)
class Block:
    """Operations in order, the last of which is the terminator. `label` is `^bb0` and so on, unique in its region."""

    label: str
    region: Region
    arguments: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    @property
    def terminator(self) -> Operation:
        return self.operations[-1]

    def __repr__(self) -> str:
        return f"<block {self.label}: {len(self.operations)} operations>"


@dataclass(eq=False, slots=True)
class Region:
    """Blocks of which the first is the entry."""

    parent: Operation | None = None
    blocks: list[Block] = field(default_factory=list)

    @property
    def block(self) -> Block:
        """The only block."""
        (block,) = self.blocks
        return block


@dataclass(frozen=True, eq=False)
class Module:
    """A parsed module: its functions (`tt.func`) by name, and the `builtin.module` operation itself."""

    functions: dict[str, Operation]
    operation: Operation


_SCALAR = re.compile(r"[su]?i[0-9]+|index")
_POINTER = re.compile(r"!tt\.ptr<(.*?)(?:,\s*([0-9]+))?>")
_TENSOR = re.compile(r"tensor<((?:[0-9]+x)*)([^,]+(?:,\s*[0-9]+>)?)>")


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """The type that `text` spells; an `OpaqueType` for whatever is not a scalar, pointer or static tensor."""
    if text in _FLOAT_BITS or _SCALAR.fullmatch(text):
        return ScalarType(text)
    if match := _POINTER.fullmatch(text):
        return PointerType(parse_type(match[1]), int(match[2] or 1))
    if match := _TENSOR.fullmatch(text):
        element = parse_type(match[2])
        if isinstance(element, ScalarType | PointerType):
            return TensorType(tuple(int(extent) for extent in match[1].split("x")[:-1]), element)
    return OpaqueType(text)


def generic_text(module: Any, context: Any) -> str:
    """The generic form, with locations, of a module of `triton._C.libtriton.ir`.

    MLIR's printer falls back to the generic form for a module that does not verify, and an attribute without a dialect
    prefix makes it so. The attribute cannot be taken off again: the module is of no further use to MLIR afterwards.

    Raises:
        MLIRSyntaxError: the printer did not give the generic form.
    """
    from triton._C.libtriton import ir

    from esper_triton.cpu.errors import MLIRSyntaxError

    module.set_attr("force_generic", ir.builder(context).get_bool_attr(True))
    text = str(module)
    if '"builtin.module"(' not in text:
        import triton

        raise MLIRSyntaxError(f"the MLIR printer of triton {triton.__version__} did not give the generic form")
    return text


def parse(text: str) -> Module:
    """Parse the generic form of a module.

    Raises:
        MLIRSyntaxError: the text is not the generic form; the message gives the line.
    """
    from esper_triton.cpu.mlir_parser import Parser

    return Parser(text).module()
