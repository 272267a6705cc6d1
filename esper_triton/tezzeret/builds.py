"""From requests to stored artifacts with a verdict: what is there is found, what is not is built once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    ProofFailed,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.tezzeret.forge import Forged
from esper_triton.tezzeret.pipelines import Announce, BuildRecord, device_of, make, plan_of
from esper_triton.tezzeret.request import Request, requests_for
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask.zygotes import warm_up
from esper_triton.urza import Artifact, Urza

__all__ = ["Built", "build_all", "is_stored", "requests_of", "stored"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What came of one request. `seconds` are from the request to the verdict, waiting for others left out."""

    artifact: Artifact
    hit: bool
    seconds: float
    code_bytes: int


@dataclass
class _Job:
    """A request on its way."""

    request: Request
    record: BuildRecord | None = None
    artifact: Artifact | None = None
    code_bytes: int = 0
    seconds: float = 0.0
    hit: bool = True

    def look(self, store: Urza) -> bool:
        """Whether the store has, intact, what the request was built as."""
        self.record = BuildRecord.read(store.recall(self.request.digest), self.request)
        if self.record is None:
            return False
        try:
            artifact, blobs = store.load(self.record.artifact_id)
        except (ArtifactNotFound, CorruptObject, UntrustedArtifact):
            return False
        if not self.request.is_of(artifact.manifest):  # the record is not signed
            self.record = None
            return False
        self.artifact, self.code_bytes = artifact, _code_bytes(artifact, blobs)
        return True

    @property
    def is_done(self) -> bool:
        """Whether there is an artifact, with a verdict if this machine can give one."""
        if self.artifact is None:
            return False
        pending = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)
        return self.artifact.status not in pending or device_of(self.request.target) is None


def build_all(requests: Sequence[Request], store: Urza, announce: Announce) -> list[Built]:
    """Builds, stores and proves requests, in their order; either everything that is missing compiles or nothing is
    stored.

    One build of a request at a time in all processes: others wait for it and take what it has stored.

    Raises BlueprintError (nothing was compiled), CompileError (nothing was stored), ProofFailed (it was stored as
    REJECTED), StoreUnavailable, and ArtifactRefused where its GPU is here and cannot take it.
    """
    jobs = [_Job(request) for request in requests]
    for job in jobs:
        started = time.perf_counter()
        job.look(store)
        job.seconds = time.perf_counter() - started
    waiting = [job for job in jobs if not job.is_done]
    if waiting:
        if any(job.artifact is None for job in waiting):
            plan_of(waiting[0].request)  # a request that is wrong leaves no trace in the store
        _build(waiting, store, announce)
    built = []
    for job in jobs:
        assert job.artifact is not None
        if job.artifact.status is KernelStatus.REJECTED:
            raise ProofFailed(
                f"artifact {job.artifact.id} does not compute what {job.request.blueprint.name!r} says and was stored "
                f"as REJECTED: {_first_failure(store, job.artifact)}"
            )
        built.append(Built(artifact=job.artifact, hit=job.hit, seconds=job.seconds, code_bytes=job.code_bytes))
    return built


def is_stored(request: Request, store: Urza) -> bool:
    """Whether the request would be a hit."""
    return _Job(request).look(store)


def requests_of(job: Mapping[str, Any]) -> list[Request]:
    """The requests of a job as the pool gives it to a worker."""
    return requests_for(
        Blueprint.model_validate(job["blueprint"]),
        job["dims"],
        job["dtype"],
        tuple(parse_target(name) for name in job["targets"]),
        job["pipeline"],
        job["budget_s"],
    )


def stored(job: Mapping[str, Any], store: Urza) -> list[Built] | None:
    """What `build_all` gives for a job of which everything is there, proven; None where it would build or prove."""
    requests = requests_of(job)
    jobs = [_Job(request) for request in requests]
    if not all(one.look(store) and one.is_done for one in jobs):
        return None
    return build_all(requests, store, lambda *_: None)


def _build(jobs: Sequence[_Job], store: Urza, announce: Announce) -> None:
    if any(device_of(job.request.target) is not None for job in jobs):
        warm_up()  # while kernels are compiled
    with contextlib.ExitStack() as turns:
        # In one order everywhere: two processes that wait for each other would wait forever.
        for job in sorted(jobs, key=lambda job: job.request.turn):
            turns.enter_context(store.building(job.request.turn))
        share = 1 / len(jobs)

        def make_one(job: _Job) -> tuple[_Job, Forged, BuildRecord] | None:
            label, started, done = job.request.target.label, time.perf_counter(), jobs.index(job) * share

            def told(stage: str, part: float) -> None:
                announce(f"{stage} for {label}", done + part * share)

            told("compiling", 0.0)
            try:
                if job.look(store):  # somebody else has been faster
                    return None
                job.hit = False
                return (job, *make(job.request, job.record, told))
            finally:
                job.seconds += time.perf_counter() - started

        # One after the other, since CPython 3.11 fails where two threads parse (gh-106905).
        made = [one for one in map(make_one, jobs) if one is not None]
        for job, forged, record in made:
            job.artifact = store.commit(forged.manifest, forged.blobs)
            job.code_bytes = _code_bytes(job.artifact, forged.blobs)
            store.remember(record.request, record.model_dump_json(indent=1).encode())
        for index, job in enumerate(jobs):
            assert job.artifact is not None
            started = time.perf_counter()
            announce(f"proving {job.artifact.id}", 0.8 + 0.2 * index * share)
            _prove(job, store)
            job.seconds += time.perf_counter() - started


def _prove(job: _Job, store: Urza) -> None:
    assert job.artifact is not None
    if job.is_done:
        return
    from esper_triton.urabrask import validate

    device = device_of(job.request.target)
    assert device is not None
    job.artifact, _ = validate(job.artifact.id, store, "fast", blueprint=job.request.blueprint, device=device)


def _code_bytes(artifact: Artifact, blobs: dict[str, bytes]) -> int:
    return sum(len(blobs[digest]) for digest in {kernel.binary for kernel in artifact.manifest.kernels.values()})


def _first_failure(store: Urza, artifact: Artifact) -> str:
    from esper_triton.urabrask.verdict import read_report

    try:
        report = read_report(artifact.id, store)
    except ArtifactRefused as error:
        return str(error)
    return "; ".join(report.reasons)
