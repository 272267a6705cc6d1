"""Statistics of activations against torch's own and NumPy's, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_triton.kasmina.statistics import (
    ActivationStatistics,
    chosen_features,
    merged,
    moments_of,
    statistics_of,
    thinned,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def found(*calls: Tensor) -> ActivationStatistics:
    """Of calls that are sampled one after the other."""
    chosen = chosen_features(calls[0].shape[1], CPU)
    first, *rest = [moments_of(call, chosen) for call in calls]
    for moments in rest:
        first = merged(first, moments, chosen)
    return ActivationStatistics.of(statistics_of(first, chosen).tolist())


def expected(rows: Tensor) -> ActivationStatistics:
    """Of rows, [n, d] with n > 1, all at once, as torch and NumPy define it."""
    rows = rows.double()
    alive = [len(column.unique()) > 1 for column in rows.T]
    chosen = chosen_features(rows.shape[1], CPU)
    columns = range(rows.shape[1]) if chosen is None else chosen.tolist()
    few = [c for c in columns if alive[c]]
    correlation = None
    if len(few) > 1:
        r = np.corrcoef(rows[:, few].numpy(), rowvar=False)
        correlation = float(np.abs(r[np.triu_indices(len(few), 1)]).mean())
    return ActivationStatistics(float(rows.var(0).mean()), alive.count(False) / len(alive), correlation)


def assert_same(got: ActivationStatistics, wanted: ActivationStatistics) -> None:
    # All of it is float64; a column far from zero loses the digits that its mean has before its deviations.
    for value, other in zip(got, wanted, strict=True):
        assert value == (None if other is None else pytest.approx(other, rel=1e-7, abs=1e-12))


def drawn(seed: int, rows: int, width: int, *, offset: float = 0.0, dead: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    mixed = mixed + offset
    mixed[:, : min(dead, width)] = torch.randn(min(dead, width), generator=generator).round()
    return mixed


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    width=st.integers(1, 90),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e5]),
    dead=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_calls_that_are_merged_give_what_all_of_their_rows_give(
    sizes: list[int], width: int, offset: float, dead: int, dtype: torch.dtype, seed: int
) -> None:
    rows = drawn(seed, sum(sizes), width, offset=offset, dead=dead).to(dtype)
    if not rows.isfinite().all():  # 1e5 is no float16
        rows = rows.nan_to_num(1.0, 1.0, 1.0)
    got = found(*rows.split(sizes))
    if sum(sizes) == 1:
        assert got == (None, None, None)
    else:
        assert_same(got, expected(rows))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    spoilt=st.sets(st.integers(0, 4)),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_a_call_that_is_not_finite_counts_as_no_row_and_spoils_nothing(
    sizes: list[int], spoilt: set[int], poison: float, dtype: torch.dtype, seed: int
) -> None:
    calls = list(drawn(seed, sum(sizes), 5, dead=1).to(dtype).split(sizes))
    good = torch.cat([torch.empty(0, 5, dtype=dtype), *(c for k, c in enumerate(calls) if k not in spoilt)])
    for k in spoilt & set(range(len(calls))):
        calls[k] = calls[k].clone()
        calls[k][-1, 3] = poison
    got = found(*calls)
    if len(good) < 2:
        assert got == (None, None, None)
    else:
        assert_same(got, expected(good))


def test_values_at_the_end_of_float32_and_below_its_normal_numbers_are_no_overflow() -> None:
    rows = torch.tensor([[3e38, 1e-45], [-3e38, 0.0], [0.0, 3e-45]])
    assert_same(found(rows), expected(rows))
    assert_same(found(rows[:1], rows[1:]), expected(rows))


def test_a_feature_is_dead_that_is_always_zero_or_always_the_same_and_not_one_that_changed_in_one_row() -> None:
    rows = torch.zeros(1000, 4)
    rows[:, 1], rows[999, 2], rows[:, 3] = 0.1, 1e-30, torch.linspace(-1, 1, 1000)
    assert found(*rows.split(100)).dead_ratio == 0.5
    # One feature that is alive has nobody to correlate with.
    assert found(rows[:999]) == (pytest.approx(float(rows[:999, 3].double().var()) / 4), 0.75, None)


def test_features_that_are_multiples_of_one_another_correlate_wholly_and_orthogonal_ones_do_not() -> None:
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    a, b = (2 * math.pi * 64 * t / 64).sin(), torch.arange(64).double() % 2 - 0.5
    assert found(torch.stack([a, -3 * a + 1, 7 * a], 1).float()).correlation == pytest.approx(1.0, abs=1e-6)
    # The alternating one is orthogonal to what is the same in each pair of rows.
    paired = t.view(32, 2).mean(1).repeat_interleave(2)
    assert found(torch.stack([paired, b], 1).float()).correlation == pytest.approx(0.0, abs=1e-6)


@given(width=st.integers(1, 5000))
def test_the_features_whose_correlation_is_looked_at_are_the_same_each_time_and_no_draw_of_torchs_is_taken(
    width: int,
) -> None:
    state = torch.get_rng_state()
    chosen = chosen_features(width, CPU)
    again = chosen_features(width, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    if width <= 64:
        assert chosen is None
    else:
        assert chosen is not None
        assert again is not None
        assert torch.equal(chosen, again)
        assert len(set(chosen.tolist())) == 64
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < width


@given(rows=st.integers(0, 5000), width=st.integers(1, 3000))
def test_a_large_call_is_thinned_to_rows_at_equal_distances(rows: int, width: int) -> None:
    index = torch.arange(rows).unsqueeze(1).expand(rows, width)
    kept = thinned(index)[:, 0]
    most = max(64, 65536 // width)
    assert len(kept) <= most
    assert len(kept) == rows or len(kept) >= most // 2
    assert len(kept.diff().unique()) <= 1
    assert not rows or kept[0] == 0


def test_what_is_sampled_of_a_strided_view_is_that_of_its_values() -> None:
    wide = drawn(3, 50, 12)
    assert_same(found(wide[:, 4:8]), expected(wide[:, 4:8]))


def test_nothing_is_read_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor is read back")

    k, chosen = drawn(0, 20, 100), chosen_features(100, CPU)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, forbidden)
        moments = merged(moments_of(k, chosen), moments_of(k, chosen), chosen)
        values = statistics_of(moments, chosen)
    assert values.shape == (3,)
