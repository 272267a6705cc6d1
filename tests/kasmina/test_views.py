from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_triton.kasmina.views import Axes, empty_output, from_matrix, matches, matrix, settle

shapes = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A tensor of any layout with at least one feature, and the dimension where its features lie."""
    shape = list(draw(shapes))
    feature_dim = draw(st.integers(0, len(shape) - 1))
    shape[feature_dim] = max(shape[feature_dim], 1)
    tensor = torch.randn(shape)
    match draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded"])):
        case "permuted":
            order = draw(st.permutations(range(len(shape))))
            tensor = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        case "sliced":
            tensor = torch.randn([2 * size + 1 for size in shape])[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
        case "expanded":
            tensor = torch.randn([1, *shape[1:]]).expand(shape)
    return tensor, feature_dim if draw(st.booleans()) else feature_dim - len(shape)


@given(tensors())
def test_a_matrix_has_the_features_of_each_place_in_a_row_in_the_order_of_the_places(
    drawn: tuple[torch.Tensor, int],
) -> None:
    tensor, feature_dim = drawn
    found = matrix(tensor, Axes(feature_dim))
    width = tensor.shape[feature_dim]
    assert found.shape == (tensor.numel() // width, width)
    assert width == 1 or found.stride(1) == 1
    columns = [tensor.select(feature_dim, column).flatten() for column in range(width)]
    assert torch.equal(found, torch.stack(columns, dim=-1))


@given(tensors())
def test_what_is_written_as_a_matrix_comes_out_in_the_shape_and_the_strides_of_the_host(
    drawn: tuple[torch.Tensor, int],
) -> None:
    tensor, feature_dim = drawn
    out, written = empty_output(tensor, Axes(feature_dim))
    assert written.is_contiguous()
    written.copy_(matrix(tensor, Axes(feature_dim)))
    settle(out, written, Axes(feature_dim))
    assert torch.equal(out, tensor)
    assert not out._is_view()
    assert out.stride() == torch.empty_like(tensor).stride()
    assert torch.equal(from_matrix(matrix(tensor, Axes(feature_dim)).contiguous(), tensor, Axes(feature_dim)), tensor)


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3).map(tuple), st.booleans())
def test_where_the_length_comes_first_rows_are_item_by_item(shape: tuple[int, ...], turned: bool) -> None:
    axes = Axes(-1, length_first=True)
    tensor = torch.randn(shape) if not turned else torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1)
    assert torch.equal(matrix(tensor, axes), torch.cat(tensor.unbind(1)))
    out, written = empty_output(tensor, axes)
    written.copy_(matrix(tensor, axes))
    settle(out, written, axes)
    assert torch.equal(out, tensor)
    assert out.stride() == torch.empty_like(tensor).stride()
    assert torch.equal(from_matrix(matrix(tensor, axes).contiguous(), tensor, axes), tensor)
    assert torch.equal(matrix(tensor[0], axes), tensor[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_image_in_channels_last_needs_no_copy(memory_format: torch.memory_format) -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    out, written = empty_output(image, Axes(-3))
    shares = memory_format is torch.channels_last
    assert (matrix(image, Axes(1)).data_ptr() == image.data_ptr()) is shares
    assert (written.data_ptr() == out.data_ptr()) is shares
    assert out.stride() == image.stride()


def test_a_tensor_matches_by_its_features_and_by_the_places_of_another() -> None:
    image = torch.empty(2, 3, 4, 5)
    assert matches(image, 3, 1)
    assert matches(image, 3, -3)
    assert not matches(image, 4, 1)
    assert not matches(torch.empty(3), 3, 1)
    assert not matches(torch.empty(()), 1, -1)
    assert matches(image, 3, 1, like=torch.empty(2, 7, 4, 5))
    assert not matches(image, 3, 1, like=torch.empty(2, 3, 4, 6))
    assert not matches(image, 3, 1, like=torch.empty(2, 3, 4))
