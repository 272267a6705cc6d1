"""What a step has left to be read: faults, what calls have written on the device, and the signals of ramps.

Read at the boundary, never in a call (law 3), and as plain values, so that replicas can agree on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper_triton.contracts.errors import NonFiniteOutput, ReplicaFailed
from esper_triton.kasmina.gates import Evaluation
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import Seed

__all__ = ["Measured", "measure_step", "take_in", "who"]


@dataclass(kw_only=True)
class Measured:
    """Of one layer, in the step that has just ended; by seed where it is of a seed.

    Attributes:
        calls: of the layer, while a seed was active. faults: how many calls failed, and why the last one did.
        errors: relative reconstruction errors in TRAINING. drift, grad_norms: see `Signals`.
        evaluations: what `evaluate_seed` has measured in the seed's stage.
    """

    calls: int = 0
    faults: dict[int, tuple[int, str]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    drift: float | None = None
    grad_norms: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)


def who(record: LayerRecord, seed: Seed) -> str:
    """For messages."""
    return f"seed {seed.index} of layer {record.name!r} ({seed.artifact_id})"


def measure_step(record: LayerRecord) -> Measured:
    """Reads what the step has left, once: one transfer for all errors of the layer and one for all flags."""
    measured = Measured(calls=record.forward_calls_active - record.calls_counted, drift=_drift(record))
    _read_errors(record, measured)
    _read_flags(record)
    for seed in record.seeds:
        if seed.pending_faults:
            measured.faults[seed.index] = seed.pending_faults, f"{type(seed.last_error).__name__}: {seed.last_error}"
        if seed.evaluation is not None:
            measured.evaluations[seed.index] = seed.evaluation
        if seed.schedule is not None and "grad_norm" in seed.schedule.needs:
            norm = _grad_norm(seed)
            if norm is not None:
                measured.grad_norms[seed.index] = norm
    return measured


def take_in(record: LayerRecord, measured: Measured) -> None:
    """Makes what was measured elsewhere count for these seeds, in place of what was measured here."""
    record.calls_counted = record.forward_calls_active - measured.calls
    for seed in record.seeds:
        faults, reason = measured.faults.get(seed.index, (0, ""))
        if faults and not seed.pending_faults:
            seed.last_error = ReplicaFailed(f"{who(record, seed)} failed on another replica: {reason}")
        seed.pending_faults = faults
        seed.reconstruction_error = measured.errors.get(seed.index, seed.reconstruction_error)
        seed.evaluation = measured.evaluations.get(seed.index)


def _read_errors(record: LayerRecord, measured: Measured) -> None:
    waiting = [(seed, seed.measured_error) for seed in record.seeds if seed.measured_error is not None]
    if not waiting:
        return
    for (seed, _), error in zip(waiting, torch.stack([tensor for _, tensor in waiting]).tolist(), strict=True):
        seed.measured_error = None
        if not math.isfinite(error):
            seed.fault(NonFiniteOutput(f"{who(record, seed)}: its output in TRAINING is not finite"))
        elif error >= 0.0:
            seed.reconstruction_error = measured.errors[seed.index] = error


def _read_flags(record: LayerRecord) -> None:
    if record.nonfinite is None:
        return
    flags = record.nonfinite.tolist()
    if any(flags):
        record.nonfinite.zero_()
    for seed, flag in zip(record.seeds, flags, strict=True):
        if flag:
            seed.fault(NonFiniteOutput(f"{who(record, seed)}: its output was not finite where the host's was"))


def _drift(record: LayerRecord) -> float | None:
    before, now = record.output_mean, record.output_mean_now
    if now is None:
        return None
    record.output_mean, record.output_mean_now = now, None
    if before is None or before.device != now.device or before.dtype != now.dtype:
        return None
    return 1.0 - float(torch.cosine_similarity(before.double(), now.double(), dim=0))


def _grad_norm(seed: Seed) -> float | None:
    grads: list[Tensor] = [parameter.grad for parameter in seed.parameters.values() if parameter.grad is not None]
    if not grads:
        return None
    return float(torch.stack([grad.double().norm() for grad in grads]).norm())
