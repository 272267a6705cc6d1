"""Fixtures shared by the rooms: stores, and an adapter that is written by hand, compiled for this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import esper_triton as esper

# A machine that is busy with other things draws slowly, which is no fault of a test.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

ADAPTER = Path(__file__).resolve().parent / "data" / "bottleneck_adapter.toml"


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage is to look through all of it for every few tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same one for all processes that run its tests."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Iterator[None]:
    """Triton's cache and Esper's default store for this run alone: no test finds what another run compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(run_folder / "triton-cache"))
        patch.setenv("ESPER_URZA", str(tmp_path_factory.mktemp("default-store") / "urza"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _fsync_costs_nothing() -> Iterator[None]:
    """No test cuts the power, and thousands of waits for the disk would be much of the time. One test checks that data
    is synced, and in which order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr("esper_triton.urza.index.SYNCHRONOUS", "OFF")
        yield


@pytest.fixture
def store(tmp_path: Path) -> esper.Urza:
    """A fresh, empty store."""
    return esper.Urza(tmp_path / "urza")


@pytest.fixture(scope="session")
def adapter_path() -> Path:
    """A blueprint with a Triton source of its own: the shipped bottleneck_adapter, written by hand."""
    return ADAPTER


@pytest.fixture(scope="session")
def adapter_store(run_folder: Path) -> esper.Urza:
    """A store for the whole run; `adapter_for` fills it. Tests that damage a store use `store`."""
    return esper.Urza(run_folder / "adapters")


@pytest.fixture(scope="session")
def adapter_for(adapter_store: esper.Urza, adapter_path: Path) -> Callable[..., str]:
    """`adapter_for(d, r, dtype="float32")`: id of the adapter for this CPU, VALIDATED, in `adapter_store`."""

    def compiled(d: int, r: int, dtype: object = "float32") -> str:
        artifacts = esper.compile(adapter_path, dims={"d": d, "r": r}, dtype=dtype, targets=["cpu"], urza=adapter_store)
        return artifacts.id

    return compiled


@pytest.fixture(scope="session")
def adapter_id(adapter_for: Callable[..., str]) -> str:
    """The adapter with d=64, r=16, float32."""
    return adapter_for(64, 16, "float32")


@pytest.fixture
def adapter_variant(tmp_path: Path, adapter_path: Path) -> Callable[..., Path]:
    """`adapter_variant(toml={old: new}, source={old: new})`: the adapter with these texts replaced, in `tmp_path`."""

    def written(*, toml: Mapping[str, str] | None = None, source: Mapping[str, str] | None = None) -> Path:
        target = tmp_path / adapter_path.name
        for path, changes in ((adapter_path, toml), (adapter_path.with_suffix(".py"), source)):
            text = path.read_text(encoding="utf-8")
            for old, new in (changes or {}).items():
                assert old in text, f"{path.name} has no {old!r} any more"
                text = text.replace(old, new)
            (tmp_path / path.name).write_text(text, encoding="utf-8")
        return target

    return written


@pytest.fixture(scope="session")
def library_store(run_folder: Path) -> esper.Urza:
    """A store for the whole run; `library_artifact` fills it."""
    return esper.Urza(run_folder / "library")


@pytest.fixture(scope="session")
def library_artifact(library_store: esper.Urza) -> Callable[..., str]:
    """`library_artifact(name, dtype="float32")`: id of what ships, with the dims of `shipped`, for this CPU, proven, in
    `library_store`."""
    from shipped import BLUEPRINTS, dims_of

    def compiled(name: str, dtype: str = "float32") -> str:
        request = {"dims": dims_of(name), "dtype": dtype, "pipeline": "fast"}
        return esper.compile(BLUEPRINTS[name], urza=library_store, **request).id

    return compiled
