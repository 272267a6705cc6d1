"""Triton expressions for the nodes of a graph, at given rows and columns.

A value is asked for where it is needed, and what it is made from is asked for in turn, at the rows and columns that
this needs: so slices, shifts and transpositions are index arithmetic in a load, and nothing is computed twice in one
place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from esper_triton.tezzeret.graph import Node

__all__ = ["At", "Index", "Tensor", "Value", "Values", "far", "float_literal"]

_LONGEST_EXPRESSION = 56
# What the kernels' own lines call things.
_NAMES_OF_KERNELS = frozenset(
    "row row_ok line line_ok item position positions rows batch length image_height image_width training alpha "
    "tl triton torch libdevice larger".split()
)


@dataclass(frozen=True)
class Index:
    """An index of a block: `code` as it stands in an expression of two dimensions. `name`, if it is one variable of one
    dimension, and then `block` is its extent. `ok` says where it is within its extent, None for everywhere."""

    code: str
    rows: bool = False
    cols: bool = False
    ok: str | None = None
    name: str | None = None
    block: str = "1"


ZERO = Index("0")


@dataclass(frozen=True)
class At:
    """Where a value is wanted: `row` of its level, and an index for each inner dimension. `line` is the row of the
    value seen as a matrix, where that is a variable. `ok` are conditions under which it is not 0."""

    row: Index
    inner: tuple[Index, ...]
    line: Index | None = None
    ok: tuple[str, ...] = ()

    def aligned(self, node: Node, argument: Node) -> At:
        """Where an argument of a pointwise operation is wanted, by broadcasting."""
        if argument.shape == node.shape:
            return self
        skipped = len(node.shape) - len(argument.shape)
        inner = tuple(ZERO if extent == 1 else self.inner[skipped + i] for i, extent in enumerate(argument.shape))
        return replace(self, inner=inner, line=self.line if argument.inner_rows == node.inner_rows else None)


@dataclass(frozen=True)
class Value:
    """Code of a block [rows, columns], either of which may be 1."""

    code: str
    rows: bool = False
    cols: bool = False


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory: the name that its kernel parameters begin with, elements from one row to the next (an
    expression), and whether its elements are of the layer's dtype or float32."""

    name: str
    row_stride: str
    is_input_dtype: bool


@dataclass
class _Scope:
    """What has been given a variable in a block."""

    values: dict[tuple[Node, At], Value] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)


class Values:
    """The body of one kernel, as lines, and the values in it."""

    def __init__(
        self, memory: Mapping[Node, Tensor], names: Mapping[Node, str], dtype: str, uses: Mapping[Node, int]
    ) -> None:
        self.memory, self.names, self.dtype, self.uses = memory, names, dtype, uses
        self.prologue: list[str] = []
        self.lines: list[str] = []
        self.pointers: dict[str, None] = {}
        self.strides: dict[str, None] = {}
        self.scalars: dict[str, None] = {}
        self.is_image = False
        self.fixed_rows: set[str] = set()
        """Code of row indices that are made before every loop."""
        self.results: dict[Node, Value] = {}
        """Of sums and products, by whoever has computed them."""
        self._indent = 1
        self._scopes: list[_Scope] = [_Scope()]
        self._taken: set[str] = set(_NAMES_OF_KERNELS)
        self._narrow: dict[str, str] = {}  # of loaded values: the variable before it was made float32

    # ---- lines

    def line(self, text: str) -> None:
        self.lines.append("    " * self._indent + text)

    @contextmanager
    def block(self, head: str | None) -> Iterator[None]:
        """An indented block; values made in it are not seen after it. Without `head` just such a scope."""
        if head is not None:
            self.line(head)
            self._indent += 1
        self._scopes.append(_Scope())
        results = dict(self.results)
        yield
        self.results = results
        self._scopes.pop()
        if head is not None:
            self._indent -= 1

    def variable(self, wanted: str) -> str:
        """A name that no other variable of the kernel has."""
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name

    def assign(self, wanted: str, code: str) -> str:
        name = self.variable(wanted)
        self.line(f"{name} = {without_parentheses(code)}")
        return name

    def pointer(self, name: str) -> str:
        self.pointers[name] = None
        return f"{name}_ptr"

    def stride(self, name: str) -> str:
        self.strides[name] = None
        return f"{name}_row_stride"

    def scalar(self, name: str) -> str:
        self.scalars[name] = None
        return name

    # ---- values

    def alpha(self) -> str:
        return self._top("alpha", f"tl.load({self.pointer('alpha')})")

    def _top(self, name: str, code: str) -> str:
        """A scalar that is computed once, before everything else."""
        line = f"    {name} = {code}"
        if line not in self.prologue:
            self._taken.add(name)
            self.prologue.append(line)
        return name

    @contextmanager
    def before(self) -> Iterator[None]:
        """Lines written meanwhile stand before everything else, outside of any block."""
        lines, indent = self.lines, self._indent
        self.lines, self._indent = self.prologue, 1
        yield
        self.lines, self._indent = lines, indent

    def value(self, node: Node, at: At) -> Value:
        """The node's value as float32."""
        if node.op == "const":
            return Value(float_literal(node["value"]))
        if node.op == "alpha":
            return Value(self.alpha())
        if node.op == "length":
            return Value(self._top("positions", f"{self.scalar('length')}.to(tl.float32)"))
        if node in self.results:
            return self.results[node]
        for scope in reversed(self._scopes):
            if (node, at) in scope.values:
                return scope.values[node, at]
        value = self._made(node, at)
        if value.rows or value.cols or node.op not in ("reshape", "slice", "expand"):
            keep = self.uses.get(node, 2) > 1 or node in self.names or len(value.code) > _LONGEST_EXPRESSION
            if keep and not value.code.isidentifier():
                wide = self.assign(self.hint(node), value.code)
                if value.code in self._narrow:
                    self._narrow[wide] = self._narrow[value.code]
                value = replace(value, code=wide)
        self._scopes[-1].values[node, at] = value
        return value

    def hint(self, node: Node) -> str:
        if node in self.names:
            return self.names[node]
        if node in self.memory:
            return self.memory[node].name
        return node["name"] if node.op in ("input", "param") else {"lt": "below", "gt": "above"}.get(node.op, node.op)

    def is_plain_load(self, node: Node) -> bool:
        """Whether the value is what is in memory, 0 outside of the mask."""
        if node in self.memory or node.op == "param":
            return True
        return node.op in _MAPS_OF_LOADS and node not in self.results and self.is_plain_load(node.args[0])

    def zeroed(self, node: Node, at: At, *, rows: bool) -> Value:
        """The value, 0 wherever the block reaches beyond the value's columns, and with `rows` beyond its rows too."""
        value = self.value(node, at)
        masks = [m for m in (at.row.ok if rows else None, *(i.ok for i in at.inner), *at.ok) if m]
        if not masks or (self.is_plain_load(node) and node not in self.results):
            return value
        masked = f"tl.where({' & '.join(masks)}, {value.code}, 0.0)"
        return Value(masked, value.rows or rows, value.cols or any(i.ok for i in at.inner))

    def operand(self, node: Node, at: At, *, rows: bool) -> str:
        """Code of the value as an operand of a product: of the layer's dtype, 0 beyond its extent."""
        if node in self.memory and node not in self.results:
            value = self.value(node, at)
            if value.code in self._narrow:
                return self._narrow[value.code]
        zeroed = self.zeroed(node, at, rows=rows)
        code = zeroed.code
        if not (zeroed.rows and zeroed.cols):
            code = f"(tl.zeros([{at.row.block}, {at.inner[-1].block}], dtype=tl.float32) + {code})"
        if self.dtype != "float32":
            code = f"{code}.to({self.element})"
        return code if code.isidentifier() else self._shared(self.hint(node), code)

    @property
    def element(self) -> str:
        return f"tl.{self.dtype}"

    def _made(self, node: Node, at: At) -> Value:
        if node in self.memory:
            return self._load(self.memory[node], node, at)
        match node.op:
            case "param":
                return self._param(node, at)
            case "expand":
                return self.value(node.args[0], at.aligned(node, node.args[0]))
            case "slice":
                return self.value(node.args[0], _moved(at, f" + {node['start']}" if node["start"] else ""))
            case "pad":
                return self._piece(node.args[0], at, node["start"])
            case "concat":
                return self._concat(node, at)
            case "reshape":
                return self.value(node.args[0], self._reshaped(node, at))
            case "transpose":
                *leading, a, b = at.inner
                return self.value(node.args[0], replace(at, inner=(*leading, b, a), line=None))
            case "unpool":
                code = f"({at.row.code}.to(tl.int32) // {self.scalar('length')}).to(tl.int64)"
                item = Index(self.of_rows(at.row.code, "item", code), rows=True, ok=at.row.ok)
                return self.value(node.args[0], replace(at, row=item, line=None))
            case "shift":
                return self._shifted(node, at)
            case "gather":
                return self._gathered(node, at)
            case "onehot":
                row, is_whole = self._entry(node.args[0], at)
                return Value(f"tl.where({is_whole} & ({row} == {at.inner[-1].code}), 1.0, 0.0)", True, True)
            case "keep":
                return self._keep(node, at)
            case "where" if node.args[0].op in _COMPARISONS and node.args[0] not in self.memory:
                condition, *choices = node.args
                here = at.aligned(node, condition)
                left, right = (self.value(c, here.aligned(condition, c)) for c in condition.args)
                x, y = (self.value(c, at.aligned(node, c)) for c in choices)
                test = f"{left.code} {_COMPARISONS[condition.op]} {right.code}"
                return _joined(f"tl.where({test}, {x.code}, {y.code})", left, right, x, y)
            case op if op in _POINTWISE:
                values = [self.value(a, at.aligned(node, a)) for a in node.args]
                return _joined(_POINTWISE[op].format(*(v.code for v in values)), *values)
        raise AssertionError(f"{node} is computed by a kernel and is not in memory here")

    # ---- memory

    def _load(self, tensor: Tensor, node: Node, at: At) -> Value:
        stride = tensor.row_stride
        if stride == "row_stride":
            stride = self.stride(tensor.name)
        # A contiguous matrix of several lines a row is indexed by the line.
        if at.line is not None and node.inner_rows > 1 and stride == str(node.size):
            parts = [(at.line, str(node.width)), (at.inner[-1], "1")]
        else:
            steps = [str(math.prod(node.shape[i + 1 :])) for i in range(len(node.shape))]
            parts = [(at.row, stride), *zip(at.inner, steps, strict=True)]
        return self._loaded(self.pointer(tensor.name), parts, at, tensor.is_input_dtype)

    def _param(self, node: Node, at: At) -> Value:
        inner = [replace(i, code=far(node, i.code)) for i in at.inner]
        parts = list(zip(inner, (str(s) for s in node["strides"]), strict=True))
        where = self.pointer(node["name"])
        if node["offset"]:
            where = f"{where} + {node['offset']}"
        level = replace(at, row=ZERO, ok=()) if not any(i.rows for i in at.inner) else at
        return self._loaded(where, parts, level, True)

    def _loaded(self, where: str, parts: list[tuple[Index, str]], at: At, convert: bool) -> Value:
        used = [(index, stride) for index, stride in parts if index.code != "0"]
        terms = [index.code if stride == "1" else f"{index.code} * {stride}" for index, stride in used]
        rows, cols = any(i.rows for i, _ in used), any(i.cols for i, _ in used)
        masks = list(dict.fromkeys(m for m in (*(i.ok for i, _ in used), *at.ok) if m))
        code = " + ".join([where, *terms])
        if masks:
            code = f"tl.load({code}, mask={' & '.join(masks)}, other=0.0)"
        else:
            code = f"tl.load({code})"
        if convert and self.dtype != "float32":
            narrow = self._shared("loaded", code)
            code = f"{narrow}.to(tl.float32)"
            self._narrow[code] = narrow
        return Value(code, rows, cols)

    # ---- index maps

    def _piece(self, node: Node, at: At, start: int) -> Value:
        """The value at columns that begin with `start`, 0 at the others."""
        moved = _moved(at, f" - {start}" if start else "")
        within = f"({at.inner[-1].code} >= {start}) & ({at.inner[-1].code} < {start + node.width})"
        value = self.value(node, replace(moved, ok=(*at.ok, within)))
        if self.is_plain_load(node):
            return value
        return Value(f"tl.where({within}, {value.code}, 0.0)", value.rows, True)

    def _concat(self, node: Node, at: At) -> Value:
        start, pieces = 0, []
        for argument in node.args:
            here = at if argument.shape[:-1] == node.shape[:-1] else self._leading(at, argument)
            pieces.append(self._piece(argument, here, start))
            start += argument.width
        return _joined(" + ".join(f"({piece.code})" for piece in pieces), *pieces)

    @staticmethod
    def _leading(at: At, argument: Node) -> At:
        kept = at.inner[len(at.inner) - len(argument.shape) :]
        inner = [ZERO if e == 1 else i for e, i in zip(argument.shape[:-1], kept, strict=False)]
        return replace(at, inner=(*inner, at.inner[-1]), line=None)

    def _reshaped(self, node: Node, at: At) -> At:
        """Element indices of the one shape as those of the other, by the position in memory."""
        source = node.args[0].shape
        if node.shape[-1:] == source[-1:] and at.line is not None:
            return replace(at, inner=self._from_line(at.line, source, at.inner[-1]))
        steps = [math.prod(node.shape[i + 1 :]) for i in range(len(node.shape))]
        terms = [
            index.code if step == 1 else f"{index.code} * {step}"
            for index, step in zip(at.inner, steps, strict=True)
            if index.code != "0"
        ]
        rows, cols = any(i.rows for i in at.inner), any(i.cols for i in at.inner)
        masks = tuple(i.ok for i in at.inner if i.ok and (i.rows or i.cols))
        name = self._shared("flat", " + ".join(terms)) if terms else "0"
        return replace(at, inner=self.unflattened(name, source, rows, cols), line=None, ok=(*at.ok, *masks))

    @staticmethod
    def unflattened(flat: str, shape: tuple[int, ...], rows: bool, cols: bool) -> tuple[Index, ...]:
        inner = []
        for dim, extent in enumerate(shape):
            behind = math.prod(shape[dim + 1 :])
            code = flat if behind == 1 else f"{flat} // {behind}"
            if dim > 0:
                code = f"({code}) % {extent}" if behind > 1 else f"{code} % {extent}"
            inner.append(Index(f"({code})", rows, cols) if extent > 1 else ZERO)
        return tuple(inner)

    def _from_line(self, line: Index, shape: tuple[int, ...], last: Index) -> tuple[Index, ...]:
        lines = math.prod(shape[:-1])
        leading = self.unflattened(f"({line.code} % {lines})", shape[:-1], True, False) if lines > 1 else ()
        return (*(leading or (ZERO,) * (len(shape) - 1)), last)

    def _shifted(self, node: Node, at: At) -> Value:
        dy, dx = node["dy"], node["dx"]
        row = at.row.code
        suffix = ("_" + _signed(dy) if dy else "") + "_" + _signed(dx)
        # Rows are fewer than 2^31, and division is cheaper in 32 bits.
        short = f"{row}.to(tl.int32)"
        ok = [at.row.ok] if at.row.ok else []
        if self.is_image:
            width, height = self.scalar("image_width"), self.scalar("image_height")
            step = " + ".join(filter(None, (f"({dy}) * {width}" if dy else "", str(dx) if dx else "")))
            if dy:
                ok.append(_within(self.of_rows(row, "y", f"{short} // {width} % {height}"), height, dy))
            if dx:
                ok.append(_within(self.of_rows(row, "x_at", f"{short} % {width}"), width, dx))
        else:
            step, length = str(dx), self.scalar("length")
            ok.append(_within(self.of_rows(row, "position", f"{short} % {length}"), length, dx))
        moved = self.of_rows(row, f"row{suffix}", f"{row} + {step}")
        masked = self.of_rows(row, f"ok{suffix}", " & ".join(ok))
        if row in self.fixed_rows:
            self.fixed_rows.add(moved)
        source = replace(at, row=Index(moved, rows=True, ok=masked), line=None)
        value = self.value(node.args[0], source)
        if self.is_plain_load(node.args[0]):
            return value
        return Value(f"tl.where({masked}, {value.code}, 0.0)", True, value.cols)

    def of_rows(self, row: str, wanted: str, code: str) -> str:
        """A variable for what depends on the row alone: computed once, where the rows are the same in every loop."""
        if row not in self.fixed_rows:
            return self._shared(wanted, code)
        if code not in self._scopes[0].codes:
            with self.before():
                self._scopes[0].codes[code] = self.assign(wanted, code)
        return self._scopes[0].codes[code]

    def _shared(self, wanted: str, code: str) -> str:
        """One variable for equal code."""
        for scope in self._scopes:
            if code in scope.codes:
                return scope.codes[code]
        self._scopes[-1].codes[code] = name = self.assign(wanted, code)
        return name

    def _gathered(self, node: Node, at: At) -> Value:
        table, index = node.args
        row, is_whole = self._entry(index, at)
        count, (stride, step) = table.shape[0], table["strides"]
        where = f"{self.pointer(table['name'])} + {row} * {stride} + {at.inner[-1].code} * {step}"
        masks = [f"{is_whole} & ({row} >= 0) & ({row} < {count})", *(m for m in (at.row.ok, at.inner[-1].ok) if m)]
        code = f"tl.load({where}, mask={' & '.join(masks)}, other=float('nan'))"
        return Value(code + ("" if self.dtype == "float32" else ".to(tl.float32)"), True, True)

    def _entry(self, index: Node, at: At) -> tuple[str, str]:
        """A table's row by the value that names it, and whether it does: it is no NaN."""
        found = self.value(index, replace(at, inner=(*at.inner[:-1], ZERO))).code
        is_number = f"({found} == {found})"
        return self._shared("entry", f"tl.where({is_number}, {found}, -1.0).to(tl.int64)"), is_number

    def _keep(self, node: Node, at: At) -> Value:
        """The factor of dropout: 0 or 1 / (1 - p) in training, else 1. Drawn by philox from the element's position."""
        seed = f"tl.load({self.pointer('dropout_seed')}) + {node['salt']}"
        steps = [math.prod(node.shape[i + 1 :]) for i in range(len(node.shape))]
        terms = [f"{at.row.code} * {node.size}"]
        terms += [f"{i.code} * {s}" for i, s in zip(at.inner, steps, strict=True) if i.code != "0"]
        drawn = self.assign("drawn", f"tl.rand({seed}, {' + '.join(terms)})")
        scale = float_literal(1 / (1 - node["p"])) if node["p"] < 1 else "0.0"
        kept = f"tl.where({drawn} >= {node['p']!r}, {scale}, 0.0)"
        return Value(f"tl.where({self.scalar('training')} != 0, {kept}, 1.0)", True, True)


def far(param: Node, code: str) -> str:
    """An index of a parameter's dimension, in 64 bits where its elements are more than 32 bits count."""
    last = param["offset"] + sum((e - 1) * s for e, s in zip(param.shape, param["strides"], strict=True))
    return code if last < 2**31 or code == "0" else f"{code}.to(tl.int64)"


def _signed(step: int) -> str:
    """A step as a part of a name."""
    return f"{'m' if step < 0 else 'p'}{abs(step)}"


def _within(place: str, extent: str, step: int) -> str:
    """Whether the neighbour of a place is within its item."""
    return f"({place} >= {-step})" if step < 0 else f"({place} < {extent} - {step})"


def _moved(at: At, step: str) -> At:
    """The same with the last index moved. The mask stays: it is of the block's own columns."""
    if not step:
        return at
    last = at.inner[-1]
    return replace(at, inner=(*at.inner[:-1], replace(last, code=f"({last.code}{step})", name=None)))


def _joined(code: str, *values: Value) -> Value:
    return Value(code, any(v.rows for v in values), any(v.cols for v in values))


def without_parentheses(code: str) -> str:
    """The expression without a pair of parentheses around the whole of it."""
    if not (code.startswith("(") and code.endswith(")")):
        return code
    depth = 0
    for position, character in enumerate(code):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and position < len(code) - 1:
            return code
    return code[1:-1]


def float_literal(value: float) -> str:
    """Triton source for a float32 constant."""
    if math.isnan(value) or math.isinf(value):
        return f"float('{value}')"
    return repr(value)


_MAPS_OF_LOADS = frozenset({"slice", "pad", "reshape", "transpose", "unpool", "shift"})
_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
_POINTWISE = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "exp": "tl.exp({0})",
    "expm1": "libdevice.expm1({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "abs": "tl.abs({0})",
    "tanh": "libdevice.tanh({0})",
    "sigmoid": "tl.sigmoid({0})",
    "softplus": "(tl.maximum({0}, 0.0) + libdevice.log1p(tl.exp(-tl.abs({0}))))",
    "erf": "tl.erf({0})",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    **{name: f"tl.where({{0}} {sign} {{1}}, 1.0, 0.0)" for name, sign in _COMPARISONS.items()},
    "where": "tl.where({0} != 0.0, {1}, {2})",
}
