"""What a function of tensors has torch do, operation by operation, as a graph that runs without the function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["graph_of"]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does what it is told, and writes it down. Tensors are known by who they are, so all of them are kept; those that
    come from elsewhere, as numbers that are made tensors, are constants of the graph."""

    def __init__(self, graph: fx.Graph, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants: dict[str, Tensor] = {}
        self._graph = graph
        self._nodes = {id(value): graph.placeholder(f"given_{index}") for index, value in enumerate(given)}
        self._kept: list[Tensor] = [*given]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, as of `rounding.Rounded`."""
        return False

    def node(self, value: Any) -> Any:
        """What a value is in the graph."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value.detach()
            self._nodes[id(value)] = self._graph.create_node("get_attr", name)
            self._kept.append(value)
        return self._nodes[id(value)]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        taken, named = self._in_graph(args), self._in_graph(dict(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = self._graph.call_function(func, taken, named)
        several = isinstance(result, tuple | list)
        for index, value in enumerate(result if several else (result,)):
            if isinstance(value, Tensor):
                self._nodes[id(value)] = self._graph.call_function(operator.getitem, (made, index)) if several else made
                self._kept.append(value)
        return result

    def _in_graph(self, values: Any) -> Any:
        if isinstance(values, tuple | list):
            return type(values)(self._in_graph(value) for value in values)
        if isinstance(values, dict):
            return {name: self._in_graph(value) for name, value in values.items()}
        return self.node(values)


def graph_of(function: Callable[..., Tensor], *given: Tensor) -> fx.GraphModule:
    """`function` of these tensors as torch's own operations, one after the other, for tensors like them.

    `torch.fx.experimental.proxy_tensor.make_fx` does as much, and imports torch's compiler, which takes seconds.

    Raises what the function raises.
    """
    graph = fx.Graph()
    recorder = _Recorder(graph, given)
    with torch.no_grad(), recorder:
        found = function(*given)
    graph.output(recorder.node(found))
    graph.eliminate_dead_code()
    return fx.GraphModule(recorder.constants, graph)
