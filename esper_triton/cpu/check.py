"""`python -m esper_triton.cpu --check`: what the backend finds of this machine and this installation."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

from esper_triton.cpu.errors import CPUBackendError

__all__ = ["check_environment", "findings"]

TESTED = ((3, 6), (3, 9))  # first and last minor version of Triton
# Of a processor's features, those that the lowering or LLVM makes something of.
_FEATURES = {
    "x86_64": (
        *("sse4.2", "avx", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
        *("avx512bf16", "avx512fp16", "avxvnni", "amx-tile"),
    ),
    "aarch64": ("neon", "fullfp16", "dotprod", "bf16", "i8mm", "sve", "sve2"),
}


def check_environment() -> None:
    """Whether kernels can be compiled here at all.

    Raises:
        CPUBackendError: a package is missing or cannot be imported, Triton does not know the backend, interprets
            kernels, or its printer does not give what the backend reads.
    """
    for package in ("torch", "llvmlite.binding", "numpy"):
        try:
            __import__(package)
        except Exception as error:
            name = package.partition(".")[0]
            raise CPUBackendError(
                f"{name} cannot be imported ({type(error).__name__}: {error}): install it with pip install {name}"
            ) from error
    from triton import knobs
    from triton.backends import backends

    known = backends.get("cpu")
    if known is None or not known.driver.__module__.startswith("esper_triton."):
        skips = os.environ.get("TRITON_BACKENDS_IN_TREE") == "1"
        remedy = "unset TRITON_BACKENDS_IN_TREE" if skips else "install esper-triton with pip, into this environment"
        found = f"found {', '.join(map(repr, sorted(backends)))}" if known is None else f"'cpu' is {known.driver!r}"
        raise CPUBackendError(f"Triton did not find the entry point of this backend ({found}): {remedy}")
    if knobs.runtime.interpret:
        raise CPUBackendError("TRITON_INTERPRET=1 is set, so Triton interprets kernels and compiles none: unset it")
    _check_printer()


def _check_printer() -> None:
    """Raises MLIRSyntaxError where an empty module is not printed, or not parsed, as it should be."""
    from triton._C.libtriton import ir

    from esper_triton.cpu import mlir

    context = ir.context()
    ir.load_dialects(context)
    module = ir.builder(context).create_module()
    mlir.parse(mlir.generic_text(module, context))


def findings() -> dict[str, dict[str, Any]]:
    """What was found, in groups of names and values that `json.dumps` takes.

    Raises:
        CPUBackendError: see `CPUDriver.is_active`.
    """
    return {"processor": _processor(), "threads": _threads(), "versions": _versions(), "triton": _triton()}


def _processor() -> dict[str, Any]:
    from esper_triton.cpu.host import cpu_features, cpu_name, vector_bits

    features = set(cpu_features())
    return {
        "name": _model() or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "LLVM's name": cpu_name(),
        "features": {name: name in features for name in _FEATURES.get(platform.machine(), ())},
        "vector bits": vector_bits(),
        "lanes of a chunk": 2 * vector_bits() // 32,
    }


def _model() -> str:
    """The processor's own name; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _threads() -> dict[str, Any]:
    import torch

    return {
        "of a launch (torch.get_num_threads)": torch.get_num_threads(),
        "cores of this process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }


def _versions() -> dict[str, Any]:
    import llvmlite
    import llvmlite.binding as llvm
    import torch
    import triton

    numbers = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    first, last = (".".join(map(str, version)) for version in TESTED)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "triton is a tested version": TESTED[0] <= numbers <= TESTED[1],
        "tested versions of triton": f"{first} to {last}",
        "llvmlite": llvmlite.__version__,
        "LLVM": ".".join(map(str, llvm.llvm_version_info)),
    }


def _triton() -> dict[str, Any]:
    from triton import knobs
    from triton.backends import backends

    from esper_triton.cpu.driver import CPUDriver

    is_active = CPUDriver.is_active()
    return {
        "backends": sorted(backends),
        "CPU is the active device": is_active,
        "because": _reason(is_active),
        "cache folder": str(knobs.cache.dir),
        "sanitizer": os.environ.get("ESPER_TRITON_SANITIZE") or None,
    }


def _reason(is_active: bool) -> str:
    from triton.backends import backends

    wished = "ESPER_TRITON_CPU=1" if os.environ.get("ESPER_TRITON_CPU") == "1" else "TRITON_DEFAULT_BACKEND=cpu"
    if is_active and os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu":
        return f"{wished} is set"
    if is_active:
        return "no other backend finds a device"
    ask = "set ESPER_TRITON_CPU=1 or call esper_triton.cpu.enable() to use the CPU"
    if os.environ.get("ESPER_TRITON_CPU") == "0":
        return f"ESPER_TRITON_CPU=0 is set; {ask}"
    others = [name for name in sorted(backends) if name != "cpu"]
    return f"a device of another backend ({' or '.join(others)}) was found; {ask}"
