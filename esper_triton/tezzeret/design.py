"""What a blueprint's graph is for given dims, as the emitter takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.expressions import evaluate
from esper_triton.contracts.graph import Op, attributes, infer, layout_of
from esper_triton.contracts.operations import OPERATIONS
from esper_triton.tezzeret.emission import Design
from esper_triton.tezzeret.expand import expand
from esper_triton.tezzeret.graph import Graph, Node

__all__ = ["design_of"]


def design_of(blueprint: Blueprint, dims: Mapping[str, int], dtype: str) -> Design:
    """The blueprint's canonical graph with numbers for its dims: of two spellings of one design it is the same.

    Raises BlueprintError with every fault of the graph at these dims, or for an op that has no kernel in this place.
    """
    types = infer(blueprint, dims)
    canonical = blueprint.canonical()
    graph = Graph()
    inputs = {name: graph.input(name, "rows", types[name].shape) for name in blueprint.inputs}
    parameters = {name: graph.param(name, types[name].shape) for name in sorted(blueprint.parameters)}
    values: dict[str, Node] = {**inputs, **parameters}
    for op in canonical.ops:
        args = [values[item] if isinstance(item, str) else graph.const(item) for item in op.inputs]
        try:
            value = expand(graph, op.op, args, _numbers(op, dims))
        except ValueError as error:
            raise BlueprintError(f"blueprint {blueprint.name!r}: {op}: {error}") from error
        if value.op not in ("input", "param", "const"):
            graph.names.setdefault(value, op.op)
        values[op.name] = value
    symbols: dict[int, str] = {}
    for name in sorted(dims):
        symbols.setdefault(dims[name], name)
    return Design(
        name=blueprint.name,
        id=blueprint.id,
        graph=graph,
        k=values[canonical.output],
        inputs=inputs,
        parameters=parameters,
        layout=layout_of(canonical.ops),
        symbols=symbols,
        dtype=dtype,
    )


def _numbers(op: Op, dims: Mapping[str, int]) -> dict[str, Any]:
    """The op's attributes with numbers for extents."""
    found: dict[str, Any] = {}
    for name, value in attributes(op).items():
        kind = OPERATIONS[op.op].attributes[name].kind
        if kind == "extent" and value is not None:
            value = evaluate(str(value), dims)
        elif kind == "extents" and isinstance(value, tuple):
            found[name] = tuple(evaluate(str(item), dims) for item in value)
            continue
        found[name] = value
    return found
