"""A blueprint's graph: its ops, and what can be said of it before anything is compiled."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from esper_triton.contracts.dims import assignments_within, dim_faults, filled_dims
from esper_triton.contracts.errors import BlueprintError, nearest
from esper_triton.contracts.expressions import Expression, ExpressionError, symbols
from esper_triton.contracts.operations import OPERATIONS
from esper_triton.contracts.values import AttributeValue, Call, Extent, SymbolicType, ValueType

if TYPE_CHECKING:
    from esper_triton.contracts.blueprint import Blueprint, ParameterSpec

__all__ = [
    "RESERVED",
    "X_DIM",
    "Inference",
    "Layout",
    "Op",
    "ValueType",
    "attributes",
    "check",
    "expressions_of",
    "infer",
    "input_dims",
    "is_affine",
    "layout_of",
    "layouts_of",
]

Layout = Literal["rows", "sequence", "image"]
X_DIM = "d_in"
# Names that the executor and the emitted kernels use themselves.
RESERVED = frozenset("h x out alpha rows batch length image_height image_width training dropout_seed".split())


class Op(BaseModel):
    """One operation, and the name of its value.

    `inputs` are names of earlier values, of parameters, of `x` or `h`, or numbers. `attrs` are kept in one form:
    numbers as float, extents as expressions over dims, absent where the default is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    op: str
    inputs: tuple[str | Annotated[float, Field(allow_inf_nan=False, strict=True)], ...]
    attrs: dict[str, AttributeValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = dict(given)
        operation = OPERATIONS.get(given["op"]) if isinstance(given.get("op"), str) else None
        attrs = given.get("attrs")
        if operation is not None and isinstance(attrs, Mapping):
            kept: dict[str, Any] = {}
            for name, value in attrs.items():
                try:
                    value = operation.attributes[name].normalized(value)
                except (KeyError, ValueError):  # told by `check`, with everything else that is wrong
                    pass
                else:
                    if value is None:
                        continue
                kept[name] = value
            given["attrs"] = kept
        return given

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that are values, each once."""
        return tuple(dict.fromkeys(item for item in self.inputs if isinstance(item, str)))

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(str(item) for item in self.inputs)})"


def attributes(op: Op) -> dict[str, AttributeValue]:
    """The op's attributes in their normal form, defaults filled in."""
    return OPERATIONS[op.op].resolve(op.attrs)


def input_dims(blueprint: Blueprint) -> dict[str, str]:
    """The symbol of the width of each input. `x` is as wide as `h` where the blueprint has no dim `d_in`."""
    widths = {"h": blueprint.feature_dim, "x": X_DIM if X_DIM in blueprint.dims else blueprint.feature_dim}
    return {name: widths[name] for name in blueprint.inputs}


class Inference:
    """The types of a graph's values, worked out op by op. A value that a fault has left without a type is None, and
    nothing further is said of what uses it."""

    def __init__(
        self,
        inputs: Mapping[str, str],
        parameters: Mapping[str, Sequence[str]],
        assignments: Sequence[Mapping[str, int]],
        *,
        exact: bool,
    ) -> None:
        """`inputs`: the symbol of each one's width. `parameters`: the shapes, as expressions. `exact`: as in Call."""
        self.assignments = assignments
        self.exact = exact
        self.faults: list[str] = []
        self.types: dict[str, SymbolicType | None] = {}
        for name, width in inputs.items():
            self.types[name] = self._tensor(name, [width], level=True)
        for name, shape in parameters.items():
            self.types[name] = self._tensor(name, shape, level=False)
        self._inputs = set(inputs)

    def _tensor(self, name: str, shape: Sequence[str], *, level: bool) -> SymbolicType | None:
        try:
            extents = tuple(Extent.of(text, self.assignments) for text in shape)
        except ExpressionError:  # an unknown symbol, which the blueprint's own check names
            return None
        kind = SymbolicType("rows" if level else None, extents)
        if any(extent.never(lambda n: n >= 1) for extent in extents):
            self.faults.append(f"parameter {name!r} has shape {kind}, expected extents of at least 1")
            return None
        return kind

    def step(self, op: Op, names: Set[str] = frozenset()) -> None:
        """Takes the next op: notes its faults and the type of its value. `names`: those of all ops, later ones too."""
        faults: list[str] = []
        if op.name in RESERVED or op.name.startswith("grad_"):
            faults.append("the name is reserved")
        elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", op.name) or keyword.iskeyword(op.name):
            faults.append("a value's name is a letter and up to 62 letters, digits and _, and no keyword of Python")
        if op.name in self.types and op.name not in RESERVED:
            faults.append("the name is taken by a value or parameter before it")
        kind = self._type(op, names, faults)
        self.faults += [f"{op}: {fault}" for fault in faults]
        self.types.setdefault(op.name, kind)

    def _type(self, op: Op, names: Set[str], faults: list[str]) -> SymbolicType | None:
        operation = OPERATIONS.get(op.op)
        if operation is None:
            faults.append(f"unknown operation {op.op!r}{nearest(op.op, OPERATIONS)}")
            self._operands(op, names, faults)
            return None
        wrong = operation.faults(len(op.inputs), op.attrs)
        faults += wrong
        operands = self._operands(op, names, faults)
        known = {symbol for dims in self.assignments for symbol in dims}
        for name, value in op.attrs.items():
            spec = operation.attributes.get(name)
            if spec is not None and spec.kind in ("extent", "extents") and not wrong:
                for text in value if isinstance(value, tuple) else (value,):
                    for symbol in sorted(symbols(str(text)) - known):
                        wrong = ["told"]
                        faults.append(f"{name}: unknown symbol {symbol!r} in {text!r}{nearest(symbol, known)}")
        if wrong or operands is None:
            return None
        arguments = dict(zip(_argument_names(operation.arguments, len(operands)), operands, strict=False))
        for argument, (given, kind) in arguments.items():
            if kind.mask and not (operation.takes_mask and argument == operation.arguments[0]):
                faults.append(f"{argument} {given} is a {kind}, which only 'where' takes as its first argument")
                return None
        call = Call(arguments, operation.resolve(op.attrs), self.assignments, exact=self.exact)
        try:
            result = operation.rule(call)
        except ExpressionError as error:
            faults.append(str(error))
            return None
        faults += call.faults
        return None if call.faults else result

    def _operands(self, op: Op, names: Set[str], faults: list[str]) -> list[tuple[str, SymbolicType]] | None:
        operands: list[tuple[str, SymbolicType]] = []
        complete = True
        for item in op.inputs:
            if not isinstance(item, str):
                operands.append((f"{item:g}", SymbolicType(None, ())))
                continue
            kind = self.types.get(item)
            if item == op.name and item not in self.types:
                faults.append(f"{item!r} is used in its own definition")
            elif item not in self.types and item in names:
                faults.append(f"{item!r} comes only later, so it is a forward reference or part of a cycle")
            elif item not in self.types:
                faults.append(f"unknown value {item!r}{nearest(item, {*self.types, *names})}")
            if kind is None:
                complete = False
            else:
                operands.append((item, kind))
        return operands if complete else None


def _argument_names(names: Sequence[str], count: int) -> list[str]:
    return [names[i] if i < len(names) else f"{names[-1]}{i}" for i in range(count)]


def check(blueprint: Blueprint, dims: Mapping[str, int] | None = None) -> list[str]:
    """Every fault of a blueprint's graph at once, each naming the op and the shapes found and expected.

    Without `dims` the graph has to be right whatever the dims are: shapes are compared at a few fixed assignments of
    distinct primes within the dims' limits, so that two expressions count as equal where they are one in effect. What
    only some dims fulfil (a slice within its value, a width that is a multiple of the heads) is left to the check with
    `dims`, which also looks at their limits; a dim that has no number there has its default.
    """
    return _analyse(blueprint, dims)[0]


def infer(blueprint: Blueprint, dims: Mapping[str, int]) -> dict[str, ValueType]:
    """The level and inner dims of the inputs, the parameters and every op's value, for these dims.

    Raises BlueprintError with every fault, as `check(blueprint, dims)` finds them.
    """
    faults, types = _analyse(blueprint, dims)
    if faults:
        raise BlueprintError(f"blueprint {blueprint.name!r}: " + "; ".join(faults))
    return {
        name: ValueType(kind.level, tuple(extent.values[0] for extent in kind.shape), kind.mask)
        for name, kind in types.items()
        if kind is not None
    }


def _analyse(
    blueprint: Blueprint, dims: Mapping[str, int] | None
) -> tuple[list[str], Mapping[str, SymbolicType | None]]:
    if not blueprint.ops:
        raise BlueprintError(f"blueprint {blueprint.name!r} is a hand-written source, it has no graph to check")
    ops = blueprint.ops
    assignments: Sequence[Mapping[str, int]]
    if dims is None:
        faults = []
        assignments = assignments_within(blueprint.dims, expressions_of(blueprint.parameters, blueprint.ops))
    else:
        dims = filled_dims(blueprint.dims, dims)
        faults = dim_faults(blueprint.dims, dims)
        if faults:
            return faults, {}
        assignments = [dims]
    shapes = {name: spec.shape for name, spec in blueprint.parameters.items()}
    inference = Inference(input_dims(blueprint), shapes, assignments, exact=dims is not None)
    names = {op.name for op in ops}
    for op in ops:
        inference.step(op, names)
    faults += inference.faults
    faults += _layout_faults(ops)
    faults += _unused(blueprint)
    faults += _output_faults(blueprint, inference)
    return faults, inference.types


def expressions_of(parameters: Mapping[str, ParameterSpec], ops: Iterable[Op]) -> list[Expression]:
    """Those of shapes and attributes, each once; what is none is left out."""
    texts = [text for spec in parameters.values() for text in spec.shape]
    for op in ops:
        for name, value in op.attrs.items():
            spec = OPERATIONS[op.op].attributes.get(name) if op.op in OPERATIONS else None
            if spec is not None and spec.kind in ("extent", "extents"):
                texts += [str(item) for item in (value if isinstance(value, tuple) else (value,))]
    found = []
    for text in dict.fromkeys(texts):
        try:
            found.append(Expression(text))
        except ExpressionError:  # told where it stands
            continue
    return found


def _layout_faults(ops: Sequence[Op]) -> list[str]:
    by_domain = {domain: [op for op in ops if _domain(op) == domain] for domain in ("sequence", "image")}
    if all(by_domain.values()):
        one, other = by_domain["sequence"][0], by_domain["image"][0]
        return [f"{one} is over a sequence and {other} over an image; one graph has one layout"]
    return []


def _domain(op: Op) -> str:
    return OPERATIONS[op.op].domain if op.op in OPERATIONS else "row"


def layouts_of(ops: Iterable[Op]) -> tuple[Layout, ...]:
    """The layouts in which a graph can be computed. Where each result depends on its own row alone, any; pooling and
    attention take the positions of a sequence or of an image; convolutions take what they are over."""
    domains = {_domain(op) for op in ops}
    if "image" in domains:
        return ("image",)
    if "sequence" in domains:
        return ("sequence",)
    return ("sequence", "image") if "positions" in domains else ("rows", "sequence", "image")


def layout_of(ops: Iterable[Op]) -> Layout:
    """The least layout that a graph needs, the first of `layouts_of`: `rows` where each row is on its own."""
    return layouts_of(ops)[0]


def _unused(blueprint: Blueprint) -> list[str]:
    used = {blueprint.output}
    for op in reversed(blueprint.ops):
        if op.name in used:
            used.update(op.names)
    read = {name for op in blueprint.ops for name in op.names}
    faults = []
    for op in blueprint.ops:
        if op.name not in used:
            whom = "only what is not used itself uses it" if op.name in read else "nothing uses it"
            faults.append(f"{op}: {whom}, and it is not the output {blueprint.output!r}")
    for name in blueprint.parameters:
        if name not in used:
            faults.append(f"parameter {name!r} is not used")
    for name in blueprint.inputs:
        if name not in used:
            faults.append(f"input {name!r} is not used; input is {blueprint.input!r}")
    named = {blueprint.feature_dim, X_DIM if "x" in blueprint.inputs else blueprint.feature_dim}
    for expression in expressions_of(blueprint.parameters, blueprint.ops):
        named |= expression.symbols
    faults += [f"dim {name!r} is not used" for name in blueprint.dims if name not in named]
    return faults


def _output_faults(blueprint: Blueprint, inference: Inference) -> list[str]:
    output = blueprint.output
    if output not in {op.name for op in blueprint.ops}:
        return [f"output {output!r} is no op's value{nearest(output, [op.name for op in blueprint.ops])}"]
    kind = inference.types.get(output)
    width = inference.types.get("h") or inference._tensor("h", [blueprint.feature_dim], level=True)
    if kind is not None and width is not None and (kind.level != "rows" or kind.mask or kind.shape != width.shape):
        return [f"output {output!r} is {kind}, expected {width}: one value for each row and feature of the layer"]
    return []


def is_affine(blueprint: Blueprint) -> bool:
    """Whether a row of k is an affine function of the same row of the inputs, whatever the parameters are."""
    if layout_of(blueprint.ops) != "rows":
        return False
    degree: dict[str, float] = dict.fromkeys(blueprint.parameters, 0)
    degree |= dict.fromkeys(blueprint.inputs, 1)
    for op in blueprint.ops:
        operation = OPERATIONS[op.op]
        names = _argument_names(operation.arguments, len(op.inputs))
        degrees = [degree[item] if isinstance(item, str) else 0 for item in op.inputs]
        variable = [name for name, value in zip(names, degrees, strict=True) if value]
        together = operation.variadic or (operation.jointly and set(variable) <= set(operation.affine))
        if not variable:
            result: float = 0
        elif together or (len(variable) == 1 and variable[0] in operation.affine):
            result = max(degrees)
        else:
            result = math.inf
        degree[op.name] = result
    return degree[blueprint.output] <= 1
