"""hypothesis strategies for layers, their inputs, and artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_triton.compile import compile as compile_blueprint
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.kasmina.kinds import kind_of
from esper_triton.tezzeret.library import shipped
from esper_triton.urza import Artifact, Urza

__all__ = ["LAYERS", "artifacts", "inputs", "layers"]

_MOST = 24  # features; several blocks of a kernel are made of rows

Kinds = Literal["linear", "conv1d", "conv2d", "layernorm", "rmsnorm", "groupnorm", "embedding", "attention"]


def _linear(draw: st.DrawFn) -> nn.Module:
    return nn.Linear(draw(_sizes), draw(_sizes), bias=draw(st.booleans()))


def _convolution(kind: type[nn.Conv1d | nn.Conv2d]) -> Callable[[st.DrawFn], nn.Module]:
    def make(draw: st.DrawFn) -> nn.Module:
        groups = draw(st.sampled_from([1, 1, 2]))
        size = draw(st.sampled_from([1, 3]))
        return kind(
            groups * draw(_sizes),
            groups * draw(_sizes),
            size,
            stride=draw(st.sampled_from([1, 1, 2])),
            padding=size // 2,
            groups=groups,
            bias=draw(st.booleans()),
        )

    return make


def _groupnorm(draw: st.DrawFn) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, 3]))
    return nn.GroupNorm(groups, groups * draw(_sizes))


def _attention(draw: st.DrawFn) -> nn.Module:
    heads = draw(st.sampled_from([1, 2, 4]))
    return nn.MultiheadAttention(heads * draw(st.integers(1, 8)), heads, batch_first=draw(st.booleans()))


_sizes = st.integers(1, _MOST)
LAYERS: dict[Kinds, Callable[[st.DrawFn], nn.Module]] = {
    "linear": _linear,
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "layernorm": lambda draw: nn.LayerNorm(draw(_sizes)),
    "rmsnorm": lambda draw: nn.RMSNorm(draw(_sizes)),
    "groupnorm": _groupnorm,
    "embedding": lambda draw: nn.Embedding(draw(st.integers(1, 50)), draw(_sizes)),
    "attention": _attention,
}
"""By name, what `layers` draws from."""


@st.composite
def layers(draw: st.DrawFn, kinds: Sequence[Kinds] = tuple(LAYERS)) -> nn.Module:
    """A layer of torch that can hold seeds, of drawn widths of at most 48, with parameters of its own draw."""
    kind = draw(st.sampled_from(kinds))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LAYERS[kind](draw)


@st.composite
def inputs(draw: st.DrawFn, layer: nn.Module, *, most: int = 9, dtype: torch.dtype | None = None) -> Tensor:
    """What a layer of `layers`, or a KasminaLayer of that kind, takes: drawn leading sizes (none included) up to
    `most`, ordinary numbers, now and then in memory that is not contiguous.

    The dtype is that of the layer's parameters, float32 where it has none; int64 for an embedding.
    """
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        shape = draw(st.lists(st.integers(0, most), min_size=1, max_size=2))
        return torch.randint(0, layer.num_embeddings, shape, generator=generator)
    found = dtype or next((p.dtype for p in layer.parameters()), torch.float32)
    kind = kind_of(layer)
    width = layer.in_channels if isinstance(layer, nn.Conv1d | nn.Conv2d) else kind.x_width
    assert width is not None, f"inputs() is not for a {type(layer).__name__}"
    if kind.feature_dim == -1:
        least = 2 if isinstance(layer, nn.MultiheadAttention) else 0
        lead = draw(st.lists(st.integers(1 if least else 0, most), min_size=least, max_size=2))
        wide = torch.randn(*lead, width + 3, generator=generator).to(found)
        value = wide[..., :width]
        is_strided = draw(st.booleans())
        return value if is_strided else value.contiguous()
    positions = kind.positions if kind.positions is not None else draw(st.integers(1, 2))
    batch = draw(st.integers(0 if not isinstance(layer, nn.GroupNorm) else 1, most))
    places = [draw(st.integers(3, most)) for _ in range(positions)]
    value = torch.randn(batch, *places, width, generator=generator).to(found).movedim(-1, 1)
    # torch 2.13 ends the process in the backward of a GroupNorm on channels-last input that needs no gradient.
    is_strided = not isinstance(layer, nn.GroupNorm) and draw(st.booleans())
    return value if is_strided else value.contiguous()


@st.composite
def artifacts(
    draw: st.DrawFn, /, urza: Urza, blueprints: Sequence[str | Blueprint] | None = None, **options: Any
) -> Artifact:
    """A VALIDATED artifact of a shipped blueprint (or one of `blueprints`, by name or object) for drawn small dims, in
    `urza`; compiled with the pipeline `fast` where it is not there yet. `options`: as of `esper.compile`."""
    wanted = draw(st.sampled_from(list(blueprints) if blueprints is not None else sorted(shipped())))
    blueprint = Blueprint.load(shipped()[wanted]) if isinstance(wanted, str) else wanted
    dims = {}
    for name, dim in blueprint.dims.items():
        if dim.default is None:
            few = [n for n in (8, 16, 20) if dim.min <= n <= dim.max]
            dims[name] = draw(st.sampled_from(few or [dim.min]))
    if "heads" in blueprint.dims:
        dims["heads"] = 2
    return compile_blueprint(blueprint, dims=dims, urza=urza, **{"pipeline": "fast", **options})[0]
