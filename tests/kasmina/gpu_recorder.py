"""A machine whose GPUs are not there: it records what would be loaded and launched on them, and computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton


@dataclass(frozen=True)
class Load:
    """One binary that was given to a device."""

    symbol: str
    binary: bytes
    shared: int
    index: int
    current: int  # the device that was current
    function: int  # the handle that was given back


@dataclass(frozen=True)
class Launch:
    """One call of a launcher, and the device that was current."""

    signature: tuple[str, ...]
    values: tuple[Any, ...]
    current: int


class RecordingDriver:
    """In the place of Triton's driver of a vendor."""

    def __init__(self, backend: str, warp_size: int) -> None:
        self.backend, self.warp_size = backend, warp_size
        self.utils = self
        self.current = 0
        self.streams: dict[int, int] = {}
        self.loads: list[Load] = []
        self.launches: list[Launch] = []
        self.metadata: list[Any] = []
        self.guards: list[int] = []
        self.max_threads, self.max_shared = 1024, 227 * 1024

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend=self.backend, warp_size=self.warp_size)

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, index: int) -> int:
        return self.streams.get(index, 0)

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {"max_shared_mem": self.max_shared}

    def load_binary(self, symbol: str, binary: bytes, shared: int, index: int) -> tuple[int, int, int, int, int]:
        function = 7000 + len(self.loads)
        self.loads.append(Load(symbol, binary, shared, index, self.current, function))
        return 5000 + len(self.loads), function, 32, 0, self.max_threads

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        self.metadata.append(metadata)
        signature = tuple(src.signature.values())
        return lambda *values: self.launches.append(Launch(signature, values, self.current))

    @contextmanager
    def guard(self, index: int) -> Iterator[None]:
        """In the place of `torch.cuda.device`."""
        before, self.current = self.current, index
        self.guards.append(index)
        try:
            yield
        finally:
            self.current = before


def pretend(monkeypatch: pytest.MonkeyPatch, backend: str, architectures: Sequence[str]) -> RecordingDriver:
    """For the rest of a test, torch and Triton see GPUs of these architectures, as in targets."""
    driver = RecordingDriver(backend, 64 if backend == "hip" else 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(architectures))
    monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
    monkeypatch.setattr(torch.cuda, "device", driver.guard)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    if backend == "hip":
        monkeypatch.setattr(torch.version, "hip", "7.0")
        names = [SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-") for name in architectures]
        monkeypatch.setattr(torch.cuda, "get_device_properties", names.__getitem__)
    else:
        monkeypatch.setattr(torch.version, "hip", None)
        capabilities = [(int(name[:-1]), int(name[-1])) for name in architectures]
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return driver
