"""Shared by the tests of layers and models: the bottleneck adapter in plain torch, and layers with a seed that
works."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_triton.kasmina import KasminaLayer
from esper_triton.kasmina.boundary import refresh
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.prepared import Prepared
from esper_triton.urza import Urza

Parameters = Mapping[str, Tensor]


def adapter(h: Tensor, parameters: Parameters) -> Tensor:
    """The adapter's k for h [rows, d], in whatever dtype it is given."""
    z = F.linear(h, parameters["down_weight"], parameters["down_bias"])
    return h + F.linear(F.gelu(z), parameters["up_weight"], parameters["up_bias"])


def law_2(h: Tensor, seeds: list[tuple[tuple[int, int], float, Parameters]]) -> Tensor:
    """out = h + sum_i a_i (k_i - h[c_i]) for seeds of (span, alpha, parameters)."""
    out = h
    for (start, stop), alpha, parameters in seeds:
        own = h[..., start:stop]
        step = alpha * (adapter(own, parameters) - own)
        out = out + F.pad(step, (start, h.shape[-1] - stop))
    return out


def own_parameters(layer: KasminaLayer, seed: int) -> dict[str, nn.Parameter]:
    """A seed's parameters by their names in the blueprint."""
    prefix = f"{seed}."
    return {name.removeprefix(prefix): p for name, p in layer.seed_parameters() if name.startswith(prefix)}


def grow(
    layer: KasminaLayer, seed: int, artifact_id: str, *, alpha: float, draw: int | None = 0, force: bool = False
) -> None:
    """Loads, grafts and sets alpha; parameters are drawn anew with `draw` as the seed of the draw, since a fresh
    adapter equals the host."""
    assert layer.load_kernel_sync(seed, artifact_id, force=force), layer.last_error(seed)
    if draw is not None:
        generator = torch.Generator().manual_seed(draw)
        for parameter in own_parameters(layer, seed).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    KasminaLayer.graft(layer, seed)
    KasminaLayer.set_alpha(layer, seed, alpha)


def linear_with_seeds(store: Urza, features_in: int, width: int, num_seeds: int, **options: object) -> KasminaLayer:
    """A KasminaLinear with the same weights for the same sizes."""
    linear = nn.Linear(features_in, width)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return KasminaLayer.adopt(linear, num_seeds=num_seeds, urza=store, name="fc", **options)  # type: ignore[arg-type]


def memory_folder() -> str | None:
    """A folder in memory, where there can be one: hundreds of stores on a disk take minutes."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def copy_artifact(source: Urza, destination: Urza, artifact_id: str, **changes: object) -> str:
    """Commits an artifact of one store into another, with fields of its manifest changed; returns its id there."""
    artifact, blobs = source.load(artifact_id)
    manifest = artifact.manifest.model_copy(update=changes)
    return destination.commit(manifest, blobs).id


def break_launches(monkeypatch: pytest.MonkeyPatch, layer: KasminaLayer, seed: int, *, forward: bool = True) -> None:
    """Makes every launch of a seed's kernel, forward or backward, raise, whichever way a call goes."""
    kernel = layer._kasmina.seeds[seed].kernel
    assert kernel is not None
    which = "_forward" if forward else "_backward"

    def broken(*arguments: object) -> None:
        raise RuntimeError("the launch failed")

    launches = [replace(launch, run=broken) for launch in getattr(kernel.program, which)]
    monkeypatch.setattr(kernel.program, which, launches)
    refresh(layer)  # what was prepared before holds the launches that work


def break_every_launch(
    monkeypatch: pytest.MonkeyPatch, instead: Callable[..., object], *, forward: bool = True
) -> None:
    """Puts `instead` in the place of every kernel's forward, or backward; no call goes the prepared way meanwhile."""
    monkeypatch.setattr(KernelProgram, "forward" if forward else "backward", instead)
    monkeypatch.setattr(Prepared, "fits", lambda *_: False)


def flip_one_byte(store: Urza, artifact_id: str) -> None:
    """Damages one byte in the middle of the artifact's first binary."""
    record = next(iter(store.get(artifact_id).manifest.kernels.values()))
    path = store.object_path(record.binary)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
