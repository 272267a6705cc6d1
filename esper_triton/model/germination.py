"""A seed from a design in one call: what the layer asks for is found out, compiled in the background, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.graph import X_DIM
from esper_triton.kasmina.boundary import host_dtype
from esper_triton.kasmina.kinds import kind_of
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState

__all__ = ["Place", "free_seed", "place_of", "target_name"]

_S = SeedLifecycleState


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a layer asks of a kernel: the width of the span, that of the layer's input (None where rows of it do not fit
    those of the output), the dtype, and the target of its device. `who` is for messages."""

    who: str
    width: int
    x_width: int | None
    dtype: str
    target: str

    def dims(self, blueprint: Blueprint, given: Mapping[str, int]) -> dict[str, int]:
        """Numbers for a blueprint's dims: of the place, as given, and the blueprint's defaults.

        Raises BlueprintError for a dim that has none, one that is given and is another here, and a blueprint that reads
        an input which there is not.
        """
        dims = {blueprint.feature_dim: self.width}
        if "x" in blueprint.inputs:
            if self.x_width is None:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r} reads the layer's input, which {self.who} has not row by row; "
                    'take one with input = "h"'
                )
            if X_DIM not in blueprint.dims and self.x_width != self.width:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r} reads an input as wide as the output ({self.width}); that of "
                    f"{self.who} is {self.x_width} wide; give the blueprint a dim {X_DIM!r}"
                )
            if X_DIM in blueprint.dims:
                dims[X_DIM] = self.x_width
        for name, size in given.items():
            if dims.get(name, size) != size:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r}: {name}={size} was given, and {self.who} asks for {dims[name]}"
                )
        dims = {n: d.default for n, d in blueprint.dims.items() if d.default is not None} | dims | dict(given)
        missing = [name for name in blueprint.dims if name not in dims]
        if missing:
            limits = ", ".join(f"{name} ({blueprint.dims[name].min} to {blueprint.dims[name].max})" for name in missing)
            raise BlueprintError(f"blueprint {blueprint.name!r} for {self.who}: a number is needed for {limits}")
        return dims


def place_of(layer: nn.Module, seed: int | None = None) -> Place:
    """What a layer asks of a kernel: of a KasminaLayer for `seed`, by default its first free one; of another module for
    the whole width.

    Raises TypeError for a module that cannot hold seeds, ValueError for a dtype or a device that no kernel is for or a
    layer without a free seed.
    """
    if isinstance(layer, KasminaLayer):
        record = layer._kasmina
        who, kind = f"layer {record.name!r}", record.kind
        start, stop = layer.seed_span(free_seed(layer) if seed is None else seed)
        width = stop - start
    else:
        who, kind = type(layer).__name__, kind_of(layer)
        width = kind.width
    dtype = host_dtype(cast(KasminaLayer, layer)) or torch.float32
    names = {value: name for name, value in TORCH_DTYPE.items()}
    if dtype not in names:
        raise ValueError(f"{who} is {dtype}; kernels exist for {', '.join(TORCH_DTYPE)}")
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    return Place(who=who, width=width, x_width=kind.x_width, dtype=names[dtype], target=target_name(device))


def target_name(device: torch.device) -> str:
    """The compile target of a device: `cpu`, `cuda:90`, `hip:gfx942`. Raises ValueError for any other device."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"no kernel is for a device of type {device.type!r}; move the layer to cpu or cuda")
    if torch.version.hip is not None:
        return f"hip:{str(torch.cuda.get_device_properties(device).gcnArchName).partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def free_seed(layer: KasminaLayer, taken: Any = ()) -> int:
    """The first seed that an artifact can be loaded into now, dormant ones before those that are gone. `taken` are left
    out. Raises ValueError with the states where there is none."""
    record = layer._kasmina
    outlooks = {seed.index: record.queue.outlook(seed) for seed in record.seeds if seed.index not in taken}
    for wanted in (_S.DORMANT, _S.CANCELLED, _S.CULLED):
        for index, outlook in outlooks.items():
            if outlook.state is wanted and (wanted is not _S.CULLED or record.epoch >= outlook.opens_at):
                return index
    states = ", ".join(
        f"{seed.index} {'waits for a compile' if seed.index in taken else outlooks[seed.index].state.name}"
        for seed in record.seeds
    )
    raise ValueError(f"layer {record.name!r} has no free seed: {states}")
