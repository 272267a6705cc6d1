"""The executor: adopts layers, holds their seeds' state, loads proven kernels and runs them. It never compiles."""

from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.state import KasminaStateLayout

__all__ = ["KasminaLayer", "KasminaStateLayout", "KernelCache", "KernelProgram", "SeedLifecycleState"]
