"""The recursive-descent parser behind `esper_triton.cpu.mlir.parse`.

Grammar of one operation in generic form:

    %a:2, %b = "dialect.name"(%x, %y#1)[^bb1, ^bb2] <{properties}> ({region}, {region}) {attributes} :
        (types) -> types loc(...)
"""

from __future__ import annotations

import re
import struct
from typing import Any

from esper_triton.cpu.errors import MLIRSyntaxError
from esper_triton.cpu.mlir import (
    Block,
    Dense,
    DialectAttribute,
    FunctionType,
    Location,
    Module,
    OpaqueType,
    Operation,
    Region,
    ScalarType,
    SymbolRef,
    TensorType,
    Type,
    Value,
    parse_type,
)

__all__ = ["Parser"]

_STRING = r'"(?:[^"\\]|\\.)*"'
_BODY = rf'(?:{_STRING}|->|[^<>"])*'
for _ in range(4):  # `<...>` nested up to five deep, as in `!tt.tensordesc<tensor<8x8xf16, #shared<{...}>>>`
    _BODY = rf'(?:{_STRING}|->|[^<>"]|<{_BODY}>)*'
_TOKEN = re.compile(
    rf"""{_STRING}
    |%[\w$.-]+(?:\#\d+)?
    |->|<{{|}}>|[,()=:{{}}\[\]]
    |\^[\w$.-]+
    |@(?:{_STRING}|[\w$.]+)
    |[!#]?[A-Za-z_][\w$.]*(?:<{_BODY}>)?
    |-?0x[0-9A-Fa-f]+|-?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?
    |//[^\n]*
    |\S""",
    re.VERBOSE,
)
_ALIAS = re.compile(r"^([#!][\w$.]+) = (.*)\n?", re.MULTILINE)
_NUMBER = re.compile(r"-?0x[0-9A-Fa-f]+|-?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|true|false")
_ESCAPE = re.compile(r'\\(?:([0-9A-Fa-f]{2})|(["\\nt]))')
_STRUCT = {1: "b", 8: "b", 16: "h", 32: "i", 64: "q"}
# Triton's own library code: a line in it says nothing about where the user's kernel asks for the operation.
_LIBRARY = ("/triton/language/", "\\triton\\language\\")


class Parser:
    """Parses one text once."""

    def __init__(self, text: str, aliases: dict[str, str] | None = None) -> None:
        if aliases is None:
            aliases = dict(_ALIAS.findall(text))
            # Keeps the line numbers of what is left.
            text = _ALIAS.sub("\n", text)
        self._text = text
        self._aliases = aliases
        self._locations: dict[str, Location | None] = {}
        self._tokens: list[str] = [token for token in _TOKEN.findall(text) if not token.startswith("//")]
        self._tokens.append("")
        self._position = 0
        # One per open region: the values defined in it, and those used in it before they were defined.
        self._scopes: list[dict[str, Value]] = [{}]
        self._pending: list[dict[str, Value]] = [{}]
        self._labels: list[dict[str, Block]] = []

    def module(self) -> Module:
        operation = self._operation(None)
        if operation.name != "builtin.module":
            raise self._error("a builtin.module", operation.name)
        if self._tokens[self._position]:
            raise self._error("the end of the text")
        functions = {
            op.attributes["sym_name"]: op for op in operation.regions[0].block.operations if op.name == "tt.func"
        }
        return Module(functions, operation)

    # Tokens

    def _error(self, expected: str, found: str | None = None) -> MLIRSyntaxError:
        line, index = self._text.count("\n") + 1, -1
        for match in _TOKEN.finditer(self._text):
            if not match[0].startswith("//"):
                index += 1
                if index == self._position:
                    line = self._text.count("\n", 0, match.start()) + 1
                    break
        token = self._tokens[self._position] if found is None else found
        return MLIRSyntaxError(f"MLIR line {line}: expected {expected}, found {token[:60]!r}")

    def _expect(self, token: str) -> None:
        if self._tokens[self._position] != token:
            raise self._error(repr(token))
        self._position += 1

    def _accept(self, token: str) -> bool:
        if self._tokens[self._position] == token:
            self._position += 1
            return True
        return False

    def _next(self) -> str:
        token = self._tokens[self._position]
        if not token:
            raise self._error("more")
        self._position += 1
        return token

    # Values

    def _use(self, name: str) -> Value:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        pending = self._pending[-1]
        if name not in pending:
            pending[name] = Value(name, OpaqueType("?"))
        return pending[name]

    def _define(self, name: str, type: Type) -> Value:
        value = self._pending[-1].pop(name, None)
        if value is None:
            value = Value(name, type)
        else:
            value.type = type
        self._scopes[-1][name] = value
        return value

    # Operations, regions, blocks

    def _operation(self, block: Block | None) -> Operation:
        tokens = self._tokens
        packs: list[tuple[str, int]] = []
        while tokens[self._position].startswith("%"):
            name = self._next()
            packs.append((name, int(self._next()) if self._accept(":") else 1))
            if not self._accept(","):
                self._expect("=")
        name = tokens[self._position]
        if not name.startswith('"'):
            raise self._error("an operation in generic form")
        self._position += 1
        operation = Operation(name[1:-1], [], [], {}, [], [], [], None, block)
        self._expect("(")
        if not self._accept(")"):
            operation.operands = self._operands()
        for value in operation.operands:
            if not (value.users and value.users[-1] is operation):
                value.users.append(operation)
        if self._accept("["):
            while not self._accept("]"):
                operation.successors.append(self._successor(self._next()))
                self._accept(",")
        if self._accept("<{"):
            self._attributes(operation.attributes, "}>")
        if tokens[self._position] == "(":
            self._position += 1
            while not self._accept(")"):
                operation.regions.append(self._region(operation))
                self._accept(",")
        if self._accept("{"):
            self._attributes(operation.attributes, "}")
        self._expect(":")
        signature = self._function_type()
        self._check_count("operands", operation, len(signature.inputs), len(operation.operands))
        names = [n if size == 1 else f"{n}#{k}" for n, size in packs for k in range(size)]
        self._check_count("results", operation, len(signature.results), len(names))
        for index, (result, type) in enumerate(zip(names, signature.results, strict=True)):
            value = self._define(result, type)
            value.defining_op, value.index = operation, index
            operation.results.append(value)
        operation.location = self._trailing_location()
        operation.successor_operands = self._successor_operands(operation)
        return operation

    def _check_count(self, what: str, operation: Operation, expected: int, found: int) -> None:
        if expected != found:
            raise self._error(f"{expected} {what} of {operation.name}", str(found))

    def _operands(self) -> list[Value]:
        values = []
        while True:
            name = self._next()
            if not name.startswith("%"):
                self._position -= 1
                raise self._error("an operand")
            values.append(self._use(name))
            if self._accept(")"):
                return values
            self._expect(",")

    def _successor_operands(self, operation: Operation) -> list[list[Value]]:
        operands, count = operation.operands, len(operation.successors)
        if not count:
            return []
        sizes = operation.attributes.get("operandSegmentSizes")
        if sizes is None:
            # Without segments everything goes to the one successor, as in cf.br.
            return [list(operands)] if count == 1 else [[] for _ in range(count)]
        result, end = [], len(operands)
        for size in reversed(sizes[-count:]):
            result.append(operands[end - size : end])
            end -= size
        return result[::-1]

    def _successor(self, label: str) -> Block:
        labels = self._labels[-1]
        if label not in labels:
            labels[label] = Block(label, Region())
        return labels[label]

    def _region(self, parent: Operation) -> Region:
        region = Region(parent)
        self._expect("{")
        self._scopes.append({})
        self._pending.append({})
        self._labels.append({})
        if not self._tokens[self._position].startswith("^") and self._tokens[self._position] != "}":
            region.blocks.append(self._block(Block("^bb0", region)))
        while self._tokens[self._position].startswith("^"):
            block = self._successor(self._next())
            block.region = region
            if self._accept("("):
                while not self._accept(")"):
                    name = self._next()
                    self._expect(":")
                    argument = self._define(name, self._type())
                    argument.block, argument.index = block, len(block.arguments)
                    block.arguments.append(argument)
                    self._trailing_location()
                    self._accept(",")
            self._expect(":")
            region.blocks.append(self._block(block))
        self._expect("}")
        for label, block in self._labels.pop().items():
            if block.region is not region:
                raise self._error("a block for each label", label)
        self._scopes.pop()
        pending = self._pending.pop()
        if pending and parent.name in ("tt.func", "builtin.module"):
            raise self._error("a definition of every value used", next(iter(pending)))
        # A value that dominates this region may be defined further down in the text, in an outer region.
        for name, value in pending.items():
            outer = self._pending[-1].setdefault(name, value)
            if outer is not value:
                self._replace(value, outer)
        return region

    def _replace(self, old: Value, new: Value) -> None:
        for user in old.users:
            user.operands = [new if value is old else value for value in user.operands]
            user.successor_operands = [[new if v is old else v for v in group] for group in user.successor_operands]
            if user not in new.users:
                new.users.append(user)

    def _block(self, block: Block) -> Block:
        tokens = self._tokens
        while tokens[self._position][:1] in ("%", '"'):
            block.operations.append(self._operation(block))
        return block

    # Types

    def _type(self) -> Type:
        if self._tokens[self._position] == "(":
            return self._function_type()
        token = self._next()
        return parse_type(self._aliases.get(token, token))

    def _types(self) -> tuple[Type, ...]:
        if not self._accept("("):
            return (self._type(),)
        types = []
        while not self._accept(")"):
            types.append(self._type())
            self._accept(",")
        return tuple(types)

    def _function_type(self) -> FunctionType:
        inputs = self._types()
        self._expect("->")
        return FunctionType(inputs, self._types())

    # Attributes

    def _attributes(self, into: dict[str, Any], closing: str) -> None:
        while not self._accept(closing):
            key = self._next()
            into[_unquote(key) if key.startswith('"') else key] = self._attribute() if self._accept("=") else True
            self._accept(",")

    def _attribute(self) -> Any:
        token = self._next()
        first = token[0]
        if first == '"':
            if self._accept(":"):
                self._type()
            return _unquote(token)
        if token in ("true", "false"):
            return token == "true"
        if first.isdigit() or first == "-":
            type = self._type() if self._accept(":") else None
            return _number(token, type)
        if first == "[":
            values = []
            while not self._accept("]"):
                values.append(self._attribute())
                self._accept(",")
            return tuple(values)
        if first == "{":
            nested: dict[str, Any] = {}
            self._attributes(nested, "}")
            return nested
        if first == "@":
            name = _symbol(token)
            while self._tokens[self._position] == ":" and self._tokens[self._position + 1] == ":":
                self._position += 2
                name += "::" + _symbol(self._next())
            return SymbolRef(name)
        if first == "(":
            self._position -= 1
            return self._function_type()
        if first == "#":
            return self._dialect_attribute(token)
        if token == "loc":
            self._position -= 1
            return self._trailing_location()
        if token == "unit":
            return True
        if token.startswith("dense<"):
            self._expect(":")
            return _dense(token[6:-1], self._type())
        if token.startswith("array<"):
            element, _, items = token[6:-1].partition(":")
            type = parse_type(element.strip())
            return tuple(_number(item.strip(), type) for item in items.split(",") if item.strip())
        if first == "!" or first.isalpha():
            type = parse_type(self._aliases.get(token, token))
            if isinstance(type, OpaqueType) and first != "!" and "<" in token:
                name, _, body = token.partition("<")
                if name not in ("tensor", "vector", "memref", "tuple", "complex"):
                    return DialectAttribute(name, body[:-1])
            return type
        self._position -= 1
        raise self._error("an attribute")

    def _dialect_attribute(self, token: str) -> Any:
        if token in self._aliases:
            return Parser(self._aliases[token], self._aliases)._attribute()
        name, _, body = token[1:].partition("<")
        if self._accept(":"):
            self._type()
        return DialectAttribute(name, body[:-1])

    # Locations

    def _trailing_location(self) -> Location | None:
        if self._tokens[self._position] != "loc":
            return None
        self._position += 1
        self._expect("(")
        location = self._location()
        self._expect(")")
        return location

    def _location(self) -> Location | None:
        token = self._next()
        if token.startswith("#"):
            if token not in self._locations:
                inner = Parser(self._aliases.get(token, "loc(unknown)"), self._aliases)
                inner._locations = self._locations
                self._locations[token] = inner._trailing_location()
            return self._locations[token]
        if token.startswith('"'):
            if self._accept(":"):
                location = Location(_unquote(token), int(self._next()))
                while self._tokens[self._position] in (":", "to") or self._tokens[self._position].isdigit():
                    self._position += 1
                return location
            inside = None
            if self._accept("("):
                inside = self._location()
                self._expect(")")
            return inside
        if token == "callsite":
            self._expect("(")
            callee = self._location()
            self._expect("at")
            caller = self._location()
            self._expect(")")
            if callee is None or (caller and any(part in callee.file for part in _LIBRARY)):
                return caller
            return callee
        if token.startswith("fused"):
            self._expect("[")
            parts = []
            while not self._accept("]"):
                parts.append(self._location())
                self._accept(",")
            return next((part for part in parts if part), None)
        return None


def _unquote(token: str) -> str:
    body = token[1:-1]
    if "\\" not in body:
        return body
    # MLIR escapes bytes of UTF-8, not characters.
    raw = _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else {"n": "\n", "t": "\t"}.get(m[2], m[2]), body)
    try:
        return raw.encode("latin-1").decode()
    except UnicodeError:
        return raw


def _symbol(token: str) -> str:
    name = token.removeprefix("@")
    return _unquote(name) if name.startswith('"') else name


def _number(token: str, type: Type | None) -> Any:
    if token in ("true", "false"):
        return token == "true"
    is_float = isinstance(type, ScalarType) and type.is_float
    if "0x" in token:
        bits = int(token, 16)
        return _float_from_bits(bits, type) if isinstance(type, ScalarType) and is_float else bits
    if is_float or "." in token or "e" in token or "E" in token:
        return float(token)
    return int(token)


def _float_from_bits(bits: int, type: ScalarType) -> Any:
    def decode(code: str, width: int, shift: int = 0) -> float:
        value: float = struct.unpack(code, (bits << shift).to_bytes(width, "little"))[0]
        return value

    if type.name == "f64":
        return decode("<d", 8)
    if type.name == "f32":
        return decode("<f", 4)
    if type.name == "f16":
        return decode("<e", 2)
    if type.name == "bf16":
        return decode("<f", 4, 16)
    if type.name == "f8E5M2":
        return decode("<e", 2, 8)
    if type.name == "f8E4M3FN":
        sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, bits >> 3 & 15, bits & 7
        if exponent == 15 and mantissa == 7:
            return float("nan")
        return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return DialectAttribute("float_bits", f"{bits:#x} : {type.name}")


def _dense(body: str, type: Type) -> Any:
    element = type.element if isinstance(type, TensorType) else None
    if not isinstance(type, TensorType) or not isinstance(element, ScalarType):
        return DialectAttribute("dense", body)
    if body.startswith('"'):
        values = _blob(bytes.fromhex(body[3:-1]), type.size, element)
    else:
        values = tuple(_number(token, element) for token in _NUMBER.findall(body))
        if values and not body.startswith("["):
            return Dense(type, values[0], splat=True)
    if len(values) == 1:
        return Dense(type, values[0], splat=True)
    if len(values) != type.size:
        raise MLIRSyntaxError(f"a constant of type {type} has {len(values)} elements, expected {type.size}")
    return Dense(type, values, splat=False)


def _blob(data: bytes, size: int, element: ScalarType) -> tuple[Any, ...]:
    """Elements of a constant that MLIR printed as a hexadecimal string of its little-endian storage."""
    if element.name == "i1" and len(data) == (size + 7) // 8 and len(data) != size:  # eight to a byte
        return tuple(bool(data[k >> 3] >> (k & 7) & 1) for k in range(size))
    width = max(element.bits // 8, 1)
    if len(data) % width:
        raise MLIRSyntaxError(f"a constant of {element} has {len(data)} bytes, expected a multiple of {width}")
    if element.is_float:
        return tuple(
            _float_from_bits(int.from_bytes(data[k : k + width], "little"), element) for k in range(0, len(data), width)
        )
    values = struct.unpack(f"<{len(data) // width}{_STRUCT[element.bits]}", data)
    return tuple(bool(value) for value in values) if element.name == "i1" else values
