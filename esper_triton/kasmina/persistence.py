"""What of a layer's seeds outlives the process: written as plain values and tensors, checked whole before any of it is
used.

A layer's section holds

    width, chunking   of the layer, to be compared
    state             the arrays of KasminaStateLayout by name
    seeds             for each seed its schema_version, seed, span, state, alpha, artifact_id, manifest_digest,
                      parameters (tensors by name), and counters

Machine code is not in it. It is fetched from Urza again, verified again, and must be of the manifest with the recorded
digest (law 4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from esper_triton.contracts.errors import ArtifactRefused, EsperError, nearest
from esper_triton.contracts.manifest import Digest
from esper_triton.kasmina import loading
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.seed import LoadedKernel, LoadTicket, Seed
from esper_triton.urza import Urza

__all__ = ["Missing", "PreparedLayer", "layer_section", "prepare_layer", "version_fault"]

SCHEMA_VERSION = "1.0"
Missing = Literal["error", "recover"]

_S = SeedLifecycleState
_LOADING = (_S.GERMINATED, _S.LOADING)
_RUNS_KERNEL = (_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED)
# Attributes of a seed, all integers, that go on counting.
_COUNTERS = ("error_count", "pending_faults", "specialisation_misses", "latency_ns", "timed_calls")


def layer_section(layer: KasminaLayer) -> dict[str, Any]:
    """The layer's section. Parameters in it are the layer's own memory, as in `state_dict`; the state is a copy."""
    record = layer._kasmina
    return {
        "width": record.kind.width,
        "chunking": record.chunking,
        "state": {name: array.detach().clone() for name, array in layer.state.arrays().items()},
        "seeds": [_seed_section(seed) for seed in record.seeds],
    }


def _seed_section(seed: Seed) -> dict[str, Any]:
    state, artifact_id = seed.state, seed.artifact_id
    if state in _LOADING:
        # The load under way will not end in another process. What a retry had learned before must not be lost.
        state = _S.ERROR_RECOVERY if seed.parameters else _S.DORMANT
        artifact_id = artifact_id if seed.parameters else None
    return {
        "schema_version": SCHEMA_VERSION,
        "seed": seed.index,
        "span": seed.span,
        "state": state.name,
        "alpha": seed.alpha,
        "artifact_id": artifact_id,
        "manifest_digest": None if seed.kernel is None else seed.kernel.digest,
        "parameters": {name: parameter.detach() for name, parameter in seed.parameters.items()},
        "counters": {name: getattr(seed, name) for name in _COUNTERS},
    }


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


_T = TypeVar("_T", bound=_Section)


class _SeedSection(_Section):
    schema_version: str
    seed: int
    span: tuple[int, int]
    state: str
    alpha: float = Field(ge=0.0, le=1.0)
    artifact_id: str | None
    manifest_digest: Digest | None
    parameters: dict[str, Tensor]
    counters: dict[str, Annotated[int, Field(ge=0)]]


class _LayerSection(_Section):
    width: int
    chunking: str
    state: dict[str, Tensor]
    seeds: list[dict[str, Any]]


@dataclass(frozen=True)
class _PreparedSeed:
    seed: Seed
    section: _SeedSection
    state: SeedLifecycleState
    kernel: LoadedKernel | None
    error: BaseException | None
    ticket: LoadTicket  # pins the kernel until it is applied


@dataclass(frozen=True)
class PreparedLayer:
    """A layer's section that has been found to fit: everything is there that `apply` needs, and it cannot fail."""

    layer: KasminaLayer
    seeds: tuple[_PreparedSeed, ...]
    state: dict[str, Tensor]
    urza: Urza | None

    @property
    def parameters(self) -> dict[int, tuple[str, ...]]:
        """By seed, the names of its parameters, for the seeds that will have some."""
        return {p.seed.index: tuple(p.section.parameters) for p in self.seeds if p.section.parameters}

    def apply(self) -> None:
        """Makes the layer's seeds what the section says, and then tells the layer's observers."""
        layer = self.layer
        before = [(seed.state, seed.artifact_id) for seed in layer._kasmina.seeds]
        if layer._kasmina.urza is None:
            layer._kasmina.urza = self.urza
        for prepared in self.seeds:
            _apply_seed(prepared, layer._state_storage().device)
        for name, array in layer.state.arrays().items():
            if name in self.state:
                array.copy_(self.state[name])
        layer._rebuild()
        for prepared, (source, artifact_id) in zip(self.seeds, before, strict=True):
            layer._tell(prepared.seed, source, artifact_id or prepared.seed.artifact_id)


def _apply_seed(prepared: _PreparedSeed, device: torch.device) -> None:
    own, section = prepared.seed, prepared.section
    had = own.parameters
    KasminaLayer._release(own)
    own.state, own.alpha = prepared.state, 0.0 if prepared.kernel is None else section.alpha
    own.artifact_id, own.kernel, own.last_error = section.artifact_id, prepared.kernel, prepared.error
    own.parameters = _placed(had, section.parameters, device)
    for parameter in own.parameters.values():
        parameter.grad = None
        parameter.requires_grad_(not own.state.is_frozen)
    for name in _COUNTERS:
        setattr(own, name, section.counters.get(name, 0))
    if own.kernel is not None:
        KernelCache.process().pin(own.kernel.key, own.kernel.program, own)


def _placed(had: dict[str, nn.Parameter], saved: dict[str, Tensor], device: torch.device) -> dict[str, nn.Parameter]:
    """The saved values in the parameters that are there, where these are of the same form, so that an optimizer that
    has them goes on with them; in new ones otherwise. `saved` may be the very memory of `had`."""

    def form(tensors: dict[str, nn.Parameter] | dict[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(name, t.shape, t.dtype) for name, t in tensors.items()]

    if form(had) == form(saved) and all(p.device == device for p in had.values()):
        with torch.no_grad():
            for name, parameter in had.items():
                parameter.copy_(saved[name])
        return had
    return {name: nn.Parameter(value.detach().to(device, copy=True).contiguous()) for name, value in saved.items()}


def prepare_layer(
    name: str, layer: KasminaLayer, section: Any, urza: Urza | None, missing: Missing, faults: list[str]
) -> PreparedLayer | None:
    """Checks a layer's section against the layer, and fetches and verifies the kernels of its seeds. Changes nothing.

    With `missing="recover"` a seed whose artifact cannot be had will be in ERROR_RECOVERY. Every other fault is added
    to `faults`, and then there is no result.
    """
    found: list[str] = []
    parsed = _parsed(_LayerSection, section, f"layer {name!r}", found)
    if parsed is None:
        faults += found
        return None
    record = layer._kasmina
    for what, saved, here in (
        ("features", parsed.width, record.kind.width),
        ("seeds", len(parsed.seeds), len(record.seeds)),
        ("chunking", parsed.chunking, record.chunking),
    ):
        if saved != here:
            found.append(f"layer {name!r}: the checkpoint has {what} {saved}, the model has {here}")
    known = layer.state.arrays()
    for array, value in parsed.state.items():
        if array not in known:
            found.append(f"layer {name!r}: unknown state array {array!r}{nearest(array, known)}")
        elif not found and (value.shape, value.dtype) != (known[array].shape, known[array].dtype):
            found.append(f"layer {name!r}: state array {array!r} is {_form(value)}, expected {_form(known[array])}")
    prepared = []
    if not found:
        store = urza if urza is not None else record.urza
        for own, saved_seed in zip(record.seeds, parsed.seeds, strict=True):
            one = _prepare_seed(f"seed {own.index} of layer {name!r}", layer, own, saved_seed, store, missing, found)
            prepared += [] if one is None else [one]
    faults += found
    return None if found else PreparedLayer(layer, tuple(prepared), parsed.state, urza)


def _prepare_seed(
    who: str, layer: KasminaLayer, own: Seed, body: Any, urza: Urza | None, missing: Missing, faults: list[str]
) -> _PreparedSeed | None:
    version = version_fault(body.get("schema_version"), SCHEMA_VERSION)  # first: a newer one may have other fields
    if version:
        faults.append(f"{who}: {version}")
        return None
    section = _parsed(_SeedSection, body, who, faults)
    if section is None:
        return None
    found = list(_inconsistencies(own, section))
    if found:
        faults += [f"{who}: {fault}" for fault in found]
        return None
    state, ticket = SeedLifecycleState[section.state], LoadTicket()
    if state not in _RUNS_KERNEL:
        return _PreparedSeed(own, section, state, None, None, ticket)
    assert section.artifact_id is not None  # else it would have been inconsistent
    try:
        kernel = _fetched(who, layer, own, section.artifact_id, section.manifest_digest, urza, ticket)
    except Exception as error:  # whatever a load raises; it is told, or kept for `last_error`
        if missing == "recover":
            return _PreparedSeed(own, section, _S.ERROR_RECOVERY, None, error, ticket)
        kind = "" if isinstance(error, EsperError) else f"{type(error).__name__}: "
        faults.append(f"{who}: artifact {section.artifact_id!r} cannot be restored: {kind}{error}")
        return None
    expected = kernel.manifest.parameters
    dtype = TORCH_DTYPE[kernel.manifest.dtype]
    for name in sorted({*expected, *section.parameters}):
        value = section.parameters.get(name)
        wanted = f"{tuple(expected[name].shape)} of {dtype}" if name in expected else "none"
        if value is None or name not in expected or (tuple(value.shape), value.dtype) != (expected[name].shape, dtype):
            shown = "none" if value is None else _form(value)
            faults.append(f"{who}: parameter {name!r} is {shown}, its artifact expects {wanted}")
            return None
    return _PreparedSeed(own, section, state, kernel, None, ticket)


def _inconsistencies(own: Seed, section: _SeedSection) -> Sequence[str]:
    """What of a seed's section contradicts the seed or itself."""
    faults = []
    if section.seed != own.index:
        faults.append(f"the section is of seed {section.seed}")
    if section.span != own.span:
        faults.append(f"the checkpoint has columns {section.span}, the model has {own.span}")
    for name in section.counters:
        if name not in _COUNTERS:
            faults.append(f"unknown counter {name!r}{nearest(name, _COUNTERS)}")
    if section.state not in _S.__members__ or SeedLifecycleState[section.state] in _LOADING:
        return [*faults, f"state {section.state!r} cannot be restored{nearest(section.state, _S.__members__)}"]
    state = SeedLifecycleState[section.state]
    if state in _RUNS_KERNEL and (section.artifact_id is None or section.manifest_digest is None):
        faults.append(f"it is {state.name} and has no artifact_id or no manifest_digest")
    if state not in (*_RUNS_KERNEL, _S.ERROR_RECOVERY) and (section.artifact_id is not None or section.parameters):
        faults.append(f"it is {state.name} and has an artifact or parameters")
    return faults


def _fetched(
    who: str,
    layer: KasminaLayer,
    own: Seed,
    artifact_id: str,
    digest: str | None,
    urza: Urza | None,
    ticket: LoadTicket,
) -> LoadedKernel:
    if urza is None:
        raise ValueError("there is no Urza to fetch it from; give one to wrap or to the call that restores")
    kernel = loading.load(layer._load_request(own, artifact_id, holder=ticket), urza)
    if kernel.digest != digest:
        raise ArtifactRefused(
            f"its manifest has digest {kernel.digest} in {urza}, and {who} was saved with {digest}: it was built or "
            "judged anew since; restore the store that it was saved with"
        )
    return kernel


def version_fault(found: Any, known: str) -> str | None:
    """Why a section of schema version `found` cannot be read by a release that writes `known`, or None."""
    if not isinstance(found, str) or not re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}", found):
        return f"schema_version is {found!r}, expected such as {known!r}"

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    if numbers(found) > numbers(known):
        return f"schema_version {found} is newer than {known}; upgrade esper_triton to read it"
    return None


def _parsed(model: type[_T], body: Any, where: str, faults: list[str]) -> _T | None:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            field = ".".join(str(part) for part in item["loc"])
            faults.append(f"{where}: {field or 'the section'}: {item['msg']}")
        return None


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
