"""Proofs over the bus: what a worker does with an artifact that has been compiled."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.events import KernelCharacterized, KernelReady, ProofFailed
from esper_triton.contracts.manifest import ARTIFACT_ID, KernelStatus
from esper_triton.contracts.report import Level
from esper_triton.oona.jobs import GivenBack, Job, JobServer
from esper_triton.oona.subscription import Delivery
from esper_triton.tezzeret.pipelines import device_of
from esper_triton.urabrask.gauntlet import Policy
from esper_triton.urabrask.verdict import validate

if TYPE_CHECKING:
    from esper_triton.oona import Oona
    from esper_triton.urza import Artifact, Urza

__all__ = ["GROUP", "proof_server"]

GROUP = "urabrask"
"""The group of the workers."""

_MOST_REASONS = 20
_MOST_TEXT = 8000
_PENDING = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)


def proof_server(bus: Oona, urza: Urza, *, level: Level = "standard", policy: Policy = "strict") -> JobServer:
    """Serves `compilation.kernel.ready`: puts each artifact through the gauntlet, gives it its status, and answers with
    a KernelCharacterized, or a ProofFailed where there is no verdict. One at a time: two would measure each other.

    One that was there before it was asked for, and has a verdict, went through when it was built; it is answered with
    what the store says. `level` and `policy` as of `validate`.
    """
    return JobServer(
        bus, topics.KERNEL_READY, GROUP, functools.partial(_prove, urza=urza, level=level, policy=policy), _refused
    )


def _prove(job: Job, *, urza: Urza, level: Level, policy: Policy) -> list[KernelCharacterized]:
    ready = job.message
    assert isinstance(ready, KernelReady)
    artifact = urza.get(ready.artifact_id)
    if artifact.status is KernelStatus.ARCHIVED or (ready.hit and artifact.status not in _PENDING):
        return [_characterized(artifact, (), urza)]

    def tell(what: str, part: float) -> None:
        if job.given_back.is_set():
            raise GivenBack

    device = device_of(artifact.manifest.target) or torch.device("cpu")
    proven, report = validate(ready.artifact_id, urza, level, policy=policy, tell=tell, device=device)
    return [_characterized(proven, report.reasons, urza)]


def _characterized(artifact: Artifact, reasons: tuple[str, ...], urza: Urza) -> KernelCharacterized:
    return KernelCharacterized(
        artifact_id=artifact.id,
        manifest_digest=artifact.digest,
        status=artifact.status,
        reasons=tuple(reason[:_MOST_TEXT] for reason in reasons[:_MOST_REASONS]),
        tags=urza.record(artifact.id).tags,
    )


def _refused(delivery: Delivery, error: Exception) -> ProofFailed:
    told = delivery.envelope.payload.get("artifact_id")
    known = isinstance(told, str) and ARTIFACT_ID.match(told) is not None
    return ProofFailed(artifact_id=told if known else None, error=type(error).__name__, message=str(error)[:_MOST_TEXT])
