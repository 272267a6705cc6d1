"""Lineage: which seeds became part of a model, from what and when. JSON beside the saved weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.manifest import ArtifactId, Digest

__all__ = ["Lineage", "LineageEntry"]

SCHEMA_VERSION = "1.0"


class _Value(BaseModel):
    # Strings for inf and NaN: they are measurements too, and JSON has no numbers for them.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class LineageEntry(_Value):
    """One fossilised seed. `metric_before` and `metric_after` are the means of the validation metric without and with
    it, null where it was not measured; `step` is the step of its layer, counted in boundaries, at which it was
    fossilised."""

    layer: str
    seed: Annotated[int, Field(ge=0)]
    artifact_id: ArtifactId
    manifest_digest: Digest
    parameters: tuple[str, ...]
    alpha: float
    metric_before: float | None = None
    metric_after: float | None = None
    step: int | None = None


class Lineage(_Value):
    """`lineage.json`. `weights` is the file beside it with the weights and the seeds' section, `weights_sha256` is what
    its bytes hash to."""

    schema_version: str = SCHEMA_VERSION
    esper_triton: str
    saved_at: str
    weights: Annotated[str, Field(pattern=r"^weights-[0-9a-f]{16}\.pt$")]
    weights_sha256: Digest
    seeds: tuple[LineageEntry, ...] = ()
