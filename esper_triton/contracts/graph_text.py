"""Graphs as people write them: assignments of nested calls, read with Python's own parser and never evaluated."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.graph import Op
from esper_triton.contracts.operations import OPERATIONS

__all__ = ["read_graph", "write_graph"]

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.MatMult: "matmul",
}
_COMPARISONS: dict[type[ast.cmpop], str] = {ast.Gt: "gt", ast.GtE: "ge", ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq"}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@"}
_SYMBOLS |= {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
_MAX_LENGTH = 100_000  # characters; bounds the parser's work on a hostile file


class GraphTextError(ValueError):
    """The text is no graph. `faults` are all that was found, each with its line."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


def read_graph(text: str) -> tuple[Op, ...]:
    """The ops of lines such as `k = h + linear(gelu(z), up_weight, up_bias)`.

    There are calls of the known operations with attributes by keyword, `+ - * / @`, comparisons, unary minus and
    numbers. A call within another gets a name of its own, made from that of its line. Raises GraphTextError.
    """
    if len(text) > _MAX_LENGTH:
        raise GraphTextError([f"graph of {len(text)} characters; at most {_MAX_LENGTH} are allowed"])
    try:
        lines = ast.parse(text, mode="exec").body
    except SyntaxError as error:
        raise GraphTextError([f"graph line {error.lineno}: {error.msg}"]) from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise GraphTextError([f"graph: cannot be read ({error})"]) from error
    reader = _Reader({node.id for line in lines for node in ast.walk(line) if isinstance(node, ast.Name)})
    for line in lines:
        try:
            reader.line(line)
        except RecursionError:
            reader.faults.append(f"graph line {line.lineno}: nested too deeply")
    if reader.faults:
        raise GraphTextError(reader.faults)
    return tuple(reader.ops)


class _Reader:
    def __init__(self, taken: set[str]) -> None:
        self.ops: list[Op] = []
        self.faults: list[str] = []
        self._taken = taken
        self._target = ""

    def line(self, line: ast.stmt) -> None:
        match line:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                self._target = target
                result = self._operand(value, name=target)
                if result is not None and result != target:  # a name or a number alone
                    self._add("identity", [result], {}, target, line)
            case _:
                self._fault(line, f"{ast.unparse(line)!r} is no assignment to one name")

    def _fault(self, node: ast.stmt | ast.expr, text: str) -> None:
        self.faults.append(f"graph line {node.lineno}: {text}")

    def _fresh(self) -> str:
        count = 1
        while f"{self._target}_{count}" in self._taken:
            count += 1
        self._taken.add(f"{self._target}_{count}")
        return f"{self._target}_{count}"

    def _add(
        self, op: str, inputs: list[str | float], attrs: dict[str, object], name: str | None, node: ast.stmt | ast.expr
    ) -> str | None:
        name = name or self._fresh()
        try:
            self.ops.append(Op.model_validate({"name": name, "op": op, "inputs": tuple(inputs), "attrs": attrs}))
        except ValueError:
            self._fault(node, f"{ast.unparse(node)!r} has something that is neither a name nor a finite number")
            return None
        return name

    def _operand(self, node: ast.expr, name: str | None = None) -> str | float | None:
        """A value's name or a number; None after a fault. `name` is what an operation's value is to be called."""
        match node:
            case ast.Name(id=value):
                return value
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                try:
                    return float(number)
                except OverflowError:
                    self._fault(node, "the number is too large for a float")
                    return None
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                negated = self._operand(inner)
                if isinstance(negated, float):
                    return -negated
                return None if negated is None else self._add("neg", [negated], {}, name, node)
            case ast.UnaryOp(op=ast.UAdd(), operand=inner):
                return self._operand(inner, name)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _BINARY:
                return self._call(_BINARY[type(operator)], [left, right], {}, name, node)
            case ast.Compare(left=left, ops=[comparison], comparators=[right]) if type(comparison) in _COMPARISONS:
                return self._call(_COMPARISONS[type(comparison)], [left, right], {}, name, node)
            case ast.Call(func=ast.Name(id=op), args=args, keywords=keywords):
                if op not in OPERATIONS:
                    self._fault(node, f"unknown operation {op!r}{nearest(op, OPERATIONS)}")
                    return None
                if any(isinstance(argument, ast.Starred) for argument in args) or any(k.arg is None for k in keywords):
                    self._fault(node, f"{ast.unparse(node)!r}: * and ** are not taken")
                    return None
                return self._call(op, args, {str(k.arg): k.value for k in keywords}, name, node)
        self._fault(node, f"{ast.unparse(node)!r} is not taken; there are calls of operations, + - * / @ and numbers")
        return None

    def _call(
        self, op: str, args: list[ast.expr], keywords: dict[str, ast.expr], name: str | None, node: ast.expr
    ) -> str | None:
        operation = OPERATIONS[op]
        most = len(args) if operation.variadic else len(operation.arguments)
        # `dropout(h, 0.1)`: what follows the arguments are attributes, in order.
        attrs = dict(zip(operation.attributes, args[most:], strict=False))
        if len(args) - most > len(attrs):
            self._fault(node, f"{ast.unparse(node)!r}: too many arguments for {operation.signature}")
            return None
        args = args[:most]
        for argument in operation.arguments[len(args) :]:
            if argument not in keywords:
                break
            args.append(keywords.pop(argument))
        for keyword in keywords.keys() & attrs.keys():
            self._fault(node, f"{ast.unparse(node)!r}: {keyword} is given twice")
            return None
        operands = [self._operand(argument) for argument in args]
        values = {keyword: _constant(value) for keyword, value in (attrs | keywords).items()}
        inputs = [operand for operand in operands if operand is not None]
        if len(inputs) < len(operands):
            return None
        return self._add(op, inputs, values, name, node)


def _constant(node: ast.expr) -> object:
    """An attribute's value: a number, a string, a list of these, or the text of an expression over dims."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return tuple(_constant(item) for item in items)
        case ast.Name(id="true" | "false" as word):  # as in the TOML around it
            return word == "true"
    return ast.unparse(node)


def write_graph(ops: Iterable[Op]) -> str:
    """One line for each op, as `read_graph` reads them."""
    return "".join(f"{op.name} = {_expression(op)}\n" for op in ops)


def _expression(op: Op) -> str:
    operands = [_operand_text(item) for item in op.inputs]
    if op.op in _SYMBOLS:
        return f" {_SYMBOLS[op.op]} ".join(operands)
    return f"{op.op}({', '.join([*operands, *_attrs_text(op)])})"


def _operand_text(item: str | float) -> str:
    return item if isinstance(item, str) else repr(item)


def _attrs_text(op: Op) -> list[str]:
    return [f"{name}={_attr_text(value, OPERATIONS[op.op].attributes[name].kind)}" for name, value in op.attrs.items()]


def _attr_text(value: object, kind: str) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    if isinstance(value, str):
        return value if kind == "extent" else json.dumps(value)
    return repr(value)
