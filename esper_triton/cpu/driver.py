"""The driver half of the Triton plugin: the CPU as Triton's device.

Triton imports this module while it is itself being imported, in every process of every user: it imports next to
nothing, and what it needs is imported when a kernel is first launched.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import esper_triton.cpu.forking  # noqa: F401  # from now on it takes note
from esper_triton.cpu.errors import CPUBackendError

__all__ = ["CPUDriver"]

_CPP_TYPES = {
    **{f"i{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **dict.fromkeys(("fp16", "bf16", "fp32", "f32"), "float"),
    **dict.fromkeys(("fp64", "f64"), "double"),
    "i1": "int8_t",
    "u1": "uint8_t",
}
_MAX_CACHE_BYTES = 256 * 2**20


_asking = threading.local()

if os.environ.get("ESPER_TRITON_CPU") == "1":
    # Triton's own way to choose one of several drivers. It reads this when a kernel is first used.
    os.environ["TRITON_DEFAULT_BACKEND"] = "cpu"


def _says_active(driver: Any) -> bool:
    try:
        return bool(driver.is_active())
    except Exception:  # a broken GPU driver, or a broken torch, must not keep Triton from running here
        return False


def _triton_takes_wishes() -> bool:
    """Whether this wheel reads TRITON_DEFAULT_BACKEND: 3.6 does not."""
    module = sys.modules.get("triton.runtime.driver")
    choose = getattr(module, "_create_driver", None)
    return "TRITON_DEFAULT_BACKEND" in getattr(getattr(choose, "__code__", None), "co_consts", ())


class CPUDriver(DriverBase):  # type: ignore[misc]  # triton carries no types
    """The CPU as Triton's active device: where no other backend is usable, or where it is asked for (`enable`,
    `ESPER_TRITON_CPU=1`, `TRITON_DEFAULT_BACKEND=cpu`)."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = _Utils()
        self.launcher_cls = _launcher

    @staticmethod
    def is_active() -> bool:
        """True where it was asked for, and where no other backend of this Triton says the same of itself, so that
        Triton never finds two.

        Raises:
            CPUBackendError: it was asked for by the environment, beside an active GPU, of a Triton that does not look
                there (before 3.7).
        """
        wished = os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu"
        if wished and _triton_takes_wishes():
            return True
        if (os.environ.get("ESPER_TRITON_CPU") == "0" and not wished) or getattr(_asking, "now", False):
            return False
        from triton.backends import backends

        _asking.now = True  # another backend may ask in the same way
        try:
            others = [name for name, b in backends.items() if b.driver is not CPUDriver and _says_active(b.driver)]
        finally:
            _asking.now = False
        if wished and others:
            raise CPUBackendError(
                f"this version of Triton cannot be told by its environment to take the CPU instead of {others[0]!r}: "
                "call esper_triton.cpu.enable()"
            )
        return not others

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The C type in which the argument arrives."""
        return "void*" if ty.startswith("*") else _CPP_TYPES[ty]

    def get_current_target(self) -> GPUTarget:
        from esper_triton.cpu.host import cpu_name

        return GPUTarget("cpu", cpu_name(), 1)

    def get_current_device(self) -> str:
        """Not 0, which would share Triton's per-device caches with `cuda:0`."""
        return "cpu"

    def set_current_device(self, device: Any) -> None:
        """Nothing: there is one CPU."""

    def get_current_stream(self, device: Any = None) -> int:
        """Always 0: a launch returns when it is done."""
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What `triton.testing.do_bench` asks of `torch.cuda`."""
        return _DeviceInterface

    def get_benchmarker(self) -> Callable[..., Any]:
        from triton.testing import do_bench

        return do_bench  # type: ignore[no-any-return]  # triton carries no types

    def get_empty_cache_for_benchmark(self) -> Any:
        """A buffer of twice the last-level cache: writing it evicts what a kernel left there."""
        import torch

        level3 = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
        return torch.empty(min(2 * level3 or 64 * 2**20, _MAX_CACHE_BYTES), dtype=torch.int8)

    def clear_cache(self, cache: Any) -> None:
        cache.zero_()


def _launcher(src: Any, metadata: Any) -> Callable[..., None]:
    from esper_triton.cpu.stock import stock_launcher

    return stock_launcher(src, metadata)


class _Utils:
    """What `triton.compiler.CompiledKernel` asks of a driver."""

    def load_binary(
        self,
        name: str,
        kernel: bytes,
        shared: int,
        device: Any,
    ) -> tuple[Any, Any, int, int, int]:
        """(module, function, registers, spills, most threads); module and function are the same object here."""
        from esper_triton.cpu.native import LoadedCode

        code = LoadedCode.load(kernel, symbol=name)
        return code, code, 0, 0, 2**31 - 1

    def unload_module(self, module: Any) -> None:
        """Nothing: machine code is freed with the last reference to it, so a launch in flight is safe."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 2**31 - 1, "multiprocessor_count": os.cpu_count() or 1, "warpSize": 1}


class _Event:
    """A point in time, for `do_bench`. Launches are synchronous, so the host's clock is the device's."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._enable_timing = enable_timing
        self._time_ns = 0

    def record(self, stream: Any = None) -> None:
        self._time_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to `end`; never 0, by which `do_bench` would divide."""
        return max(end._time_ns - self._time_ns, 1) / 1e6


class _DeviceInterface:
    Event = _Event

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Nothing to wait for: launches are synchronous."""

    @staticmethod
    def current_device() -> str:
        return "cpu"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1
