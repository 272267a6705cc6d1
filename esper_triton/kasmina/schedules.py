"""Alpha schedules: how far a seed in GRAFTING is blended into its layer's output.

A schedule is a frozen value without any state. What a ramp has come to is one whole number, its progress: the steps
that have counted so far. It lies with the seed and can be saved as it is. Progress and alpha are pure functions of it
and of what was measured in the last step, so a run that is resumed ramps as the one that was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

from esper_triton.contracts.errors import nearest

__all__ = [
    "Schedule",
    "Signals",
    "cosine",
    "describe_schedule",
    "drift_controlled",
    "grad_norm_gated",
    "linear",
    "schedule_from",
]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What was measured in the step that has just ended; None is what was not.

    Attributes:
        drift: 1 - cos of the layer's mean output (over all rows) in this step and in the one before; in [0, 2].
        grad_norm: 2-norm of the gradients of the seed's parameters, all together.
    """

    drift: float | None = None
    grad_norm: float | None = None


class Schedule(Protocol):
    """What `layer.graft(seed, schedule=...)` takes. `needs` names the fields of Signals that `advance` reads."""

    needs: ClassVar[tuple[str, ...]]

    def advance(self, progress: int, signals: Signals) -> int:
        """Progress after a step that began at `progress`."""

    def alpha(self, progress: int) -> float:
        """Alpha, in [0, 1], at `progress`; 0 at 0."""

    def is_complete(self, progress: int) -> bool:
        """Whether the ramp is done."""


@dataclass(frozen=True)
class _Ramp:
    steps: int
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{type(self).__name__}: steps must be a whole number of at least 1, found {self.steps!r}")

    def advance(self, progress: int, signals: Signals) -> int:
        return min(progress + 1, self.steps)

    def alpha(self, progress: int) -> float:
        return min(progress / self.steps, 1.0)

    def is_complete(self, progress: int) -> bool:
        return progress >= self.steps


class linear(_Ramp):
    """Alpha rises by 1 / steps a step."""


class cosine(_Ramp):
    """Alpha = (1 - cos(pi * progress / steps)) / 2: slow at both ends."""

    def alpha(self, progress: int) -> float:
        return (1.0 - math.cos(math.pi * min(progress / self.steps, 1.0))) / 2.0


@dataclass(frozen=True)
class drift_controlled(_Ramp):
    """A linear ramp that pauses while the layer's output turns faster than `max_drift` (see `Signals.drift`) a step,
    and in a step without a training call or without one before it."""

    max_drift: float = 0.01
    needs: ClassVar[tuple[str, ...]] = ("drift",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.max_drift <= 2.0:
            raise ValueError(f"drift_controlled: max_drift must be from 0 to 2, found {self.max_drift!r}")

    def advance(self, progress: int, signals: Signals) -> int:
        calm = signals.drift is not None and signals.drift <= self.max_drift
        return super().advance(progress, signals) if calm else progress


@dataclass(frozen=True)
class grad_norm_gated(_Ramp):
    """A linear ramp that advances only in steps whose gradient norm of the seed's parameters lies in [low, high]."""

    low: float = 0.0
    high: float = math.inf
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.low <= self.high:
            raise ValueError(f"grad_norm_gated: 0 <= low <= high is needed, found low={self.low!r}, high={self.high!r}")

    def advance(self, progress: int, signals: Signals) -> int:
        inside = signals.grad_norm is not None and self.low <= signals.grad_norm <= self.high
        return super().advance(progress, signals) if inside else progress


_SCHEDULES: dict[str, type[_Ramp]] = {
    kind.__name__: kind for kind in (linear, cosine, drift_controlled, grad_norm_gated)
}


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """A shipped schedule as plain values, for `schedule_from`. Raises TypeError for one of the user's own."""
    if _SCHEDULES.get(type(schedule).__name__) is not type(schedule):
        raise TypeError(f"{schedule!r} is not one of {', '.join(_SCHEDULES)}, so it has no description to save")
    return {"schedule": type(schedule).__name__, **asdict(schedule)}


def schedule_from(description: Mapping[str, Any]) -> Schedule:
    """The schedule that `describe_schedule` described. Raises ValueError, with everything that is wrong: an unknown
    name, or options that are missing, unknown or out of range."""
    options = dict(description)
    name = options.pop("schedule", None)
    kind = _SCHEDULES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown schedule {name!r}{nearest(str(name), _SCHEDULES)}")
    known = {field.name: field for field in fields(kind)}
    faults = [f"{key!r} is missing" for key, field in known.items() if field.default is MISSING and key not in options]
    faults += [f"there is no option {key!r}{nearest(str(key), known)}" for key in options if key not in known]
    faults += [
        f"{key} must be a number, found {value!r}"
        for key, value in options.items()
        if key in known and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    if faults:
        raise ValueError(f"schedule {name!r}: {'; '.join(faults)}")
    return kind(**options)
