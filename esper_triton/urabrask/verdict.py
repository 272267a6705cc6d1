"""An artifact of a store put to the proof, and what came of it written there."""

from __future__ import annotations

import math

import torch

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.contracts.report import Level, ValidationReport
from esper_triton.urabrask.gauntlet import Policy, Progress, examine
from esper_triton.urabrask.sandbox import Limits
from esper_triton.urabrask.tags import figures_of, in_class, retag, tags_of
from esper_triton.urza import Artifact, Urza
from esper_triton.urza.designs import blueprint_of

__all__ = ["read_report", "validate"]

_CPU = torch.device("cpu")


def validate(
    artifact_id: str,
    store: Urza,
    level: Level = "fast",
    *,
    seed: int | None = None,
    seconds: float | None = None,
    blueprint: Blueprint | None = None,
    device: torch.device = _CPU,
    policy: Policy = "strict",
    limits: Limits | None = None,
    tell: Progress = lambda *_: None,
) -> tuple[Artifact, ValidationReport]:
    """Proves an artifact and gives it its status, with the report beside it, tags and figures.

    An artifact that has been proven before may lose its status and not win it back: VALIDATED becomes REJECTED where it
    fails now, and REJECTED stays. What is new of one that stays VALIDATED is its tags and figures. One for a GPU that
    is not here stays PENDING_HARDWARE unless `policy` says otherwise (see `gauntlet.Policy`); a report of it is
    returned and not kept.

    Args: as of `examine`, and
        blueprint: what it was made from; by default what the artifact keeps.

    Raises as `Urza.load` and `Urza.set_status` do, ArtifactRefused for one that is ARCHIVED or of another blueprint,
    and ProofUnavailable where no sandbox can be started: the status is then as it was.
    """
    artifact, blobs = store.load(artifact_id)
    manifest = artifact.manifest
    if manifest.status is KernelStatus.ARCHIVED:
        raise ArtifactRefused(f"artifact {artifact_id} is ARCHIVED, which is final; compile its blueprint again")
    report = examine(
        manifest,
        blobs,
        blueprint or blueprint_of(manifest, blobs),
        level=level,
        seed=seed,
        seconds=seconds,
        device=device,
        policy=policy,
        limits=limits,
        tell=tell,
    )
    tell("storing the verdict", 0.98)
    figures = figures_of(report.benchmarks, report.drift)
    if report.verdict == "VALIDATED" and report.benchmarks:
        others = [one.figures for one in in_class(store, manifest)]
        tags = tags_of(figures, others, report.benchmarks, _io_bytes(manifest, report))
        report = report.model_copy(update={"tags": tags})
    if report.verdict == "PENDING_HARDWARE" or manifest.status is KernelStatus.REJECTED:
        return artifact, report
    proven = store.set_status(
        artifact_id,
        KernelStatus(report.verdict),
        report.model_dump_json(indent=1).encode(),
        tags=report.tags,
        figures=figures,
    )
    if report.verdict == "VALIDATED":
        retag(store, proven.manifest)
    return proven, report


def read_report(artifact_id: str, store: Urza) -> ValidationReport:
    """The report that an artifact was stored with. Raises as `Urza.load` does, ArtifactRefused where it has none, or
    one of an older release."""
    artifact, blobs = store.load(artifact_id)
    if artifact.manifest.report is None:
        raise ArtifactRefused(
            f"artifact {artifact_id} is {artifact.status} and has no report; "
            f"python -m esper_triton.urabrask validate {artifact_id} makes one"
        )
    try:
        return ValidationReport.model_validate_json(blobs[artifact.manifest.report])
    except ValueError as error:
        raise ArtifactRefused(
            f"artifact {artifact_id} has a report that this release cannot read ({str(error).splitlines()[0]})"
        ) from error


def _io_bytes(manifest: Manifest, report: ValidationReport) -> int:
    """Bytes that go in and out of the largest call: activations, parameters, and the gradients of both."""
    rows = max(one.rows for one in report.benchmarks)
    reads = 2 if manifest.input == "xh" else 1
    elements = 2 * rows * manifest.width * (reads + 1)
    elements += 2 * sum(math.prod(record.shape) for record in manifest.parameters.values())
    return elements * (4 if manifest.dtype == "float32" else 2)
