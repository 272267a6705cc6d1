"""What a kernel draws, without the kernel, and what comes of it in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import MUTANTS, forged

from esper_triton.cpu.enabling import active
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.philox import uniform
from esper_triton.urabrask.sandbox import Sandbox
from esper_triton.urabrask.subject import Call, Subject

LENGTH = 64
ROWS, WIDTH = 301, 48


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


@pytest.fixture(scope="module")
def dropped() -> Iterator[Callable[..., torch.Tensor]]:
    """`dropped(training, seed)`: the output at alpha 1 of a compiled kernel that drops a quarter of h * w = 1.5."""
    mutant = next(one for one in MUTANTS if one.blueprint == "dropped")
    made = forged(dataclasses.replace(mutant, edits=()))
    subject = Subject(made.manifest)
    with Sandbox.of_kernels(made.manifest, made.blobs) as box:

        def run(training: bool, seed: int) -> torch.Tensor:
            call = Call(
                extents=Extents.of_rows(ROWS),
                inputs={"h": torch.full((ROWS, WIDTH), 3.0)},
                parameters={"w": torch.full((WIDTH,), 0.5)},
                grad_out=torch.ones(ROWS, WIDTH),
                alpha=1.0,
                training=training,
                dropout_seed=seed,
            )
            placed = subject.place(call, box.arena)
            box.run(placed.forward + placed.backward)
            return subject.outcome(placed, box.arena.snapshot()).results["out"]

        yield run


def within(found: float, rate: float, draws: int) -> bool:
    """Whether so many draws may come to it: within five standard deviations of a binomial share."""
    return abs(found - rate) < 5 * (rate * (1 - rate) / draws) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17])
def test_a_kernel_keeps_three_quarters_scaled_up_and_draws_each_element_on_its_own(
    dropped: Callable[..., torch.Tensor], seed: int
) -> None:
    out = dropped(True, seed)
    kept = out != 0
    assert torch.equal(out[kept], torch.full((int(kept.sum()),), 1.5).mul(1 / 0.75))
    kept = kept.double()
    assert within(float(kept.mean()), 0.75, kept.numel())
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert within(float((one * other).mean()), 0.75**2, one.numel())  # neighbours know nothing of each other
    assert all(within(float(share), 0.75, ROWS) for share in kept.mean(0))
    assert all(within(float(share), 0.75, WIDTH) for share in kept.mean(1))


def test_another_seed_is_another_draw_the_same_one_the_same_and_eval_mode_drops_nothing(
    dropped: Callable[..., torch.Tensor],
) -> None:
    first, again, other = (dropped(True, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert within(float(((first != 0) == (other != 0)).double().mean()), 0.75**2 + 0.25**2, first.numel())
    for seed in (5, 6):
        assert torch.equal(dropped(False, seed), torch.full((ROWS, WIDTH), 1.5))
