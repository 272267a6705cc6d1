from __future__ import annotations

import itertools

import pytest

from esper_triton.contracts.errors import InvalidTransition
from esper_triton.kasmina.lifecycle import SeedLifecycleState, check_transition

# The table of the lifecycle, written out again: state, value, moves.
TABLE = {
    "DORMANT": (0, "GERMINATED"),
    "GERMINATED": (1, "LOADING CANCELLED"),
    "LOADING": (2, "TRAINING GRAFTING CULLED"),
    "TRAINING": (3, "GRAFTING CULLED CANCELLED"),
    "GRAFTING": (4, "STABILIZATION CULLED ROLLED_BACK"),
    "STABILIZATION": (5, "EVALUATING CULLED ROLLED_BACK"),
    "EVALUATING": (6, "FINE_TUNING FOSSILIZED CULLED ROLLED_BACK"),
    "FINE_TUNING": (7, "FOSSILIZED CULLED ROLLED_BACK"),
    "FOSSILIZED": (8, ""),
    "CULLED": (9, "DORMANT"),
    "CANCELLED": (10, "DORMANT"),
    "ROLLED_BACK": (11, ""),
    "ERROR_RECOVERY": (12, "LOADING CULLED"),
}


def test_the_states_have_the_values_that_are_written_to_device_memory() -> None:
    assert {state.name: int(state) for state in SeedLifecycleState} == {n: v for n, (v, _) in TABLE.items()}


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(SeedLifecycleState, repeat=2)), ids=lambda s: s.name
)
def test_every_pair_of_states_is_a_move_exactly_when_the_table_says_so(
    source: SeedLifecycleState, target: SeedLifecycleState
) -> None:
    moves = TABLE[source.name][1].split()
    if target.name in moves:
        check_transition("fc1", 3, source, target)
        return
    with pytest.raises(InvalidTransition) as caught:
        check_transition("fc1", 3, source, target)
    assert caught.value.allowed == tuple(moves)
    assert (caught.value.layer, caught.value.seed) == ("fc1", 3)


def test_the_states_that_contribute_are_those_from_grafting_to_fossilized() -> None:
    active = {state.name for state in SeedLifecycleState if state.is_active}
    assert active == {"GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"}
