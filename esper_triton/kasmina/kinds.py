"""Which modules can be adopted, how wide their output is, and how seeds divide it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["OUT_PROJ_REASON", "Chunking", "Kind", "kind_of", "seed_spans"]

Chunking = Literal["features", "whole"]

OUT_PROJ_REASON = (
    "nn.MultiheadAttention uses the weight of its out_proj and never calls it, so a seed there would be ignored; "
    "target the attention itself"
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What dispatch needs to know of a host.

    `width` features lie in dimension `feature_dim` of the output: counted from the end (negative), or 1. A module that
    gives a tuple (`first_of_tuple`) has its output in the first place. `x_width` is the width of its input in the same
    dimension where every row of the output comes from a row of the input at the same place, and None elsewhere.
    `x_name` is the name of that argument, which is the first; empty where it has none.

    `positions` counts the dimensions after that of the features, None where only a call shows it. `length_first` says
    that an output of three dimensions is [length, batch, width].
    """

    width: int
    x_width: int | None = None
    feature_dim: int = -1
    first_of_tuple: bool = False
    x_name: str = ""
    positions: int | None = 0
    length_first: bool = False

    @property
    def may_be_image(self) -> bool:
        """Whether its output can have two dimensions of positions."""
        return self.positions in (2, None)


def _convolution(module: _ConvNd, spatial_dims: int) -> Kind:
    return Kind(
        width=module.out_channels,
        x_width=module.in_channels if _keeps_every_size(module) else None,
        feature_dim=-1 - spatial_dims,  # from the end: an input without a batch dimension is taken too
        positions=spatial_dims,
    )


def _keeps_every_size(module: _ConvNd) -> bool:
    if any(stride != 1 for stride in module.stride) or any(module.output_padding):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same"
    reach = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size, strict=True)]
    return all(2 * padding == r for padding, r in zip(module.padding, reach, strict=True))


def _last(width: int) -> Kind:
    return Kind(width=width, x_width=width)


def _channels(width: int, positions: int | None, feature_dim: int = 1) -> Kind:
    return Kind(width=width, x_width=width, feature_dim=feature_dim, positions=positions)


_KINDS: dict[type[nn.Module], Callable[[Any], Kind]] = {
    nn.Linear: lambda m: Kind(width=m.out_features, x_width=m.in_features),
    nn.Bilinear: lambda m: Kind(width=m.out_features),  # two inputs, of which none is x
    nn.Conv1d: lambda m: _convolution(m, 1),
    nn.Conv2d: lambda m: _convolution(m, 2),
    nn.Conv3d: lambda m: _convolution(m, 3),
    nn.ConvTranspose1d: lambda m: _convolution(m, 1),
    nn.ConvTranspose2d: lambda m: _convolution(m, 2),
    nn.ConvTranspose3d: lambda m: _convolution(m, 3),
    nn.Embedding: lambda m: Kind(width=m.embedding_dim),
    nn.EmbeddingBag: lambda m: Kind(width=m.embedding_dim),
    nn.LayerNorm: lambda m: _last(m.normalized_shape[-1]),
    nn.RMSNorm: lambda m: _last(m.normalized_shape[-1]),
    nn.GroupNorm: lambda m: _channels(m.num_channels, None),
    nn.BatchNorm1d: lambda m: _channels(m.num_features, 1),  # or 0
    nn.BatchNorm2d: lambda m: _channels(m.num_features, 2),
    nn.BatchNorm3d: lambda m: _channels(m.num_features, 3),
    nn.SyncBatchNorm: lambda m: _channels(m.num_features, None),
    nn.InstanceNorm1d: lambda m: _channels(m.num_features, 1, -2),
    nn.InstanceNorm2d: lambda m: _channels(m.num_features, 2, -3),
    nn.InstanceNorm3d: lambda m: _channels(m.num_features, 3, -4),
    nn.MultiheadAttention: lambda m: Kind(
        width=m.embed_dim, x_width=m.embed_dim, first_of_tuple=True, length_first=not m.batch_first
    ),
}

# Refused even with `features=`: the reason, for the message.
_REFUSED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((NonDynamicallyQuantizableLinear,), OUT_PROJ_REASON),
    (
        (nn.RNNBase, nn.LSTMCell),
        "it returns its hidden state beside its output, and a seed on the output alone would leave the two at odds; "
        "target the layer that reads it",
    ),
    ((nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict), "it is a container and has no forward"),
)


def kind_of(module: nn.Module, features: int | None = None) -> Kind:
    """What `module` gives, or a tensor-to-tensor module that is not known here when `features` gives its last
    dimension.

    Raises TypeError with the reason for a module whose output a seed cannot work on, ValueError for a wrong `features`.
    """
    name = type(module).__name__
    for types, reason in _REFUSED:
        if isinstance(module, types):
            raise TypeError(f"{name} cannot be adopted: {reason}")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(f"{name} cannot be adopted before its first forward: its features are not known yet")
    x_name = _first_argument(module)
    for known, read in _KINDS.items():
        if isinstance(module, known):
            kind = read(module)
            if features is not None and features != kind.width:
                raise ValueError(f"{name} has {kind.width} output features, features={features} was given")
            return replace(kind, x_name=x_name)
    if features is None:
        kinds = ", ".join(known.__name__ for known in _KINDS)
        raise TypeError(
            f"{name} cannot be adopted: the width of its output is not known. Known are {kinds}; for another module "
            "from a tensor to a tensor, KasminaLayer.adopt(module, features=<size of the output's last dimension>)"
        )
    if features < 1:
        raise ValueError(f"features must be at least 1, found {features}")
    return Kind(width=features, x_name=x_name, length_first=_takes_length_first(module))


def _takes_length_first(module: nn.Module) -> bool:
    """As its attention does, where it has one."""
    attentions = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return any(not attention.batch_first for attention in attentions)


def _first_argument(module: nn.Module) -> str:
    """What the host's forward calls its first argument, for calls by keyword. A subclass may call it otherwise."""
    try:
        first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    except (TypeError, ValueError):  # a callable without a signature
        return ""
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else ""


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
