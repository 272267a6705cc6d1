"""Which modules can be adopted, how wide their output is, and how seeds divide it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["Chunking", "Kind", "kind_of", "seed_spans"]

Chunking = Literal["features", "whole"]


@dataclass(frozen=True)
class Kind:
    """Widths of a module's last dimensions. `x_width` is None where the input is not a float matrix or is not known."""

    width: int
    x_width: int | None


_KINDS: dict[type[nn.Module], Callable[[Any], Kind]] = {
    nn.Linear: lambda m: Kind(m.out_features, m.in_features),
    nn.Embedding: lambda m: Kind(m.embedding_dim, None),
    nn.LayerNorm: lambda m: Kind(m.normalized_shape[-1], m.normalized_shape[-1]),
    nn.RMSNorm: lambda m: Kind(m.normalized_shape[-1], m.normalized_shape[-1]),
}

# Refused even with `features=`: the reason, for the message.
_REFUSED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (NonDynamicallyQuantizableLinear,),
        "nn.MultiheadAttention uses the weight of its out_proj and never calls it, so a seed there would be ignored; "
        "target a layer around the attention instead",
    ),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "its features are in dimension 1, and seeds work on features in the last dimension",
    ),
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
        "its features are in dimension 1, and seeds work on features in the last dimension",
    ),
    ((nn.MultiheadAttention, nn.RNNBase), "it returns a tuple, and seeds work on one tensor"),
    ((nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict), "it is a container and has no forward"),
)


def kind_of(module: nn.Module, features: int | None = None) -> Kind:
    """Widths of `module`, or of a tensor-to-tensor module that is not known here when `features` gives its last
    dimension.

    Raises TypeError with the reason for a module whose output a seed cannot work on, ValueError for a wrong `features`.
    """
    name = type(module).__name__
    for types, reason in _REFUSED:
        if isinstance(module, types):
            raise TypeError(f"{name} cannot be adopted: {reason}")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(f"{name} cannot be adopted before its first forward: its features are not known yet")
    for known, read in _KINDS.items():
        if isinstance(module, known):
            kind = read(module)
            if features is not None and features != kind.width:
                raise ValueError(f"{name} has {kind.width} output features, features={features} was given")
            return kind
    if features is None:
        kinds = ", ".join(known.__name__ for known in _KINDS)
        raise TypeError(
            f"{name} cannot be adopted: the width of its output is not known. Known are {kinds}; for another module "
            "from a tensor to a tensor, KasminaLayer.adopt(module, features=<size of the output's last dimension>)"
        )
    if features < 1:
        raise ValueError(f"features must be at least 1, found {features}")
    return Kind(features, None)


def seed_spans(width: int, num_seeds: int, chunking: Chunking) -> tuple[tuple[int, int], ...]:
    """Columns [start, stop) of each seed. `features`: every column in exactly one span, sizes as equal as possible, the
    larger first. `whole`: each seed has the entire width. Raises ValueError."""
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1, found {num_seeds}")
    if chunking == "whole":
        return ((0, width),) * num_seeds
    if chunking != "features":
        raise ValueError(f"unknown chunking {chunking!r}; known: 'features', 'whole'")
    if num_seeds > width:
        raise ValueError(f"{num_seeds} seeds cannot share {width} features; at most one seed a feature")
    size, larger = divmod(width, num_seeds)
    starts = [seed * size + min(seed, larger) for seed in range(num_seeds + 1)]
    return tuple(itertools.pairwise(starts))
