from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_triton.model.divergence import LossWatch


def verdicts(watch: LossWatch, losses: list[float]) -> list[bool]:
    return [watch.see(loss) is not None for loss in losses]


@given(st.lists(st.floats(0.5, 1.5), min_size=10, max_size=60), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_diverges_at_once(losses: list[float], last: float) -> None:
    watch = LossWatch(factor=4.0)
    assert not any(verdicts(watch, losses))
    assert watch.see(last) == f"the loss is {last}"


@given(st.lists(st.floats(0.9, 1.1), min_size=10, max_size=60), st.integers(1, 6), st.integers(10, 70))
def test_a_loss_above_so_many_times_the_windows_median_diverges_after_patience_steps(
    losses: list[float], patience: int, window: int
) -> None:
    watch = LossWatch(factor=3.0, patience=patience, window=window)
    verdicts(watch, losses)
    high = 3.0 * statistics.median(losses[-window:]) * 1.001
    assert verdicts(watch, [high] * patience) == [False] * (patience - 1) + [True]


@given(st.lists(st.floats(0.9, 1.1), min_size=10, max_size=60))
def test_one_calm_step_in_between_begins_anew(losses: list[float]) -> None:
    watch = LossWatch(factor=3.0, patience=2)
    verdicts(watch, losses)
    assert not any(verdicts(watch, [9.0, 1.0] * 10))


def test_a_loss_around_zero_or_below_is_measured_by_how_much_it_varies() -> None:
    watch = LossWatch(factor=5.0, patience=1)
    assert not any(verdicts(watch, [0.0, 1.0, -1.0] * 10))
    assert not watch.see(3.9)
    assert watch.see(4.1)
    watch = LossWatch(factor=5.0, patience=1)
    assert not any(verdicts(watch, [-10.0 + 0.1 * k for k in range(20)]))
    assert watch.see(40.0)


def test_a_loss_that_falls_and_the_first_ten_are_taken_as_they_are() -> None:
    assert not any(verdicts(LossWatch(factor=2.0, patience=1), [1e9, 1.0, 1e6, *(100.0 / k for k in range(1, 200))]))


def test_a_watch_goes_on_where_another_has_been() -> None:
    losses = [1.0, 1.1, 0.9] * 5 + [50.0, 50.0]
    first, second = LossWatch(patience=3), LossWatch(patience=3)
    verdicts(first, losses)
    second.load_state_dict(first.state_dict())
    assert second.is_suspicious
    assert first.see(50.0) == second.see(50.0) == "the loss is 50, for 3 steps above 10; its running median is 1"
    assert not first.fresh().is_suspicious


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="factor must be above 1, found 1"):
        LossWatch(factor=1.0)
    with pytest.raises(ValueError, match="found 0 and 100"):
        LossWatch(patience=0)
    with pytest.raises(ValueError, match="window >= 10"):
        LossWatch(window=9)
