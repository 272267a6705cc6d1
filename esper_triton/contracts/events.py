"""What the rooms announce on the bus, beside commands and health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from esper_triton.contracts.blueprint import TEXT_LIMIT_BYTES
from esper_triton.contracts.envelope import Message
from esper_triton.contracts.manifest import ArtifactId, Digest, KernelStatus, TargetSpec

__all__ = [
    "CompileFailed",
    "CompileRequest",
    "EpochEvent",
    "FieldReport",
    "KernelCharacterized",
    "KernelReady",
    "ProofFailed",
    "StoreEvent",
    "TransitionEvent",
]


class TransitionEvent(Message):
    """`audit.lifecycle`: a seed has moved. `step` and `epoch` are its layer's. `error` is the class of what the seed
    has met, where that is why; its message stays in the process. With one state as source and target the seed has
    stayed in it, and goes on with another kernel of its design: `artifact_id`, for tensors that it had none for."""

    model: str
    layer: str
    seed: Annotated[int, Field(ge=0)]
    source: str
    target: str
    artifact_id: str | None = None
    error: Annotated[str, Field(max_length=100)] | None = None
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
    """`compilation.blueprint.submitted`: somebody needs artifacts. Either of a `blueprint` (its canonical text, of a
    hand-written one with the text of its source), or of the one that an artifact keeps, for another dtype or target.

    `targets` are machines, since `cpu` is another one for whoever asks than for whoever compiles. Without `dims` they
    are those of the artifact, or the blueprint's defaults.
    """

    reason: Literal["submitted", "specialisation_miss"] = "submitted"
    blueprint: Annotated[str, Field(max_length=TEXT_LIMIT_BYTES)] | None = None
    source_text: Annotated[str, Field(max_length=TEXT_LIMIT_BYTES)] = ""
    like_artifact_id: ArtifactId | None = None
    dims: dict[str, int] | None = None
    dtype: str
    targets: Annotated[tuple[TargetSpec, ...], Field(min_length=1, max_length=32)]
    pipeline: str = "standard"
    budget_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    model: str | None = None
    layer: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_design(self) -> CompileRequest:
        if (self.blueprint is None) == (self.like_artifact_id is None):
            raise ValueError("exactly one of blueprint and like_artifact_id is needed")
        return self


class KernelReady(Message):
    """`compilation.kernel.ready`: an artifact has been committed. It is `part` (from 0) of the `parts` that one request
    has led to, in the order of its targets; they come together or not at all."""

    artifact_id: ArtifactId
    manifest_digest: Digest
    status: KernelStatus
    compile_seconds: float | None = None
    hit: bool = False
    part: Annotated[int, Field(ge=0)] = 0
    parts: Annotated[int, Field(ge=1)] = 1


class CompileFailed(Message):
    """`compilation.blueprint.failed`: why a request led to no artifact that may run. `error` is the class of
    `contracts.errors`, or of Python."""

    error: str
    message: str


class KernelCharacterized(Message):
    """`validation.kernel.characterized`: an artifact has been proven or rejected."""

    artifact_id: ArtifactId
    manifest_digest: Digest
    status: KernelStatus
    reasons: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class ProofFailed(Message):
    """`validation.kernel.failed`: why an artifact that was to be proven has no verdict. `error` is the class of
    `contracts.errors`, or of Python."""

    artifact_id: ArtifactId | None = None
    error: str
    message: str


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
    """`innovation.field_reports`: what a seed has done for a model, or that its kernel failed there. `blueprint` is the
    start of the blueprint's id, as in the artifact's; metrics are the validation metric without and with the seed, null
    where it was not measured. Of what is FAULTED, `fault` says how: a launch that raised, values that were not finite
    where the host's were, or a drift from what they should be; `message` says it in words."""

    model: str
    blueprint: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    artifact_id: ArtifactId
    layer: str
    seed: Annotated[int, Field(ge=0)]
    outcome: Literal["FOSSILIZED", "CULLED", "ROLLED_BACK", "FAULTED"]
    fault: Literal["launch", "non_finite", "drift"] | None = None
    message: Annotated[str, Field(max_length=2000)] = ""
    metric_before: float | None = None
    metric_after: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
