"""From a design to Triton source: the blend, the derivative, the kernels, and how they are launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from esper_triton.tezzeret.columns import write_columns, write_pool
from esper_triton.tezzeret.derive import pull_back
from esper_triton.tezzeret.fuse import Gradient, Kernel, fuse, merge_products, needed_from_forward
from esper_triton.tezzeret.graph import Graph, Node
from esper_triton.tezzeret.host import host_functions
from esper_triton.tezzeret.own_kernels import write_attention, write_attention_grad, write_bmm
from esper_triton.tezzeret.rows import Constants, KernelSource, Surroundings, Tiles, write_rows
from esper_triton.tezzeret.values import Tensor

__all__ = ["Design", "Emitted", "Launch", "emit"]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is to be computed: `k` from `inputs` (of x and h those that it reads) and `parameters`, in a graph of
    numeric shapes. `symbols` names extents."""

    name: str
    id: str
    graph: Graph
    k: Node
    inputs: Mapping[str, Node]
    parameters: Mapping[str, Node]
    layout: Literal["rows", "sequence", "image"]
    symbols: Mapping[int, str]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Intermediate:
    """A tensor between kernels, contiguous: [level, size], or [level] where size is 1."""

    name: str
    level: str
    size: int
    is_input_dtype: bool


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch: the kernel's name and grid, expressions over rows, batch and constexprs."""

    kernel: str
    grid: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """A Triton source and its launches. `saved` lives from forward to backward, `scratch` within a backward."""

    source: str
    constexprs: dict[str, int]
    saved: tuple[Intermediate, ...]
    scratch: tuple[Intermediate, ...]
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]


@dataclass
class _Assembly:
    """What has been written so far."""

    design: Design
    tiles: Tiles
    constants: Constants = field(default_factory=Constants)
    sources: list[KernelSource] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def intermediate(self, node: Node) -> Intermediate:
        narrow = node.size == 1 or node.level == "batch" or node.op == "attention_lse"
        wanted = self.design.graph.names.get(node, node.op)
        name, number = f"{wanted}_kept", 2
        while name in self.taken:
            name, number = f"{wanted}_kept_{number}", number + 1
        self.taken.add(name)
        return Intermediate(name=name, level=node.level, size=node.size, is_input_dtype=not narrow)

    def launches(
        self,
        phase: str,
        kernels: Sequence[Kernel],
        memory: Mapping[Node, Tensor],
        outputs: Mapping[Node, Tensor],
    ) -> tuple[Launch, ...]:
        design = self.design
        around = Surroundings(
            dtype=design.dtype,
            memory={**memory, **outputs},
            outputs=outputs,
            gradients={name: Tensor(f"grad_{name}", "", True) for name in design.parameters},
            names=design.graph.names,
            widths=design.symbols,
            constants=self.constants,
            tiles=self.tiles,
            is_image=design.layout == "image",
        )
        made = []
        for kernel in kernels:
            name, number = f"{phase}_{kernel.kind}", 2
            while any(source.name == name for source in self.sources):
                name, number = f"{phase}_{kernel.kind}_{number}", number + 1
            self.sources.append(_WRITERS[kernel.kind](kernel, name, around))
            made.append(Launch(kernel=name, grid=self.sources[-1].grid))
        return tuple(made)


_WRITERS = {
    "rows": write_rows,
    "columns": write_columns,
    "pool_sum": write_pool,
    "bmm": write_bmm,
    "attention": write_attention,
    "attention_grad": write_attention_grad,
}


def emit(design: Design, tiles: Tiles) -> Emitted:
    """Writes the kernels of `out = h + alpha * (k - h)` (law 2) and of its derivative.

    At alpha 0 every result is selected and not computed, so that a seed that has run away (NaN parameters) leaves the
    host alone; at alpha 1 out is k. Where k is h plus something, that something is what alpha scales, and nothing is
    lost to the difference of two close numbers.

    Raises ValueError where the derivative has no rule.
    """
    g = design.graph
    h = design.inputs.get("h") or g.input("h", "rows", (design.k.width,))
    step = _without(g, design.k, h)
    if step is not None:
        blended = g.add(h, g.mul(g.alpha, step))
    else:
        mixed = g.add(h, g.mul(g.alpha, g.sub(design.k, h)))
        blended = g.pointwise("where", g.pointwise("eq", g.alpha, g.const(1.0)), design.k, mixed)
    is_off = g.pointwise("eq", g.alpha, g.const(0.0))
    out = g.pointwise("where", is_off, h, blended)
    input_grads, gradients = _backward(design, h, step)

    assembly = _Assembly(design, tiles, taken={*design.parameters, "h", "x", "out", "alpha"})
    inputs = {h: Tensor("h", "row_stride", True)}
    if "x" in design.inputs:
        inputs[design.inputs["x"]] = Tensor("x", "row_stride", True)

    # ---- forward
    wanted = list(input_grads.values()) + [t for gradient in gradients for t in gradient.terms]
    needed = needed_from_forward([out], wanted)
    roots, became = merge_products(g, [out, *needed], [])
    kernels = fuse(roots, [], inputs, held=tiles.held, separate=tiles.separate)
    targets = list(dict.fromkeys(t for kernel in kernels for t in kernel.targets))
    kept = {t: assembly.intermediate(t) for t in targets if t is not roots[0]}
    outputs = {t: _tensor(i) for t, i in kept.items()} | {roots[0]: Tensor("out", "row_stride", True)}
    forward = assembly.launches("forward", kernels, inputs, outputs)

    # ---- backward
    memory = inputs | {_grad_out(design): Tensor("grad_out", "row_stride", True)}
    memory |= {old: _tensor(kept[new]) for old, new in became.items() if new in kept}
    terms = [t for gradient in gradients for t in gradient.terms]
    merged, _ = merge_products(g, [*input_grads.values(), *terms], memory)
    grads = dict(zip(input_grads, merged, strict=False))
    renewed = iter(merged[len(grads) :])
    gradients = [replace(gradient, terms=tuple(next(renewed) for _ in gradient.terms)) for gradient in gradients]
    kernels = fuse(list(grads.values()), gradients, memory, held=tiles.held, separate=tiles.separate)
    targets = list(dict.fromkeys(t for kernel in kernels for t in kernel.targets))
    own = {grad: Tensor(f"grad_{name}", "row_stride", True) for name, grad in grads.items()}
    scratch = {t: assembly.intermediate(t) for t in targets if t not in own}
    backward = assembly.launches("backward", kernels, memory, {t: _tensor(i) for t, i in scratch.items()} | own)

    emitted = Emitted(
        source="",
        constexprs=assembly.constants.values,
        saved=tuple(kept.values()),
        scratch=tuple(scratch.values()),
        forward=forward,
        backward=backward,
    )
    return replace(emitted, source=_source(design, assembly.sources, emitted))


def _without(g: Graph, k: Node, h: Node) -> Node | None:
    """What k adds to h, where it is such a sum."""
    if k.op != "add" or k in g.vjps:
        return None
    a, b = k.args
    if a is h and b.shape == h.shape:
        return b
    if b is h and a.shape == h.shape:
        return a
    for part, other in ((a, b), (b, a)):
        rest = _without(g, part, h)
        if rest is not None:
            return g.add(rest, other)
    return None


def _grad_out(design: Design) -> Node:
    return design.graph.input("grad_out", "rows", (design.k.width,))


def _backward(design: Design, h: Node, step: Node | None) -> tuple[dict[str, Node], list[Gradient]]:
    """Gradients at the inputs, as they are written, and at the parameters."""
    g, grad_out = design.graph, _grad_out(design)
    through = g.mul(g.alpha, grad_out)
    leaves = pull_back(g, {design.k if step is None else step: through})
    is_off = g.pointwise("eq", g.alpha, g.const(0.0))
    grads: dict[str, Node] = {}
    for name, node in design.inputs.items():
        terms = leaves.get(node, [])
        if name == "h":
            past = grad_out if step is not None else g.mul(g.sub(g.const(1.0), g.alpha), grad_out)
            total = g.add(past, terms[0]) if terms else past
            grads[name] = g.pointwise("where", is_off, grad_out, total)
        else:
            zero = g.expand(g.const(0.0), node.level, node.shape)
            grads[name] = g.pointwise("where", is_off, g.const(0.0), terms[0] if terms else zero)
    gradients = [Gradient(view, tuple(terms)) for view, terms in leaves.items() if view.op == "param"]
    reached_ones = {gradient.param["name"] for gradient in gradients}
    for name, parameter in design.parameters.items():
        if name not in reached_ones:  # only compared with, say
            zeros = g.expand(g.const(0.0), "rows", (parameter.size,))
            gradients.append(Gradient(parameter, (g.sum_rows(zeros),)))
    return grads, gradients


_LARGER = """@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
"""


def _tensor(one: Intermediate) -> Tensor:
    return Tensor(one.name, str(one.size), one.is_input_dtype)


def _source(design: Design, sources: Sequence[KernelSource], emitted: Emitted) -> str:
    bodies = "\n\n".join(source.text for source in sources)
    if "larger" in bodies:
        bodies = f"{_LARGER}\n\n{bodies}"
    imports = ["import torch", "import triton", "import triton.language as tl"]
    if "libdevice." in bodies:
        imports.append("from triton.language.extra import libdevice")
    # Nothing of the author's prose or names: designs that are equal have one source.
    head = f'"""Kernels of blueprint {design.id[:12]}, for {design.dtype}. Written by a compiler."""'
    return "\n".join([head, "", *imports, "", "", bodies, "", host_functions(design, sources, emitted)])
