"""Kernels of one operation each: products of two activations, and attention with its derivative."""

from __future__ import annotations

import math

from esper_triton.tezzeret.fuse import Kernel, untransposed
from esper_triton.tezzeret.graph import Node
from esper_triton.tezzeret.rows import KernelSource, Surroundings, Writer, power_of_2
from esper_triton.tezzeret.values import Tensor

__all__ = ["write_attention", "write_attention_grad", "write_bmm"]

_LEAST = 16  # of every extent of a product on a GPU


def _narrowed(tensor: Tensor, around: Surroundings) -> str:
    """What makes an operand of a product the layer's dtype, where it lies in memory as float32."""
    return "" if tensor.is_input_dtype or around.dtype == "float32" else f".to(tl.{around.dtype})"


# ---- products of two activations


def write_bmm(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """A kernel each program of which computes a tile of one product of a batch."""
    (target,) = kernel.targets
    a, b = target.args
    m, k, n = target.shape[-2], a.shape[-1], target.shape[-1]
    count = math.prod(target.shape[:-2])
    writer = Writer(around, [], {})
    block = {
        role: writer.constant(f"BLOCK_{role}", min(64, max(_LEAST, power_of_2(extent))))
        for role, extent in (("M", m), ("N", n), ("K", k))
    }
    out = around.outputs[target]
    a_at = _element(writer, a, around, "product", "m[:, None]", "k[None, :]", count)
    b_at = _element(writer, b, around, "product", "k[:, None]", "n[None, :]", count)
    narrow_a, narrow_b = (_narrowed(around.memory[untransposed(node)], around) for node in (a, b))
    body = f"""
product = tl.program_id(0).to(tl.int64)
m = tl.program_id(1) * {block["M"]} + tl.arange(0, {block["M"]})
n = tl.program_id(2) * {block["N"]} + tl.arange(0, {block["N"]})
out = tl.zeros([{block["M"]}, {block["N"]}], dtype=tl.float32)
for start in range(0, {k}, {block["K"]}):
    k = start + tl.arange(0, {block["K"]})
    a = tl.load({a_at}, mask=(m[:, None] < {m}) & (k[None, :] < {k}), other=0.0){narrow_a}
    b = tl.load({b_at}, mask=(k[:, None] < {k}) & (n[None, :] < {n}), other=0.0){narrow_b}
    out = {writer.dot("a", "b", "out")}
inside = (m[:, None] < {m}) & (n[None, :] < {n})
tl.store({writer.pointer(out.name)} + product * {m * n} + m[:, None] * {n} + n[None, :], out, mask=inside)
"""
    for line in body.strip().split("\n"):
        writer.line(line)
    rows = "batch" if kernel.space[0] == "batch" else "rows"
    text = writer.function(
        name, [f"A tile of {out.name} [{rows}, {', '.join(map(str, target.shape))}], a product of a batch."]
    )
    grid = (f"{rows} * {count}", f"cdiv({m}, {block['M']})", f"cdiv({n}, {block['N']})")
    return KernelSource(name=name, text=text, grid=grid, constexprs=tuple(writer.constexprs))


def _element(writer: Writer, node: Node, around: Surroundings, product: str, row: str, column: str, count: int) -> str:
    """Address of an element of a stored operand, which may be the transpose of what lies in memory."""
    base = untransposed(node)
    tensor = around.memory[base]
    lines, width = base.shape[-2:]
    if base is not node:
        row, column = column, row
    start = f"{product} * {lines * width}"
    if tensor.row_stride == "row_stride":
        stride = writer.stride(tensor.name)
        start = (
            f"{product} * {stride}"
            if count == 1
            else f"{product} // {count} * {stride} + {product} % {count} * {lines * width}"
        )
    return f"{writer.pointer(tensor.name)} + {start} + {row} * {width} + {column}"


# ---- attention


def source_of(node: Node, around: Surroundings) -> tuple[Tensor, int]:
    """The tensor in memory that a value is read from, and its first column there."""
    first = 0
    while node not in around.memory and node.op == "slice":
        first, node = first + node["start"], node.args[0]
    return around.memory[node], first


class _Attention:
    """Pieces that the three kernels share. Queries and keys are positions of one item; rows are `base + position`."""

    def __init__(self, kernel: Kernel, around: Surroundings) -> None:
        self.around = around
        first = kernel.targets[0]
        self.q, self.k, self.v = first.args[:3]
        self.heads, self.causal = first["heads"], first["causal"]
        self.dk, self.dv = self.q.width // self.heads, self.v.width // self.heads
        self.writer = writer = Writer(around, [], {})
        self.block = writer.constant("BLOCK_POSITIONS", 64 if max(self.dk, self.dv) <= 128 else 32)
        self.dk_block = writer.constant("BLOCK_DK", max(_LEAST, power_of_2(self.dk)))
        self.dv_block = writer.constant("BLOCK_DV", max(_LEAST, power_of_2(self.dv)))
        self.scale = repr(1.0 / math.sqrt(self.dk))
        self.element = f"tl.{around.dtype}"

    def head(self) -> str:
        length = self.writer.scalar("length")
        return f"""
head = tl.program_id(1) % {self.heads}
base = (tl.program_id(1) // {self.heads}).to(tl.int64) * {length}
at_dk = tl.arange(0, {self.dk_block})
at_dv = tl.arange(0, {self.dv_block})
"""

    def address(self, tensor: Tensor, first: int, positions: str, which: str) -> str:
        stride = self.writer.stride(tensor.name) if tensor.row_stride == "row_stride" else tensor.row_stride
        extent = self.dk if which == "dk" else self.dv
        shift = f" + {first}" if first else ""
        start = f"{self.writer.pointer(tensor.name)} + (base + {positions})[:, None] * {stride}{shift}"
        return f"{start} + head * {extent} + at_{which}[None, :]"

    def mask(self, positions: str, which: str) -> str:
        extent = self.dk if which == "dk" else self.dv
        whole = power_of_2(extent) == extent and extent >= _LEAST
        return f"({positions} < length)[:, None]" + ("" if whole else f" & (at_{which} < {extent})[None, :]")

    def load(self, name: str, node: Node, positions: str, which: str) -> str:
        tensor, first = source_of(node, self.around)
        where, mask = self.address(tensor, first, positions, which), self.mask(positions, which)
        return f"{name} = tl.load({where}, mask={mask}, other=0.0)" + _narrowed(tensor, self.around)

    def store(self, tensor: Tensor, value: str, positions: str, which: str) -> str:
        return f"tl.store({self.address(tensor, 0, positions, which)}, {value}, mask={self.mask(positions, which)})"

    def cast(self, code: str) -> str:
        return code if self.around.dtype == "float32" else f"{code}.to({self.element})"

    def scores(self, queries: str, keys: str) -> list[str]:
        hidden = f"({keys}[None, :] < length)"
        if self.causal:
            hidden += f" & ({keys}[None, :] <= {queries}[:, None])"
        return [
            f"scores = {self.writer.dot('q', 'tl.trans(k)', None)} * {self.scale}",
            f"scores = tl.where({hidden}, scores, float('-inf'))",
        ]

    def range(self, of: str) -> str:
        """The blocks of keys that a block of queries sees, or of queries that see a block of keys."""
        if not self.causal:
            return "0, length"
        here = f"tl.program_id(0) * {self.block}"
        return f"0, tl.minimum(length, {here} + {self.block})" if of == "keys" else f"{here}, length"


def write_attention(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """A kernel each program of which computes a block of queries of one head, with a running maximum and sum
    (M. Milakov, N. Gimelshein 2018; T. Dao et al. 2022)."""
    one = _Attention(kernel, around)
    writer, block = one.writer, one.block
    out = next((around.outputs[t] for t in kernel.targets if t.op == "attention"), None)
    lse = next((around.outputs[t] for t in kernel.targets if t.op == "attention_lse"), None)
    lines = [
        *one.head().strip().split("\n"),
        f"queries = tl.program_id(0) * {block} + tl.arange(0, {block})",
        one.load("q", one.q, "queries", "dk"),
        f"most = tl.full([{block}], float('-inf'), dtype=tl.float32)",
        f"total = tl.zeros([{block}], dtype=tl.float32)",
        f"out = tl.zeros([{block}, {one.dv_block}], dtype=tl.float32)",
        f"for start in range({one.range('keys')}, {block}):",
        f"    keys = start + tl.arange(0, {block})",
        f"    {one.load('k', one.k, 'keys', 'dk')}",
        f"    {one.load('v', one.v, 'keys', 'dv')}",
        *(f"    {line}" for line in one.scores("queries", "keys")),
        "    higher = tl.maximum(most, tl.max(scores, axis=1))",
        "    shrunk = tl.exp(most - higher)",
        "    powers = tl.exp(scores - higher[:, None])",
        "    total = total * shrunk + tl.sum(powers, axis=1)",
        f"    out = {writer.dot(one.cast('powers'), 'v', 'out * shrunk[:, None]')}",
        "    most = higher",
    ]
    if out is not None:
        lines.append(one.store(out, "out / total[:, None]", "queries", "dv"))
    if lse is not None:
        where = f"{writer.pointer(lse.name)} + (base + queries) * {one.heads} + head"
        lines.append(f"tl.store({where}, most + tl.log(total), mask=queries < length)")
    for line in lines:
        writer.line(line)
    doc = [
        f"A block of queries of one of {one.heads} heads: softmax(q k^T / sqrt({one.dk})) v"
        + (", without the keys that come later." if one.causal else ".")
    ]
    grid = (f"cdiv(length, {block})", f"batch * {one.heads}")
    return KernelSource(name=name, text=writer.function(name, doc), grid=grid, constexprs=tuple(writer.constexprs))


def write_attention_grad(kernel: Kernel, name: str, around: Surroundings) -> KernelSource:
    """The derivative of attention. Programs of the first half take a block of queries and write its gradient, those of
    the second a block of keys and write the gradients of keys and values: no sum is shared, so the order is fixed."""
    one = _Attention(kernel, around)
    writer, block = one.writer, one.block
    _, _, _, out, lse, grad = kernel.targets[0].args
    writes = {t["which"]: around.outputs[t] for t in kernel.targets}
    sums = writer.pointer(around.memory[lse].name)

    def of_queries(queries: str) -> list[str]:
        return [
            one.load("q", one.q, queries, "dk"),
            one.load("grad", grad, queries, "dv"),
            one.load("out", out, queries, "dv"),
            f"lse = tl.load({sums} + (base + {queries}) * {one.heads} + head, mask={queries} < length, other=0.0)",
            "delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)",
        ]

    def slope(queries: str, keys: str) -> list[str]:
        return [
            *one.scores(queries, keys),
            "powers = tl.exp(scores - lse[:, None])",
            f"rise = {writer.dot('grad', 'tl.trans(v)', None)}",
            f"slope = powers * (rise - delta[:, None]) * {one.scale}",
        ]

    lines = one.head().strip().split("\n")
    here = f"tl.program_id(0) * {block} + tl.arange(0, {block})"
    queries_part = [
        f"queries = {here}",
        *of_queries("queries"),
        f"grad_q = tl.zeros([{block}, {one.dk_block}], dtype=tl.float32)",
        f"for start in range({one.range('keys')}, {block}):",
        f"    keys = start + tl.arange(0, {block})",
        f"    {one.load('k', one.k, 'keys', 'dk')}",
        f"    {one.load('v', one.v, 'keys', 'dv')}",
        *(f"    {line}" for line in slope("queries", "keys")),
        f"    grad_q = {writer.dot(one.cast('slope'), 'k', 'grad_q')}",
    ]
    keys_part = [
        f"keys = {here}",
        one.load("k", one.k, "keys", "dk"),
        one.load("v", one.v, "keys", "dv"),
        f"grad_k = tl.zeros([{block}, {one.dk_block}], dtype=tl.float32)",
        f"grad_v = tl.zeros([{block}, {one.dv_block}], dtype=tl.float32)",
        f"for start in range({one.range('queries')}, {block}):",
        f"    queries = start + tl.arange(0, {block})",
        *(f"    {line}" for line in of_queries("queries")),
        *(f"    {line}" for line in slope("queries", "keys")),
        # Rows beyond the last query have lse 0 and powers that are not: they must not count.
        "    powers = tl.where((queries < length)[:, None], powers, 0.0)",
        "    slope = tl.where((queries < length)[:, None], slope, 0.0)",
        f"    grad_v = {writer.dot(one.cast('tl.trans(powers)'), 'grad', 'grad_v')}",
        f"    grad_k = {writer.dot(one.cast('tl.trans(slope)'), 'q', 'grad_k')}",
    ]
    if "q" in writes:
        queries_part.append(one.store(writes["q"], "grad_q", "queries", "dk"))
    if "k" in writes:
        keys_part.append(one.store(writes["k"], "grad_k", "keys", "dk"))
    if "v" in writes:
        keys_part.append(one.store(writes["v"], "grad_v", "keys", "dv"))
    lines += ["if tl.program_id(2) == 0:", *(f"    {line}" for line in queries_part)]
    lines += ["else:", *(f"    {line}" for line in keys_part)]
    for line in lines:
        writer.line(line)
    doc = ["Gradients of a block of queries, or of a block of keys and values, of one head."]
    grid = (f"cdiv(length, {block})", f"batch * {one.heads}", "2")
    return KernelSource(name=name, text=writer.function(name, doc), grid=grid, constexprs=tuple(writer.constexprs))
