"""The executor: adopts layers, holds their seeds' state, loads proven kernels and runs them. It never compiles."""

from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.gates import ErrorRateGate, Evaluation, MetricGate, Policy, ReconstructionGate
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.schedules import Schedule, Signals, cosine, drift_controlled, grad_norm_gated, linear
from esper_triton.kasmina.state import KasminaStateLayout

__all__ = [
    "ErrorRateGate",
    "Evaluation",
    "KasminaLayer",
    "KasminaStateLayout",
    "KernelCache",
    "KernelProgram",
    "MetricGate",
    "Policy",
    "ReconstructionGate",
    "Schedule",
    "SeedLifecycleState",
    "Signals",
    "cosine",
    "drift_controlled",
    "grad_norm_gated",
    "linear",
]
