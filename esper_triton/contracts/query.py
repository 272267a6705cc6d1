"""KernelQuery: what is asked of a store, and what it answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.blueprint import DTypeName
from esper_triton.contracts.manifest import ArtifactId, Digest, KernelStatus
from esper_triton.contracts.record import Figures, Role, Tag

__all__ = ["MOST_ANSWERED", "Change", "KernelMatch", "KernelQuery"]

MOST_ANSWERED = 10_000
"""Artifacts that a server answers to one question at most; a directory answers up to a million."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KernelQuery(_Value):
    """Which artifacts are wanted; every condition that is left out holds for all.

    `target` is a label such as `cpu` or `cuda90`. `dims` are some of the artifact's. An artifact has all of `required`
    and none of `excluded`. A bound on latency or memory leaves out what was not measured. `limit` is the most that are
    answered: those with the most of `preferred` first, then the fastest, then the newest, what was not measured last.
    """

    blueprint_id: Digest | None = None
    target: str | None = None
    dtype: DTypeName | None = None
    dims: dict[str, int] = Field(default_factory=dict)
    statuses: tuple[KernelStatus, ...] = (KernelStatus.VALIDATED,)
    required: tuple[Tag, ...] = ()
    preferred: Annotated[tuple[Tag, ...], Field(max_length=16)] = ()
    excluded: tuple[Tag, ...] = ()
    max_latency_us: Annotated[float, Field(ge=0)] | None = None
    max_memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 20


class KernelMatch(_Value):
    """An artifact as the index has it. Only `Urza.get` and `Urza.load` check anything: this is for choosing.

    `size_bytes` counts the manifest and every blob, shared ones too. `uses` counts loads, as far as they are known.
    """

    id: ArtifactId
    digest: Digest
    blueprint_id: Digest
    blueprint_name: str
    target: str
    pipeline: str
    dtype: DTypeName
    dims: dict[str, int]
    status: KernelStatus
    tags: tuple[Tag, ...]
    figures: Figures
    created_at: str
    compile_seconds: float
    size_bytes: int
    uses: int = 0
    lineages: tuple[str, ...] = ()


class Change(_Value):
    """One entry of an artifact's history; statuses are null where there was, or is, no artifact."""

    when: str
    what: str
    artifact_id: ArtifactId
    source: KernelStatus | None
    target: KernelStatus | None
    role: Role | None
    manifest: Digest | None
