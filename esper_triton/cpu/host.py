"""The processor that code is for, in LLVM's words: this machine's, or a baseline that many machines have."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

__all__ = [
    "BASELINES",
    "compiling_for",
    "cpu_features",
    "cpu_name",
    "feature_string",
    "last_level_cache_bytes",
    "vector_bits",
]

_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
BASELINES: dict[str, tuple[str, ...]] = {
    "x86-64": (),
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}
"""Levels of the x86-64 psABI (section 3.1.1), which LLVM knows as processors, with the features of each beyond those of
the first."""

_baseline: ContextVar[str | None] = ContextVar("esper_triton_baseline", default=None)


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Meanwhile, and in this thread, the functions below speak of a baseline where `name` is one, not of the host."""
    token = _baseline.set(name if name in BASELINES else None)
    try:
        yield
    finally:
        _baseline.reset(token)


_FILE = "processor.json"


def cpu_name() -> str:
    """LLVM's name of the processor, such as `znver3`."""
    return _baseline.get() or _processor()[0]


def _features() -> dict[str, bool]:
    baseline = _baseline.get()
    return _processor()[1] if baseline is None else dict.fromkeys(BASELINES[baseline], True)


@lru_cache(maxsize=1)
def _processor() -> tuple[str, dict[str, bool]]:
    """LLVM's answer, which is kept in Triton's cache folder for as long as this machine is up: loading LLVM to ask it
    takes longer than everything else that this backend does to launch a kernel that is compiled already."""
    boot = _boot()
    if boot is None:
        return _ask_llvm()
    import llvmlite
    from triton.runtime.cache import get_cache_manager

    try:
        cache = get_cache_manager(hashlib.sha256(f"{boot} {llvmlite.__version__}".encode()).hexdigest())
        if path := cache.get_file(_FILE):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not whole: asked for again
                with open(path, encoding="utf-8") as file:
                    kept = json.load(file)
                return str(kept["name"]), {str(name): bool(enabled) for name, enabled in kept["features"].items()}
    except (OSError, RuntimeError):  # a folder that cannot be used
        return _ask_llvm()
    name, features = _ask_llvm()
    with suppress(OSError):
        cache.put(json.dumps({"name": name, "features": features}), _FILE, binary=False)
    return name, features


def _ask_llvm() -> tuple[str, dict[str, bool]]:
    import llvmlite.binding as llvm

    return str(llvm.get_host_cpu_name()), dict(llvm.get_host_cpu_features())


def _boot() -> str | None:
    """What no other machine has, nor this one after its next start; None where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def cpu_features() -> tuple[str, ...]:
    """Names of LLVM's features that the processor has, sorted, such as `("aes", "avx", "avx2", ...)`."""
    return tuple(sorted(name for name, enabled in _features().items() if enabled))


def feature_string() -> str:
    """Every feature as `+name` or `-name`: what a host lacks is off even where its processor's name implies it."""
    return ",".join(f"{'+' if enabled else '-'}{name}" for name, enabled in sorted(_features().items()))


def vector_bits() -> int:
    """Width of the widest vector register: 512 with AVX-512, 256 with AVX, otherwise 128."""
    features = cpu_features()
    if "avx512f" in features:
        return 512
    return 256 if "avx" in features and platform.machine() in ("x86_64", "AMD64") else 128


@lru_cache(maxsize=1)
def last_level_cache_bytes() -> int:
    """Size of the largest cache that a core of this machine has access to; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):  # such as "32768K"
            sizes.append(int(path.read_text(encoding="ascii").strip().removesuffix("K")) * 1024)
    return max(sizes, default=32 * 2**20)
