"""Reverse-mode derivative of a graph, as nodes of the same graph.

One rule an operation: the vector-Jacobian product by its arguments (A. Griewank, A. Walther, "Evaluating Derivatives",
2008, chapter 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from esper_triton.tezzeret.graph import Graph, Node, reached

__all__ = ["pull_back"]

Rule = Callable[[Graph, Node, Node], "tuple[Node | None, ...]"]


def pull_back(graph: Graph, cotangents: dict[Node, Node]) -> dict[Node, list[Node]]:
    """The cotangents of every `input` and `param` leaf that the given values depend on.

    Args:
        cotangents: of values of the graph, each of the value's level and shape.

    Returns, for each leaf, terms to be added up; of an input there is one. A term of a parameter is summed over rows,
    and has the elements of the parameter's view in one row.

    Raises ValueError where two parameters are combined before they meet an activation: that has no rule.
    """
    sums: dict[Node, list[Node]] = {node: [grad] for node, grad in cotangents.items()}
    leaves: dict[Node, list[Node]] = {}
    for node in sorted(reached(cotangents), key=lambda node: -node.index):
        if node not in sums:
            continue
        terms = sums.pop(node)
        if node.op == "param":
            leaves[node] = terms
            continue
        total = _total(graph, terms)
        if node.op == "input":
            leaves[node] = [total]
            continue
        inputs, grads = _vjp(graph, node, total)
        for argument, grad in zip(inputs, grads, strict=True):
            if grad is None or argument.op in ("const", "alpha", "length", "keep"):
                continue
            if argument.level == "none" and argument.op != "param":
                raise ValueError(f"{node.op} combines parameters before they meet an activation")
            sums.setdefault(argument, []).append(fitted(graph, grad, argument))
    return leaves


def _vjp(graph: Graph, node: Node, grad: Node) -> tuple[Sequence[Node], tuple[Node | None, ...]]:
    if node in graph.vjps:
        inputs, function = graph.vjps[node]
        return inputs, function(grad)
    return node.args, _RULES[node.op](graph, node, grad)


def _total(graph: Graph, terms: Iterable[Node]) -> Node:
    first, *rest = terms
    for term in rest:
        first = graph.add(first, term)
    return first


def fitted(graph: Graph, grad: Node, argument: Node) -> Node:
    """The cotangent summed over what the argument was broadcast along."""
    if grad.level == argument.level and grad.shape == argument.shape:
        return grad
    if argument.level == "none" and grad.level == "none":
        return grad  # of a product over rows: outer and sum_rows are made to fit
    shape = (1,) * (len(grad.shape) - len(argument.shape)) + argument.shape
    # An inner dimension that the argument does not have, from the right.
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1 and grad.shape[dim] != 1:
            grad = _sum_dim(graph, grad, dim)
    if argument.level == "none":
        width = math.prod(grad.shape)
        return graph.sum_rows(graph.reshape(grad, (width,)))
    return graph.reshape(grad, argument.shape)


def _sum_dim(graph: Graph, grad: Node, dim: int) -> Node:
    """Sum over one inner dimension, kept as 1."""
    shape = grad.shape
    if dim == len(shape) - 1:
        return graph.rsum(grad)
    behind = math.prod(shape[dim + 1 :])
    turned = graph.transpose(graph.reshape(grad, (*shape[:dim], shape[dim], behind)))
    return graph.reshape(graph.rsum(turned), (*shape[:dim], 1, *shape[dim + 1 :]))


def _unary(slope: Callable[[Graph, Node, Node], Node]) -> Rule:
    """Of a pointwise operation: `slope` of the graph, the argument and the value."""
    return lambda g, node, grad: (g.mul(grad, slope(g, node.args[0], node)),)


def _chosen(better: str) -> Rule:
    """Of maximum and minimum. Where both are equal each takes half, and at NaN both take all, as in torch."""

    def rule(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
        a, b = node.args
        shared = g.pointwise("where", g.pointwise("eq", a, b), g.mul(g.const(0.5), grad), grad)
        none = g.const(0.0)
        return (
            g.pointwise("where", g.pointwise(better, b, a), none, shared),
            g.pointwise("where", g.pointwise(better, a, b), none, shared),
        )

    return rule


def _linear(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    (a, weight), (transposed,) = node.args, node["transposed"]
    to_weight = g.outer(a, grad) if transposed else g.outer(grad, a)
    return g.linear(grad, weight, transposed=not transposed), to_weight


def _rmax(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    """Equal maxima share, as in torch's amax.

    The largest is found again among the values that it is compared with: those that went through memory are rounded,
    and what was the largest before may be none of them.
    """
    largest = g.node("rmax", node.args, node.level, node.shape, nan=node["nan"], again=True)
    is_largest = g.pointwise("eq", node.args[0], largest)
    return (g.mul(g.div(grad, g.rsum(is_largest)), is_largest),)


def _concat(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    grads, start = [], 0
    for argument in node.args:
        grads.append(g.slice(grad, start, start + argument.width))
        start += argument.width
    return tuple(grads)


def _gather(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    table, index = node.args
    hot = g.node("onehot", (index,), index.level, (*index.shape[:-1], table.shape[0]))
    return g.outer(hot, grad), None


def _div(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    _, b = node.args
    to_b = None if b.op in ("const", "length") else g.unary("neg", g.mul(grad, g.div(node, b)))
    return g.div(grad, b), to_b


def _bmm(g: Graph, node: Node, grad: Node) -> tuple[Node | None, ...]:
    a, b = node.args
    return g.bmm(grad, g.transpose(b)), g.bmm(g.transpose(a), grad)


_RULES: dict[str, Rule] = {
    "add": lambda g, node, grad: (grad, grad),
    "sub": lambda g, node, grad: (grad, g.unary("neg", grad)),
    "mul": lambda g, node, grad: (g.mul(grad, node.args[1]), g.mul(grad, node.args[0])),
    "div": _div,
    "neg": lambda g, node, grad: (g.unary("neg", grad),),
    "exp": _unary(lambda g, a, y: y),
    "expm1": _unary(lambda g, a, y: g.unary("exp", a)),
    "log": lambda g, node, grad: (g.div(grad, node.args[0]),),
    "sqrt": lambda g, node, grad: (g.div(g.mul(grad, g.const(0.5)), node),),
    "rsqrt": _unary(lambda g, a, y: g.mul(g.const(-0.5), g.mul(y, g.mul(y, y)))),
    "abs": _unary(lambda g, a, y: g.sub(g.pointwise("gt", a, g.const(0.0)), g.pointwise("lt", a, g.const(0.0)))),
    "tanh": _unary(lambda g, a, y: g.sub(g.const(1.0), g.mul(y, y))),
    "sigmoid": _unary(lambda g, a, y: g.mul(y, g.sub(g.const(1.0), y))),
    "softplus": _unary(lambda g, a, y: g.unary("sigmoid", a)),
    "erf": _unary(lambda g, a, y: g.mul(g.const(2 / math.sqrt(math.pi)), g.unary("exp", g.unary("neg", g.mul(a, a))))),
    "relu": lambda g, node, grad: (
        g.pointwise("where", g.pointwise("le", node.args[0], g.const(0.0)), g.const(0.0), grad),
    ),
    "maximum": _chosen("gt"),
    "minimum": _chosen("lt"),
    "where": lambda g, node, grad: (
        None,
        g.pointwise("where", node.args[0], grad, g.const(0.0)),
        g.pointwise("where", node.args[0], g.const(0.0), grad),
    ),
    **{op: (lambda g, node, grad: (None,) * len(node.args)) for op in ("gt", "ge", "lt", "le", "eq", "onehot")},
    "expand": lambda g, node, grad: (grad,),
    "slice": lambda g, node, grad: (g.pad(grad, node["start"], node.args[0].width),),
    "pad": lambda g, node, grad: (g.slice(grad, node["start"], node["start"] + node.args[0].width),),
    "concat": _concat,
    "reshape": lambda g, node, grad: (g.reshape(grad, node.args[0].shape),),
    "transpose": lambda g, node, grad: (g.transpose(grad),),
    "unpool": lambda g, node, grad: (g.pool_sum(grad),),
    "shift": lambda g, node, grad: (g.shift(grad, -node["dy"], -node["dx"]),),
    "gather": _gather,
    "rsum": lambda g, node, grad: (g.expand(grad, node.args[0].level, node.args[0].shape),),
    "rmax": _rmax,
    "linear": _linear,
    "pool_sum": lambda g, node, grad: (g.unpool(grad),),
    "bmm": _bmm,
}
