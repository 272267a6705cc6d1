"""The graph that kernels are written from: few operations, numeric shapes, equal nodes made once.

A node's value is an array with a *level* and an inner shape. Level `rows` has one entry for every row of the layer's
input (every position of every item of the batch), level `batch` one for every item, and level `none` is of parameters
and constants. So `rows`, (64,) is a matrix [rows, 64], and `none`, (64,) a vector. All arithmetic is float32.

Operations:

- leaves: `input` (name), `param` (name, strides, offset: a view of a parameter), `const` (value), `alpha`, `length`
  (positions of an item, as a float)
- pointwise: those of `POINTWISE`, broadcast from the right; `keep` (p, salt) is dropout's factor, drawn by position
- index maps: `expand` (a sum's value for each of its terms), `slice` (start), `pad` (start), `concat`, `reshape`,
  `transpose`, `unpool` (batch to rows), `shift` (dy, dx: the value at another position of the item, 0 outside of it),
  `gather` (of a parameter's rows), `onehot`
- sums along a row: `rsum`, `rmax`, over the last inner dimension, kept as 1
- products with parameters: `linear` of a, weight, a, weight, ...: the sum of a weight^T over the pairs, weight [n, k],
  or [k, n] where `transposed` says so
- over rows, to level none: `outer` [n, k] = sum over rows of g[n] a[k], `sum_rows`; over an item: `pool_sum`
- kernels of their own: `bmm`, `attention`, `attention_lse`, `attention_grad` (which)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "ACCUMULATORS",
    "INDEX_MAPS",
    "LEAVES",
    "OVER_ROWS",
    "OWN_KERNELS",
    "POINTWISE",
    "Graph",
    "Level",
    "Node",
    "Vjp",
    "broadcast",
    "broadcast_shapes",
    "reached",
]

Level = Literal["rows", "batch", "none"]

LEAVES = frozenset({"input", "param", "const", "alpha", "length"})
POINTWISE = frozenset(
    "add sub mul div neg exp expm1 log sqrt rsqrt abs tanh sigmoid softplus erf relu maximum minimum "
    "gt ge lt le eq where keep".split()
)
INDEX_MAPS = frozenset(
    {"expand", "slice", "pad", "concat", "reshape", "transpose", "unpool", "shift", "gather", "onehot"}
)
ACCUMULATORS = frozenset({"rsum", "rmax", "linear"})
OVER_ROWS = frozenset({"outer", "sum_rows"})
OWN_KERNELS = frozenset({"pool_sum", "bmm", "attention", "attention_lse", "attention_grad"})


@dataclass(frozen=True, eq=False)
class Node:
    """One value. Equal only to itself; a `Graph` makes equal values one node. `index` grows with every node, so that
    arguments come before what uses them."""

    index: int
    op: str
    args: tuple[Node, ...]
    attrs: tuple[tuple[str, Any], ...]
    level: Level
    shape: tuple[int, ...]

    def __getitem__(self, name: str) -> Any:
        """An attribute."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def width(self) -> int:
        """Extent of the last inner dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def inner_rows(self) -> int:
        """Matrix rows of the last two dimensions that one row of the level holds."""
        return math.prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Elements for each row of the level."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        shown = ", ".join([*(f"%{a.index}" for a in self.args), *(f"{k}={v}" for k, v in self.attrs)])
        return f"%{self.index} = {self.op}({shown}): {self.level}{list(self.shape)}"


Vjp = Callable[[Node], "tuple[Node | None, ...]"]
"""From the cotangent of a value to those of what it is made from; None where there is none."""


class Graph:
    """Makes nodes; two of the same operation, arguments and attributes are one."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}
        self.names: dict[Node, str] = {}
        """What the blueprint calls a value, where it does."""
        self.vjps: dict[Node, tuple[tuple[Node, ...], Vjp]] = {}
        """Derivatives that are shorter than what the chain rule makes of the node's own operations: the nodes that it
        is taken by, and the function."""

    def node(self, op: str, args: Iterable[Node], level: Level, shape: tuple[int, ...], **attrs: Any) -> Node:
        """The node, made unless it is there."""
        args, items = tuple(args), tuple(sorted(attrs.items()))
        key = (op, args, items, level, shape)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(len(self._nodes), op, args, items, level, shape)
        return found

    @property
    def nodes(self) -> Iterable[Node]:
        """All of them, arguments first."""
        return self._nodes.values()

    # ---- leaves

    def const(self, value: float) -> Node:
        return self.node("const", (), "none", (), value=float(value))

    def input(self, name: str, level: Level, shape: tuple[int, ...]) -> Node:
        return self.node("input", (), level, shape, name=name)

    def param(self, name: str, shape: tuple[int, ...]) -> Node:
        """The whole of a parameter, which is contiguous."""
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return self.node("param", (), "none", shape, name=name, strides=strides, offset=0)

    def view(self, param: Node, keep: tuple[int, ...], at: dict[int, int]) -> Node:
        """Dimensions `keep` of a parameter, at the given indices of the others."""
        strides = param["strides"]
        offset = param["offset"] + sum(strides[dim] * index for dim, index in at.items())
        shape = tuple(param.shape[dim] for dim in keep)
        return self.node(
            "param", (), "none", shape, name=param["name"], strides=tuple(strides[d] for d in keep), offset=offset
        )

    @property
    def alpha(self) -> Node:
        return self.node("alpha", (), "none", ())

    @property
    def length(self) -> Node:
        return self.node("length", (), "none", ())

    # ---- pointwise

    def pointwise(self, op: str, *args: Node, **attrs: Any) -> Node:
        """Broadcast from the right, as numpy does. Simplifies products and sums with the constants 0 and 1."""
        level, shape = broadcast(args)
        args = self._at_level(args, level)
        if op in ("mul", "add", "sub", "div") and len(args) == 2:
            simple = self._simplified(op, args[0], args[1], level, shape)
            if simple is not None:
                return simple
        return self.node(op, args, level, shape, **attrs)

    def _at_level(self, args: Iterable[Node], level: Level) -> tuple[Node, ...]:
        """A value of the batch item counts for each of its rows."""
        return tuple(self.unpool(a) if (a.level, level) == ("batch", "rows") else a for a in args)

    def _simplified(self, op: str, a: Node, b: Node, level: Level, shape: tuple[int, ...]) -> Node | None:
        if a.op == b.op == "const":
            x, y = a["value"], b["value"]
            if op != "div" or y != 0:
                return self.const({"mul": x * y, "add": x + y, "sub": x - y, "div": x / y if y else 0.0}[op])
        # Only what is exact for NaN and infinities too.
        if op in ("mul", "div") and _is(b, 1.0) and (a.level, a.shape) == (level, shape):
            return a
        if op == "mul" and _is(a, 1.0) and (b.level, b.shape) == (level, shape):
            return b
        return None

    def add(self, a: Node, b: Node) -> Node:
        return self.pointwise("add", a, b)

    def sub(self, a: Node, b: Node) -> Node:
        return self.pointwise("sub", a, b)

    def mul(self, a: Node, b: Node) -> Node:
        return self.pointwise("mul", a, b)

    def div(self, a: Node, b: Node) -> Node:
        return self.pointwise("div", a, b)

    def unary(self, op: str, a: Node) -> Node:
        return self.pointwise(op, a)

    # ---- index maps

    def slice(self, a: Node, start: int, stop: int) -> Node:
        return self.node("slice", (a,), a.level, (*a.shape[:-1], stop - start), start=start)

    def pad(self, a: Node, start: int, width: int) -> Node:
        """Zeros before and after, in the last dimension."""
        return self.node("pad", (a,), a.level, (*a.shape[:-1], width), start=start)

    def concat(self, *args: Node) -> Node:
        level, leading = broadcast([self.slice(a, 0, 1) for a in args])
        args = self._at_level(args, level)
        return self.node("concat", args, level, (*leading[:-1], sum(a.width for a in args)))

    def expand(self, a: Node, level: Level, shape: tuple[int, ...]) -> Node:
        """Broadcast to this level and inner shape."""
        (a,) = self._at_level((a,), level)
        return a if a.shape == shape else self.node("expand", (a,), level, shape)

    def reshape(self, a: Node, shape: tuple[int, ...]) -> Node:
        return a if shape == a.shape else self.node("reshape", (a,), a.level, shape)

    def transpose(self, a: Node) -> Node:
        if a.op == "transpose":
            return a.args[0]
        return self.node("transpose", (a,), a.level, (*a.shape[:-2], a.shape[-1], a.shape[-2]))

    def unpool(self, a: Node) -> Node:
        return self.node("unpool", (a,), "rows", a.shape)

    def shift(self, a: Node, dy: int, dx: int) -> Node:
        """The value `dx` positions on in the item (and `dy` lines down, of an image), 0 where there is none.

        Goes past products with parameters: what is read at its neighbours' rows is then the same for all of them.
        """
        if dy == dx == 0:
            return a
        if a.op == "mul" and "none" in (a.args[0].level, a.args[1].level):
            return self.mul(*(arg if arg.level == "none" else self.shift(arg, dy, dx) for arg in a.args))
        if a.op == "linear":
            moved = [arg if arg.level == "none" else self.shift(arg, dy, dx) for arg in a.args]
            return self.node("linear", moved, a.level, a.shape, **dict(a.attrs))
        return self.node("shift", (a,), "rows", a.shape, dy=dy, dx=dx)

    # ---- sums and products

    def rsum(self, a: Node) -> Node:
        return a if a.width == 1 else self.node("rsum", (a,), a.level, (*a.shape[:-1], 1))

    def rmax(self, a: Node, *, nan: bool = False) -> Node:
        """The largest; with `nan`, NaN where there is one. (Without, a NaN is what goes last.)"""
        return a if a.width == 1 else self.node("rmax", (a,), a.level, (*a.shape[:-1], 1), nan=nan)

    def rmean(self, a: Node) -> Node:
        return self.mul(self.rsum(a), self.const(1.0 / a.width))

    def linear(self, a: Node, weight: Node, *, transposed: bool = False) -> Node:
        """a weight^T, or a weight where it is `transposed`. With one column on either side it is no product."""
        out_dim = 1 if transposed else 0
        n, k = weight.shape[out_dim], weight.shape[1 - out_dim]
        if k == 1:
            return self.mul(a, self.view(weight, (out_dim,), {1 - out_dim: 0}))
        if n == 1:
            return self.rsum(self.mul(a, self.view(weight, (1 - out_dim,), {out_dim: 0})))
        return self.node("linear", (a, weight), a.level, (*a.shape[:-1], n), transposed=(transposed,))

    def pool_sum(self, a: Node) -> Node:
        flat = self.reshape(a, (a.size,))
        return self.reshape(self.node("pool_sum", (flat,), "batch", flat.shape), a.shape)

    def outer(self, g: Node, a: Node) -> Node:
        if 1 in (g.width, a.width):
            return self.sum_rows(self.mul(g, a))
        return self.node("outer", (g, a), "none", (g.width, a.width))

    def sum_rows(self, g: Node) -> Node:
        return self.node("sum_rows", (g,), "none", (g.width,))

    def bmm(self, a: Node, b: Node) -> Node:
        level = max(a.level, b.level, key=_RANK.__getitem__)
        return self.node("bmm", self._at_level((a, b), level), level, (*a.shape[:-1], b.shape[-1]))


def _is(node: Node, value: float) -> bool:
    return node.op == "const" and node["value"] == value


_RANK: dict[str, int] = {"none": 0, "batch": 1, "rows": 2}


def broadcast(args: Iterable[Node]) -> tuple[Level, tuple[int, ...]]:
    """Level and inner shape of a pointwise operation on `args`. Raises ValueError where shapes do not fit."""
    args = list(args)
    level: Level = max((a.level for a in args), key=lambda name: _RANK[name])
    return level, broadcast_shapes([a.shape for a in args])


def broadcast_shapes(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Aligned from the right; an extent of 1 goes with any. Raises ValueError where shapes do not fit."""
    found = []
    for position in range(-max(map(len, shapes)), 0):
        extents = {shape[position] for shape in shapes if len(shape) >= -position} - {1}
        if len(extents) > 1:
            raise ValueError(f"inner shapes {', '.join(str(list(shape)) for shape in shapes)} do not broadcast")
        found.append(extents.pop() if extents else 1)
    return tuple(found)


def reached(targets: Iterable[Node], *, stop: Iterable[Node] = ()) -> Iterator[Node]:
    """Every node that the targets are made from, arguments first; what lies behind the nodes of `stop` is left out."""
    blocked, seen, stack = set(stop), set[Node](), list(targets)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node not in blocked:
                stack += node.args
    yield from sorted(seen, key=lambda node: node.index)
