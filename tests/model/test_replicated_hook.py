"""Two processes grow one model under a GrowthHook each: they go the same way, and go back together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from growing_replica import STEPS
from two_ranks import run_both

from esper_triton.urza import Urza

REPLICA = Path(__file__).with_name("growing_replica.py")
Seen = list[dict[str, Any]]


def both(folder: Path, store: Urza, artifact: str, epochs: int) -> list[tuple[int, str, str]]:
    """Status, output and errors of each rank."""
    rendezvous = folder / f"rendezvous-{epochs}-{len(list(folder.iterdir()))}"
    arguments = [str(rendezvous), str(store.root), str(folder / "run"), artifact, str(epochs)]
    return run_both(REPLICA, arguments)


def seen_by(results: list[tuple[int, str, str]]) -> Seen:
    for status, _, errors in results:
        assert status == 0, errors
    return [json.loads(said) for _, said, _ in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def seen(folder: Path, adapter_store: Urza, adapter_for: Callable[..., str]) -> Seen:
    """What the two have seen in eight epochs."""
    return seen_by(both(folder, adapter_store, adapter_for(16, 4), 8))


def test_both_ranks_make_the_same_moves_and_end_with_the_same_weights_bit_by_bit(seen: Seen) -> None:
    assert seen[0]["moves"] == seen[1]["moves"]
    assert seen[0]["weights"] == seen[1]["weights"]
    assert seen[0]["losses"] != seen[1]["losses"]  # each had data of its own


def test_the_first_ranks_controller_and_its_measurements_count(seen: Seen) -> None:
    of_first = [target for _, layer, target in seen[1]["moves"] if layer == "0"]
    assert of_first == [
        "GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED",
    ]  # fmt: skip
    assert seen[0]["answers"] == {"request_germination-0-0": "applied", "request_germination-2-0": "applied"}
    assert seen[1]["answers"] == {}
    assert seen[0]["metrics"] == seen[1]["metrics"]
    assert seen[0]["metrics"][-1] == 4.0  # 5 less the alpha of the one seed that stayed
    assert seen[0]["measured"] == seen[1]["measured"]


def test_what_goes_wrong_on_one_rank_takes_both_back(seen: Seen) -> None:
    assert seen[0]["rollbacks"] == seen[1]["rollbacks"]
    diverged, damaged = seen[0]["rollbacks"]
    assert diverged["reason"] == "the loss is nan"
    assert (diverged["step"], diverged["checkpoint_step"]) == (5 * STEPS + 4, 5 * STEPS)
    assert (diverged["layer"], diverged["seed"]) == ("2", 0)
    assert "state arrays differ" in damaged["reason"]
    assert (damaged["step"], damaged["checkpoint_step"], damaged["layer"]) == (7 * STEPS, 6 * STEPS, None)
    assert [target for _, layer, target in seen[0]["moves"] if layer == "2"][-1] == "ROLLED_BACK"


def test_two_ranks_whose_checkpoints_are_not_of_one_step_go_on_with_the_newest_that_both_have(
    seen: Seen, folder: Path, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    assert seen[0]["files"] == seen[1]["files"] == [f"{n * STEPS:010d}" for n in (5, 6, 8)]
    for path in (folder / "run" / "rank-1").glob(f"checkpoint-{8 * STEPS:010d}-*.pt"):
        path.unlink()  # as if it had been killed before its last one was written
    again = seen_by(both(folder, adapter_store, adapter_for(16, 4), 8))
    assert [one["start"] for one in again] == [6, 6]
    assert again[0]["weights"] == again[1]["weights"]
    assert len(again[0]["rollbacks"]) == 2  # the array is damaged again


def test_a_rank_that_has_no_checkpoint_in_common_ends_both_with_the_reason(
    seen: Seen, folder: Path, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    for path in (folder / "run" / "rank-1").iterdir():
        path.unlink()
    results = both(folder, adapter_store, adapter_for(16, 4), 8)
    for status, _, errors in results:
        assert status != 0
        assert "CheckpointError: the ranks have no checkpoint of one step in common; their newest are of" in errors


def test_the_heuristic_of_the_first_rank_grows_both(
    adapter_store: Urza, adapter_for: Callable[..., str], tmp_path: Path
) -> None:
    adapter_for(16, 4)  # is in the store
    seen = seen_by(both(tmp_path, adapter_store, "", 6))
    assert seen[0]["moves"] == seen[1]["moves"]
    assert seen[0]["weights"] == seen[1]["weights"]
    assert [target for _, _, target in seen[1]["moves"]] == [
        "GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED",
    ]  # fmt: skip
    assert seen[0]["explanation"] == "1 seeds are part of the model (max_seeds)"
    assert seen[1]["explanation"] == "not asked yet"
