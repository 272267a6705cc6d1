"""The processor that this process runs on, in LLVM's words."""

from __future__ import annotations

import platform
from functools import lru_cache

__all__ = ["cpu_features", "cpu_name", "feature_string", "vector_bits"]


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """LLVM's name of the host's processor, such as `znver3`."""
    import llvmlite.binding as llvm

    return str(llvm.get_host_cpu_name())


@lru_cache(maxsize=1)
def _features() -> dict[str, bool]:
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


@lru_cache(maxsize=1)
def cpu_features() -> tuple[str, ...]:
    """Names of LLVM's features that the host has, sorted, such as `("aes", "avx", "avx2", ...)`."""
    return tuple(sorted(name for name, enabled in _features().items() if enabled))


@lru_cache(maxsize=1)
def feature_string() -> str:
    """Every feature as `+name` or `-name`: what the host lacks is off even where its processor's name implies it."""
    return ",".join(f"{'+' if enabled else '-'}{name}" for name, enabled in sorted(_features().items()))


@lru_cache(maxsize=1)
def vector_bits() -> int:
    """Width of the widest vector register: 512 with AVX-512, 256 with AVX, otherwise 128."""
    features = cpu_features()
    if "avx512f" in features:
        return 512
    return 256 if "avx" in features and platform.machine() in ("x86_64", "AMD64") else 128
