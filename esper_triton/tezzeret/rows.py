"""The Triton source of kernels that work on blocks of rows: `rows`, `columns` and `pool_sum` kernels of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from esper_triton.tezzeret.fuse import FULL_WIDTH, Kernel
from esper_triton.tezzeret.graph import Node, reached
from esper_triton.tezzeret.values import ZERO, At, Index, Tensor, Value, Values, far

__all__ = ["Constants", "KernelSource", "Surroundings", "Tiles", "Writer", "write_rows"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Extents of blocks, all powers of two.

    rows, cols, depth: of a kernel with products: rows of a block, columns of the result, and columns of the operands
    that are multiplied at a time. held: most elements of a weight's tile where operands or results are held whole.
    sums_rows: rows of a block of a kernel without products. full: columns that such a kernel holds at once. sum_depth:
    rows that are added up at a time. separate: nothing is fused.
    """

    rows: int = 32
    cols: int = 64
    depth: int = 64
    held: int = FULL_WIDTH**2
    sums_rows: int = 1
    full: int = 8192
    sum_depth: int = 32
    separate: bool = False


class Constants:
    """Names of `tl.constexpr` parameters, one for each role and value."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def name(self, role: str, value: int) -> str:
        name, number = role, 2
        while self.values.setdefault(name, value) != value:
            name, number = f"{role}_{number}", number + 1
        return name


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What all kernels of an artifact share. `widths` names extents for variables; `outputs` are where targets go."""

    dtype: str
    memory: Mapping[Node, Tensor]
    outputs: Mapping[Node, Tensor]
    gradients: Mapping[str, Tensor]
    names: Mapping[Node, str]
    widths: Mapping[int, str]
    constants: Constants
    tiles: Tiles
    is_image: bool


@dataclass(frozen=True, kw_only=True)
class KernelSource:
    """One `@triton.jit` function as text, and its launch."""

    name: str
    text: str
    grid: tuple[str, ...]
    constexprs: tuple[str, ...] = field(default=())


def power_of_2(extent: int) -> int:
    return 1 << max(extent - 1, 0).bit_length()


class Writer(Values):
    """The body of one kernel, with blocks of rows and of columns."""

    def __init__(self, around: Surroundings, memory: Iterable[Node], uses: Mapping[Node, int]) -> None:
        super().__init__({n: around.memory[n] for n in memory}, around.names, around.dtype, uses)
        self.around = around
        self.constexprs: dict[str, None] = {}
        self.is_image = around.is_image

    def constant(self, role: str, value: int) -> str:
        name = self.around.constants.name(role, value)
        self.constexprs[name] = None
        return name

    def symbol(self, width: int) -> str:
        """What a dimension of this extent is called in variables."""
        return self.around.widths.get(width, f"w{width}")

    def rows_of(self, level: str, lines: int) -> str:
        """The number of matrix rows of a space, as an expression of the kernel."""
        rows = self.scalar("batch" if level == "batch" else "rows")
        return rows if lines == 1 else f"{rows}.to(tl.int64) * {lines}"

    def place(self, node: Node, line: Index, row: Index, last: Index) -> At:
        """Where a node with the kernel's lines is written or read: its own lines, and columns `last`."""
        lines = node.inner_rows
        leading = node.shape[:-1]
        if lines == 1:
            inner: tuple[Index, ...] = (ZERO,) * len(leading)
        else:
            inner = self.unflattened(f"({line.code} % {lines})", leading, True, False)
        return At(row, (*inner, last) if node.shape else (), line)

    def columns(self, width: int, block: int, start: str | None = None) -> Index:
        """A block of columns: all of them, or those from variable `start` on."""
        if width == 1:
            return ZERO
        symbol = self.symbol(width)
        name = self.constant(f"BLOCK_{symbol.upper()}", block)
        at = self.assign(
            symbol + "_at", f"tl.arange(0, {name})" if start is None else f"{start} + tl.arange(0, {name})"
        )
        beyond = block != width if start is None else width % block != 0
        ok = self.assign(f"{symbol}_ok", f"({at} < {width})[None, :]") if beyond else None
        return Index(f"{at}[None, :]", cols=True, ok=ok, name=at, block=name)

    def weight(self, node: Node, n: Index, k: Index, *, transposed: bool) -> str:
        """A block [n, k] of a weight as an operand, or [k, n] of a transposed one; in the order in which it lies."""
        (first, second), (a, b) = (k, n) if transposed else (n, k), node["strides"]
        assert first.name is not None
        left, right = far(node, f"{first.name}[:, None]"), far(node, second.code)
        terms = [left + ("" if a == 1 else f" * {a}"), right + ("" if b == 1 else f" * {b}")]
        where = " + ".join([self.pointer(node["name"]), *filter(None, (str(node["offset"] or ""),)), *terms])
        masks = [f"tl.trans({first.ok})"] if first.ok else []
        masks += [second.ok] if second.ok else []
        return f"tl.load({where}, mask={' & '.join(masks)}, other=0.0)" if masks else f"tl.load({where})"

    def dot(self, a: str, b: str, acc: str | None) -> str:
        middle = f", {acc}" if acc else ""
        return f'tl.dot({a}, {b}{middle}, input_precision="ieee")'

    def function(self, name: str, doc: Sequence[str]) -> str:
        parameters = [f"{n}_ptr" for n in self.pointers] + [f"{n}_row_stride" for n in self.strides]
        parameters += [*self.scalars, *(f"{n}: tl.constexpr" for n in self.constexprs)]
        quoted = doc if len(doc) > 1 else [doc[0]]
        # Or a launch with one row would be given a kernel of its own, in which rows is no tensor.
        fixed = f"(do_not_specialize={list(self.scalars)})" if self.scalars else ""
        text = [f"@triton.jit{fixed}", f"def {name}(", *(f"    {p}," for p in parameters), "):"]
        text += [f'    """{quoted[0]}' + ('"""' if len(quoted) == 1 else "")]
        if len(quoted) > 1:
            text += ["", *(f"    {line}" if line else "" for line in quoted[1:]), '    """']
        return "\n".join([*text, *self.prologue, *self.lines, ""])


def count_uses(roots: Iterable[Node], stop: Iterable[Node]) -> dict[Node, int]:
    blocked = set(stop)
    uses: dict[Node, int] = {}
    roots = list(roots)
    for node in reached(roots, stop=blocked):
        if node not in blocked:
            for argument in node.args:
                uses[argument] = uses.get(argument, 0) + 1
    for root in roots:
        uses[root] = uses.get(root, 0) + 1
    return uses


def described(node: Node, names: Mapping[Node, str]) -> str:
    return names.get(node, node["name"] if node.op in ("param", "input") else node.op)


# ---- rows


class _Rows:
    def __init__(self, kernel: Kernel, around: Surroundings) -> None:
        self.kernel, self.around = kernel, around
        reads = [n for n in kernel.reads if n in around.memory and n not in kernel.targets]
        inputs = [n for n in around.memory if n.op == "input"]
        self.reads = [n for n in reads if n not in kernel.computed]
        self.writer = Writer(around, dict.fromkeys([*inputs, *self.reads]), count_uses(kernel.targets, self.reads))
        self.products = any(n.op == "linear" for n in kernel.computed)
        self.rows = around.tiles.rows if self.products else around.tiles.sums_rows
        self.full = FULL_WIDTH if self.products else around.tiles.full

    def is_full(self, width: int) -> bool:
        return power_of_2(width) <= self.full

    def whole_block(self, width: int) -> int:
        return max(16 if self.products else 1, power_of_2(width))

    def chunk_block(self, *, depth: bool) -> int:
        """Columns at a time of a width that is not held whole, as a result or as an operand."""
        tiles = self.around.tiles
        if not self.products:
            return min(1024, tiles.full)
        # What is held whole beside it leaves less room.
        return tiles.depth if depth else tiles.cols

    def write(self, name: str) -> KernelSource:
        writer, (level, lines) = self.writer, self.kernel.space
        block = writer.constant("BLOCK_ROWS", self.rows)
        unit = "row" if lines == 1 else "line"
        with writer.before():
            writer.line(f"{unit} = (tl.program_id(0).to(tl.int64) * {block} + tl.arange(0, {block}))[:, None]")
            writer.line(f"{unit}_ok = {unit} < {writer.rows_of(level, lines)}")
            if lines > 1:
                writer.line(f"row = line // {lines}")
        writer.fixed_rows = {"row", unit}
        self.line = self.row = Index(unit, rows=True, ok=f"{unit}_ok", name=unit, block=block)
        if lines > 1:
            self.row = Index("row", rows=True, ok="line_ok", name="row", block=block)
        self.whole: dict[int, Index] = {}
        streamed = self._streamed()
        self._phases([n for n in self.kernel.computed if n not in streamed])
        self._outputs(streamed)
        grid = f"cdiv({'batch' if level == 'batch' else 'rows'}{'' if lines == 1 else f' * {lines}'}, {block})"
        text = writer.function(name, self._doc())
        return KernelSource(name=name, text=text, grid=(grid,), constexprs=tuple(writer.constexprs))

    def _doc(self) -> list[str]:
        names = self.around.names
        lines = []
        for target in self.kernel.targets:
            tensor = self.around.outputs[target]
            shape = ", ".join([self.kernel.space[0], *map(str, target.shape)])
            lines.append(f"{tensor.name} [{shape}]")
        made = [f"{described(n, names)} [{n.width}]" for n in self.kernel.computed]
        rest = [f"Computed on the way: {', '.join(dict.fromkeys(made))}."] if made else []
        return [f"A block of rows of {', '.join(lines)}.", *rest]

    def columns(self, width: int) -> Index:
        """All columns of a width that is held whole."""
        if width not in self.whole:
            with self.writer.before():
                self.whole[width] = self.writer.columns(width, self.whole_block(width))
        return self.whole[width]

    def _streamed(self) -> list[Node]:
        """The products that are computed with the outputs that need them, some columns at a time: those that are too
        wide to be held, and those whose weight's tile would be too large."""
        computed = self.kernel.computed
        inner = {n for node in computed for n in reached(node.args, stop=self.reads)}
        needs = {target: self._products_of(target) for target in self.kernel.targets}
        found = {n for n in computed if n.op == "linear" and not self.is_full(n.width)}
        for node in computed:
            if node.op != "linear" or node in found or not self._is_too_large(node):
                continue
            together = {node}  # what is in one output goes together
            while more := {n for used in needs.values() if together & used for n in used} - together:
                together |= more
            if not together & inner:
                found |= together
        return [n for n in computed if n in found]

    def _products_of(self, target: Node) -> set[Node]:
        """The products whose elements a target's elements are computed from, one from one."""
        computed = set(self.kernel.computed)
        return {n for n in reached([target], stop=computed | set(self.reads)) if n in computed and n.op == "linear"}

    def _is_too_large(self, node: Node) -> bool:
        """Whether the whole of a product needs too large a tile of a weight."""
        widths = [a.width for a in node.args[::2] if not self._is_readable(a)]
        return any(self.whole_block(w) * self.whole_block(node.width) > self.around.tiles.held for w in widths)

    def _is_readable(self, operand: Node) -> bool:
        """Whether any columns of it can be had: it is computed from memory, and from what has one value a row."""
        inside = set(reached([operand], stop=[*self.reads, *self.kernel.computed]))
        return not any(n in inside and n.width > 1 for n in self.kernel.computed)

    def at(self, node: Node, last: Index) -> At:
        return self.writer.place(node, self.line, self.row, last)

    # ---- sums along a row, and products that are held whole

    def _phases(self, resident: Sequence[Node]) -> None:
        waiting = list(resident)
        while waiting:
            pending = set(waiting)
            ready = [n for n in waiting if not any(b in pending for b in reached(n.args))]
            first = ready[0]
            if first.op == "linear":
                self._products([n for n in ready if n.op == "linear" and _depths(n) == _depths(first)], None)
            else:
                width = first.args[0].width
                self._sums([n for n in ready if n.op != "linear" and n.args[0].width == width], width)
            waiting = [n for n in waiting if n not in self.writer.results]

    def _sums(self, nodes: Sequence[Node], width: int) -> None:
        writer = self.writer
        for node in nodes:
            what = "sum" if node.op == "rsum" else "maximum"
            writer.line(f"# The {what} along the row of {described(node.args[0], self.around.names)} [{width}].")
        if self.is_full(width):
            for node in nodes:
                code = self._reduced(node, self.columns(width), width)
                writer.results[node] = Value(writer.assign(writer.hint(node), code), rows=True)
            return
        block = writer.constant("BLOCK_ROWS", self.rows)
        sums = {}
        for node in nodes:
            fill = "0.0" if node.op == "rsum" else "float('-inf')"
            sums[node] = writer.assign(writer.hint(node), f"tl.full([{block}, 1], {fill}, dtype=tl.float32)")
        with self._chunks(width, depth=True) as last:
            for node in nodes:
                code = self._reduced(node, last, width)
                joined = f"{sums[node]} + {code}" if node.op == "rsum" else f"larger({sums[node]}, {code})"
                writer.line(f"{sums[node]} = {joined}")
        for node in nodes:
            writer.results[node] = Value(sums[node], rows=True)

    def _reduced(self, node: Node, last: Index, width: int) -> str:
        operand = node.args[0]
        at = self.at(operand, last)
        value = self.writer.zeroed(operand, at, rows=False) if node.op == "rsum" else self._lowest(operand, at)
        if value.cols:
            if node.op == "rmax" and node["nan"]:
                return f"tl.reduce({value.code}, 1, larger, keep_dims=True)"
            return f"{'tl.sum' if node.op == 'rsum' else 'tl.max'}({value.code}, axis=1, keep_dims=True)"
        terms = width if self.is_full(width) else self.chunk_block(depth=True)
        return f"({value.code} * {float(terms)})" if node.op == "rsum" else value.code

    def _lowest(self, operand: Node, at: At) -> Value:
        value = self.writer.value(operand, at)
        masks = [i.ok for i in at.inner if i.ok]
        if not masks:
            return value
        return Value(f"tl.where({' & '.join(masks)}, {value.code}, float('-inf'))", value.rows, True)

    @contextmanager
    def _chunks(self, width: int, *, depth: bool) -> Iterator[Index]:
        """A loop over the columns of a width."""
        writer, block = self.writer, self.chunk_block(depth=depth)
        start = writer.variable("start")
        step = writer.constant(f"BLOCK_{writer.symbol(width).upper()}", block)
        with writer.block(f"for {start} in range(0, {width}, {step}):"):
            yield writer.columns(width, block, start)

    def _products(self, nodes: Sequence[Node], last: Index | None) -> None:
        """Products with operands of the same widths: of the columns `last`, or whole."""
        writer = self.writer
        depths = _depths(nodes[0])
        columns = {node: last or self.columns(node.width) for node in nodes}
        for node in nodes:
            writer.line(self._comment(node))
        held = self.around.tiles.held
        at_once = [
            self.is_full(depth)
            and all(
                not self._is_readable(node.args[2 * pair])
                or self.whole_block(depth) * self._extent(columns[node]) <= held
                for node in nodes
            )
            for pair, depth in enumerate(depths)
        ]
        if at_once == [True]:
            for node in nodes:
                code = self._product(node, 0, self.columns(depths[0]), columns[node], None)
                writer.results[node] = Value(writer.assign(writer.hint(node), code), True, True)
            return
        block = writer.constant("BLOCK_ROWS", self.rows)
        sums = {}
        for node in nodes:
            sums[node] = writer.assign(
                writer.hint(node), f"tl.zeros([{block}, {columns[node].block}], dtype=tl.float32)"
            )

        def add(pairs: Iterable[tuple[Node, int]], k: Index) -> None:
            for node, pair in pairs:
                code = self._product(node, pair, k, columns[node], sums[node])
                writer.line(f"{sums[node]} = {code}")

        for width, whole in dict.fromkeys(zip(depths, at_once, strict=True)):
            same = [pair for pair, found in enumerate(zip(depths, at_once, strict=True)) if found == (width, whole)]
            pairs = [(node, pair) for pair in same for node in nodes]
            if whole:
                add(pairs, self.columns(width))
                continue
            tile = max(self._extent(columns[node]) for node in nodes) * self.chunk_block(depth=True)
            together = len(pairs) if len(pairs) * tile <= held else 1  # a loop has the tiles of all of its products
            for first in range(0, len(pairs), together):
                with self._chunks(width, depth=True) as k:
                    add(pairs[first : first + together], k)
        for node in nodes:
            writer.results[node] = Value(sums[node], True, True)

    def _extent(self, columns: Index) -> int:
        """How many columns a block has."""
        assert columns.block is not None
        return self.around.constants.values[columns.block]

    def _comment(self, node: Node) -> str:
        names = self.around.names
        terms = zip(node.args[::2], node.args[1::2], strict=True)
        what = " + ".join(f"{described(a, names)} [{a.width}] times {w['name']}" for a, w in terms)
        return f"# {described(node, names)} [{node.width}] = {what}."

    def _product(self, node: Node, pair: int, k: Index, n: Index, acc: str | None) -> str:
        writer = self.writer
        operand, weight = node.args[2 * pair], node.args[2 * pair + 1]
        transposed = node["transposed"][pair]
        a = writer.operand(operand, self.at(operand, k), rows=False)
        w = writer.weight(weight, n, k, transposed=transposed)
        return writer.dot(a, w if transposed else f"tl.trans({w})", acc)

    # ---- what is written

    def _outputs(self, streamed: Sequence[Node]) -> None:
        groups: dict[tuple[int, bool], list[Node]] = {}
        for target in self.kernel.targets:
            whole = self.is_full(target.width) and not self._products_of(target) & set(streamed)
            groups.setdefault((target.width, whole), []).append(target)
        for (width, whole), targets in groups.items():
            if whole:
                last = self.columns(width)
                for target in targets:
                    self._store(target, last)
                continue
            inside = set(reached(targets, stop=self.reads))
            needed = [n for n in streamed if n in inside and n.width == width]
            self._hold_operands(needed)
            with self._chunks(width, depth=False) as last:
                for depths in dict.fromkeys(map(_depths, needed)):
                    self._products([n for n in needed if _depths(n) == depths], last)
                for target in targets:
                    self._store(target, last)

    def _hold_operands(self, products: Sequence[Node]) -> None:
        """Computes what a loop over the results' columns multiplies in every turn."""
        for operand in dict.fromkeys(a for node in products for a in node.args[::2]):
            if self.is_full(operand.width) and not self._is_readable(operand):
                self.writer.operand(operand, self.at(operand, self.columns(operand.width)), rows=False)

    def _store(self, target: Node, last: Index) -> None:
        writer, tensor = self.writer, self.around.outputs[target]
        at = self.at(target, last)
        value = writer.value(target, at)
        stride = writer.stride(tensor.name) if tensor.row_stride == "row_stride" else tensor.row_stride
        if target.inner_rows > 1 and stride == str(target.size):
            terms = [f"{self.line.code} * {target.width}", at.inner[-1].code]
        else:
            steps = [math.prod(target.shape[i + 1 :]) for i in range(len(target.shape))]
            terms = [f"{self.row.code} * {stride}" if stride != "1" else self.row.code]
            terms += [i.code if s == 1 else f"{i.code} * {s}" for i, s in zip(at.inner, steps, strict=True)]
        masks = " & ".join(m for m in (self.line.ok, last.ok) if m)
        where = " + ".join([writer.pointer(tensor.name), *(t for t in terms if t != "0")])
        writer.line(f"tl.store({where}, {value.code}, mask={masks})")


def _depths(node: Node) -> tuple[int, ...]:
    """Columns of a product's operands."""
    return tuple(a.width for a in node.args[::2])


def write_rows(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """A kernel each program of which computes a block of rows."""
    return _Rows(kernel, around).write(name)
