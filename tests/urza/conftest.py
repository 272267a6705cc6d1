"""Fixtures of the store's tests. None of them needs a compiler."""

from __future__ import annotations

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


@pytest.fixture
def urza(tmp_path: Path) -> Urza:
    return Urza(tmp_path / "urza")
