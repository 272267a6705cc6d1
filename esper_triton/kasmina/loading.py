"""Fetching, checking and loading an artifact for one seed. Runs off the training thread and touches no layer."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch
from torch import nn

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.initial import Init
from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.cache import CacheKey, KernelCache
from esper_triton.kasmina.kinds import Kind
from esper_triton.kasmina.launcher import TORCH_DTYPE, X_DIM, KernelProgram, check_runs_here, x_width_of
from esper_triton.kasmina.seed import LoadedKernel
from esper_triton.urza import Urza

__all__ = ["LoadRequest", "check_dtype", "fetch", "load", "make_parameters"]


@dataclass(frozen=True)
class LoadRequest:
    """What is loaded for whom. `dtype` is None for a host without parameters: any fits until a call shows otherwise.
    `force` loads a kernel that has failed while it ran in this process, too."""

    artifact_id: str
    layer_name: str
    layer_key: int
    seed: int
    span: tuple[int, int]
    kind: Kind
    device: torch.device
    dtype: torch.dtype | None
    holder: object
    force: bool = False

    @property
    def who(self) -> str:
        """For messages."""
        return f"seed {self.seed} of layer {self.layer_name!r}"


def load(request: LoadRequest, urza: Urza) -> LoadedKernel:
    """Law 4 in order: bytes (by Urza, every one), ban, device, status and machine, fit to the span; then the cache.

    Raises an EsperError that says what was wrong and what would work.
    """
    began = time.perf_counter_ns()
    artifact, blobs = urza.load(request.artifact_id)
    manifest = artifact.manifest
    cache = KernelCache.process()
    if not request.force:
        cache.check_not_failed(manifest.id)
    cache.check_not_banned(manifest.id)
    _check_device(request, manifest)
    check_runs_here(manifest, request.device)
    _check_fit(request, manifest)
    key = CacheKey(artifact.digest, f"{manifest.dtype}x{manifest.width}", str(request.device))
    try:
        program = cache.load(key, lambda: KernelProgram.load(manifest, blobs, request.device), request.holder)
    except ArtifactRefused:
        raise
    except Exception:
        cache.record_failure(manifest.id, request.layer_key)
        raise
    latency_us = (time.perf_counter_ns() - began) / 1000
    return LoadedKernel(manifest=manifest, digest=artifact.digest, program=program, key=key, load_latency_us=latency_us)


def fetch(request: LoadRequest, urza: Urza) -> tuple[LoadedKernel, dict[str, nn.Parameter]]:
    """`load`, and the parameters that the seed starts with."""
    loaded = load(request, urza)
    with torch.inference_mode(False):  # or they could never be trained
        return loaded, make_parameters(request, loaded.manifest)


def _check_fit(request: LoadRequest, manifest: Manifest) -> None:
    start, stop = request.span
    if manifest.width != stop - start:
        raise ArtifactRefused(
            f"artifact {manifest.id} computes {manifest.width} features ({manifest.feature_dim}), {request.who} has "
            f"{stop - start} (columns {start} to {stop - 1}); compile blueprint {manifest.blueprint_name!r} with "
            f"{manifest.feature_dim}={stop - start}"
        )
    check_dtype(request.who, manifest, request.dtype)
    if manifest.layout == "image" and not request.kind.may_be_image:
        raise ArtifactRefused(
            f"artifact {manifest.id} works on images, [batch, features, height, width], and {request.who} gives none; "
            f"load it into a two-dimensional convolution or norm, or one of layout 'sequence' here"
        )
    if "x" in manifest.input:
        if request.kind.x_width is None:
            raise ArtifactRefused(f"artifact {manifest.id} reads the layer's input; that of {request.who} does not fit")
        if x_width_of(manifest) != request.kind.x_width:
            symbol = X_DIM if X_DIM in manifest.dims else manifest.feature_dim
            raise ArtifactRefused(
                f"artifact {manifest.id} reads inputs of width {x_width_of(manifest)} ({symbol}), {request.who} has "
                f"{request.kind.x_width}; compile blueprint {manifest.blueprint_name!r} with "
                f"{symbol}={request.kind.x_width}"
            )
    if not manifest.backward:
        raise ArtifactRefused(f"artifact {manifest.id} has no backward, so gradients would stop at {request.who}")


def _check_device(request: LoadRequest, manifest: Manifest) -> None:
    if request.device.type == ("cpu" if manifest.target.backend == "cpu" else "cuda"):
        return
    way_out = (
        "give the model memory first, as by model.to_empty(device='cpu')"
        if request.device.type == "meta"
        else f"move the layer, or compile blueprint {manifest.blueprint_name!r} for its device"
    )
    raise ArtifactRefused(
        f"artifact {manifest.id} is for {manifest.target.label}, {request.who} is on {request.device}; {way_out}"
    )


def check_dtype(who: str, manifest: Manifest, dtype: torch.dtype | None) -> None:
    """Raises ArtifactRefused where the layer computes in another dtype than the artifact."""
    if dtype is not None and TORCH_DTYPE[manifest.dtype] != dtype:
        name = str(dtype).removeprefix("torch.")
        way_out = (
            f"compile blueprint {manifest.blueprint_name!r} with dtype {name}"
            if dtype in TORCH_DTYPE.values()
            else f"kernels exist for {', '.join(TORCH_DTYPE)} only, so cast the layer to one of these"
        )
        raise ArtifactRefused(f"artifact {manifest.id} is for {manifest.dtype}, {who} is {name}; {way_out}")


def make_parameters(request: LoadRequest, manifest: Manifest) -> dict[str, nn.Parameter]:
    """The seed's parameters as the blueprint initialises them, the same for the same artifact, layer name and seed.

    Drawn in float32 from a generator of their own: the global random stream does not move (law 8). What each `init` is
    stands in `contracts.initial`. Raises ArtifactRefused for one that is unknown.
    """
    identity = f"{manifest.id}\0{request.layer_name}\0{request.seed}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") >> 1)
    parameters = {}
    for name in sorted(manifest.parameters):
        record = manifest.parameters[name]
        try:
            init = Init.parse(record.init)
        except ValueError as error:
            raise ArtifactRefused(f"artifact {manifest.id}: parameter {name!r} has {error}") from error
        value = torch.zeros(record.shape, dtype=torch.float32)
        match init.kind:
            case "zeros":
                pass
            case "ones":
                value.fill_(1.0)
            case "constant":
                value.fill_(init.number)
            case "normal":
                value.normal_(0.0, init.number, generator=generator)
            case _:
                bound = init.bound(record.shape)
                value.uniform_(-bound, bound, generator=generator)
        parameters[name] = nn.Parameter(value.to(device=request.device, dtype=TORCH_DTYPE[manifest.dtype]))
    return parameters
