"""Urabrask, the proving ground: nothing runs in a model before it is proven. Loaded on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "LEVELS": "esper_triton.urabrask.gauntlet",
    "examine": "esper_triton.urabrask.gauntlet",
    "validate": "esper_triton.urabrask.verdict",
}

__all__ = ["LEVELS", "examine", "validate"]

if TYPE_CHECKING:
    from esper_triton.urabrask.gauntlet import LEVELS, examine
    from esper_triton.urabrask.verdict import validate


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esper_triton.urabrask' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
