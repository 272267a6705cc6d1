"""Which values go through memory, and which kernels compute them.

A *rows* kernel computes a block of rows of its results from whatever it needs of the same rows: pointwise chains, sums
along a row, products with parameters, one after the other. What it cannot keep for the next step goes through memory,
and another kernel takes it from there: a wide product that is summed up along the row, or multiplied again; a value
that is read at another row or column. What is cheap is computed again rather than stored.

A *columns* kernel computes a tile of parameters' gradients, over all rows. The others are kernels of one operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from esper_triton.tezzeret.graph import (
    ACCUMULATORS,
    INDEX_MAPS,
    LEAVES,
    OVER_ROWS,
    POINTWISE,
    Graph,
    Level,
    Node,
    reached,
)

__all__ = ["Gradient", "Kernel", "Space", "fuse", "merge_products", "needed_from_forward"]

FULL_WIDTH = 256
"""A product of at most so many columns stays in registers, whole, for what follows it."""

_COSTLY = frozenset({"exp", "expm1", "log", "tanh", "sigmoid", "softplus", "erf", "keep"})
_MOVES_COLUMNS = frozenset({"slice", "pad", "concat"})
_MOVES_ROWS = frozenset({"reshape", "transpose", "unpool", "shift"})

Space = tuple[Level, int]
"""What the rows of a kernel are: those of the level, times so many for each."""


@dataclass(frozen=True)
class Gradient:
    """The gradient at a view of a parameter: the sum of `terms`, each `outer` or `sum_rows`."""

    param: Node
    terms: tuple[Node, ...]


@dataclass
class Kernel:
    """One launch. `targets` are the nodes, or gradients, that it writes; `reads` what it finds in memory."""

    kind: Literal["rows", "columns", "pool_sum", "bmm", "attention", "attention_grad"]
    space: Space
    stage: int
    targets: list[Node] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)
    reads: frozenset[Node] = frozenset()
    computed: list[Node] = field(default_factory=list)
    """Of a rows kernel, the sums and products in it, arguments first."""


def space_of(node: Node) -> Space:
    return node.level, node.inner_rows


def needed_from_forward(forward: Iterable[Node], backward: Iterable[Node]) -> list[Node]:
    """What the backward takes from the forward: results of sums and products. The rest it computes again."""
    found = set(reached(forward))
    ours = {node for node in found if _is_computed(node)}
    backward = list(backward)
    # Attention has the logarithm of its sums at hand, which nothing but its derivative asks for.
    ours |= {n for n in reached(backward) if n.op == "attention_lse" and found.issuperset(n.args)}
    return [node for node in reached(backward, stop=ours) if node in ours]


def _is_computed(node: Node) -> bool:
    return node.op not in LEAVES and node.op not in POINTWISE and node.op not in INDEX_MAPS


# ---- products that are added up


def merge_products(graph: Graph, roots: Sequence[Node], keep: Iterable[Node]) -> tuple[list[Node], dict[Node, Node]]:
    """The roots with every sum of products that nothing else uses made one `linear`. Nodes of `keep` stay as they are,
    for they are read from memory. Returns the new roots, and what became of each node."""
    kept = set(keep)
    uses: dict[Node, int] = {}
    nodes = list(reached(roots, stop=kept))
    for node in nodes:
        if node not in kept:
            for argument in node.args:
                uses[argument] = uses.get(argument, 0) + 1
    for root in roots:
        uses[root] = uses.get(root, 0) + 1
    new: dict[Node, Node] = {}
    for node in nodes:
        if node in kept or not node.args:
            new[node] = node
            continue
        args = tuple(new[a] for a in node.args)
        made = None
        if node.op == "add" and all(
            uses[old] == 1 and a.op == "linear" for old, a in zip(node.args, args, strict=True)
        ):
            a, b = args
            if a.shape == b.shape and a.level == b.level and not {a, b} & kept:
                made = graph.node(
                    "linear", (*a.args, *b.args), a.level, a.shape, transposed=(*a["transposed"], *b["transposed"])
                )
        new[node] = made or graph.node(node.op, args, node.level, node.shape, **dict(node.attrs))
        if node in graph.names:
            graph.names.setdefault(new[node], graph.names[node])
    return [new[root] for root in roots], new


# ---- kernels


class _Partition:
    """`stored` goes through memory; of that, a rows kernel computes for itself what is not in `cut`."""

    def __init__(self, memory: Iterable[Node]) -> None:
        self.memory = set(memory)
        self.stored: set[Node] = set()
        self.cut: set[Node] = set()

    def known(self, *, rows: bool) -> set[Node]:
        return self.memory | (self.cut if rows else self.stored)

    def inside(self, operands: Iterable[Node], *, rows: bool) -> list[Node]:
        """What a kernel that starts from memory evaluates for these operands."""
        known = self.known(rows=rows)
        return [node for node in reached(operands, stop=known) if node not in known]

    def store(self, node: Node) -> None:
        if node.op not in LEAVES and node not in self.memory:
            self.stored.add(node)

    def cut_at(self, node: Node) -> None:
        if node.op not in LEAVES and node not in self.memory:
            self.stored.add(node)
            self.cut.add(node)


def fuse(
    targets: Sequence[Node],
    gradients: Sequence[Gradient],
    memory: Iterable[Node],
    *,
    held: int = FULL_WIDTH**2,
    separate: bool = False,
) -> list[Kernel]:
    """The kernels that write `targets` and `gradients`, in an order in which each finds what it reads.

    Args:
        memory: values that are there already, besides the inputs. held: most elements of a weight between two values
            that are held whole. separate: every operation for itself, through memory: what fusing is compared with.
    """
    part = _Partition([*memory])
    terms = [term for gradient in gradients for term in gradient.terms]
    before: tuple[int, int] | None = None
    while before != (len(part.stored), len(part.cut)):
        before = len(part.stored), len(part.cut)
        for node in reached([*targets, *terms], stop=part.memory):
            if node not in part.memory:
                _cut_for(part, node)
                _cut_between(part, node, held)
                if separate and node.level != "none" and (node.op in POINTWISE or node.op in ACCUMULATORS):
                    part.cut_at(node)
        _cut_shared_products(part, targets)
    wanted = [*dict.fromkeys([*targets, *sorted(part.stored, key=lambda node: node.index)])]
    return _kernels(part, [t for t in wanted if t not in part.memory], gradients)


def _cut_for(part: _Partition, node: Node) -> None:
    """What `node` needs in memory."""
    if node.op in ("attention", "attention_lse", "attention_grad"):
        part.cut_at(node)
        for argument in node.args:
            part.store(unsliced(argument))
    elif node.op == "bmm":
        part.cut_at(node)
        for argument in node.args:
            part.store(untransposed(argument))
    elif node.op == "pool_sum":
        part.cut_at(node)
        for inner in part.inside(node.args, rows=False):
            if _is_computed(inner):
                part.store(inner)
    elif node.op == "shift" and not _is_light(part, node.args[0]):
        part.cut_at(node.args[0])
    elif node.op in _MOVES_ROWS or node.op in _MOVES_COLUMNS:
        for argument in node.args:
            inside = part.inside([argument], rows=True)
            if any(inner.op == "linear" for inner in inside):
                part.cut_at(argument)
            elif node.op in _MOVES_ROWS:
                for inner in inside:
                    if _is_computed(inner):
                        part.cut_at(inner)
    elif node.op == "linear":
        for operand in node.args[::2]:
            if operand.width > FULL_WIDTH and not _is_cheap(part, operand, rows=True, chunks=node.width > FULL_WIDTH):
                part.cut_at(operand)
    elif node.op in ("rsum", "rmax"):
        for inner in part.inside(node.args, rows=True):
            if inner.op == "linear" and inner.width > FULL_WIDTH:
                part.cut_at(inner)
    elif node.op in OVER_ROWS:
        for operand in node.args:
            if not _is_cheap(part, operand, rows=False, chunks=node.op == "outer"):
                inside = [n for n in part.inside([operand], rows=False) if _is_computed(n)]
                narrow = all(n.op in ("rsum", "rmax") for n in inside)
                costly = node.op == "outer" and _has_costly(part, operand, rows=False)
                for n in inside if narrow and not costly else [operand]:
                    part.store(n)


def _cut_between(part: _Partition, node: Node, held: int) -> None:
    """Where a product that `node` needs whole has an operand that is whole too, and the weight between them is too
    large, the operand goes through memory."""
    if node.op not in ("linear", "rsum", "rmax"):
        return
    for inner in part.inside(node.args, rows=True):
        if inner.op == "linear" and inner.width <= FULL_WIDTH:
            for operand in inner.args[::2]:
                if operand.width * inner.width > held and not _is_cheap(part, operand, rows=True, chunks=False):
                    part.cut_at(operand)


def _has_costly(part: _Partition, operand: Node, *, rows: bool) -> bool:
    return any(node.op in _COSTLY for node in part.inside([operand], rows=rows))


def _is_cheap(part: _Partition, operand: Node, *, rows: bool, chunks: bool) -> bool:
    """Whether it may be computed where it is used, from memory. `chunks`: once for every tile of the result."""
    for node in part.inside([operand], rows=rows):
        if node.op == "linear" or (_is_computed(node) and not rows):
            return False
        if chunks and node.op in _COSTLY:
            return False
    return True


def _is_light(part: _Partition, operand: Node) -> bool:
    """Whether it is computed again for every neighbour that it is read by: a few operations on what is in memory."""
    inside = [n for n in part.inside([operand], rows=True) if n.op not in LEAVES]
    return len(inside) <= 2 and all(n.op in POINTWISE and n.op not in _COSTLY for n in inside)


def _cut_shared_products(part: _Partition, targets: Sequence[Node]) -> None:
    """A product is computed once: where other rows, or a later kernel, need it too, it goes through memory."""
    places: dict[Node, set[tuple[Space, int]]] = {}
    stages = _Stages(part)
    for target in [*targets, *part.stored]:
        if target in part.memory or not _is_rows_target(target):
            continue
        where = space_of(target), stages.of(target)
        for inner in part.inside([target], rows=True) if target not in part.cut else _inside_cut(part, target):
            if inner.op == "linear":
                places.setdefault(inner, set()).add(where)
    for product, found in places.items():
        if len(found) > 1:
            part.cut_at(product)


def _inside_cut(part: _Partition, target: Node) -> list[Node]:
    return [target, *part.inside(target.args, rows=True)]


def _is_rows_target(node: Node) -> bool:
    return node.op not in ("pool_sum", "bmm", "attention", "attention_lse", "attention_grad", *OVER_ROWS)


def unsliced(node: Node) -> Node:
    """What a column range is a part of: it is read there."""
    return unsliced(node.args[0]) if node.op == "slice" else node


def untransposed(node: Node) -> Node:
    """What a transpose is read from."""
    return node.args[0] if node.op == "transpose" else node


class _Stages:
    """How many kernels must have run before the one that writes a value."""

    def __init__(self, part: _Partition) -> None:
        self.part = part
        self._known: dict[Node, int] = {}

    def of(self, target: Node) -> int:
        if target not in self._known:
            self._known[target] = self.after(target.args, rows=_is_rows_target(target))
        return self._known[target]

    def after(self, operands: Iterable[Node], *, rows: bool) -> int:
        """The first stage at which everything that the operands are read from is there."""
        known = self.part.known(rows=rows)
        read = [n for n in reached(operands, stop=known) if n in known and n not in self.part.memory]
        return max((self.of(n) + 1 for n in read), default=0)


def _kernels(part: _Partition, wanted: Sequence[Node], gradients: Sequence[Gradient]) -> list[Kernel]:
    stages = _Stages(part)
    made: dict[tuple[object, ...], Kernel] = {}

    def kernel(kind: str, space: Space, stage: int, *key: object) -> Kernel:
        return made.setdefault((kind, space, stage, *key), Kernel(kind, space, stage))  # type: ignore[arg-type]

    for node in wanted:
        stage = stages.of(node)
        match node.op:
            case "attention" | "attention_lse":
                kernel("attention", space_of(node), stage, node.args, node["heads"], node["causal"]).targets.append(
                    node
                )
            case "attention_grad":
                where = kernel("attention_grad", space_of(node), stage, node.args, node["heads"], node["causal"])
                where.targets.append(node)
            case "bmm":
                kernel("bmm", space_of(node), stage, node).targets.append(node)
            case "pool_sum":
                kernel("pool_sum", space_of(node), stage, node.width).targets.append(node)
            case _:
                kernel("rows", space_of(node), stage).targets.append(node)
    # Products first: a sum of rows goes along with a product of the same rows, which has them in its tiles anyway.
    hosts: dict[tuple[Node, ...], Kernel] = {}
    for gradient in sorted(gradients, key=lambda g: g.terms[0].op != "outer"):
        stage = stages.after([a for term in gradient.terms for a in term.args], rows=False)
        space, first = space_of(gradient.terms[0].args[0]), gradient.terms[0]
        if first.op == "outer":
            where = kernel("columns", space, stage, first.shape)
            for side in (0, 1):
                hosts.setdefault(tuple(term.args[side] for term in gradient.terms), where)
        else:
            own = tuple(term.args[0] for term in gradient.terms)
            where = hosts.get(own) or kernel("columns", space, stage, "sums", first.shape)
        where.gradients.append(gradient)
    for one in made.values():
        _complete(part, one)
    return sorted(made.values(), key=lambda one: one.stage)


def _complete(part: _Partition, kernel: Kernel) -> None:
    rows = kernel.kind == "rows"
    known = part.known(rows=rows)
    inside: set[Node] = set()
    reads: set[Node] = set()
    operands = [*kernel.targets, *(a for g in kernel.gradients for term in g.terms for a in term.args)]
    for operand in operands:
        # A target is computed here though it is in memory afterwards.
        start = operand.args if operand in kernel.targets and operand in known else [operand]
        for node in reached(start, stop=known):
            (reads if node in known else inside).add(node)
        if operand in kernel.targets:
            inside.add(operand)
    kernel.reads = frozenset(reads - set(kernel.targets) if not rows else reads)
    kernel.computed = [n for n in sorted(inside, key=lambda n: n.index) if n.op in ACCUMULATORS]
