"""Kernels in this process, without a sandbox: on a GPU, and for whoever vouches for the code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.gpu import GPUKernel
from esper_triton.kasmina.launcher import check_machine
from esper_triton.urabrask.arena import Arena
from esper_triton.urabrask.sandbox import Failed, Limits, Threads
from esper_triton.urabrask.subject import Launch

__all__ = ["LocalRunner"]


class LocalRunner:
    """A `Runner` of the binaries themselves. On a GPU the arena is copied there before each call, and back after it.

    A kernel that leaves a GPU's memory altogether makes every later use of the GPU by this process fail; the process
    should end then.
    """

    def __init__(
        self, manifest: Manifest, blobs: Mapping[str, bytes], device: torch.device, limits: Limits | None = None
    ) -> None:
        """Raises ArtifactRefused where the artifact is not for `device`, and what its loader raises."""
        self.device = check_machine(manifest, device)
        self.arena = Arena((limits or Limits()).tensor_bytes)
        self._launchers: dict[str, dict[Threads, Callable[..., None]]] = {}
        for name, record in manifest.kernels.items():
            if self.device.type == "cuda":
                launcher = GPUKernel.load(blobs[record.binary], record, manifest.target, self.device).launcher()
                self._launchers[name] = dict.fromkeys(("one", "two", "usual"), launcher)
            else:
                from esper_triton.cpu.native import NativeKernel

                native = NativeKernel.load(blobs[record.binary], symbol=record.symbol, signature=record.signature)
                self._launchers[name] = {
                    "one": native.launcher(1),
                    "two": native.launcher(2),
                    "usual": native.launcher(),
                }

    def run(self, launches: Sequence[Launch], threads: Threads = "one") -> None:
        """Raises Failed."""
        self._on_device(lambda base: self._launch(self._resolved(launches, base, threads)))

    def time(self, launches: Sequence[Launch], samples: int, inner: int) -> list[int]:
        """Nanoseconds of the launches: `samples` means of `inner`. Raises Failed."""
        found: list[int] = []

        def measure(base: int) -> None:
            resolved = self._resolved(launches, base, "usual")
            for _ in range(samples):
                self._wait()
                began = time.perf_counter_ns()
                for _ in range(inner):
                    self._launch(resolved)
                self._wait()
                found.append((time.perf_counter_ns() - began) // inner)

        self._on_device(measure)
        return found

    def close(self) -> None:
        """Gives its memory back."""
        self.arena.close()

    def _resolved(self, launches: Sequence[Launch], base: int, threads: Threads) -> list[tuple[Any, tuple[int, ...]]]:
        return [
            (
                self._launchers[name][threads],
                (*grid, *(base + value[0] if isinstance(value, list) else value for value in arguments)),
            )
            for name, grid, arguments in launches
        ]

    @staticmethod
    def _launch(resolved: Sequence[tuple[Any, tuple[int, ...]]]) -> None:
        for launch, arguments in resolved:
            launch(*arguments)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _on_device(self, work: Callable[[int], None]) -> None:
        try:
            if self.device.type == "cpu":
                work(self.arena.memory.data_ptr())
                return
            used = self.arena.used
            there = used.to(self.device)
            # The arena's addresses count from its beginning, which is not copied.
            work(there.data_ptr() - used.data_ptr() + self.arena.memory.data_ptr())
            self._wait()
            used.copy_(there)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
