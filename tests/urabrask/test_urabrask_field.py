"""A kernel that fails in training loses its status, and every model that uses it is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

import esper_triton as esper
from esper_triton.contracts.envelope import CHARACTERIZED, FIELD_REPORTS
from esper_triton.contracts.errors import ArtifactRefused, NonFiniteOutput
from esper_triton.contracts.events import FieldReport, KernelCharacterized
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KernelCache
from esper_triton.kasmina.lifecycle import SeedLifecycleState as S
from esper_triton.oona import Oona
from esper_triton.urabrask.field import FieldWatch, demote
from esper_triton.urabrask.verdict import read_report

D, R = 16, 4


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture
def artifact_id(store: esper.Urza, adapter_path: Path) -> str:
    return esper.compile(adapter_path, dims={"d": D, "r": R}, urza=store, pipeline="fast").id


def fault(artifact_id: str, layer: str = "0", seed: int = 0, **fields: object) -> FieldReport:
    told = {"fault": "launch", "message": "LaunchError: it did not run", "outcome": "FAULTED"} | fields
    return FieldReport(
        model="model", blueprint=artifact_id[:12], artifact_id=artifact_id, layer=layer, seed=seed, **told
    )


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_fault_in_one_model_takes_the_kernel_out_of_every_model(store: esper.Urza, artifact_id: str) -> None:
    with Oona() as bus, FieldWatch(bus, store), bus.subscribe(CHARACTERIZED) as verdicts:
        remotes = []
        for name in ("a", "b"):
            host = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
            model = esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=store)
            remotes.append(esper.connect(model, bus, name=name))
            for layer in model.kasmina_layers:
                assert model.load_kernel_sync(layer, 0, artifact_id)
        first, second = (remote.model.kasmina_layers for remote in remotes)
        remotes[0].model.graft("0", 0)
        remotes[0].model.step_boundary()
        first["0"]._kasmina.seeds[0].fault(NonFiniteOutput("its output was not finite where the host's was"))
        remotes[0].model.step_boundary()
        assert first["0"].seed_state(0) is S.ERROR_RECOVERY
        verdict = verdicts.get(30.0).parse()
        assert isinstance(verdict, KernelCharacterized)
        assert (verdict.artifact_id, verdict.status) == (artifact_id, KernelStatus.REJECTED)
        assert verdict.reasons[0].startswith("it failed in training: non_finite in seed 0 of layer '0' of model 'a'")

        def culled() -> bool:
            for remote in remotes:
                remote.model.step_boundary()
            return all(layer.seed_state(0) is S.CULLED for layers in (first, second) for layer in layers.values())

        eventually(culled)
        for remote in remotes:
            remote.close()
    assert store.get(artifact_id).status is KernelStatus.REJECTED
    report = read_report(artifact_id, store)
    assert report.verdict == "REJECTED"
    assert "its output was not finite where the host's was" in report.field_reports[0]
    assert report.cases > 0  # what the proof had found is still there
    with pytest.raises(ArtifactRefused, match="failed while it ran in this process"):
        KernelCache.process().check_not_failed(artifact_id)


def test_as_many_seeds_have_to_fault_as_the_watch_asks_for(store: esper.Urza, artifact_id: str) -> None:
    with Oona() as bus:
        watch = FieldWatch(bus, store, faults=2)
        assert watch.take(fault(artifact_id)) is None
        assert watch.take(fault(artifact_id)) is None  # the same seed again
        assert watch.take(fault(artifact_id, outcome="CULLED", fault=None)) is None
        assert store.get(artifact_id).status is KernelStatus.VALIDATED
        verdict = watch.take(fault(artifact_id, layer="2", fault="drift", message=""))
        assert verdict is not None
        assert len(verdict.field_reports) == 2
        assert verdict.field_reports[1] == "drift in seed 0 of layer '2' of model 'model'"
        assert store.get(artifact_id).status is KernelStatus.REJECTED
        assert demote([fault(artifact_id)], store)[1] is None  # it was before
    with pytest.raises(ValueError, match="faults is 0, expected at least 1"):
        FieldWatch(bus, store, faults=0)


def test_reports_that_cannot_be_followed_up_end_nothing(store: esper.Urza, artifact_id: str) -> None:
    with Oona() as bus, FieldWatch(bus, store):
        bus.publish(FIELD_REPORTS, fault("0123456789ab-cpu-standard-0123456789ab"))
        bus.publish(FIELD_REPORTS, fault(artifact_id))
        eventually(lambda: store.get(artifact_id).status is KernelStatus.REJECTED)
