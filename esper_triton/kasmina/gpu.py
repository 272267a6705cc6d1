"""Kernels on GPUs: cubins and hsacos, loaded by Triton's own driver and launched on torch's current stream.

How a binary is loaded and how arguments are packed is the business of the Triton that is installed: its driver and its
launcher class do both, and nothing of their ABI is repeated here. None of this has run on a GPU yet; docs/gpu.md says
what has been checked without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.manifest import KernelRecord, Manifest, TargetSpec

__all__ = ["GPUKernel", "check_gpu", "find_gpu"]

# The launchers multiply the three extents of a grid as C ints and launch nothing where the product is not positive.
_MOST_PROGRAMS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What Triton's launcher classes read of a kernel's source. They take keys of any kind and go by the order."""

    signature: dict[int, str]
    constants: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _LaunchMetadata:
    """What Triton's launcher classes and backends read of a compiled kernel, of 3.6 to 3.9. The forge compiles nothing
    that needs more than one CTA, scratch memory, a cooperative grid or a dependent launch."""

    num_warps: int
    shared: int  # bytes
    warp_size: int
    num_ctas: int = 1
    global_scratch_size: int = 0
    global_scratch_align: int = 1
    profile_scratch_size: int = 0
    profile_scratch_align: int = 1
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    tensordesc_meta: None = None
    instrumentation_mode: str = ""


class _Function(NamedTuple):
    """A kernel in a device's memory."""

    handle: int
    max_threads: int


class GPUKernel:
    """One kernel on one GPU.

    `launcher()` gives `launch(x, y, z, *args)`: x, y, z are the grid, args follow the kernel's signature, pointers as
    device addresses. It returns before the kernel has run. It launches on torch's current stream of the kernel's
    device, asked for at each launch, whichever device is current; so it can be captured in a CUDA graph. It allocates
    nothing and reads nothing back. It raises ValueError for a grid of more than 2**31 - 1 programs, and RuntimeError
    from the driver.
    """

    def __init__(
        self,
        *,
        run: Callable[..., None],
        function: int,
        packed_metadata: object,
        driver: Any,
        device_index: int,
        code_bytes: int,
    ) -> None:
        self._run = run
        self._function = function
        self._packed_metadata = packed_metadata
        self._driver = driver
        self._device_index = device_index
        self.code_bytes = code_bytes

    @classmethod
    def load(cls, binary: bytes, record: KernelRecord, target: TargetSpec, device: torch.device) -> GPUKernel:
        """Loads a binary that `check_gpu` has found to be for `device`, which has an index.

        Whatever takes time is done here: the binary goes to the device, and Triton 3.6 compiles its launcher with a C
        compiler (later ones come with it).

        Raises ArtifactRefused where Triton's active driver is not that of the device, where the device cannot take the
        kernel (threads, shared memory, the driver's own reason), and where no launcher can be made.
        """
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        driver = _active_driver(target)
        index = device.index
        where = f"kernel {record.name!r} for {target.label} cannot be loaded onto {device}"
        # A binary is loaded into the context that is current, whatever index the driver is given.
        with torch.cuda.device(index):
            warp_size = driver.get_current_target().warp_size
            shared_limit = driver.utils.get_device_properties(index)["max_shared_mem"]
            if record.shared_bytes > shared_limit:
                raise ArtifactRefused(
                    f"{where}: it needs {record.shared_bytes} bytes of shared memory, one program can have "
                    f"{shared_limit} there; compile it with smaller blocks"
                )
            metadata = _LaunchMetadata(num_warps=record.num_warps, shared=record.shared_bytes, warp_size=warp_size)
            try:
                function = _load_function(driver.utils.load_binary, record.symbol, binary, record.shared_bytes, index)
                run = driver.launcher_cls(_Source(signature=dict(enumerate(record.signature))), metadata)
            except Exception as error:
                raise ArtifactRefused(f"{where}: {type(error).__name__}: {error}") from error
        threads = record.num_warps * warp_size
        if threads > function.max_threads:
            raise ArtifactRefused(
                f"{where}: {record.num_warps} warps of {warp_size} are {threads} threads, the device takes "
                f"{function.max_threads} of this kernel; compile it with fewer warps"
            )
        arch: str | int = int(target.arch) if target.backend == "cuda" else target.arch
        backend = make_backend(GPUTarget(target.backend, arch, warp_size))
        return cls(
            run=run,
            function=function.handle,
            packed_metadata=backend.pack_metadata(metadata),
            driver=driver,
            device_index=index,
            code_bytes=len(binary),
        )

    def launcher(self) -> Callable[..., None]:
        """The function that launches; it keeps the kernel."""
        run, function, packed_metadata, index = self._run, self._function, self._packed_metadata, self._device_index
        # torch's own, under the names by which Triton's driver has them on every release and for either vendor.
        current_device, current_stream = self._driver.get_current_device, self._driver.get_current_stream

        def launch(x: int, y: int, z: int, *args: Any) -> None:
            if x * y * z > _MOST_PROGRAMS:
                raise ValueError(f"a grid of {x} x {y} x {z} programs is more than a GPU's launch can have, 2**31 - 1")
            # Every release's launcher takes an integer for a pointer as it is (CUDA and HIP, 3.6 to 3.9: getPointer and
            # extractPointer begin with PyLong_Check), and asks the driver about nothing then. The three None are the
            # launch's metadata and hooks, which profilers of Triton's own set.
            if current_device() == index:
                run(x, y, z, current_stream(index), function, packed_metadata, None, None, None, *args)
                return
            with torch.cuda.device(index):
                run(x, y, z, current_stream(index), function, packed_metadata, None, None, None, *args)

        return launch


@functools.cache
def _load_function(
    load_binary: Callable[..., tuple[Any, ...]], symbol: str, binary: bytes, shared_bytes: int, device_index: int
) -> _Function:
    """Once a process for each kernel and device. What is loaded stays: a captured graph may launch it long after its
    layer has let go of it, and Triton before 3.9 cannot unload. So loading the same again must cost no memory."""
    _, handle, _, _, max_threads = load_binary(symbol, binary, shared_bytes, device_index)
    return _Function(handle, max_threads)


def reset() -> None:
    """Forgets what has been loaded (for tests)."""
    _load_function.cache_clear()


def check_gpu(manifest: Manifest, device: torch.device) -> torch.device:
    """`device` with its index, if it is a GPU of exactly the architecture that the artifact was compiled for.

    Raises ArtifactRefused with the way out.
    """
    target, name = manifest.target, manifest.blueprint_name
    if target.backend != _vendor():
        raise ArtifactRefused(
            f"artifact {manifest.id} is for {target.label} and this process has no such device; "
            f"compile blueprint {name!r} for cpu, or load it on a machine that has one"
        )
    if device.type != "cuda":
        raise ArtifactRefused(
            f"artifact {manifest.id} is for {target.label} and cannot run on {device}; "
            f"compile blueprint {name!r} for cpu, or move the layer to the GPU"
        )
    if device.index is None:
        current = torch.cuda.current_device()  # type: ignore[unreachable]  # torch has it that index is never None
        device = torch.device("cuda", current)
    found = _architecture(device.index)
    if found != target.arch:
        others = [f"cuda:{i}" for i in range(torch.cuda.device_count()) if _architecture(i) == target.arch]
        raise ArtifactRefused(
            f"artifact {manifest.id} is for {target.label}, {device} ({torch.cuda.get_device_name(device.index)}) is "
            f"{target.backend}{found}; compile blueprint {name!r} for {target.backend}:{found}"
            + (f", or move the layer to {' or '.join(others)}" if others else "")
        )
    return device


def find_gpu(target: TargetSpec) -> torch.device | None:
    """The first GPU of this process on which binaries for `target` can run now; None where there is none, or where
    Triton's active driver is another's."""
    if target.backend != _vendor():
        return None
    try:
        _active_driver(target)
    except ArtifactRefused:
        return None
    indices = (i for i in range(torch.cuda.device_count()) if _architecture(i) == target.arch)
    return next((torch.device("cuda", i) for i in indices), None)


def _vendor() -> str | None:
    """`cuda` or `hip`, as in targets; None where torch has no GPU."""
    if not torch.cuda.is_available():
        return None
    return "hip" if _is_rocm() else "cuda"


def _is_rocm() -> bool:
    return torch.version.hip is not None


def _architecture(device_index: int) -> str:
    """As in targets: `90` or `gfx942`."""
    if _is_rocm():
        # With features behind it, as in gfx90a:sramecc+:xnack-; code for the plain name runs with any of them.
        return str(torch.cuda.get_device_properties(device_index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"{major}{minor}"


def _active_driver(target: TargetSpec) -> Any:
    """Triton's active driver, which must be that of `target`: the launcher classes use whichever is active."""
    import triton

    try:
        driver = triton.runtime.driver.active
        active = driver.get_current_target().backend
    except RuntimeError as error:
        raise ArtifactRefused(f"a kernel for {target.label} cannot be loaded: Triton has no driver: {error}") from error
    if active != target.backend:
        way_out = (
            "call esper_triton.cpu.disable(), and unset ESPER_TRITON_CPU and TRITON_DEFAULT_BACKEND"
            if active == "cpu"
            else "load it in a process whose Triton uses that device"
        )
        raise ArtifactRefused(
            f"a kernel for {target.label} cannot be loaded while Triton's active driver is that of {active!r}; "
            f"{way_out}"
        )
    return driver
