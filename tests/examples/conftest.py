"""Scripts of docs/examples as their readers run them, and a Redis server for the one that wants it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "oona"))

from bus_fixtures import redis_server, scratch

__all__ = ["redis_server", "scratch"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[..., str]:
    """`run_example("digits.py", ...)`: what the script prints when it is run in an empty folder, where a warning is an
    error. `packages` are more folders to import from."""

    def run(name: str, *arguments: str, packages: tuple[Path, ...] = (), warnings: str = "error") -> str:
        path = os.pathsep.join(map(str, (ROOT, *packages)))
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", "ESPER_OONA": str(tmp_path / "journal")}
        done = subprocess.run(
            [sys.executable, "-W", warnings, str(ROOT / "docs" / "examples" / name), *arguments],
            cwd=tmp_path,
            env=os.environ | own | {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
