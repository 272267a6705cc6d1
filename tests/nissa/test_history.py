"""Values over time, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_triton.nissa.history import History


@given(st.integers(0, 500), st.sampled_from([2, 4, 8, 30]))
def test_a_history_covers_the_whole_time_evenly_whatever_is_added(count: int, rows: int) -> None:
    history = History(2, rows=rows)
    for k in range(count):
        history.add(float(k), np.array([k, -k], np.float32))
    times, values = history.column(1)
    assert values == [-time for time in times]
    assert len(times) <= rows
    if count:
        assert len(times) > min(count, rows // 2) - 1
        assert times[0] == 0.0
        steps = set(np.diff(times).tolist())
        assert len(steps) <= 1  # evenly
        step = steps.pop() if steps else 1.0
        assert count - 1 - times[-1] < max(step, 1.0) or len(times) == 1
        assert step == 1.0 or count > rows


def test_rows_are_copies() -> None:
    history = History(1)
    history.add(0.0, np.array([1.0], np.float32))
    _, rows = history.rows()
    rows[:] = 5.0
    assert history.column(0) == ([0.0], [1.0])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_history_of_an_odd_length_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="an even number from 2 on"):
        History(1, rows=rows)
