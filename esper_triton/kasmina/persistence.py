"""What of a layer's seeds outlives the process: written as plain values and tensors, checked whole before any of it is
used.

A layer's section holds

    width, chunking   of the layer, to be compared
    clock             epoch, step and counters of the layer
    output_mean       of the last step, for schedules that look at the drift
    seeds             for each seed its schema_version, seed, span, state, alpha, artifact_id, manifest_digest,
                      parameters (tensors by name), counters, health, what its stage has come to, and how it became
                      permanent

The state arrays on the device are not in it, since a commit writes all of them from the seeds; nor is machine code.
That is fetched from Urza again, verified again, and must be of the manifest with the recorded digest (law 4). A loss of
the user's own for a seed in TRAINING is code too: set it again.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from esper_triton.contracts.errors import ArtifactRefused, EsperError, nearest
from esper_triton.contracts.manifest import Digest
from esper_triton.kasmina import loading
from esper_triton.kasmina.boundary import refresh, state_storage, tell
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.gates import Evaluation
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.moves import Made, release
from esper_triton.kasmina.pending import load_request
from esper_triton.kasmina.schedules import Schedule, describe_schedule, schedule_from
from esper_triton.kasmina.seed import LoadedKernel, LoadTicket, Seed
from esper_triton.urza import Urza

__all__ = ["Missing", "PreparedLayer", "layer_section", "prepare_layer", "version_fault"]

SCHEMA_VERSION = "1.0"
Missing = Literal["error", "recover"]

_S = SeedLifecycleState
_LOADING = (_S.GERMINATED, _S.LOADING)
_RUNS_KERNEL = (_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED)
# Attributes of a seed, and of a layer's record, all integers, that go on counting.
_COUNTERS = (
    "error_count",
    "pending_faults",
    "specialisation_misses",
    "latency_ns",
    "timed_calls",
    "calls",
    "last_update_epoch",
    "opens_at",
)
_CLOCK = ("epoch", "step", "forward_calls_active", "calls_counted", "sampling")


def layer_section(layer: KasminaLayer) -> dict[str, Any]:
    """The layer's section. Tensors in it are the layer's own memory, as in `state_dict`. Requests that wait for a
    boundary are not in it. Raises TypeError for a schedule of the user's own, which has no description."""
    record = layer._kasmina
    with record.queue.lock:
        return {
            "width": record.kind.width,
            "chunking": record.chunking,
            "clock": {name: int(getattr(record, name)) for name in _CLOCK},
            "output_mean": record.output_mean,
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
        "health": seed.health,
        "stage": {
            "steps": seed.stage_steps,
            "schedule": None if seed.schedule is None else describe_schedule(seed.schedule),
            "progress": seed.progress,
            "reconstruction_error": seed.reconstruction_error,
            "evaluation": None if seed.evaluation is None else asdict(seed.evaluation),
            "is_ready": seed.is_ready,
        },
        "permanent": {
            "since_step": seed.permanent_since_step,
            "evaluation": None if seed.permanent_evaluation is None else asdict(seed.permanent_evaluation),
        },
    }


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


_T = TypeVar("_T", bound=_Section)


_Count = Annotated[int, Field(ge=0)]


class _EvaluationSection(_Section):
    on: tuple[float, ...] = Field(min_length=2)
    off: tuple[float, ...] = Field(min_length=2)
    lower_is_better: bool


class _StageSection(_Section):
    steps: _Count
    schedule: dict[str, Any] | None
    progress: _Count
    reconstruction_error: float | None
    evaluation: _EvaluationSection | None
    is_ready: bool


class _PermanentSection(_Section):
    since_step: _Count | None
    evaluation: _EvaluationSection | None


class _SeedSection(_Section):
    schema_version: str
    seed: int
    span: tuple[int, int]
    state: str
    alpha: float = Field(ge=0.0, le=1.0)
    artifact_id: str | None
    manifest_digest: Digest | None
    parameters: dict[str, Tensor]
    counters: dict[str, _Count]
    health: float
    stage: _StageSection
    permanent: _PermanentSection


class _LayerSection(_Section):
    width: int
    chunking: str
    clock: dict[str, _Count]
    output_mean: Tensor | None
    seeds: list[dict[str, Any]]


@dataclass(frozen=True)
class _PreparedSeed:
    seed: Seed
    section: _SeedSection
    state: SeedLifecycleState
    kernel: LoadedKernel | None
    schedule: Schedule | None
    error: BaseException | None
    ticket: LoadTicket  # pins the kernel until it is applied


@dataclass(frozen=True)
class PreparedLayer:
    """A layer's section that has been found to fit: everything is there that `apply` needs, and it cannot fail."""

    layer: KasminaLayer
    section: _LayerSection
    seeds: tuple[_PreparedSeed, ...]
    urza: Urza | None

    @property
    def parameters(self) -> dict[int, tuple[str, ...]]:
        """By seed, the names of its parameters, for the seeds that will have some."""
        return {p.seed.index: tuple(p.section.parameters) for p in self.seeds if p.section.parameters}

    def apply(self) -> None:
        """Makes the layer's seeds what the section says, and then tells the layer's observers. Requests and loads that
        wait are void. This thread is the layer's owner from now on."""
        layer, record = self.layer, self.layer._kasmina
        device = state_storage(layer).device
        record.owner = threading.get_ident()
        with record.queue.lock:
            record.queue.take()
            if record.urza is None:
                record.urza = self.urza
            for name in _CLOCK:
                setattr(record, name, self.section.clock.get(name, 0))
            record.sampling = bool(record.sampling)
            mean = self.section.output_mean
            record.output_mean = None if mean is None else mean.to(device, copy=True)
            record.output_mean_now = record.observed = None
            made = [m for prepared in self.seeds if (m := _apply_seed(prepared, device, record.epoch)) is not None]
            refresh(layer)
        tell(record, made)


def _apply_seed(prepared: _PreparedSeed, device: torch.device, epoch: int) -> Made | None:
    """The move that this is; None where the seed is in its state already, with the same parameters and artifact."""
    own, section, stage = prepared.seed, prepared.section, prepared.section.stage
    had, source, artifact_id = own.parameters, own.state, own.artifact_id
    release(own)
    own.enter(prepared.state, epoch)
    own.artifact_id, own.kernel, own.last_error = section.artifact_id, prepared.kernel, prepared.error
    own.parameters = _placed(had, section.parameters, device)
    for parameter in own.parameters.values():
        parameter.grad = None
        parameter.requires_grad_(not own.state.is_frozen)
    own.health = section.health
    for name in _COUNTERS:
        setattr(own, name, section.counters.get(name, 0))
    if own.kernel is not None:
        KernelCache.process().pin(own.kernel.key, own.kernel.program, own)
        own.load_latency_us = own.kernel.load_latency_us
        own.alpha, own.schedule, own.progress = section.alpha, prepared.schedule, stage.progress
    if prepared.error is None:  # else it has only just come into its state
        own.stage_steps, own.is_ready = stage.steps, stage.is_ready
        own.reconstruction_error = stage.reconstruction_error
        own.evaluation = _evaluation(stage.evaluation)
    own.permanent_since_step = section.permanent.since_step
    own.permanent_evaluation = _evaluation(section.permanent.evaluation)
    if own.state is source and own.parameters is had and own.artifact_id == artifact_id:
        return None
    return own.index, source, own.state, artifact_id or own.artifact_id


def _evaluation(section: _EvaluationSection | None) -> Evaluation | None:
    return None if section is None else Evaluation(**section.model_dump())


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
    for counter in parsed.clock:
        if counter not in _CLOCK:
            found.append(f"layer {name!r}: unknown counter {counter!r}{nearest(counter, _CLOCK)}")
    prepared = []
    if not found:
        store = urza if urza is not None else record.urza
        for own, saved_seed in zip(record.seeds, parsed.seeds, strict=True):
            one = _prepare_seed(f"seed {own.index} of layer {name!r}", layer, own, saved_seed, store, missing, found)
            prepared += [] if one is None else [one]
    faults += found
    return None if found else PreparedLayer(layer, parsed, tuple(prepared), urza)


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
    schedule = None
    if section.stage.schedule is not None:
        try:
            schedule = schedule_from(section.stage.schedule)
        except ValueError as error:
            faults.append(f"{who}: {error}")
            return None
    if state not in _RUNS_KERNEL:
        return _PreparedSeed(own, section, state, None, None, None, ticket)
    assert section.artifact_id is not None  # else it would have been inconsistent
    try:
        kernel = _fetched(who, layer, own, section.artifact_id, section.manifest_digest, urza, ticket)
    except Exception as error:  # whatever a load raises; it is told, or kept for `last_error`
        if missing == "recover":
            return _PreparedSeed(own, section, _S.ERROR_RECOVERY, None, None, error, ticket)
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
    return _PreparedSeed(own, section, state, kernel, schedule, None, ticket)


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
    kernel = loading.load(load_request(layer, own, artifact_id, holder=ticket), urza)
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
