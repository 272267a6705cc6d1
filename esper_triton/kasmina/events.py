"""What a layer tells those who asked to be told: its seeds' transitions, once they have taken effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_triton.kasmina.lifecycle import SeedLifecycleState

__all__ = ["Observer", "Transition"]


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
