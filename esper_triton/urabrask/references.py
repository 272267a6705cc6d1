"""What an artifact's kernels are measured against: the torch function that its blueprint says they compute."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.graph import Op, infer
from esper_triton.tezzeret.reference import reference
from esper_triton.tezzeret.source import load_source

__all__ = ["draws_itself", "reference_of"]


def draws_itself(reference: Callable[..., Tensor]) -> bool:
    """Whether a reference takes `rand`, and so knows what has been dropped in training mode."""
    return "rand" in inspect.signature(reference).parameters


def reference_of(blueprint: Blueprint, dims: Mapping[str, int]) -> Callable[..., Tensor]:
    """A function of the inputs and parameters by keyword that returns k: the source's own, or the graph evaluated.

    That of a graph with dropout also takes `rand`, as `Blueprint` describes it for sources.
    """
    if not blueprint.ops:
        found: Callable[..., Tensor] = load_source(blueprint).reference
        return found
    canonical = blueprint.canonical()
    dropouts = [op for op in canonical.ops if op.op == "dropout"]
    types = infer(canonical, dims)

    def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = {name: tensors[name] for name in canonical.inputs}
        return inputs, {name: tensor for name, tensor in tensors.items() if name not in inputs}

    def evaluate(**tensors: Tensor) -> Tensor:
        inputs, parameters = split(tensors)
        return reference(canonical, inputs, parameters, dims=dims, layout=canonical.layout)

    def evaluate_with_dropout(*, rand: Callable[..., Tensor] | None = None, **tensors: Tensor) -> Tensor:
        if rand is None:
            return evaluate(**tensors)
        inputs, parameters = split(tensors)
        leading = next(iter(inputs.values())).shape[:-1]
        mask = {op.name: kept(op, salt, rand, leading) for salt, op in enumerate(dropouts)}
        return reference(canonical, inputs, parameters, dims=dims, layout=canonical.layout, training=True, mask=mask)

    def kept(op: Op, salt: int, rand: Callable[..., Tensor], leading: torch.Size) -> Tensor:
        """An element is drawn by its position, with a seed that is one more for every dropout of the graph."""
        kind = types[op.name]
        shape = (*(leading if kind.level == "rows" else leading[:1]), *kind.shape)
        offsets = torch.arange(math.prod(shape)).reshape(shape)
        p = op.attrs["p"]
        assert isinstance(p, float)
        return rand(offsets, salt=salt) >= p

    return evaluate_with_dropout if dropouts else evaluate
