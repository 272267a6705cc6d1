"""Stores past the caches: what is written is the same, and only what nobody reads again goes that way."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import RELEASE, known_if

from esper_triton.cpu import compiler
from esper_triton.cpu.lowering import streaming

_CACHE_BYTES = 1 << 14


@pytest.fixture(autouse=True, scope="module")
def _small_cache():
    """Every launch that writes 16 KiB streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "last_level_cache_bytes", lambda: _CACHE_BYTES)
        compiler._lower.cache_clear()
        yield
    compiler._lower.cache_clear()


@triton.jit
def _double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def _double_in_steps(x_ptr, out_ptr, n, steps, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK * steps
    for step in range(steps):
        i = start + step * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def _double_what_is_there(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(out_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def _double_and_count(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)
    tl.atomic_add(x_ptr, 0)


@triton.jit
def _double_and_tell(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)
    tl.atomic_store(x_ptr, 1)


@triton.jit
def _double_elsewhere(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(out_ptr.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.float32))
    tl.store(target + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


def _ir(kernel, block=1024):
    x = torch.zeros(1)
    return kernel.warmup(x, x, 1, BLOCK=block, grid=(1,)).asm["llir"]


def test_a_copy_may_stream_and_ends_with_a_fence():
    text = _ir(_double)
    assert text.count("!nontemporal") == 1
    assert text.count("fence seq_cst") == 1


@pytest.mark.parametrize("kernel", [_double_what_is_there, _double_and_count, _double_elsewhere])
def test_what_is_read_again_or_waited_for_does_not_stream(kernel):
    text = _ir(kernel)
    assert "nontemporal" not in text
    assert "fence" not in text


def test_what_a_flag_tells_of_does_not_stream():
    with known_if(RELEASE >= (3, 9), "no attribute 'atomic_store'"):
        assert "nontemporal" not in _ir(_double_and_tell)


def test_parts_of_lines_do_not_stream():
    assert "nontemporal" not in _ir(_double, block=8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.int8]),
    n=st.integers(0, 40_000),
    offset=st.integers(0, 70),
    threads=st.sampled_from([1, 2]),
)
def test_what_is_written_past_the_caches_is_all_there_and_nothing_else(dtype, n, offset, threads):
    x = torch.randint(-60, 60, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)
    memory = torch.full((offset + n + 64,), 77, dtype=dtype)
    out = memory[offset : offset + n]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _double[(triton.cdiv(n, 1024),)](x, out, n, BLOCK=1024)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, (x.double() * 2).to(dtype))
    assert torch.equal(memory[:offset], torch.full((offset,), 77, dtype=dtype))
    assert torch.equal(memory[offset + n :], torch.full((64,), 77, dtype=dtype))


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_loops_of_any_length_write_all_their_tiles(steps):
    n = 3 * steps * 256
    x = torch.arange(float(n))
    out = torch.full((n,), float("nan"))
    _double_in_steps[(3,)](x, out, n, steps, BLOCK=256)
    assert torch.equal(out, x * 2)
