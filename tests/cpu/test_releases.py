"""Features that came into Triton's language, or left it, between the releases that the backend runs on.

Each is run where Triton has it; elsewhere Triton itself must refuse it (see `releases.known_if`). Block pointers,
descriptors, concatenation and atomic accesses have files of their own.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import RELEASE, known_if
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from esper_triton.cpu.errors import UnsupportedOperation


@triton.constexpr_function
def squared(n):
    return n * n


@triton.jit
def _as_many_as_a_square(out, N: tl.constexpr):
    M: tl.constexpr = squared(N)
    tl.store(out + tl.arange(0, M), tl.arange(0, M) * squared(3))


def test_functions_of_constants_run_while_a_kernel_is_compiled():
    out = torch.zeros(16, dtype=torch.int32)
    _as_many_as_a_square[(1,)](out, 4)
    assert out.tolist() == [9 * k for k in range(16)]


@aggregate
class Span:
    """A tile of values and of weights."""

    values: tl.tensor
    weights: tl.tensor

    @triton.constexpr_function
    def __init__(self, values, weights):
        self.values = values
        self.weights = weights

    @triton.jit
    def grown(self, by):
        return Span(self.values + by, self.weights)

    @triton.jit
    def total(self):
        return tl.sum(self.values * self.weights)


@triton.jit
def _weighted(x, out, steps, N: tl.constexpr):
    at = tl.arange(0, N)
    span = Span(tl.load(x + at), at.to(tl.float32))
    for k in range(steps):
        span = span.grown(k)
    tl.store(out, span.total())


@given(n=st.sampled_from([1, 8, 64]), steps=st.integers(0, 4))
@settings(max_examples=8, deadline=None)
def test_aggregates_have_methods_and_are_carried_around_a_loop(n, steps):
    x, out = torch.randint(-9, 9, (n,)).float(), torch.zeros(1)
    _weighted[(1,)](x, out, steps, N=n)
    assert out.item() == ((x.double() + sum(range(steps))) * torch.arange(n)).sum().item()


@triton.jit
def _replaced(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    span = tl.aggregate_replace(Span(tl.load(x + at), at), values=at * 2)
    tl.store(out + at, span.values + span.weights)


def test_a_field_of_an_aggregate_is_replaced():
    assert hasattr(triton, "aggregate") == (RELEASE >= (3, 8))
    out = torch.zeros(8, dtype=torch.int32)
    with known_if(RELEASE >= (3, 8), "no attribute 'aggregate_replace'"):
        _replaced[(1,)](torch.ones(8), out, N=8)
        assert out.tolist() == [3 * k for k in range(8)]


@triton.jit
def _row_and_back(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    row = tl.unsqueeze(tl.load(x + at), 0)
    tl.store(out + at, tl.squeeze(row * 2, 0))


def test_an_axis_is_put_in_and_taken_out():
    x, out = torch.randn(16), torch.zeros(16)
    with known_if(RELEASE >= (3, 7), "no attribute 'unsqueeze'"):
        _row_and_back[(1,)](x, out, N=16)
        assert torch.equal(out, x * 2)


@triton.jit
def _turn(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.flip(tl.load(x + at)))


def test_a_tile_is_flipped_without_naming_its_axis():
    x, out = torch.randn(16), torch.zeros(16)
    with known_if(RELEASE >= (3, 9), r"tl\.flip"):
        _turn[(1,)](x, out, N=16)
        assert torch.equal(out, x.flip(0))


@triton.jit
def _number(out):
    tl.store(out, tl.to_tensor(3) + 1)


def test_a_number_becomes_a_tensor():
    out = torch.zeros(1, dtype=torch.int32)
    with known_if(RELEASE >= (3, 7), "no attribute 'to_tensor'"):
        _number[(1,)](out)
        assert out.item() == 4


@triton.jit
def _nothing_from(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.expect_zero(tl.load(x + at, mask=at < n, other=0.0), at >= n))


def test_a_tile_that_is_expected_to_be_zero_is_what_it_is():
    x, out = torch.randn(16), torch.ones(16)
    with known_if(RELEASE >= (3, 8), "no attribute 'expect_zero'"):
        _nothing_from[(1,)](x, out, 5, N=16)
        assert torch.equal(out, torch.cat([x[:5], torch.zeros(11)]))


@triton.jit
def _about(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.fdiv(tl.load(x + at), tl.load(y + at), approx=True))


@given(st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=16))
@settings(max_examples=20, deadline=None)
def test_an_approximate_quotient_is_the_exact_one(pairs):
    x, y = (torch.tensor([pair[k] for pair in pairs] + [1.0] * (16 - len(pairs))) for k in (0, 1))
    out = torch.zeros(16)
    with known_if(RELEASE >= (3, 9), "unexpected keyword argument 'approx'"):
        _about[(1,)](x, y, out, N=16)
        torch.testing.assert_close(out, x / y, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _negate(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, -tl.load(x + at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_negated_zero_has_the_sign_that_tritons_release_gives_it(dtype):
    x = torch.tensor([0.0, -0.0, 1.5, float("-inf")], dtype=dtype)
    out = torch.zeros(4, dtype=dtype)
    _negate[(1,)](x, out, N=4)
    # Before 3.8, `-x` is 0 - x to Triton.
    expected = -x if RELEASE >= (3, 8) else 0 - x
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())


@triton.jit
def _after_another_launch(x, out, N: tl.constexpr):
    gdc_wait()
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + 1)
    gdc_launch_dependents()


def test_waiting_for_the_launch_before_is_nothing_on_a_cpu():
    x, out = torch.randn(8), torch.zeros(8)
    if RELEASE < (3, 9):  # where it is inline assembly of a GPU
        with pytest.raises(UnsupportedOperation, match="inline_asm"):
            _after_another_launch[(1,)](x, out, N=8)
    else:
        _after_another_launch[(1,)](x, out, N=8)
        assert torch.equal(out, x + 1)
