"""Compile targets: what `cpu`, `cuda:90` and `hip:gfx942` stand for."""

from __future__ import annotations

import platform
from typing import Any

from esper_triton.contracts.errors import UnknownTarget, nearest
from esper_triton.contracts.manifest import TargetSpec

__all__ = ["parse_target", "runs_on_this_cpu", "shared_memory_limit", "triton_target"]

_KIB = 1024
# Shared memory that one program may use. The compiler does not ask for it: a kernel above it would fail at its load.
_CUDA_SHARED_KIB = {
    "80": 163,
    "86": 99,
    "87": 163,
    "89": 99,
    "90": 227,
    "100": 227,
    "103": 227,
    "110": 227,
    "120": 99,
    "121": 99,
}
_HIP_SHARED_KIB = {
    "gfx90a": 64,
    "gfx942": 64,
    "gfx950": 160,
    "gfx1100": 64,
    "gfx1101": 64,
    "gfx1102": 64,
    "gfx1150": 64,
    "gfx1151": 64,
    "gfx1200": 64,
    "gfx1201": 64,
}
_LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
_NAMES = (
    "cpu",
    *(f"cpu:{level}" for level in _LEVELS),
    *(f"cuda:{arch}" for arch in _CUDA_SHARED_KIB),
    *(f"hip:{arch}" for arch in _HIP_SHARED_KIB),
)


def parse_target(text: str) -> TargetSpec:
    """The machine that `text` names: `cpu` is this one with its instruction sets, `cpu:x86-64-v3` any that has those of
    that level; a GPU need not be here.

    Raises UnknownTarget with the nearest names.
    """
    backend, _, arch = text.partition(":")
    if backend == "cpu":
        from esper_triton.cpu.host import BASELINES, cpu_features, cpu_name  # here: a GPU compile needs no LLVM of ours

        if text == "cpu":
            return TargetSpec(backend="cpu", arch=cpu_name(), features=cpu_features())
        if arch in BASELINES and platform.machine() in ("x86_64", "AMD64"):
            return TargetSpec(backend="cpu", arch=arch, features=BASELINES[arch])
    if text not in _NAMES or backend == "cpu":
        raise UnknownTarget(
            f"target {text!r} is not 'cpu', 'cpu:x86-64-v3', or 'cuda:<capability>' or 'hip:<gfx name>' of a GPU that "
            "can be compiled for"
            f"{nearest(text, _NAMES)}"
        )
    return TargetSpec.model_validate({"backend": backend, "arch": arch})


def runs_on_this_cpu(spec: TargetSpec) -> bool:
    """Whether this machine has what code for a CPU target may use."""
    from esper_triton.cpu.host import cpu_features

    return spec.backend == "cpu" and set(spec.features) <= set(cpu_features())


def triton_target(spec: TargetSpec) -> Any:
    """Triton's own name for the target: a `triton.backends.compiler.GPUTarget`, of a CPU too."""
    from triton.backends.compiler import GPUTarget

    match spec.backend:
        case "cpu":
            return GPUTarget("cpu", spec.arch, 1)
        case "cuda":
            return GPUTarget("cuda", int(spec.arch), 32)
        case "hip":
            return GPUTarget("hip", spec.arch, 64 if spec.arch.startswith("gfx9") else 32)


def shared_memory_limit(spec: TargetSpec) -> int | None:
    """Bytes of shared memory that one program can have; None on a CPU, where it is ordinary memory."""
    match spec.backend:
        case "cpu":
            return None
        case "cuda":
            return _CUDA_SHARED_KIB[spec.arch] * _KIB
        case "hip":
            return _HIP_SHARED_KIB[spec.arch] * _KIB
