"""`python -m esper_triton.urabrask worker`: what is compiled is proven, as the bus tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bus_servers import HubServer
from mutants import MUTANTS, forged

import esper_triton as esper
from esper_triton.contracts.envelope import CHARACTERIZED, FIELD_REPORTS, KERNEL_READY, PROOF_FAILED
from esper_triton.contracts.events import FieldReport, KernelCharacterized, KernelReady, ProofFailed
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.oona import Oona
from esper_triton.tezzeret.forge import forge
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urza import Artifact, Urza


@pytest.fixture
def worker(hub: HubServer, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A prover of the store in `tmp_path` that is ready."""
    command = [sys.executable, "-m", "esper_triton.urabrask", "worker", "--bus", hub.address, "--level", "fast"]
    command += ["--watch-training"]
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--store", str(tmp_path / "urza")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"ESPER_OONA": str(tmp_path / "journal")},
        )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("serving compilation.kernel.ready of "), (
            tmp_path / "worker.log"
        ).read_text()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()


def ready(artifact: Artifact, *, hit: bool = False) -> KernelReady:
    return KernelReady(artifact_id=artifact.id, manifest_digest=artifact.digest, status=artifact.status, hit=hit)


def test_what_is_compiled_gets_its_verdict(
    worker: subprocess.Popen[str], hub: HubServer, tmp_path: Path, bus_to: Callable[..., Oona]
) -> None:
    store = Urza(tmp_path / "urza")
    blueprint = esper.Blueprint.load(shipped()["channel_scale"])

    def pending(target: str) -> Artifact:
        made = forge(plan_build(blueprint, {"d": 24}, "float32", parse_target(target), "fast"))
        return store.commit(made.manifest, made.blobs)

    sound, elsewhere = pending("cpu"), pending("cuda:90")
    made = forged(next(mutant for mutant in MUTANTS if mutant.name == "the factor is applied twice"))
    broken = store.commit(made.manifest, made.blobs)
    assert {one.status for one in (sound, broken)} == {KernelStatus.PENDING_BENCHMARKING}
    bus = bus_to(hub)
    answers = bus.subscribe((CHARACTERIZED, PROOF_FAILED))
    asked = {}
    for artifact in (sound, elsewhere, broken):
        asked[artifact.id] = f"job-{artifact.id}"
        bus.publish(KERNEL_READY, ready(artifact), event_id=asked[artifact.id], trace_id="the trace")
    found: dict[str, KernelCharacterized] = {}
    for _ in range(3):
        delivery = answers.get(90.0)
        assert delivery is not None
        verdict = delivery.parse()
        assert isinstance(verdict, KernelCharacterized), verdict
        assert (delivery.envelope.trace_id, delivery.envelope.in_reply_to) == ("the trace", asked[verdict.artifact_id])
        found[verdict.artifact_id] = verdict
    assert found[sound.id].status is KernelStatus.VALIDATED
    assert found[sound.id].tags
    assert found[elsewhere.id].status is KernelStatus.PENDING_HARDWARE
    assert found[broken.id].status is KernelStatus.REJECTED
    assert found[broken.id].reasons
    for artifact in (sound, elsewhere, broken):
        stored = store.get(artifact.id)
        assert (stored.status, stored.digest) == (found[artifact.id].status, found[artifact.id].manifest_digest)

    # What has been through is not proven again, and what is not there has no verdict.
    seen = len(store.history(sound.id))
    bus.publish(KERNEL_READY, ready(store.get(sound.id), hit=True))
    again = answers.get(30.0)
    assert again is not None
    assert again.parse() == found[sound.id].model_copy(update={"reasons": ()})
    assert len(store.history(sound.id)) == seen
    lost = ready(sound).model_copy(update={"artifact_id": "0123456789ab-cpu-fast-ba9876543210"})
    bus.publish(KERNEL_READY, lost)
    failure = answers.get(30.0)
    assert failure is not None
    told = failure.parse()
    assert isinstance(told, ProofFailed)
    assert (told.artifact_id, told.error) == (lost.artifact_id, "ArtifactNotFound")

    # What a model reports is tried again; this one was never tried at all.
    made = forged(next(mutant for mutant in MUTANTS if mutant.name == "a gradient lacks alpha"))
    store.commit(made.manifest, made.blobs)
    trusted = store.set_status(made.manifest.id, KernelStatus.VALIDATED, b"{}")
    told = {"model": "model", "layer": "0", "seed": 0, "outcome": "FAULTED", "fault": "launch"}
    bus.publish(FIELD_REPORTS, FieldReport(blueprint=trusted.id[:12], artifact_id=trusted.id, **told))
    demoted = answers.get(60.0)
    assert demoted is not None
    verdict = demoted.parse()
    assert isinstance(verdict, KernelCharacterized)
    assert (verdict.artifact_id, verdict.status) == (trusted.id, KernelStatus.REJECTED)

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
