from __future__ import annotations

import copy
import itertools
import pickle
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper_triton.kasmina import KasminaLayer, KasminaStateLayout

FIELDS = {
    "lifecycle_states": torch.uint8,
    "active_kernel_id": torch.int64,
    "alpha_blend": torch.float32,
    "health_accumulator": torch.float32,
    "last_update_epoch": torch.int32,
    "exec_latency_us": torch.int32,
    "error_count": torch.int16,
    "fallback_active": torch.bool,
}


@given(num_seeds=st.integers(1, 200))
def test_every_array_is_aligned_in_bounds_and_disjoint_from_the_others(num_seeds: int) -> None:
    state = KasminaStateLayout(num_seeds)
    ranges = []
    for field, dtype in FIELDS.items():
        array = getattr(state, field)
        assert (array.dtype, array.shape) == (dtype, (num_seeds,))
        start = array.data_ptr() - state.storage.data_ptr()
        assert start % dtype.itemsize == 0
        ranges.append((start, start + num_seeds * dtype.itemsize))
    ranges.sort()
    assert ranges[0][0] == 0
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert ranges[-1][1] <= state.storage.numel() <= 64 * num_seeds


def test_a_new_state_is_all_dormant_with_alpha_zero() -> None:
    state = KasminaStateLayout(3)
    assert not state.storage.any()


def test_alpha_of_a_seed_is_a_view_of_the_array() -> None:
    state = KasminaStateLayout(4)
    alpha = state.alpha(2)
    state.alpha_blend[2] = 0.25
    assert alpha.dim() == 0
    assert alpha == 0.25
    assert alpha.data_ptr() == state.alpha_blend.data_ptr() + 2 * 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_has_the_same_contents_in_memory_of_its_own(copied) -> None:  # type: ignore[no-untyped-def]
    state = KasminaStateLayout(2)
    state.active_kernel_id[1] = -(2**62)
    other = copied(state)
    assert other.active_kernel_id.tolist() == [0, -(2**62)]
    other.active_kernel_id[1] = 5
    assert state.active_kernel_id[1] == -(2**62)


def test_moving_to_where_it_is_changes_nothing_and_to_meta_keeps_the_size() -> None:
    state = KasminaStateLayout(2)
    assert state.to("cpu") is state
    assert state.to("meta").storage.shape == state.storage.shape


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_layer_leaves_the_bytes_of_its_state(cast: str) -> None:
    layer = KasminaLayer.adopt(nn.Linear(4, 4), num_seeds=2)
    layer.state.last_update_epoch[0] = 70_000
    before = layer.state.storage.clone()
    getattr(layer, cast)()
    assert torch.equal(layer.state.storage, before)
    assert layer.state.alpha_blend.dtype == torch.float32


def test_the_crc_is_that_of_the_bytes_and_changes_with_any_of_them() -> None:
    state = KasminaStateLayout(5)
    assert state.crc32() == zlib.crc32(bytes(state.storage.tolist()))
    seen = {state.crc32()}
    for field in FIELDS:
        getattr(state, field)[4] = 1
        seen.add(state.crc32())
    assert len(seen) == len(FIELDS) + 1


@pytest.mark.parametrize("storage", [torch.zeros(27, dtype=torch.uint8), torch.zeros(28), torch.zeros(56)])
def test_a_storage_of_another_size_or_dtype_is_refused(storage: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needs 28 uint8 elements"):
        KasminaStateLayout(1, storage=storage)


def test_no_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        KasminaStateLayout(0)
