"""What was measured of all seeds of a model, as one message."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from typing import Any

import numpy as np

from esper_triton.contracts.health import HealthFrame
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.statistics import ActivationStatistics

__all__ = ["HealthReader"]

_NAMES = [state.name for state in SeedLifecycleState]  # an enum's own `name` takes three times as long
_NOT_SAMPLED = ActivationStatistics(None, None, None)
_read = operator.attrgetter(
    *("state", "alpha", "error_count", "pending_faults", "is_ready", "latency_ns", "timed_calls", "calls", "health"),
    *("load_latency_us", "activations"),
)


class HealthReader:
    """Reads the seeds of some layers into messages, on the host alone: no tensor is looked at.

    Written column by column, since ten thousand seeds are read in some milliseconds of a training thread.

    Args:
        layers: by name; of one that has two names the first counts.
        latency_budget_us: see `health_score`.
    """

    def __init__(self, model: str, layers: Mapping[str, KasminaLayer], *, latency_budget_us: float) -> None:
        self._model = model
        self._latency_budget_us = latency_budget_us
        self._layers = list(dict.fromkeys(layers.values()))
        self._set_records([layer._kasmina for layer in self._layers])

    def _set_records(self, records: list[LayerRecord]) -> None:
        self._records = records
        self._seeds = list(chain.from_iterable(record.seeds for record in records))
        self._names = tuple(record.name for record in records)
        self._positions = tuple(chain.from_iterable(repeat(k, len(record.seeds)) for k, record in enumerate(records)))
        self._indices = tuple(seed.index for seed in self._seeds)
        self._starts = tuple(seed.span[0] for seed in self._seeds)
        self._stops = tuple(seed.span[1] for seed in self._seeds)

    def read(self) -> HealthFrame:
        """Every seed as it is now; layers that are no longer wrapped are left out.

        The score's error rate is the seed's moving average, and its hit ratio the process's. What was never measured is
        None, and so is a score without one of its parts.
        """
        present = [record for layer in self._layers if (record := layer.__dict__.get("_kasmina")) is not None]
        if len(present) != len(self._records) or any(a is not b for a, b in zip(present, self._records, strict=True)):
            self._set_records(present)
        cache = KernelCache.process().stats()
        loads = cache.hits + cache.misses
        hit_ratio = cache.hits / loads if loads else None
        columns = _columns(map(_read, self._seeds), 11)
        states, alphas, errors, pending, ready, latency_ns, timed, calls, failing, load_us, activations = columns
        latencies: list[float | None] | None = None
        scores: list[float | None] | None = None
        if any(timed):
            count = np.array(timed)
            latency_us = np.array(latency_ns) / 1000.0 / np.maximum(count, 1)
            latencies = [us if n else None for us, n in zip(latency_us.tolist(), timed, strict=True)]
            if hit_ratio is not None:
                in_time = 1.0 - np.minimum(latency_us / self._latency_budget_us, 1.0)
                without_fault = 1.0 - np.minimum(5.0 * np.array(failing), 1.0)
                score = 0.4 * in_time + 0.4 * without_fault + 0.2 * hit_ratio
                measured = (count > 0) & (np.array(calls) > 0)
                scores = [s if m else None for s, m in zip(score.tolist(), measured.tolist(), strict=True)]
        variances = dead_ratios = correlations = ()
        if any(activations):
            variances, dead_ratios, correlations = _columns([a or _NOT_SAMPLED for a in activations], 3)
        # Not validated: that would take longer than the rest, and the values are the layers' own.
        return HealthFrame.model_construct(
            model=self._model,
            timestamp=time.time(),
            cache_hit_ratio=hit_ratio,
            layers=self._names,
            epochs=tuple([record.epoch for record in present]),
            steps=tuple([record.step for record in present]),
            layer=self._positions,
            seed=self._indices,
            chunk_start=self._starts,
            chunk_stop=self._stops,
            state=tuple([_NAMES[state] for state in states]),
            alpha=alphas,
            error_count=tuple(map(operator.add, errors, pending)) if any(pending) else errors,
            is_ready_for_transition=ready,
            execution_latency_us=None if latencies is None else tuple(latencies),
            health_score=None if scores is None else tuple(scores),
            kernel_load_latency_us=_measured(load_us),
            activation_variance=_measured(variances),
            dead_neuron_ratio=_measured(dead_ratios),
            avg_correlation=_measured(correlations),
        )


def _columns(rows: Iterable[tuple[Any, ...]], width: int) -> list[tuple[Any, ...]]:
    """`zip(*rows)`, which makes an iterator of each of ten thousand rows and takes longer."""
    flat = tuple(chain.from_iterable(rows))
    return [flat[place::width] for place in range(width)]


def _measured(column: tuple[float | None, ...]) -> tuple[float | None, ...] | None:
    return None if column.count(None) == len(column) else column
