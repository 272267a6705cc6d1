"""What the rooms announce on the bus, beside commands and health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esper_triton.contracts.envelope import Message
from esper_triton.contracts.manifest import ArtifactId, Digest, KernelStatus

__all__ = [
    "CompileRequest",
    "EpochEvent",
    "FieldReport",
    "KernelCharacterized",
    "KernelReady",
    "StoreEvent",
    "TransitionEvent",
]


class TransitionEvent(Message):
    """`audit.lifecycle`: a seed has moved. `step` and `epoch` are its layer's."""

    model: str
    layer: str
    seed: Annotated[int, Field(ge=0)]
    source: str
    target: str
    artifact_id: str | None = None
    step: int
    epoch: int


class EpochEvent(Message):
    """`system.events.epoch`: an epoch has begun. `seeds_by_state` has every state that a seed is in; `damaged` the
    state arrays, by layer, that were not what the last commit wrote; `cache` the counters of the process's kernels."""

    model: str
    epoch: Annotated[int, Field(ge=0)]
    seeds_by_state: dict[str, int]
    damaged: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    cache: dict[str, int] = Field(default_factory=dict)


class CompileRequest(Message):
    """`compilation.blueprint.submitted`: somebody needs an artifact. Either of a stored blueprint by its digest, or of
    the same blueprint as an artifact that there is, for another dtype or device."""

    reason: Literal["submitted", "specialisation_miss"]
    blueprint: Digest | None = None
    like_artifact_id: ArtifactId | None = None
    dims: dict[str, int] | None = None
    dtype: str
    device: str
    pipeline: str = "standard"
    model: str | None = None
    layer: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class KernelReady(Message):
    """`compilation.kernel.ready`: an artifact has been committed."""

    artifact_id: ArtifactId
    manifest_digest: Digest
    status: KernelStatus
    compile_seconds: float | None = None


class KernelCharacterized(Message):
    """`validation.kernel.characterized`: an artifact has been proven or rejected."""

    artifact_id: ArtifactId
    manifest_digest: Digest
    status: KernelStatus
    reasons: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class StoreEvent(Message):
    """`audit.store`: something has happened to a store that a model loads from, as `esper_triton.urza.Event` has it:
    a file was set aside since it was damaged (`quarantined`), say, or the store does without something (`degraded`).
    `store` is the directory or URL that it was opened with."""

    model: str
    store: str
    kind: str
    artifact_id: str | None = None
    message: str
    details: dict[str, str] = Field(default_factory=dict)


class FieldReport(Message):
    """`innovation.field_reports`: what a seed has done for a model. `blueprint` is the start of the blueprint's id, as
    in the artifact's; metrics are the validation metric without and with the seed, null where it was not measured."""

    model: str
    blueprint: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    artifact_id: ArtifactId
    layer: str
    seed: Annotated[int, Field(ge=0)]
    outcome: Literal["FOSSILIZED", "CULLED", "ROLLED_BACK"]
    metric_before: float | None = None
    metric_after: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
