"""The driver half of the Triton plugin: the CPU as Triton's device, and the launcher.

Triton imports this module while it is itself being imported: it imports neither torch nor llvmlite.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from esper_triton.cpu.errors import LaunchError, UnsupportedOperation
from esper_triton.cpu.launcher import KernelTable

# Imported here, not on first use, because it notes a fork of the process.
from esper_triton.cpu.native import LoadedCode, NativeKernel, share_threads
from esper_triton.cpu.trap import FRAME_SLOTS, failure

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


class CPUDriver(DriverBase):  # type: ignore[misc]  # triton carries no types
    """The CPU as Triton's active device: where no GPU is usable, or where `TRITON_DEFAULT_BACKEND=cpu` asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = _Utils()
        self.launcher_cls = _make_launcher

    @staticmethod
    def is_active() -> bool:
        if os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu":
            return True
        try:
            import torch

            return not torch.cuda.is_available()  # true for HIP as well
        except Exception:  # a broken torch must not keep Triton from choosing its driver
            return True

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


class _Utils:
    """What `triton.compiler.CompiledKernel` asks of a driver."""

    def load_binary(
        self,
        name: str,
        kernel: bytes,
        shared: int,
        device: Any,
    ) -> tuple[LoadedCode, LoadedCode, int, int, int]:
        """(module, function, registers, spills, most threads); module and function are the same object here."""
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


def _make_launcher(src: Any, metadata: Any) -> Callable[..., None]:
    """What Triton calls with the grid and all arguments of a launch: the fast path, which falls back to `_Launcher`."""
    slow = _Launcher(src, metadata)
    return slow.table.stock_launch(slow, slow.failed)


class _Launcher:
    """Turns the arguments that Triton has bound into the slots of a `NativeKernel` and runs it.

    Triton makes the launcher before it loads the object code, so the code comes with each call.

    Attributes:
        table: what the fast path knows of this kernel.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self._name = metadata.name
        self._names = tuple(map(str, src.signature))
        self._types = tuple(src.signature.values())
        self._signature = tuple(type for type, _ in _flatten(self._types, self._types, self._name))
        for type in self._signature:
            if type.startswith("tensordesc"):
                raise UnsupportedOperation(
                    "a tensor descriptor as an argument", kernel=self._name, reason="make it in the kernel instead"
                )
        self.table = KernelTable(self._types)
        self._kernel: NativeKernel | None = None
        self._code: LoadedCode | None = None

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: LoadedCode,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], Any] | None,
        exit_hook: Callable[[Any], Any] | None,
        *args: Any,
    ) -> None:
        """Raises: LaunchError (wrong grid, number, type, range or device of arguments), before anything ran."""
        kernel = self._kernel
        if kernel is None or self._code is not function:
            kernel = self._kernel = NativeKernel(function, self._signature)
            self._code = function
            share_threads()
            self.table.bind(function, function.address)
        if len(args) != len(self._types):
            raise LaunchError(
                f"kernel {self._name!r} was given {len(args)} arguments, expected {len(self._types)}: "
                + ", ".join(self._names)
            )
        values = [value for _, value in _flatten(self._types, args, self._name)]
        run = kernel.bind((grid_x, grid_y, grid_z), values)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        run()
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def failed(self, frame: bytes) -> None:
        """Raise what the frame of a failed launch says."""
        raise failure(struct.unpack(f"={FRAME_SLOTS}q", frame), self._name)


def _flatten(types: Sequence[Any], values: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Each run-time argument with its type: constexprs dropped, tuples opened up."""
    for type, value in zip(types, values, strict=True):
        if isinstance(type, tuple):
            if len(value) != len(type):
                raise LaunchError(f"kernel {name!r} was given a tuple of {len(value)}, expected {len(type)}")
            yield from _flatten(type, value, name)
        elif type != "constexpr":
            yield type, value
