"""Graphs written in Python, with a value in hand for each op.

    b = Blueprint.build("adapter", input="h", dims={"d": {}, "r": (1, 256)})
    down = b.parameter("down_weight", ("r", "d"), init="kaiming_uniform")
    up = b.parameter("up_weight", ("d", "r"))
    adapter = b.output(b.h + b.linear(b.gelu(b.linear(b.h, down)), up))

Every operation of `contracts.operations` is a method; `+ - * / @`, comparisons and unary minus are written as such.
What does not fit raises BlueprintError at the line that asks for it; what only the whole shows (a value that nothing
uses) at `output`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from pydantic import ValidationError

from esper_triton.contracts.blueprint import INPUTS, Blueprint, ParameterSpec
from esper_triton.contracts.dims import Dim, assignments_within
from esper_triton.contracts.errors import BlueprintError, nearest
from esper_triton.contracts.graph import RESERVED, X_DIM, Inference, Op, expressions_of
from esper_triton.contracts.operations import OPERATIONS
from esper_triton.contracts.values import SymbolicType

__all__ = ["GraphBuilder", "Value"]


class Value:
    """A value of the graph that is being built: the result of an op, a parameter, or an input."""

    __hash__ = object.__hash__

    def __init__(self, builder: GraphBuilder, name: str) -> None:
        self.builder = builder
        self.name = name

    def __repr__(self) -> str:
        return f"Value({self.name!r}, {self.builder.type_of(self)})"

    def __bool__(self) -> bool:
        raise BlueprintError(f"value {self.name!r} has no truth value while the graph is built; use where(mask, a, b)")

    def __add__(self, other: Any) -> Value:
        return self.builder.op("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.builder.op("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.builder.op("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.builder.op("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.builder.op("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.builder.op("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.builder.op("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.builder.op("div", other, self)

    def __matmul__(self, other: Any) -> Value:
        return self.builder.op("matmul", self, other)

    def __neg__(self) -> Value:
        return self.builder.op("neg", self)

    def __gt__(self, other: Any) -> Value:
        return self.builder.op("gt", self, other)

    def __ge__(self, other: Any) -> Value:
        return self.builder.op("ge", self, other)

    def __lt__(self, other: Any) -> Value:
        return self.builder.op("lt", self, other)

    def __le__(self, other: Any) -> Value:
        return self.builder.op("le", self, other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self.builder.op("eq", self, other)


class GraphBuilder:
    """Made by `Blueprint.build`. Dims are fixed from the start, parameters and ops are added one by one."""

    def __init__(
        self,
        name: str,
        *,
        input: Literal["x", "h", "xh"],
        dims: Mapping[str, Dim | Mapping[str, int] | tuple[int, int]],
        **fields: Any,
    ) -> None:
        if input not in INPUTS:
            raise BlueprintError(f"blueprint {name!r}: unknown input {input!r}{nearest(str(input), INPUTS)}")
        known = set(Blueprint.model_fields) - {"ops", "output", "parameters", "affine"}
        for field in fields:
            if field not in known:
                raise BlueprintError(f"blueprint {name!r}: unknown field {field!r}{nearest(field, known)}")
        self._name = name
        self._fields = fields | {"input": input}
        self._dims = {dim: self._limits(dim, limits) for dim, limits in dims.items()}
        width = fields.get("feature_dim", "d")
        if width not in self._dims:
            raise BlueprintError(f"blueprint {name!r}: feature_dim {width!r} is not a dim{nearest(width, self._dims)}")
        widths = {"h": width, "x": X_DIM if X_DIM in self._dims else width}
        self._inputs = {item: widths[item] for item in INPUTS[input]}
        self._parameters: dict[str, ParameterSpec] = {}
        self._ops: list[Op] = []
        self._infer()

    def _limits(self, name: str, limits: Dim | Mapping[str, int] | tuple[int, int]) -> Dim:
        if isinstance(limits, Dim):
            return limits
        try:
            return Dim.model_validate({"min": limits[0], "max": limits[1]} if isinstance(limits, tuple) else limits)
        except (ValidationError, IndexError) as error:
            raise BlueprintError(f"blueprint {self._name!r}: dim {name!r} has limits {limits!r}: {error}") from error

    def _infer(self) -> None:
        """Types of everything so far. Anew when an expression is added, since it may divide a dim."""
        shapes = {name: spec.shape for name, spec in self._parameters.items()}
        assignments = assignments_within(self._dims, expressions_of(self._parameters, self._ops))
        self._inference = Inference(self._inputs, shapes, assignments, exact=False)
        for op in self._ops:
            self._inference.step(op)
        self._refuse_faults()

    def _infer_last(self) -> None:
        """The type of the op that was added last; those before it keep theirs where it brings no expression."""
        if expressions_of({}, self._ops[-1:]):
            self._infer()
            return
        self._inference.step(self._ops[-1])
        self._refuse_faults()

    def _refuse_faults(self) -> None:
        if self._inference.faults:
            self._fault("; ".join(self._inference.faults))

    def _fault(self, text: str) -> NoReturn:
        raise BlueprintError(f"blueprint {self._name!r}: {text}")

    @property
    def ops(self) -> tuple[Op, ...]:
        """What has been added so far."""
        return tuple(self._ops)

    def type_of(self, value: Value) -> SymbolicType:
        """A value's level and inner dims, these as expressions."""
        kind = self._inference.types[value.name]
        assert kind is not None  # what has none was refused
        return kind

    @property
    def h(self) -> Value:
        """The host's output, [rows, d]. Raises BlueprintError where `input` has none."""
        return self._input("h")

    @property
    def x(self) -> Value:
        """The layer's input, [rows, d_in]. Raises BlueprintError where `input` has none."""
        return self._input("x")

    def _input(self, name: str) -> Value:
        if name not in self._inputs:
            self._fault(f"input is {self._fields['input']!r}, which has no {name!r}; use input='xh' for both")
        return Value(self, name)

    def parameter(self, name: str, shape: Sequence[str | int], init: str = "zeros") -> Value:
        """A trainable tensor; `shape` holds expressions over dims, `init` is as in ParameterSpec."""
        if name in self._inference.types or name in RESERVED:
            self._fault(f"parameter name {name!r} is taken or reserved")
        try:
            spec = ParameterSpec(shape=tuple(str(extent) for extent in shape), init=init)
        except ValidationError as error:
            self._fault(f"parameter {name!r}: " + "; ".join(item["msg"] for item in error.errors()))
        self._parameters[name] = spec
        try:
            self._infer()
            if self._inference.types[name] is None:
                self._fault(f"parameter {name!r} has shape {list(spec.shape)}; known dims: {', '.join(self._dims)}")
        except BlueprintError:
            del self._parameters[name]
            self._infer()
            raise
        return Value(self, name)

    def op(self, op: str, *inputs: Any, name: str | None = None, **attrs: Any) -> Value:
        """Adds one op, as the method of its name does. `name` is what its value is called in the blueprint."""
        operands: list[str | float] = []
        for item in inputs:
            if isinstance(item, Value):
                if item.builder is not self:
                    self._fault(f"{op}: value {item.name!r} is of another blueprint, {item.builder._name!r}")
                operands.append(item.name)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                operands.append(float(item))
            else:
                self._fault(f"{op}: input {item!r} is {type(item).__name__}, expected a value or a number")
        operation = OPERATIONS.get(op)
        if operation is not None:  # attributes after the arguments, as in a graph's text
            most = len(operands) if operation.variadic else len(operation.arguments)
            for attribute, value in zip(operation.attributes, operands[most:], strict=False):
                attrs.setdefault(attribute, value)
                operands.pop()
        try:
            added = Op.model_validate(
                {"name": name or self._fresh(), "op": op, "inputs": tuple(operands), "attrs": attrs}
            )
        except ValidationError as error:
            self._fault(f"{op}: " + "; ".join(item["msg"] for item in error.errors()))
        self._ops.append(added)
        try:
            self._infer_last()
        except BlueprintError:
            self._ops.pop()
            self._infer()
            raise
        return Value(self, added.name)

    def _fresh(self) -> str:
        count = len(self._ops)
        while f"v{count}" in self._inference.types:
            count += 1
        return f"v{count}"

    def __getattr__(self, op: str) -> Callable[..., Value]:
        if op not in OPERATIONS:
            raise AttributeError(f"no operation {op!r}{nearest(op, OPERATIONS)}")
        return lambda *inputs, **attrs: self.op(op, *inputs, **attrs)

    def output(self, value: Value) -> Blueprint:
        """The finished blueprint, whose k is `value`. Raises BlueprintError with every fault of the whole."""
        if not isinstance(value, Value) or value.builder is not self:
            self._fault(f"output is {value!r}, expected a value of this blueprint")
        if value.name not in {op.name for op in self._ops}:
            value = self.op("identity", value)
        body = {"name": self._name, "dims": self._dims, "parameters": self._parameters, "ops": tuple(self._ops)}
        return Blueprint.validated(f"blueprint {self._name!r}", body | {"output": value.name} | self._fields)
