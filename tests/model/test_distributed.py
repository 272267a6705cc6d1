from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from two_ranks import run_both

from esper_triton.model.distributed import replicate
from esper_triton.urza import Urza

REPLICA = Path(__file__).with_name("replica.py")


@pytest.fixture(scope="module")
def seen(
    adapter_store: Urza, adapter_for: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    """What two replicas have seen in 50 steps."""
    folder = tmp_path_factory.mktemp("replicas")
    arguments = [str(folder / "rendezvous"), str(adapter_store.root), adapter_for(16, 4)]
    results = run_both(REPLICA, arguments)
    for status, _, errors in results:
        assert status == 0, errors
    return [json.loads(out) for _, out, _ in results]


def test_law_7_every_rank_makes_the_same_transitions_at_the_same_step(seen: list[dict[str, object]]) -> None:
    assert seen[0]["moves"] == seen[1]["moves"]
    assert seen[0]["states"] == seen[1]["states"]
    assert seen[0]["alphas"] == seen[1]["alphas"]


def test_replicas_are_the_same_bit_by_bit_after_fifty_steps(seen: list[dict[str, object]]) -> None:
    assert seen[0]["weights"] == seen[1]["weights"]


def moves_of(seen: list[dict[str, object]], layer: str, seed: int) -> list[str]:
    return [target for _, name, index, target in seen[1]["moves"] if (name, index) == (layer, seed)]  # type: ignore[attr-defined]


def test_the_first_rank_decides_and_a_fault_of_any_rank_counts_for_all(seen: list[dict[str, object]]) -> None:
    assert moves_of(seen, "0", 0) == ["GERMINATED", "LOADING", "TRAINING", "GRAFTING", "ERROR_RECOVERY"]
    # The second rank's own request to cull it was not heard.
    assert moves_of(seen, "0", 1) == ["GERMINATED", "LOADING", "TRAINING", "GRAFTING", "ERROR_RECOVERY"]


def test_a_load_that_fails_on_one_rank_culls_the_seed_on_all(seen: list[dict[str, object]]) -> None:
    assert moves_of(seen, "2", 0) == ["GERMINATED", "LOADING", "CULLED"]  # fails on both
    assert moves_of(seen, "3", 0) == ["GERMINATED", "LOADING", "CULLED"]  # on the second alone


def test_a_bare_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"Linear is not wrapped; esper_triton.wrap"):
        replicate(nn.Linear(2, 2))
