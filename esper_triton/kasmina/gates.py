"""Gates: what a seed must have shown before it goes on, and the times that its stages take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from esper_triton.kasmina.schedules import Schedule, linear

__all__ = ["ErrorRateGate", "Evaluation", "MetricGate", "Policy", "ReconstructionGate", "Verdict"]

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, kw_only=True)
class ReconstructionGate:
    """TRAINING to GRAFTING: the relative reconstruction error ||k - h|| / ||h|| is at most `max_error`, or `max_steps`
    have been spent."""

    max_error: float = 0.01
    max_steps: int = 1000

    def opens(self, error: float | None, steps: int) -> bool:
        """Whether a seed with this error (None: not measured yet) after so many steps may go on."""
        return steps >= self.max_steps or (error is not None and error <= self.max_error)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_seed` measured: the metric with the seed's alpha as it is and with alpha 0, once each a repeat.

    Attributes:
        on, off: the metric's values, pair by pair.
        lower_is_better: whether the metric is a loss.
    """

    on: tuple[float, ...]
    off: tuple[float, ...]
    lower_is_better: bool

    @property
    def _gains(self) -> Sequence[float]:
        sign = 1.0 if self.lower_is_better else -1.0
        return [sign * (off - on) for on, off in zip(self.on, self.off, strict=True)]

    @property
    def improvement(self) -> float:
        """Mean of the pairs' gains by the seed; below 0 where it does harm."""
        return statistics.fmean(self._gains)

    @property
    def noise(self) -> float:
        """Standard error of `improvement`; 0 for a metric that gives the same value each time."""
        return statistics.stdev(self._gains) / math.sqrt(len(self.on))


@dataclass(frozen=True, kw_only=True)
class MetricGate:
    """EVALUATING (and FINE_TUNING) to what follows: the metric has improved by more than `noises` times its measured
    noise. Worse by more than that in the other direction, or a metric that is not finite with the seed: CULLED; one
    that is not finite only without it has improved."""

    noises: float = 1.0

    def verdict(self, evaluation: Evaluation) -> Verdict:
        """Which way the gate sends a seed; `undecided` measures again."""
        if not all(map(math.isfinite, evaluation.on)):
            return "worse"
        if not all(map(math.isfinite, evaluation.off)):
            return "better"
        improvement, bound = evaluation.improvement, self.noises * evaluation.noise
        if improvement > bound:
            return "better"
        if improvement < -bound:
            return "worse"
        return "undecided"


@dataclass(frozen=True, kw_only=True)
class ErrorRateGate:
    """ERROR_RECOVERY to CULLED: more than `max_rate` of the seed's calls failed. Fewer than `min_calls` calls count as
    that many, so that one failure of a young seed is not a rate of 100 %."""

    max_rate: float = 0.10
    min_calls: int = 20

    def culls(self, errors: int, calls: int) -> bool:
        """Whether a seed with so many failed calls of so many goes."""
        return errors / max(calls, self.min_calls, 1) > self.max_rate


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The gates and times of a layer's seeds.

    Attributes:
        to_grafting, metric, error_rate: the gates.
        schedule: the ramp that `auto_advance` grafts with.
        stabilization_steps, fine_tuning_steps: steps that those stages take.
        embargo_epochs: epochs for which the slot of a culled seed takes no other.
        load_deadline_s: seconds that a background load may take once it has begun.
        sample_every: steps from one check of seeds' outputs for non-finite values to the next; 0 for never. In
            EVALUATING every call is checked.
        statistics_share: how much of the time of steps the statistics of activations may take, by what they are
            measured to take; how often a step is sampled follows from it. 0 for never.
        statistics_every: steps from one sample of activations to the next in place of that; 0 for never.

    Raises ValueError for a share that is not from 0 to 1, or a negative number of steps.
    """

    to_grafting: ReconstructionGate = field(default_factory=ReconstructionGate)
    metric: MetricGate = field(default_factory=MetricGate)
    error_rate: ErrorRateGate = field(default_factory=ErrorRateGate)
    schedule: Schedule = field(default_factory=lambda: linear(100))
    stabilization_steps: int = 100
    fine_tuning_steps: int = 1000
    embargo_epochs: int = 5
    load_deadline_s: float = 10.0
    sample_every: int = 100
    statistics_share: float = 0.005
    statistics_every: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.statistics_share <= 1.0:
            raise ValueError(f"statistics_share must be from 0 to 1, found {self.statistics_share}")
        if self.statistics_every is not None and self.statistics_every < 0:
            raise ValueError(f"statistics_every must be at least 0, found {self.statistics_every}")
