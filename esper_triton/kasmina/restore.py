"""Layers that were copied, unpickled, moved or cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper_triton.kasmina import loading
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.moves import warn
from esper_triton.kasmina.pending import load_request

if TYPE_CHECKING:
    from esper_triton.kasmina.layer import KasminaLayer

__all__ = ["converted", "restore_kernels"]

_S = SeedLifecycleState
_HOLDS_A_KERNEL = (_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED)


def restore_kernels(layer: KasminaLayer) -> None:
    """After a deep copy the kernels are shared; after unpickling they are loaded again, each seed whose kernel cannot
    be in recovery, with what it had learned."""
    record = layer._kasmina
    for seed in record.seeds:
        if seed.kernel is not None:
            KernelCache.process().pin(seed.kernel.key, seed.kernel.program, seed)
        elif seed.artifact_id is not None and seed.state in _HOLDS_A_KERNEL:
            try:
                if record.urza is None:
                    raise ValueError(
                        f"seed {seed.index} of layer {record.name!r}: no Urza to load {seed.artifact_id!r} from"
                    )
                request = load_request(layer, seed, seed.artifact_id, holder=seed)
                seed.kernel = loading.load(request, record.urza)
                seed.load_latency_us = seed.kernel.load_latency_us
            except Exception as error:
                seed.last_error = error
                seed.alpha = 0.0
                seed.enter(_S.ERROR_RECOVERY, record.epoch)
                warn("kernel_not_restored", record.name, seed.index, seed.artifact_id, error)


def converted(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """As `nn.Module._apply` does for the host's: the same object with new contents wherever torch allows it."""
    with torch.no_grad():
        value = fn(parameter)
        grad = None if parameter.grad is None else fn(parameter.grad)
    try:
        parameter.data = value
    except (RuntimeError, TypeError):  # to or from a kind of tensor of another make, such as meta
        parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
    parameter.grad = grad
    return parameter
