"""A handful of kernels that are compiled and run on this machine, each compared with numpy or with published values."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Kernels are in Triton's language, which has types of its own.)

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["TESTS", "Outcome", "run"]

_SEED = 20260131


@triton.jit
def _masked_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask) + tl.load(y_ptr + at, mask=mask), mask=mask)


@triton.jit
def _softmax(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) * columns
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + at, mask=at < columns, other=float("-inf"))
    powers = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row + at, powers / tl.sum(powers, 0), mask=at < columns)


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + rows * K + k[None, :], mask=(rows < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + columns, mask=(k[:, None] < K) & (columns < N), other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows * N + columns, total, mask=(rows < M) & (columns < N))


@triton.jit
def _count(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + tl.load(x_ptr + at, mask=at < n, other=0), 1, mask=at < n)


@triton.jit
def _philox(seed, counter_ptr, out_ptr):
    c0, c1, c2, c3 = tl.philox(
        seed, tl.load(counter_ptr), tl.load(counter_ptr + 1), tl.load(counter_ptr + 2), tl.load(counter_ptr + 3)
    )
    tl.store(out_ptr, c0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, c1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2, c2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3, c3.to(tl.int32, bitcast=True))


def _compared(found: torch.Tensor, expected: Any, tolerance: float) -> str:
    """Empty where `found` is `expected` (float64), relative to its largest magnitude; else what is wrong."""
    error = np.abs(found.double().numpy() - expected).max() / np.abs(expected).max()
    return "" if error <= tolerance else f"relative error {error:.1e}, expected at most {tolerance:.0e}"


def _poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def _test_add() -> str:
    n = 100_003
    x, y = (torch.from_numpy(np.random.default_rng(_SEED + k).standard_normal(n, np.float32)) for k in range(2))
    out = _poisoned(n + 1)
    _masked_add[(triton.cdiv(n, 1024),)](x, y, out, n, BLOCK=1024)
    if not torch.isnan(out[n]):
        return "the element behind the mask was written"
    return _compared(out[:n], x.double().numpy() + y.double().numpy(), 2**-23)


def _test_softmax() -> str:
    x = torch.from_numpy(10 * np.random.default_rng(_SEED).standard_normal((33, 1000), np.float32))
    out = _poisoned(33, 1000)
    _softmax[(33,)](x, out, 1000, BLOCK=1024)
    powers = np.exp(x.double().numpy() - x.double().numpy().max(1, keepdims=True))
    # exp is good to an ulp or so, and a float32 sum of 1000 positive terms to a few.
    return _compared(out, powers / powers.sum(1, keepdims=True), 1e-6)


def _test_matmul() -> str:
    m, n, k = 65, 97, 130
    rng = np.random.default_rng(_SEED)
    a, b = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((m, k), (k, n)))
    out = _poisoned(m, n)
    _matmul[(triton.cdiv(m, 32), triton.cdiv(n, 32))](a, b, out, m, n, k, BM=32, BN=32, BK=16)
    return _compared(out, a.double().numpy() @ b.double().numpy(), 1e-5)  # k roundings of 2**-24, at most


def _test_atomics() -> str:
    values = np.random.default_rng(_SEED).integers(0, 7, 50_001).astype(np.int32)
    out = torch.zeros(7, dtype=torch.int32)
    _count[(triton.cdiv(len(values), 256),)](torch.from_numpy(values), out, len(values), BLOCK=256)
    return _compared(out, np.bincount(values, minlength=7).astype(np.float64), 0.0)


# Key (low word first), counter and output of philox4x32-10 from the known answers that come with Random123.
_PHILOX = (
    ((0, 0), (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def _test_philox() -> str:
    for (low, high), counter, expected in _PHILOX:
        seed = low | high << 32
        given = torch.from_numpy(np.array(counter, np.uint32).view(np.int32))
        out = torch.zeros(4, dtype=torch.int32)
        _philox[(1,)](seed, given, out)
        found = tuple(int(word) for word in out.numpy().view(np.uint32))
        if found != expected:
            words = (" ".join(f"{word:08x}" for word in words) for words in (found, expected))
            return "{} instead of {}".format(*words)
    return ""


TESTS: dict[str, tuple[Callable[[], str], tuple[Any, ...]]] = {
    "masked add": (_test_add, (_masked_add,)),
    "softmax": (_test_softmax, (_softmax,)),
    "matmul (tl.dot)": (_test_matmul, (_matmul,)),
    "atomic add": (_test_atomics, (_count,)),
    "philox": (_test_philox, (_philox,)),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one test: `failure` is empty where it passed; `seconds` to compile and run it."""

    name: str
    failure: str
    seconds: float


def run(announce: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """Every test, compiled afresh into a folder that is gone afterwards, with the CPU as Triton's device meanwhile."""
    from esper_triton.cpu.enabling import active

    outcomes = []
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), active():
        triton.knobs.cache.dir = folder
        for name, (test, kernels) in TESTS.items():
            announce(name)
            for kernel in kernels:
                kernel.device_caches.clear()  # what was compiled in this process before
            started = time.perf_counter()
            try:
                failure = test()
            except Exception as error:
                failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            outcomes.append(Outcome(name=name, failure=failure, seconds=time.perf_counter() - started))
    return outcomes
