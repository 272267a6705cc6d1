from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_triton.contracts.errors import CheckpointError
from esper_triton.model import checkpoints as module
from esper_triton.model.checkpoints import DirectoryCheckpoints, MemoryCheckpoint, checkpoints_in
from esper_triton.model.random_streams import random_streams, set_random_streams


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return DirectoryCheckpoints(tmp_path / "run", keep=2) if request.param == "directory" else MemoryCheckpoint()


def test_what_is_given_back_is_what_was_saved_and_shares_nothing_with_it(store: Any) -> None:
    assert store.newest() is None
    weight = torch.arange(4.0)
    store.save({"w": weight, "n": 1}, 5)
    weight.add_(1)
    found = store.newest()
    assert torch.equal(found["w"], torch.arange(4.0))
    found["w"].zero_()
    assert torch.equal(store.newest()["w"], torch.arange(4.0))
    store.save({"w": weight, "n": 2}, 6)
    assert store.newest()["n"] == 2


def test_a_state_that_could_not_be_read_back_is_found_at_the_first_save(store: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"the first checkpoint cannot be read with torch\.load\(weights_only=True\)"
    ):
        store.save({"path": Path("somewhere")}, 0)
    assert store.newest() is None


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryCheckpoints(tmp_path / "run", keep=1)
    store.save({"n": 1}, 1)
    before = sorted((tmp_path / "run").iterdir())

    def full(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        store.save({"n": 2}, 2)
    assert sorted((tmp_path / "run").iterdir()) == before
    assert store.newest() == {"n": 1}


def test_what_a_process_left_behind_when_it_died_is_removed_by_the_next(tmp_path: Path) -> None:
    store = DirectoryCheckpoints(tmp_path / "run", keep=2)
    for step in range(4):
        store.save({"n": step}, step)
    (tmp_path / "run" / ".esper-0123").write_bytes(b"half of it")
    (tmp_path / "run" / "checkpoint-of-mine.pt").write_bytes(b"not ours")
    store.save({"n": 9}, 9)
    names = sorted(path.name.rpartition("-")[0] for path in checkpoints_in(tmp_path / "run"))
    assert names == ["checkpoint-0000000003", "checkpoint-0000000009"]
    assert len(list((tmp_path / "run").iterdir())) == 3


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("sprung").touch, ())

    store = DirectoryCheckpoints(tmp_path / "run", keep=2)
    store.save({"n": 1}, 1)
    trap = tmp_path / "run" / "new.pt"
    torch.save({"n": Trap()}, trap)
    trap.rename(trap.with_name(f"checkpoint-0000000002-{module._sha256(trap)[:16]}.pt"))
    assert store.newest() == {"n": 1}
    assert not (tmp_path / "sprung").exists()


def test_random_streams_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.normal()  # each keeps a second number for the next call
    torch.save(random_streams(), tmp_path / "streams.pt")

    def draw() -> list[float]:
        own = [random.random(), random.gauss(0, 1), random.gauss(0, 1), np.random.rand(), np.random.normal()]
        return [*own, float(torch.rand(())), float(torch.randn(()))]

    first = draw()
    assert draw() != first
    set_random_streams(torch.load(tmp_path / "streams.pt", weights_only=True))
    assert draw() == first
