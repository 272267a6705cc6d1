"""The one form that all spellings of a graph come to, from which a blueprint's id is made.

Sugar is written out, `identity` is removed, equal subexpressions become one, expressions over dims are multiplied
out, values are named by their place, and ops stand in the order in which the output asks for them. Two things say
nothing: the order of a commutative operation's arguments, and the names of values. The names of parameters do count,
since they are keys of the seed's state.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from esper_triton.contracts.graph import Op
from esper_triton.contracts.operations import OPERATIONS
from esper_triton.contracts.values import AttributeValue

__all__ = ["canonical_extent", "canonical_ops"]

_SUGAR = {"bias": "add", "scale": "mul", "pointwise_conv": "linear"}
# Every use of these is a draw of its own, so two that look alike are not one value.
_DRAWS = frozenset({"dropout"})

_Node = tuple[str, str, tuple["_Ref", ...]]  # operation, attributes as JSON, inputs
_Ref = tuple[str, str]  # kind ("name", "number" or "node") and what it is


class _Nodes:
    """Operations without names, each one once."""

    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        self._known: dict[_Node, int] = {}

    def add(self, op: str, attrs: Mapping[str, AttributeValue], inputs: Sequence[_Ref]) -> _Ref:
        if op == "identity":
            return inputs[0]
        op = _SUGAR.get(op, op)
        if op == "channel_gate":
            a, w1, b1, w2, b2 = inputs
            plain = OPERATIONS["linear"].resolve({})
            pooled = self.add("pool_mean", {}, [a])
            hidden = self.add("relu", {}, [self.add("linear", plain, [pooled, w1, b1])])
            return self.add("mul", {}, [a, self.add("sigmoid", {}, [self.add("linear", plain, [hidden, w2, b2])])])
        if op == "linear":
            attrs = OPERATIONS["linear"].resolve(attrs)
        if OPERATIONS[op].commutative:
            inputs = sorted(inputs)
        node = (op, json.dumps(attrs, sort_keys=True), tuple(inputs))
        if op in _DRAWS or node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return ("node", str(self._known[node]))


def canonical_ops(ops: Sequence[Op], output: str, reserved: Collection[str] = ()) -> tuple[tuple[Op, ...], str]:
    """The canonical ops and the name of their output. `reserved`: names that no value may take (parameters).

    The graph has passed its check. An output that is an input itself stays one `identity`.
    """
    nodes = _Nodes()
    refs: dict[str, _Ref] = {}
    for op in ops:
        inputs = [
            refs.get(item, ("name", item)) if isinstance(item, str) else ("number", repr(item)) for item in op.inputs
        ]
        refs[op.name] = nodes.add(op.op, _canonical_attributes(op), inputs)
    root = refs[output]
    if root[0] != "node":
        value: str | float = root[1] if root[0] == "name" else float(root[1])
        name = _names(reserved)(0)
        return (Op(name=name, op="identity", inputs=(value,)),), name
    graph = nodes.nodes
    digests = _digests(graph, _draw_labels(graph, int(root[1])))
    return _in_order(graph, int(root[1]), digests, _names(reserved))


def _canonical_attributes(op: Op) -> dict[str, AttributeValue]:
    found = OPERATIONS[op.op].resolve(op.attrs)
    for name, spec in OPERATIONS[op.op].attributes.items():
        value = found[name]
        if spec.kind == "extent":
            found[name] = canonical_extent(str(value))
        elif isinstance(value, tuple):
            found[name] = tuple(canonical_extent(str(item)) for item in value)
    return found


def canonical_extent(text: str) -> str:
    """An expression over dims with its sums and products multiplied out and sorted: `d * 2` and `d + d` are `2 * d`.

    Divisions, remainders and calls are not looked into beyond their own arguments.
    """
    terms = sorted(_terms(ast.parse(text.strip(), mode="eval").body).items())
    positive = [_shown_term(count, factors) for factors, count in terms if count > 0]
    negative = [_shown_term(-count, factors) for factors, count in terms if count < 0]
    return " - ".join([" + ".join(positive) or "0", *negative])


def _shown_term(count: int, factors: tuple[str, ...]) -> str:
    return " * ".join(factors if factors and count == 1 else (str(count), *factors))


def _terms(node: ast.expr) -> Counter[tuple[str, ...]]:
    """By product of factors, how many of it there are."""
    match node:
        case ast.Constant(value=int() as number):
            return Counter({(): number})
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            found = Counter(_terms(left))
            for factors, count in _terms(right).items():
                found[factors] += count if isinstance(op, ast.Add) else -count
            return found
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            product: Counter[tuple[str, ...]] = Counter()
            for (one, m), (other, n) in itertools.product(_terms(left).items(), _terms(right).items()):
                product[tuple(sorted(one + other))] += m * n
            return product
        case ast.BinOp(left=left, op=op, right=right):
            sign = "//" if isinstance(op, ast.FloorDiv) else "%"
            return Counter({(f"({_canonical(left)} {sign} {_canonical(right)})",): 1})
        case ast.Call(func=ast.Name(id=name), args=args):
            return Counter({(f"{name}({', '.join(map(_canonical, args))})",): 1})
    return Counter({(ast.unparse(node),): 1})


def _canonical(node: ast.expr) -> str:
    text = canonical_extent(ast.unparse(node))
    return text if text.isalnum() else f"({text})"


def _names(reserved: Collection[str]) -> Callable[[int], str]:
    prefix = "v"
    while any(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in reserved):
        prefix += "v"
    return lambda index: f"{prefix}{index}"


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _shown(ref: _Ref, digests: Sequence[str]) -> str:
    kind, what = ref
    return f"{kind} {digests[int(what)] if kind == 'node' else what}"


def _digests(graph: Sequence[_Node], labels: Mapping[int, int]) -> list[str]:
    """One for each node, of all that it is computed from. `labels` tell draws apart."""
    digests: list[str] = []
    for index, (op, attrs, inputs) in enumerate(graph):
        shown = [_shown(ref, digests) for ref in inputs]
        if OPERATIONS[op].commutative:
            shown.sort()
        digests.append(_hash([op, attrs, shown, labels.get(index, -1)]))
    return digests


def _draw_labels(graph: Sequence[_Node], root: int) -> dict[int, int]:
    """Numbers for the draws, by what they are computed from and what uses them, and not by where they were written.

    Draws are told apart by colour refinement (Weisfeiler and Leman 1968), and those that stay alike are alike: any of
    them takes the next number, and the colours of the others are refined by that.
    """
    draws = [index for index, (op, _, _) in enumerate(graph) if op in _DRAWS]
    labels: dict[int, int] = {}
    while len(labels) < len(draws):
        colours = _refined(graph, root, labels)
        first = min((index for index in draws if index not in labels), key=lambda index: colours[index])
        labels[first] = len(labels)
    return labels


def _refined(graph: Sequence[_Node], root: int, labels: Mapping[int, int]) -> list[str]:
    users: list[list[tuple[int, int]]] = [[] for _ in graph]
    for index, (op, _, inputs) in enumerate(graph):
        for position, (kind, what) in enumerate(inputs):
            if kind == "node":
                users[int(what)].append((index, 0 if OPERATIONS[op].commutative else position))
    colours = [_hash([digest, index == root]) for index, digest in enumerate(_digests(graph, labels))]
    classes = len(set(colours))
    while True:
        above = [sorted([colours[user], position] for user, position in used) for used in users]
        below = [[_shown(ref, colours) for ref in inputs] for _, _, inputs in graph]
        for (op, _, _), shown in zip(graph, below, strict=True):
            if OPERATIONS[op].commutative:
                shown.sort()
        colours = [_hash([colour, over, under]) for colour, over, under in zip(colours, above, below, strict=True)]
        if len(set(colours)) == classes:
            return colours
        classes = len(set(colours))


def _in_order(
    graph: Sequence[_Node], root: int, digests: Sequence[str], name_of: Callable[[int], str]
) -> tuple[tuple[Op, ...], str]:
    """The nodes that the root needs, each after its inputs, by walking from the root."""
    names: dict[int, str] = {}
    ops: list[Op] = []
    pending = [root]
    while pending:
        index = pending[-1]
        op, attrs, inputs = graph[index]
        if OPERATIONS[op].commutative:
            inputs = tuple(sorted(inputs, key=lambda ref: _shown(ref, digests)))
        missing = [int(what) for kind, what in inputs if kind == "node" and int(what) not in names]
        if index in names or missing:
            if index in names:
                pending.pop()
            else:
                pending.append(missing[0])
            continue
        pending.pop()
        names[index] = name_of(len(ops))
        operands = [
            names[int(what)] if kind == "node" else what if kind == "name" else float(what) for kind, what in inputs
        ]
        body = {"name": names[index], "op": op, "inputs": tuple(operands), "attrs": json.loads(attrs)}
        ops.append(Op.model_validate(body))
    return tuple(ops), names[root]
