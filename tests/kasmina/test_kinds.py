from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper_triton.kasmina.kinds import kind_of, seed_spans


@given(num_seeds=st.integers(1, 64), more=st.integers(0, 500))
def test_features_gives_every_column_to_exactly_one_seed_in_sizes_that_differ_by_at_most_one(
    num_seeds: int, more: int
) -> None:
    width = num_seeds + more
    spans = seed_spans(width, num_seeds, "features")
    assert [c for start, stop in spans for c in range(start, stop)] == list(range(width))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


def test_whole_gives_every_seed_the_entire_width() -> None:
    assert seed_spans(10, 3, "whole") == ((0, 10),) * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, 4, "features"), "4 seeds cannot share 3 features"),
        ((3, 0, "features"), "at least 1, found 0"),
        ((3, 1, "rows"), "unknown chunking 'rows'"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(args: tuple[int, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seed_spans(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "width", "x_width"),
    [
        (nn.Linear(3, 5), 5, 3),
        (nn.Embedding(7, 4), 4, None),
        (nn.LayerNorm((2, 6)), 6, 6),
        (nn.RMSNorm(6), 6, 6),
    ],
)
def test_the_width_of_a_known_kind_is_read_from_it(module: nn.Module, width: int, x_width: int | None) -> None:
    kind = kind_of(module)
    assert (kind.width, kind.x_width) == (width, x_width)


def test_another_module_needs_its_width_to_be_given() -> None:
    with pytest.raises(TypeError, match="Identity cannot be adopted: the width of its output is not known"):
        kind_of(nn.Identity())
    assert kind_of(nn.Identity(), features=12).width == 12


def test_a_width_that_contradicts_the_module_is_refused() -> None:
    with pytest.raises(ValueError, match="5 output features, features=6 was given"):
        kind_of(nn.Linear(3, 5), features=6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(4, 2).out_proj, "never calls it"),
        (nn.Conv2d(3, 4, 1), "features are in dimension 1"),
        (nn.BatchNorm1d(4), "features are in dimension 1"),
        (nn.MultiheadAttention(4, 2), "returns a tuple"),
        (nn.LSTM(4, 4), "returns a tuple"),
        (nn.LazyLinear(4), "not known yet"),
        (nn.ModuleList(), "has no forward"),
    ],
)
def test_what_a_seed_could_not_work_on_is_refused_with_the_reason_even_with_a_width(
    module: nn.Module, reason: str
) -> None:
    with pytest.raises(TypeError, match=reason):
        kind_of(module, features=4)
