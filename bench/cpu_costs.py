"""What a kernel costs apart from its work: launch, compilation, loading of stored object code, and memory."""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cpu_kernels as kernels
import torch
import triton
from rich.progress import Progress

from esper_triton.cpu import compiler, prepare
from esper_triton.cpu.native import LoadedCode

CALLS = 2000  # in one sample of a launch


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, float]:
    """Medians of at least `options.samples`; the names carry the units. On one thread."""
    torch.set_num_threads(1)
    clock = time.thread_time_ns if options.cpu_time else time.perf_counter_ns
    task = progress.add_task("costs", total=4)
    costs: dict[str, float] = {}
    for part in (_launch_us, _compile_ms):
        costs |= part(options.samples, clock)
        progress.advance(task)
    costs |= _peak_kib()
    progress.advance(task)
    costs |= _growth_kib(options.launches)
    progress.advance(task)
    return costs


def _launch_us(samples: int, clock: Callable[[], int]) -> dict[str, float]:
    """Launches of an addition of 1024 elements, in turn with torch's own addition."""
    x, y, out = torch.randn(1024), torch.randn(1024), torch.empty(1024)
    prepared = prepare(kernels.add[(1,)](x, y, out, 1024, BLOCK=1024))

    def loops() -> dict[str, Callable[[], None]]:
        # Bare loops: calling a function of Python for each launch would add to what is measured.
        def direct() -> None:
            for _ in range(CALLS):
                prepared(1, 1, 1, x, y, out, 1024)

        def stock() -> None:
            for _ in range(CALLS):
                kernels.add[(1,)](x, y, out, 1024, BLOCK=1024)

        def eager() -> None:
            for _ in range(CALLS):
                torch.add(x, y, out=out)

        return {"prepared_launch_us": direct, "stock_launch_us": stock, "torch_add_us": eager}

    times: dict[str, list[float]] = {name: [] for name in loops()}
    for _ in range(samples + 1):
        for name, loop in loops().items():
            began = clock()
            loop()
            times[name].append((clock() - began) / CALLS / 1000)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up


def _compile_ms(samples: int, clock: Callable[[], int]) -> dict[str, float]:
    """Compilation with nothing remembered and an empty folder of stored code, and loading of what was stored.

    Python, Triton and LLVM have been loaded before: the first sample is not counted.
    """
    x, out = torch.randn(4, 1024), torch.empty(4, 1024)
    a, b, c = (torch.randn(512, 512) for _ in range(3))
    sources: dict[str, Callable[[], object]] = {
        "softmax": lambda: kernels.softmax.warmup(x, out, 1024, 1024, BLOCK=1024, grid=(4,)),
        "matmul": lambda: kernels.matmul.warmup(a, b, c, 512, 512, 512, BM=64, BN=64, BK=64, EVEN=False, grid=(8, 8)),
    }
    jitted = {"softmax": kernels.softmax, "matmul": kernels.matmul}
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> object:
        began = clock()
        result = function()
        times.setdefault(name, []).append((clock() - began) / 1e6)
        return result

    for _ in range(max(samples, 15) + 1):
        for name, compile_it in sources.items():
            with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
                triton.knobs.cache.dir = folder
                for remembered in (compiler._lower, compiler._object):
                    remembered.cache_clear()
                jitted[name].device_caches.clear()
                compiled = timed(f"{name}_compile_ms", compile_it)
                jitted[name].device_caches.clear()
                timed(f"{name}_from_disk_ms", compile_it)  # with all that Triton does to find and read it
                code, symbol = compiled.asm["o"], compiled.metadata.name
                timed(f"{name}_load_ms", lambda code=code, symbol=symbol: LoadedCode.load(code, symbol=symbol))
    for kernel in jitted.values():
        kernel.device_caches.clear()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def _peak_kib() -> dict[str, float]:
    """Most resident memory during the first launch of a thread, less that before it, inputs and outputs being there.

    A kernel's arena belongs to its thread, so a thread that has launched nothing yet shows it.
    """
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    blocks = {"BM": 64, "BN": 64, "BK": 64, "EVEN": False}
    matmul = prepare(kernels.matmul.warmup(a, b, c, 1024, 1024, 1024, **blocks, grid=(16, 16)), num_threads=1)
    softmax = prepare(kernels.softmax.warmup(a, c, 1024, 1024, BLOCK=1024, grid=(1024,)), num_threads=1)
    runs = {
        "matmul_peak_kib": lambda: matmul(16, 16, 1, a, b, c, 1024, 1024, 1024),
        "softmax_peak_kib": lambda: softmax(1024, 1, 1, a, c, 1024, 1024),
    }
    peaks: dict[str, float] = {}

    def first_launch(name: str) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from now
        before = _status_kib("VmRSS")
        runs[name]()
        peaks[name] = max(_status_kib("VmHWM") - before, 0)

    for name in runs:
        thread = threading.Thread(target=first_launch, args=(name,))
        thread.start()
        thread.join()
    return peaks


def _growth_kib(launches: int) -> dict[str, float]:
    """Resident memory after many launches, stock and prepared in turn, less that after the first thousands."""
    x, y, out = torch.randn(64), torch.randn(64), torch.empty(64)
    prepared = prepare(kernels.add[(1,)](x, y, out, 64, BLOCK=64))

    def run(count: int) -> None:
        for _ in range(count // 2):
            prepared(1, 1, 1, x, y, out, 64)
            kernels.add[(1,)](x, y, out, 64, BLOCK=64)

    run(4000)
    before = _status_kib("VmRSS")
    run(launches)
    return {"launches": launches, "growth_kib": _status_kib("VmRSS") - before}
