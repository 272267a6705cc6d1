"""Fixtures of the store's tests. None of them needs a compiler."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import handmade
import pytest

from esper_triton.contracts.manifest import Manifest
from esper_triton.urza import Urza


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., tuple[Manifest, dict[str, bytes]]]:
    """`make_artifact(artifact_id, binary=..., status=..., created_at=..., ...)`, every argument with a default."""
    return handmade.make_artifact


@pytest.fixture(autouse=True)
def fsync_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, and thousands of waits for the disk would be most of the time. One test checks that
    data is synced, and in which order."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("esper_triton.urza.index.SYNCHRONOUS", "OFF")


@pytest.fixture
def urza(tmp_path: Path) -> Urza:
    return Urza(tmp_path / "urza")
