"""HealthSignal: what was measured of one seed; HealthFrame: of all seeds of a model, as it travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from esper_triton.contracts.envelope import Message

__all__ = ["HealthFrame", "HealthSignal", "health_score"]

UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


def health_score(
    latency_us: float | None, error_rate: float | None, hit_ratio: float | None, *, budget_us: float
) -> float | None:
    """`0.4 * (1 - min(latency / budget, 1)) + 0.4 * (1 - min(5 * error_rate, 1)) + 0.2 * hit_ratio`, in [0, 1]; None
    where one of the three was not measured."""
    if latency_us is None or error_rate is None or hit_ratio is None:
        return None
    return 0.4 * (1.0 - min(latency_us / budget_us, 1.0)) + 0.4 * (1.0 - min(5.0 * error_rate, 1.0)) + 0.2 * hit_ratio


class HealthSignal(Message):
    """Of one seed. What was not measured is None.

    Attributes:
        chunk: columns [start, stop) of the layer's output that the seed works on. step: boundaries of its layer.
        activation_variance: of the seed's own output k in the calls that were sampled since the epoch began: over rows,
            with n - 1 below the sum of squares, and the mean of that over features.
        dead_neuron_ratio: share of its features that had one value, zero or another, in all of those rows.
        avg_correlation: mean of |r|, Pearson's, over pairs of its features that are not dead; of 64 of them, always the
            same, where it has more.
        execution_latency_us: mean of the forward launches that were timed: all on a CPU, those of samples on a GPU.
        kernel_load_latency_us: of its last load, from the request to the store until the program was checked and in
            place.
        cache_hit_ratio: of the process's kernel cache. timestamp: seconds since 1970.
    """

    model: str
    layer: str
    seed: Count
    chunk: tuple[int, int]
    epoch: int
    step: int
    state: str
    alpha: float
    activation_variance: NonNegative | None = None
    dead_neuron_ratio: UnitInterval | None = None
    avg_correlation: UnitInterval | None = None
    health_score: UnitInterval | None = None
    execution_latency_us: float | None = None
    kernel_load_latency_us: float | None = None
    cache_hit_ratio: UnitInterval | None = None
    error_count: int = 0
    is_ready_for_transition: bool = False
    timestamp: float


class HealthFrame(Message):
    """`telemetry.seed.health`: every seed of a model at one flush, column by column.

    `layers`, `epochs` and `steps` have one entry for each layer; every other column has one for each seed, or is null
    where nothing of it was measured for any seed. `layer` is a seed's position in `layers`, `chunk_start` and
    `chunk_stop` its columns.
    """

    model: str
    timestamp: float
    cache_hit_ratio: UnitInterval | None = None
    layers: tuple[str, ...]
    epochs: tuple[int, ...]
    steps: tuple[int, ...]
    layer: tuple[Count, ...]
    seed: tuple[Count, ...]
    chunk_start: tuple[int, ...]
    chunk_stop: tuple[int, ...]
    state: tuple[str, ...]
    alpha: tuple[float, ...]
    error_count: tuple[int, ...]
    is_ready_for_transition: tuple[bool, ...]
    execution_latency_us: tuple[float | None, ...] | None = None
    health_score: tuple[UnitInterval | None, ...] | None = None
    kernel_load_latency_us: tuple[float | None, ...] | None = None
    activation_variance: tuple[NonNegative | None, ...] | None = None
    dead_neuron_ratio: tuple[UnitInterval | None, ...] | None = None
    avg_correlation: tuple[UnitInterval | None, ...] | None = None

    @model_validator(mode="after")
    def _even(self) -> HealthFrame:
        for names, length in ((("epochs", "steps"), len(self.layers)), (_PER_SEED, len(self.seed))):
            for name in names:
                column = getattr(self, name)
                if column is not None and len(column) != length:
                    raise ValueError(f"{name} has {len(column)} entries, expected {length}")
        if any(position >= len(self.layers) for position in self.layer):
            raise ValueError(f"layer has {max(self.layer)}, expected positions in the {len(self.layers)} layers")
        return self

    def signals(self) -> Iterator[HealthSignal]:
        """Each seed's own. Raises pydantic's ValidationError for values that no seed can have."""
        optional = {name: column for name in _OPTIONAL if (column := getattr(self, name)) is not None}
        for k, position in enumerate(self.layer):
            yield HealthSignal(
                model=self.model,
                layer=self.layers[position],
                seed=self.seed[k],
                chunk=(self.chunk_start[k], self.chunk_stop[k]),
                epoch=self.epochs[position],
                step=self.steps[position],
                state=self.state[k],
                alpha=self.alpha[k],
                error_count=self.error_count[k],
                is_ready_for_transition=self.is_ready_for_transition[k],
                cache_hit_ratio=self.cache_hit_ratio,
                timestamp=self.timestamp,
                **{name: column[k] for name, column in optional.items()},
            )


_OPTIONAL = (
    "execution_latency_us",
    "health_score",
    "kernel_load_latency_us",
    "activation_variance",
    "dead_neuron_ratio",
    "avg_correlation",
)
_PER_SEED = (
    "layer",
    "chunk_start",
    "chunk_stop",
    "state",
    "alpha",
    "error_count",
    "is_ready_for_transition",
    *_OPTIONAL,
)
