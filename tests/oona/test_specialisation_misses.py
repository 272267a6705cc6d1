"""A kernel that a model's calls have missed: asked for over the bus, compiled by a worker, proven, loaded, in place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from seeding import copy_artifact, grow
from torch import nn

import esper_triton as esper
from esper_triton.contracts.envelope import CHARACTERIZED, LIFECYCLE, SUBMITTED
from esper_triton.contracts.events import CompileFailed, KernelCharacterized, KernelReady
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KernelCache
from esper_triton.model import Remote
from esper_triton.oona import Oona
from esper_triton.tezzeret.jobs import compile_server
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture
def bus() -> Iterator[Oona]:
    with Oona() as bus:
        yield bus


@pytest.fixture
def own_store(store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]) -> Urza:
    """With the adapter for float32 alone."""
    copy_artifact(adapter_store, store, adapter_for(D, R))
    return store


@pytest.fixture
def remote(own_store: Urza, adapter_for: Callable[..., str], bus: Oona) -> Iterator[Remote]:
    """A model with one seed, on the bus."""
    model = esper.wrap(nn.Sequential(nn.Linear(IN, D)), ["0"], seeds_per_layer=1, urza=own_store)
    grow(model.kasmina_layers["0"], 0, adapter_for(D, R), alpha=0.5)
    remote = esper.connect(model, bus)
    yield remote
    remote.close()


def train(remote: Remote, dtype: torch.dtype, done: Callable[[], bool], *, limit_s: float = 100.0) -> None:
    """Steps until something is so."""
    until = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < until
        remote.model(torch.randn(5, IN, dtype=dtype))
        remote.model.step_boundary()
        time.sleep(0.01)


def artifact_of(remote: Remote) -> str:
    return str(remote.model.kasmina_layers["0"].get_layer_stats()["seeds"][0]["artifact_id"])


def contributes(remote: Remote, dtype: torch.dtype) -> bool:
    layer, x = remote.model.kasmina_layers["0"], torch.randn(5, IN, dtype=dtype)
    return not torch.equal(layer(x), layer.default_transform(x))


def test_a_model_that_is_cast_goes_on_growing_in_its_new_dtype_and_back(
    remote: Remote, own_store: Urza, bus: Oona, tmp_path: Path
) -> None:
    before = artifact_of(remote)
    with esper.Forge(own_store) as forge:
        worker = compile_server(bus, forge, own_store)
        worker.start()
        remote.model.to(torch.float16)
        assert not contributes(remote, torch.float16)
        with bus.subscribe(LIFECYCLE) as audit:
            train(remote, torch.float16, lambda: artifact_of(remote) != before)
            told = audit.get(10.0).parse()
        assert (told.source, told.target, told.artifact_id) == ("GRAFTING", "GRAFTING", artifact_of(remote))
        assert remote._missing._loading == []
        assert contributes(remote, torch.float16)
        manifest = own_store.get(artifact_of(remote)).manifest
        assert (manifest.dtype, manifest.blueprint_id) == ("float16", own_store.get(before).manifest.blueprint_id)
        remote.model.to(torch.float32)
        train(remote, torch.float32, lambda: artifact_of(remote) == before)  # found, not built
        worker.stop()
    assert contributes(remote, torch.float32)
    stats = remote.model.kasmina_layers["0"].get_layer_stats()["seeds"][0]
    assert (stats["state"], stats["alpha"], stats["error_count"]) == ("GRAFTING", 0.5, 0)
    # It can be saved and restored as it is.
    saved = esper.esper_state_dict(remote.model)
    twin = esper.wrap(nn.Sequential(nn.Linear(IN, D)), ["0"], seeds_per_layer=1, urza=own_store)
    esper.load_esper_state_dict(twin, saved)
    assert twin.kasmina_layers["0"].get_layer_stats()["seeds"][0]["artifact_id"] == before


def built_by_hand(remote: Remote, adapter_store: Urza, own_store: Urza, other: str) -> None:
    """Plays the worker that has built `other` and has not proven it."""
    status = KernelStatus.PENDING_BENCHMARKING
    with remote.bus.subscribe(SUBMITTED, "forge") as jobs:
        remote.model.to(torch.float16)
        remote.model(torch.randn(5, IN, dtype=torch.float16))
        remote.model.step_boundary()
        job = jobs.get(10.0)
        assert job is not None
        record = own_store.get(copy_artifact(adapter_store, own_store, other, status=status))
        remote.bus.reply(job, KernelReady(artifact_id=other, manifest_digest=record.digest, status=status))
        jobs.ack(job)
    assert remote.bus.flush()


def test_one_that_is_still_to_be_proven_is_loaded_with_its_verdict(
    remote: Remote, adapter_store: Urza, own_store: Urza, adapter_for: Callable[..., str]
) -> None:
    other = adapter_for(D, R, "float16")
    built_by_hand(remote, adapter_store, own_store, other)
    for _ in range(20):
        remote.model.step_boundary()
        time.sleep(0.005)
    assert not contributes(remote, torch.float16)
    record = own_store.promote(other)
    verdict = KernelCharacterized(artifact_id=other, manifest_digest=record.digest, status=record.status)
    remote.bus.publish(CHARACTERIZED, verdict)
    train(remote, torch.float16, lambda: artifact_of(remote) == other)
    assert contributes(remote, torch.float16)


def test_one_that_cannot_be_built_is_told_and_the_host_goes_on(
    remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    before = artifact_of(remote)
    with remote.bus.subscribe(SUBMITTED, "forge") as jobs:
        remote.model.to(torch.float64)
        remote.model(torch.randn(5, IN, dtype=torch.float64))
        remote.model.step_boundary()
        job = jobs.get(10.0)
        assert job is not None
        remote.bus.reply(job, CompileFailed(error="CompileError", message="there are no kernels of float64"))
        jobs.ack(job)
    assert remote.bus.flush()

    def told() -> bool:
        return any("specialisation_failed" in record.message for record in caplog.records)

    train(remote, torch.float64, told)
    (line,) = [json.loads(r.message) for r in caplog.records if "specialisation_failed" in r.message]
    assert (line["layer"], line["seed"], line["reason"]) == ("0", 0, "there are no kernels of float64")
    assert artifact_of(remote) == before
    assert not contributes(remote, torch.float64)
