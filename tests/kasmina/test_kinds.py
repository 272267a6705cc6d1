from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper_triton.kasmina.kinds import Kind, kind_of, seed_spans


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
    ("module", "kind"),
    [
        (nn.Linear(3, 5), Kind(width=5, x_width=3, x_name="input")),
        (nn.Bilinear(3, 4, 5), Kind(width=5, x_name="input1")),
        (nn.Embedding(7, 4), Kind(width=4, x_name="input")),
        (nn.EmbeddingBag(7, 4), Kind(width=4, x_name="input")),
        (nn.LayerNorm((2, 6)), Kind(width=6, x_width=6, x_name="input")),
        (nn.RMSNorm(6), Kind(width=6, x_width=6, x_name="x")),
        (nn.GroupNorm(2, 6), Kind(width=6, x_width=6, feature_dim=1, x_name="input", positions=None)),
        (nn.BatchNorm2d(6), Kind(width=6, x_width=6, feature_dim=1, x_name="input", positions=2)),
        (nn.InstanceNorm2d(6), Kind(width=6, x_width=6, feature_dim=-3, x_name="input", positions=2)),
        (nn.Conv1d(3, 6, 2), Kind(width=6, feature_dim=-2, x_name="input", positions=1)),
        (nn.Conv2d(3, 6, 1), Kind(width=6, x_width=3, feature_dim=-3, x_name="input", positions=2)),
        (nn.Conv3d(3, 6, 1), Kind(width=6, x_width=3, feature_dim=-4, x_name="input", positions=3)),
        (nn.ConvTranspose2d(3, 6, 2, stride=2), Kind(width=6, feature_dim=-3, x_name="input", positions=2)),
        (
            nn.MultiheadAttention(6, 2),
            Kind(width=6, x_width=6, first_of_tuple=True, x_name="query", length_first=True),
        ),
        (
            nn.MultiheadAttention(6, 2, batch_first=True),
            Kind(width=6, x_width=6, first_of_tuple=True, x_name="query"),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_dispatch_needs_to_know_of_a_known_kind_is_read_from_it(module: nn.Module, kind: Kind) -> None:
    assert kind_of(module) == kind


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 2),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
)
def test_a_convolution_has_an_input_of_the_same_rows_exactly_where_it_keeps_every_size(
    kernel: int, stride: int, padding: int, dilation: int, transposed: bool
) -> None:
    made = nn.ConvTranspose1d if transposed else nn.Conv1d
    module = made(3, 5, kernel, stride=stride, padding=padding, dilation=dilation)
    sizes = [(size, module(torch.zeros(1, 3, size)).shape[-1]) for size in (7, 8, 20)]
    assert kind_of(module).x_width == (3 if all(a == b for a, b in sizes) else None)


def test_a_convolution_that_pads_to_the_same_size_has_an_input_of_the_same_rows() -> None:
    assert kind_of(nn.Conv2d(3, 5, (2, 3), padding="same")).x_width == 3
    assert kind_of(nn.Conv2d(3, 5, (2, 3), padding="valid")).x_width is None


def test_the_first_argument_is_called_what_the_subclass_calls_it() -> None:
    class Renamed(nn.Linear):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens)

    class Any(nn.Linear):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return super().forward(*args)

    assert kind_of(Renamed(2, 3)).x_name == "tokens"
    assert kind_of(Any(2, 3)).x_name == ""


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
        (nn.LSTM(4, 4), "returns its hidden state"),
        (nn.LSTMCell(4, 4), "returns its hidden state"),
        (nn.LazyLinear(4), "not known yet"),
        (nn.ModuleList(), "has no forward"),
    ],
)
def test_what_a_seed_could_not_work_on_is_refused_with_the_reason_even_with_a_width(
    module: nn.Module, reason: str
) -> None:
    with pytest.raises(TypeError, match=reason):
        kind_of(module, features=4)
