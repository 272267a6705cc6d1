"""A kernel that fails in training loses its status, and every model that uses it is told."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS, forged
from torch import nn

import esper_triton as esper
from esper_triton.contracts.envelope import CHARACTERIZED, FIELD_REPORTS
from esper_triton.contracts.errors import ArtifactRefused, NonFiniteOutput
from esper_triton.contracts.events import FieldReport, KernelCharacterized
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KernelCache
from esper_triton.kasmina.lifecycle import SeedLifecycleState as S
from esper_triton.model.drift import DriftWatch
from esper_triton.oona import Oona
from esper_triton.tezzeret.forge import Forged, forge
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import field
from esper_triton.urabrask.field import FieldWatch, demote
from esper_triton.urabrask.verdict import read_report

D, R = 16, 4


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory, adapter_path: Path) -> tuple[Path, str]:
    """A store with one artifact that was proven, of which each test has a copy."""
    root = tmp_path_factory.mktemp("proven") / "urza"
    with contextlib.closing(esper.Urza(root)) as urza:
        return root, esper.compile(adapter_path, dims={"d": D, "r": R}, urza=urza, pipeline="fast").id


@pytest.fixture
def store(tmp_path: Path, proven: tuple[Path, str]) -> esper.Urza:
    return esper.Urza(shutil.copytree(proven[0], tmp_path / "urza"))


@pytest.fixture
def artifact_id(proven: tuple[Path, str]) -> str:
    return proven[1]


def fault(artifact_id: str, layer: str = "0", seed: int = 0, **fields: object) -> FieldReport:
    told = {"model": "model", "outcome": "FAULTED", "fault": "launch", "message": "LaunchError: it did not run"}
    told |= fields
    return FieldReport(blueprint=artifact_id[:12], artifact_id=artifact_id, layer=layer, seed=seed, **told)


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_fault_in_one_model_takes_the_kernel_out_of_every_model(store: esper.Urza, artifact_id: str) -> None:
    with Oona() as bus, FieldWatch(bus, store, faults=1), bus.subscribe(CHARACTERIZED) as verdicts:
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
    with pytest.raises(ValueError, match="again_s is -1, expected seconds"):
        FieldWatch(bus, store, again_s=-1)


def test_reports_that_cannot_be_followed_up_end_nothing(store: esper.Urza, artifact_id: str) -> None:
    with Oona() as bus, FieldWatch(bus, store, faults=1):
        bus.publish(FIELD_REPORTS, fault("0123456789ab-cpu-standard-0123456789ab"))
        bus.publish(FIELD_REPORTS, fault(artifact_id))
        eventually(lambda: store.get(artifact_id).status is KernelStatus.REJECTED)


def vouched_for(store: esper.Urza, made: Forged) -> str:
    """In the store as VALIDATED without a proof."""
    store.commit(made.manifest, made.blobs)
    return store.set_status(made.manifest.id, KernelStatus.VALIDATED, b"{}").id


def test_a_report_alone_has_a_sound_kernel_tried_again_and_changes_nothing(
    store: esper.Urza, artifact_id: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Oona() as bus, bus.subscribe(CHARACTERIZED) as verdicts:
        watch = FieldWatch(bus, store)
        assert watch.take(fault(artifact_id)) is None
        assert "was tried again, and nothing was found: launch in seed 0 of layer '0' of model 'model'" in caplog.text
        monkeypatch.setattr(field, "examine", lambda *_, **__: pytest.fail("tried again at once"))
        for seed in range(20):
            assert watch.take(fault(artifact_id, seed=seed, model=f"model {seed}")) is None
        assert verdicts.get(0.05) is None
    assert store.get(artifact_id).status is KernelStatus.VALIDATED


def test_a_kernel_that_is_wrong_with_what_it_has_learned_is_found_at_an_epochs_end_and_loses_its_status(
    store: esper.Urza,
) -> None:
    wrong = vouched_for(store, forged(next(one for one in MUTANTS if one.name == "gelu's derivative lacks a term")))
    host = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 48))
    model = esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=store)
    right = esper.compile("bottleneck_adapter", dims={"d": 48, "r": 4}, urza=store, pipeline="fast").id
    with Oona() as bus, FieldWatch(bus, store), bus.subscribe(CHARACTERIZED) as verdicts:
        remote = esper.connect(model, bus)
        for layer, artifact in (("0", right), ("2", wrong)):
            assert model.load_kernel_sync(layer, 0, artifact)
            model.graft(layer, 0)
            model.set_alpha(layer, 0, 0.5)
        # It begins with zeros, behind which a wrong derivative does not show.
        for parameter in model.kasmina_layers["2"]._kasmina.seeds[0].parameters.values():
            nn.init.normal_(parameter)
        before = torch.get_rng_state()
        grads = [p.grad for p in model.parameters()]
        with bus.subscribe(FIELD_REPORTS) as reports:
            for epoch in range(2):  # one seed an epoch
                model.epoch_boundary(epoch)
                model.step_boundary()
            report = reports.get(10.0).parse()
            assert reports.get(0.05) is None
        assert torch.equal(before, torch.get_rng_state())
        assert [p.grad for p in model.parameters()] == grads
        assert (report.fault, report.layer, report.artifact_id) == ("drift", "2", wrong)
        assert re.search(r"OutputDrifted: seed 0 of layer '2' .*grad_\w+ is off by \d\S* times its tol", report.message)
        states = {name: layer.seed_state(0) for name, layer in model.kasmina_layers.items()}
        assert states == {"0": S.GRAFTING, "2": S.ERROR_RECOVERY}
        verdict = verdicts.get(60.0).parse()
        assert (verdict.artifact_id, verdict.status) == (wrong, KernelStatus.REJECTED)
        remote.close()
    told = read_report(wrong, store)
    assert told.counterexample is not None  # of the trial that followed
    assert "OutputDrifted" in told.field_reports[0]
    assert store.get(right).status is KernelStatus.VALIDATED


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("channel_scale", "bfloat16"),
        ("multi_head_attention", "float32"),
        ("squeeze_excite", "float16"),
        ("conv3x3", "bfloat16"),
    ],
)
def test_no_drift_is_seen_in_a_right_kernel_whatever_it_has_learned(store: esper.Urza, name: str, dtype: str) -> None:
    blueprint = esper.Blueprint.load(shipped()[name])
    dims = {dim: {"heads": 3, "r": 4}.get(dim, 12) for dim in blueprint.dims}
    artifact_id = vouched_for(store, forge(plan_build(blueprint, dims, dtype, parse_target("cpu"), "fast")))
    kind = nn.Conv2d(12, 12, 1) if blueprint.layout == "image" else nn.Linear(12, 12)
    model = esper.wrap(nn.Sequential(kind).to(getattr(torch, dtype)), ["0"], seeds_per_layer=1, urza=store)
    assert model.load_kernel_sync("0", 0, artifact_id)
    model.graft("0", 0)
    seed = model.kasmina_layers["0"]._kasmina.seeds[0]
    watch = DriftWatch([model.kasmina_layers["0"]])
    generator = torch.Generator().manual_seed(3)
    for scale in (0.1, 1.0, 10.0, 1e4):
        with torch.no_grad():
            for parameter in seed.parameters.values():
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(drawn)
        # Whatever the loop has set around it.
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert watch.look()
        assert seed.pending_faults == 0


def test_where_a_blueprint_is_code_that_was_stored_or_nothing_is_active_there_is_nothing_to_look_at(
    store: esper.Urza, artifact_id: str
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(D, D)), ["0"], seeds_per_layer=1, urza=store)
    watch = DriftWatch(list(model.kasmina_layers.values()))
    assert not watch.look()
    assert model.load_kernel_sync("0", 0, artifact_id)
    model.graft("0", 0)
    assert not watch.look()
    assert model.kasmina_layers["0"]._kasmina.seeds[0].pending_faults == 0
