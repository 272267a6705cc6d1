"""What a kernel draws, without the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_triton.cpu.enabling import active
from esper_triton.urabrask.philox import uniform

LENGTH = 64


@triton.jit
def draw(seed_ptr, offset_ptr, out_ptr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    tl.store(out_ptr + at, tl.rand(tl.load(seed_ptr), tl.load(offset_ptr + at)))


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with active():
        yield


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**62), step=st.integers(1, 2**40))
def test_the_numbers_are_those_of_triton_to_the_bit(seed: int, start: int, step: int) -> None:
    offsets = start + step * torch.arange(LENGTH)
    out = torch.empty(LENGTH)
    draw[(1,)](torch.tensor([seed]), offsets, out, LENGTH)
    assert torch.equal(uniform(seed, offsets), out)


def test_the_first_words_are_those_of_the_published_vectors() -> None:
    # Random123's known answer for a counter and a key of zeros begins with 0x6627e8d5.
    assert uniform(0, torch.tensor(0)).item() == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)
    assert uniform(0, torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)
