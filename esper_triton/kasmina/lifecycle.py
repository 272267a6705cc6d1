"""States of a seed and the moves between them."""

from __future__ import annotations

import enum
from types import MappingProxyType

from esper_triton.contracts.errors import InvalidTransition

__all__ = ["ALLOWED_MOVES", "SeedLifecycleState", "check_transition"]


class SeedLifecycleState(enum.IntEnum):
    """What a seed is doing. The value is what `KasminaStateLayout.lifecycle_states` holds."""

    DORMANT = 0
    GERMINATED = 1
    LOADING = 2
    TRAINING = 3
    GRAFTING = 4
    STABILIZATION = 5
    EVALUATING = 6
    FINE_TUNING = 7
    FOSSILIZED = 8
    CULLED = 9
    CANCELLED = 10
    ROLLED_BACK = 11
    ERROR_RECOVERY = 12

    __hash__ = int.__hash__  # enum's own is a Python function, and every commit asks several sets about every seed

    @property
    def is_active(self) -> bool:
        """Whether a seed in this state contributes to the layer's output."""
        return self in _ACTIVE

    @property
    def is_frozen(self) -> bool:
        """Whether a seed in this state contributes with parameters that do not train."""
        return self in _FROZEN


_S = SeedLifecycleState
_ACTIVE = frozenset({_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED})
_FROZEN = frozenset({_S.STABILIZATION, _S.EVALUATING, _S.FOSSILIZED})

ALLOWED_MOVES = MappingProxyType(
    {
        _S.DORMANT: (_S.GERMINATED,),
        _S.GERMINATED: (_S.LOADING, _S.CANCELLED),
        _S.LOADING: (_S.TRAINING, _S.GRAFTING, _S.CULLED),
        _S.TRAINING: (_S.GRAFTING, _S.CULLED, _S.CANCELLED),
        _S.GRAFTING: (_S.STABILIZATION, _S.CULLED, _S.ROLLED_BACK),
        _S.STABILIZATION: (_S.EVALUATING, _S.CULLED, _S.ROLLED_BACK),
        _S.EVALUATING: (_S.FINE_TUNING, _S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK),
        _S.FINE_TUNING: (_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK),
        _S.FOSSILIZED: (),
        _S.CULLED: (_S.DORMANT,),
        _S.CANCELLED: (_S.DORMANT,),
        _S.ROLLED_BACK: (),
        _S.ERROR_RECOVERY: (_S.LOADING, _S.CULLED),
    }
)
"""What may be asked for. A fault moves an active seed to ERROR_RECOVERY; that is never asked for, so it is not here."""


def check_transition(layer_name: str, seed: int, source: SeedLifecycleState, target: SeedLifecycleState) -> None:
    """Raises InvalidTransition where the table has no move from `source` to `target`. Changes nothing."""
    if target not in ALLOWED_MOVES[source]:
        raise InvalidTransition(layer_name, seed, source.name, target.name, (s.name for s in ALLOWED_MOVES[source]))
