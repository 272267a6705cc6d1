"""What a layer tells those who asked to be told: its seeds' transitions, once they have taken effect, and for what its
seeds have no kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from esper_triton.kasmina.lifecycle import SeedLifecycleState

__all__ = ["Boundary", "MissObserver", "Observer", "SpecialisationMiss", "Transition"]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One seed's move from `source` to `target`, which has happened. Its parameters are those of `target`: a seed that
    has been unloaded has none any more."""

    layer: str
    seed: int
    source: SeedLifecycleState
    target: SeedLifecycleState
    artifact_id: str | None


Observer = Callable[[Transition], None]


@dataclass(frozen=True, kw_only=True)
class SpecialisationMiss:
    """A call gave a seed's columns to the host, since the seed's kernel is not for such tensors. Whoever compiles can
    make one that is: of the same blueprint, for `dtype` (as torch prints it) and `device`."""

    layer: str
    seed: int
    artifact_id: str
    dtype: str
    device: str


MissObserver = Callable[[SpecialisationMiss], None]


class Boundary(Protocol):
    """What stands at the boundaries of a model, on the training thread."""

    def before_boundary(self) -> None:
        """Requests made here take effect at the boundary that follows at once."""

    def after_boundary(self) -> None:
        """What was asked for has taken effect."""

    def begun_epoch(self, epoch: int, damaged: Mapping[str, tuple[str, ...]]) -> None:
        """An epoch has begun, or has not since state arrays are damaged: their names, by layer."""
