"""Packages of kernels are imported with the CPU as Triton's target, and their tuners are kept short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import packages
import pytest
import torch
import triton
from triton import knobs
from triton.runtime.autotuner import Autotuner

from esper_triton.cpu.driver import CPUDriver

_CONFIGURATIONS = 2  # that a tuner tries, of up to some dozens

triton.runtime.driver.set_active(CPUDriver())  # some ask for it when they are imported
packages.import_all()
triton.runtime.driver.reset_active()


@pytest.fixture(autouse=True, scope="module")
def _cpu() -> Iterator[None]:
    """Each configuration is run and timed once: what is tested is what kernels compute, whichever is chosen."""
    pruned = Autotuner.prune_configs

    def first(self: Autotuner, *args: Any, **keywords: Any) -> list[triton.Config]:
        return list(pruned(self, *args, **keywords))[:_CONFIGURATIONS]

    def benchmarker(self: CPUDriver) -> Callable[..., list[float]]:
        def once(run: Callable[[], object], quantiles: tuple[float, ...], **_: Any) -> list[float]:
            start = time.perf_counter()
            run()
            return [time.perf_counter() - start] * len(quantiles)

        return once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "prune_configs", first)
        patch.setattr(CPUDriver, "get_benchmarker", benchmarker)
        triton.runtime.driver.set_active(CPUDriver())
        yield
        triton.runtime.driver.reset_active()


@pytest.fixture
def launched() -> Iterator[set[str]]:
    """Names of the kernels that were launched, since many a package has another way for tensors on a CPU."""
    names: set[str] = set()

    def note(metadata: Any) -> None:
        names.add(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    yield names
    knobs.runtime.launch_enter_hook.remove(note)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20260131)
