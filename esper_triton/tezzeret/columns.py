"""The Triton source of kernels that add up over rows: gradients of parameters, and sums over an item's positions."""

from __future__ import annotations

from collections.abc import Sequence

from esper_triton.tezzeret.fuse import Gradient, Kernel, space_of
from esper_triton.tezzeret.graph import Node
from esper_triton.tezzeret.rows import KernelSource, Surroundings, Writer, count_uses, described, power_of_2
from esper_triton.tezzeret.values import At, Index, far

__all__ = ["write_columns", "write_pool"]

_SMALL = 128
"""Extent up to which the smaller side of a gradient's tile is the whole of it."""


def _goes_along(gradient: Gradient, product: Gradient) -> int | None:
    """The side of a product that has the same rows as a sum of rows."""
    own = tuple(term.args[0] for term in gradient.terms)
    for side in (0, 1):
        if own == tuple(term.args[side] for term in product.terms):
            return side
    return None


def _shown(gradient: Gradient) -> str:
    return f"grad_{gradient.param['name']} {list(gradient.terms[0].shape)}"


class _Columns:
    def __init__(self, kernel: Kernel, around: Surroundings) -> None:
        self.kernel, self.around = kernel, around
        operands = [a for g in kernel.gradients for term in g.terms for a in term.args]
        memory = [n for n in around.memory if n.op == "input" or n in kernel.reads]
        self.writer = Writer(around, memory, count_uses(operands, memory))
        self.product: Gradient | None = None

    def write(self, name: str) -> KernelSource:
        writer, gradients = self.writer, self.kernel.gradients
        products = [g for g in gradients if g.terms[0].op == "outer"]
        doc = [f"A tile of {', '.join(map(_shown, gradients))}, over all rows."]
        # Sums go along with the first product of the same rows.
        parts: list[list[Gradient]] = [[g] for g in products] or [gradients]
        for gradient in gradients if products else ():
            if gradient not in products:
                next(part for part in parts if _goes_along(gradient, part[0]) is not None).append(gradient)
        if products:
            n, k = products[0].terms[0].shape
            tiles = self.around.tiles
            first, grid_first = self._side(n, tiles.cols, 0, least=16)
            second, grid_second = self._side(k, tiles.cols, 1, least=16)
            grid: tuple[str, ...] = (grid_first, grid_second)
        else:
            second = None
            first, grid_first = self._side(gradients[0].terms[0].shape[0], 64, 0, least=1)
            grid = (grid_first,)
        if len(parts) > 1:
            grid = (*grid, str(len(parts)))
        for number, part in enumerate(parts):
            with writer.block(f"if tl.program_id(2) == {number}:" if len(parts) > 1 else None):
                self._part(part, first, second)
        text = writer.function(name, doc)
        return KernelSource(name=name, text=text, grid=grid, constexprs=tuple(writer.constexprs))

    def _part(self, part: Sequence[Gradient], first: Index, second: Index | None) -> None:
        """One program's work: a product with the sums that go along with it, or sums."""
        self.product = part[0] if part[0].terms[0].op == "outer" else None
        accumulators = self._zeros(part, first, second)
        for space in dict.fromkeys(space_of(t.args[0]) for g in part for t in g.terms):
            self._loop(space, accumulators, first, second)
        for gradient in part:
            self._store(gradient, accumulators[gradient], first, second)

    def _side(self, extent: int, block: int, axis: int, *, least: int) -> tuple[Index, str]:
        """A side of the tile: the whole extent where it is small, else as many columns as the axis's program has."""
        writer = self.writer
        symbol = writer.symbol(extent)
        block = max(least, power_of_2(extent)) if extent <= _SMALL else block
        name = writer.constant(f"TILE_{symbol.upper()}", block)
        at = writer.assign(f"{symbol}_at", f"tl.program_id({axis}) * {name} + tl.arange(0, {name})")
        ok = None
        if extent % block:
            ok = writer.assign(f"{symbol}_ok", f"({at} < {extent})[None, :]")
        return Index(f"{at}[None, :]", cols=True, ok=ok, name=at, block=name), f"cdiv({extent}, {name})"

    def _zeros(self, gradients: Sequence[Gradient], first: Index, second: Index | None) -> dict[Gradient, str]:
        writer = self.writer
        made = {}
        for gradient in gradients:
            shape = f"[1, {self._along(gradient, first, second).block}]"
            if gradient.terms[0].op == "outer":
                assert second is not None
                shape = f"[{first.block}, {second.block}]"
            made[gradient] = writer.assign(f"grad_{gradient.param['name']}", f"tl.zeros({shape}, dtype=tl.float32)")
        return made

    def _along(self, gradient: Gradient, first: Index, second: Index | None) -> Index:
        """The side of the tile that a sum of rows goes along."""
        if self.product is None or second is None:
            return first
        return (first, second)[_goes_along(gradient, self.product) or 0]

    def _loop(
        self,
        space: tuple[str, int],
        accumulators: dict[Gradient, str],
        first: Index,
        second: Index | None,
    ) -> None:
        writer, (level, lines) = self.writer, space
        rows = writer.assign("count", writer.rows_of(level, lines)) if lines > 1 else writer.rows_of(level, lines)
        block = writer.constant("DEPTH", self.around.tiles.depth if self.product else self.around.tiles.sum_depth)
        start = writer.variable("start")
        with writer.block(f"for {start} in range(0, {rows}, {block}):"):
            unit = "row" if lines == 1 else "line"
            writer.line(f"{unit} = (start + tl.arange(0, {block})).to(tl.int64)[:, None]".replace("start", start))
            writer.line(f"{unit}_ok = {unit} < {rows}")
            line = row = Index(unit, rows=True, ok=f"{unit}_ok", name=unit, block=block)
            if lines > 1:
                writer.line(f"row = line // {lines}")
                row = Index("row", rows=True, ok="line_ok", name="row", block=block)

            def at(node: Node, last: Index) -> At:
                return writer.place(node, line, row, last)

            for gradient, name in accumulators.items():
                for term in gradient.terms:
                    if space_of(term.args[0]) != space:
                        continue
                    if term.op == "outer":
                        assert second is not None
                        left, right = (
                            writer.operand(side, at(side, last), rows=True)
                            for side, last in zip(term.args, (first, second), strict=True)
                        )
                        writer.line(f"{name} = {writer.dot(f'tl.trans({left})', right, name)}")
                    else:
                        (g,) = term.args
                        value = writer.zeroed(g, at(g, self._along(gradient, first, second)), rows=True)
                        writer.line(f"{name} += tl.sum({value.code}, axis=0, keep_dims=True)")

    def _store(self, gradient: Gradient, name: str, first: Index, second: Index | None) -> None:
        writer, param = self.writer, gradient.param
        tensor = self.around.gradients[param["name"]]
        where = [writer.pointer(tensor.name), *filter(None, [str(param["offset"] or "")])]
        value = f"tl.where({writer.alpha()} == 0.0, 0.0, {name})"
        if gradient.terms[0].op == "outer":
            assert second is not None
            assert first.name is not None
            a, b = param["strides"]
            left, right = far(param, f"{first.name}[:, None]"), far(param, second.code)
            where += [left + ("" if a == 1 else f" * {a}"), right + ("" if b == 1 else f" * {b}")]
            masks = [f"tl.trans({first.ok})"] if first.ok else []
            masks += [second.ok] if second.ok else []
        else:
            along = self._along(gradient, first, second)
            # The elements of a view of several dimensions lie one after the other, or in one of its dimensions.
            wide = [stride for extent, stride in zip(param.shape, param["strides"], strict=True) if extent > 1]
            step = wide[-1] if wide else 1
            where.append(far(param, along.code) + ("" if step == 1 else f" * {step}"))
            masks = [along.ok] if along.ok else []
            if second is not None:
                masks.append(f"(tl.program_id({1 if along is first else 0}) == 0)")
        mask = f", mask={' & '.join(masks)}" if masks else ""
        writer.line(f"tl.store({' + '.join(where)}, {value}{mask})")


def write_columns(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """A kernel each program of which computes a tile of parameters' gradients, in a fixed order: two runs give the same
    bits."""
    return _Columns(kernel, around).write(name)


def write_pool(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """A kernel each program of which adds up some columns over the positions of one item of the batch."""
    operands = [t.args[0] for t in kernel.targets]
    memory = [n for n in around.memory if n.op == "input" or n in kernel.reads]
    writer = Writer(around, memory, count_uses(operands, memory))
    width = operands[0].width
    symbol = writer.symbol(width)
    block = min(64, power_of_2(width))
    step = writer.constant(f"TILE_{symbol.upper()}", block)
    writer.line("item = tl.program_id(0).to(tl.int64)")
    at = writer.assign(f"{symbol}_at", f"tl.program_id(1) * {step} + tl.arange(0, {step})")
    ok = writer.assign(f"{symbol}_ok", f"({at} < {width})[None, :]") if width % block else None
    last = Index(f"{at}[None, :]", cols=True, ok=ok, name=at)
    sums = {
        t: writer.assign(f"sum_{described(t.args[0], around.names)}", f"tl.zeros([1, {step}], dtype=tl.float32)")
        for t in kernel.targets
    }
    depth = writer.constant("DEPTH", around.tiles.sum_depth)
    length = writer.scalar("length")
    with writer.block(f"for start in range(0, {length}, {depth}):"):
        writer.line(f"position = start + tl.arange(0, {depth})[:, None]")
        writer.line(f"row = item * {length} + position")
        writer.line(f"row_ok = position < {length}")
        row = Index("row", rows=True, ok="row_ok", name="row")
        for target in kernel.targets:
            value = writer.zeroed(target.args[0], writer.place(target.args[0], row, row, last), rows=True)
            writer.line(f"{sums[target]} += tl.sum({value.code}, axis=0, keep_dims=True)")
    for target in kernel.targets:
        tensor = around.outputs[target]
        mask = f", mask={ok}" if ok else ""
        writer.line(f"tl.store({writer.pointer(tensor.name)} + item * {width} + {last.code}, {sums[target]}{mask})")
    doc = [
        f"Sums over one item's positions: {', '.join(around.outputs[t].name for t in kernel.targets)} [batch, {width}]."
    ]
    text = writer.function(name, doc)
    return KernelSource(
        name=name, text=text, grid=("batch", f"cdiv({width}, {step})"), constexprs=tuple(writer.constexprs)
    )
