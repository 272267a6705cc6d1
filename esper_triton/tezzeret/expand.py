"""The operations of blueprints, written in those of `graph`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esper_triton.tezzeret.graph import Graph, Node, broadcast_shapes

__all__ = ["EXPANSIONS", "expand"]

Expansion = Callable[[Graph, Sequence[Node], Mapping[str, Any]], Node]
EXPANSIONS: dict[str, Expansion] = {}


def expand(graph: Graph, op: str, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    """The value of a blueprint's operation. `attrs` are complete, with numbers for extents.

    Raises KeyError for an operation that is not known, ValueError for shapes that do not fit.
    """
    return EXPANSIONS[op](graph, args, attrs)


def _expansion(*names: str) -> Callable[[Expansion], Expansion]:
    def keep(function: Expansion) -> Expansion:
        EXPANSIONS.update(dict.fromkeys(names, function))
        return function

    return keep


def _pointwise(op: str) -> Expansion:
    return lambda g, args, attrs: g.pointwise(op, *args)


for _op in "add sub mul div maximum minimum neg abs exp log sqrt rsqrt relu tanh sigmoid softplus erf".split():
    EXPANSIONS[_op] = _pointwise(_op)
for _op in "gt ge lt le eq where".split():
    EXPANSIONS[_op] = _pointwise(_op)
EXPANSIONS |= {
    "scale": _pointwise("mul"),
    "bias": _pointwise("add"),
    "identity": lambda g, args, attrs: args[0],
    "square": lambda g, args, attrs: g.mul(args[0], args[0]),
    "reciprocal": lambda g, args, attrs: g.div(g.const(1.0), args[0]),
    "silu": lambda g, args, attrs: g.mul(args[0], g.unary("sigmoid", args[0])),
    "sum": lambda g, args, attrs: g.rsum(args[0]),
    "mean": lambda g, args, attrs: g.rmean(args[0]),
    "max": lambda g, args, attrs: g.rmax(args[0], nan=True),
    "pool_mean": lambda g, args, attrs: pool_mean(g, args[0]),
    "concat": lambda g, args, attrs: g.concat(*args),
    "slice": lambda g, args, attrs: g.slice(args[0], attrs["start"], attrs["stop"]),
    "reshape": lambda g, args, attrs: g.reshape(args[0], tuple(attrs["shape"])),
    "transpose": lambda g, args, attrs: g.transpose(args[0]),
}


@_expansion("gelu")
def _gelu(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (z,) = args
    if attrs["approximate"] == "tanh":  # Hendrycks & Gimpel 2016
        cubic = g.add(z, g.mul(g.const(0.044715), g.mul(z, g.mul(z, z))))
        inner = g.mul(g.const(math.sqrt(2 / math.pi)), cubic)
        return g.mul(z, g.add(g.const(0.5), g.mul(g.const(0.5), g.unary("tanh", inner))))
    phi = g.add(g.const(0.5), g.mul(g.const(0.5), g.unary("erf", g.mul(z, g.const(math.sqrt(0.5))))))
    out = g.mul(z, phi)

    def vjp(grad: Node) -> tuple[Node | None, ...]:
        density = g.mul(g.const(1 / math.sqrt(2 * math.pi)), g.unary("exp", g.mul(g.const(-0.5), g.mul(z, z))))
        return (g.mul(grad, g.add(phi, g.mul(z, density))),)

    g.vjps[out] = ((z,), vjp)
    return out


@_expansion("leaky_relu")
def _leaky_relu(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (z,) = args
    return g.pointwise("where", g.pointwise("gt", z, g.const(0.0)), z, g.mul(z, g.const(attrs["slope"])))


@_expansion("elu")
def _elu(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (z,) = args
    alpha, is_above = g.const(attrs["alpha"]), g.pointwise("gt", z, g.const(0.0))
    low = g.pointwise("minimum", z, g.const(0.0))
    out = g.pointwise("where", is_above, z, g.mul(alpha, g.unary("expm1", low)))
    g.vjps[out] = (
        (z,),
        lambda grad: (g.pointwise("where", is_above, grad, g.mul(grad, g.mul(alpha, g.unary("exp", low)))),),
    )
    return out


@_expansion("clamp")
def _clamp(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    """The derivative is 1 at the limits too, and 0 only beyond them."""
    (z,) = args
    out = z
    beyond: list[tuple[str, Node]] = []
    for name, closer, outside in (("min", "maximum", "lt"), ("max", "minimum", "gt")):
        if attrs[name] is not None:
            limit = g.const(attrs[name])
            out = g.pointwise(closer, out, limit)
            beyond.append((outside, limit))

    def vjp(grad: Node) -> tuple[Node | None, ...]:
        for outside, limit in beyond:
            grad = g.pointwise("where", g.pointwise(outside, z, limit), g.const(0.0), grad)
        return (grad,)

    g.vjps[out] = ((z,), vjp)
    return out


@_expansion("softmax")
def _softmax(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (z,) = args
    powers = g.unary("exp", g.sub(z, g.rmax(z)))
    out = g.div(powers, g.rsum(powers))
    g.vjps[out] = ((z,), lambda grad: (g.mul(out, g.sub(grad, g.rsum(g.mul(grad, out)))),))
    return out


@_expansion("log_softmax")
def _log_softmax(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (z,) = args
    shifted = g.sub(z, g.rmax(z))
    out = g.sub(shifted, g.unary("log", g.rsum(g.unary("exp", shifted))))
    g.vjps[out] = ((z,), lambda grad: (g.sub(grad, g.mul(g.unary("exp", out), g.rsum(grad))),))
    return out


def _normed(g: Graph, z: Node, rstd: Node, normed: Node, *, centred: bool) -> Node:
    """Gives x_hat = (z - mean) * rstd its derivative: rstd (g - mean(g) - x_hat mean(g x_hat)); J. Ba et al. 2016. The
    mean of g is there where z is centred (layernorm), and not without (rmsnorm)."""

    def vjp(grad: Node) -> tuple[Node | None, ...]:
        along = g.mul(normed, g.rmean(g.mul(grad, normed)))
        inner = g.sub(g.sub(grad, g.rmean(grad)), along) if centred else g.sub(grad, along)
        return (g.mul(rstd, inner),)

    g.vjps[normed] = ((z,), vjp)
    return normed


def _affine(g: Graph, normed: Node, weight_and_bias: Sequence[Node]) -> Node:
    if weight_and_bias:
        normed = g.mul(normed, weight_and_bias[0])
    return g.add(normed, weight_and_bias[1]) if len(weight_and_bias) > 1 else normed


@_expansion("layernorm")
def _layernorm(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    z, *rest = args
    centred = g.sub(z, g.rmean(z))
    rstd = g.unary("rsqrt", g.add(g.rmean(g.mul(centred, centred)), g.const(attrs["eps"])))
    return _affine(g, _normed(g, z, rstd, g.mul(centred, rstd), centred=True), rest)


@_expansion("rmsnorm")
def _rmsnorm(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    z, *rest = args
    rstd = g.unary("rsqrt", g.add(g.rmean(g.mul(z, z)), g.const(attrs["eps"])))
    return _affine(g, _normed(g, z, rstd, g.mul(z, rstd), centred=False), rest)


@_expansion("linear", "pointwise_conv")
def _linear(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, weight, *bias = args
    out = g.linear(a, weight, transposed=bool(attrs.get("transposed", False)))
    return g.add(out, bias[0]) if bias else out


@_expansion("matmul")
def _matmul(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, b = args
    if b.level == "none" and len(b.shape) == 2:
        return g.linear(a, b, transposed=True)
    if "none" in (a.level, b.level):
        raise ValueError("a product of an activation and a parameter takes the parameter second, as a matrix")
    leading = broadcast_shapes([a.shape[:-2], b.shape[:-2]])
    return g.bmm(g.expand(a, a.level, (*leading, *a.shape[-2:])), g.expand(b, b.level, (*leading, *b.shape[-2:])))


def pool_mean(g: Graph, a: Node) -> Node:
    """Mean over the positions of an item."""
    return g.div(g.pool_sum(a), g.length)


@_expansion("channel_gate")
def _channel_gate(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    """J. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018."""
    a, w1, b1, w2, b2 = args
    squeezed = g.unary("relu", g.add(g.linear(pool_mean(g, a), w1), b1))
    return g.mul(a, g.unary("sigmoid", g.add(g.linear(squeezed, w2), b2)))


@_expansion("dropout")
def _dropout(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    (a,) = args
    # `salt` tells the masks of several dropouts apart: they would be one where shapes are equal.
    salt = sum(1 for node in g.nodes if node.op == "keep")
    keep = g.node("keep", (), a.level, a.shape, p=float(attrs["p"]), salt=salt)
    return g.mul(a, keep)


def _taps(extent: int) -> range:
    return range(-(extent // 2), extent // 2 + 1)


def _sum(g: Graph, terms: Sequence[Node], bias: Sequence[Node]) -> Node:
    total = terms[0]
    for term in [*terms[1:], *bias]:
        total = g.add(total, term)
    return total


@_expansion("depthwise_conv1d")
def _depthwise_conv1d(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, weight, *bias = args
    taps = _taps(weight.shape[1])
    terms = [g.mul(g.shift(a, 0, t), g.view(weight, (0,), {1: i})) for i, t in enumerate(taps)]
    return _sum(g, terms, bias)


@_expansion("depthwise_conv2d")
def _depthwise_conv2d(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, weight, *bias = args
    terms = [
        g.mul(g.shift(a, dy, dx), g.view(weight, (0,), {1: i, 2: j}))
        for i, dy in enumerate(_taps(weight.shape[1]))
        for j, dx in enumerate(_taps(weight.shape[2]))
    ]
    return _sum(g, terms, bias)


@_expansion("conv1d")
def _conv1d(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, weight, *bias = args
    taps = _taps(weight.shape[2])
    terms = [g.linear(g.shift(a, 0, t), g.view(weight, (0, 1), {2: i})) for i, t in enumerate(taps)]
    return _sum(g, terms, bias)


@_expansion("conv3x3")
def _conv3x3(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    a, weight, *bias = args
    terms = [
        g.linear(g.shift(a, dy, dx), g.view(weight, (0, 1), {2: dy + 1, 3: dx + 1}))
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    return _sum(g, terms, bias)


@_expansion("attention")
def _attention(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    """softmax(q k^T / sqrt(d)) v of every head, over the positions of an item (A. Vaswani et al. 2017). Its derivative
    needs the logarithm of the softmax's sum, so that the scores need not be kept (T. Dao et al. 2022)."""
    if any(a.level != "rows" for a in args):
        raise ValueError("attention is over the positions of an item, and an operand has one value for the whole item")
    q, k, v = args
    common = {"heads": attrs["heads"], "causal": bool(attrs["causal"])}
    out = g.node("attention", (q, k, v), q.level, v.shape, **common)
    lse = g.node("attention_lse", (q, k, v), q.level, (attrs["heads"],), **common)

    def vjp(grad: Node) -> tuple[Node | None, ...]:
        arguments = (q, k, v, out, lse, grad)
        return tuple(
            g.node("attention_grad", arguments, a.level, a.shape, which=which, **common)
            for which, a in zip("qkv", (q, k, v), strict=True)
        )

    g.vjps[out] = ((q, k, v), vjp)
    return out


@_expansion("gather")
def _gather(g: Graph, args: Sequence[Node], attrs: Mapping[str, Any]) -> Node:
    table, index = args
    return g.node("gather", (table, index), index.level, (*index.shape[:-1], table.width))
