"""Esper grows a neural network while it trains.

The names below are loaded on first use (PEP 562). Importing this package imports neither torch nor triton: Triton
imports `esper_triton.cpu` by entry point while it is itself being imported, so anything heavier here would be circular.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Artifact": "esper_triton.urza",
    "Blueprint": "esper_triton.contracts.blueprint",
    "EsperError": "esper_triton.contracts.errors",
    "Forge": "esper_triton.tezzeret.pool",
    "GrowthConfig": "esper_triton.config",
    "GrowthHook": "esper_triton.model",
    "Heuristic": "esper_triton.tamiyo",
    "KasminaLayer": "esper_triton.kasmina",
    "KasminaStateLayout": "esper_triton.kasmina",
    "KernelCache": "esper_triton.kasmina",
    "LossWatch": "esper_triton.model",
    "Manual": "esper_triton.tamiyo",
    "MorphableModel": "esper_triton.model",
    "Oona": "esper_triton.oona",
    "Policy": "esper_triton.kasmina",
    "SeedLifecycleState": "esper_triton.kasmina",
    "Urza": "esper_triton.urza",
    "attach": "esper_triton.model",
    "bake": "esper_triton.model",
    "compile": "esper_triton.compile",
    "connect": "esper_triton.model",
    "dashboard": "esper_triton.nissa",
    "esper_state_dict": "esper_triton.model",
    "load_config": "esper_triton.config",
    "load_esper_state_dict": "esper_triton.model",
    "load_model": "esper_triton.model",
    "replicate": "esper_triton.model",
    "save_model": "esper_triton.model",
    "seed_parameters": "esper_triton.model",
    "unwrap": "esper_triton.model",
    "wrap": "esper_triton.model",
}

__all__ = [
    "Artifact",
    "Blueprint",
    "EsperError",
    "Forge",
    "GrowthConfig",
    "GrowthHook",
    "Heuristic",
    "KasminaLayer",
    "KasminaStateLayout",
    "KernelCache",
    "LossWatch",
    "Manual",
    "MorphableModel",
    "Oona",
    "Policy",
    "SeedLifecycleState",
    "Urza",
    "__version__",
    "attach",
    "bake",
    "compile",
    "connect",
    "dashboard",
    "esper_state_dict",
    "load_config",
    "load_esper_state_dict",
    "load_model",
    "replicate",
    "save_model",
    "seed_parameters",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from esper_triton.compile import compile
    from esper_triton.config import GrowthConfig, load_config
    from esper_triton.contracts.blueprint import Blueprint
    from esper_triton.contracts.errors import EsperError
    from esper_triton.kasmina import KasminaLayer, KasminaStateLayout, KernelCache, Policy, SeedLifecycleState
    from esper_triton.model import (
        GrowthHook,
        LossWatch,
        MorphableModel,
        attach,
        bake,
        connect,
        esper_state_dict,
        load_esper_state_dict,
        load_model,
        replicate,
        save_model,
        seed_parameters,
        unwrap,
        wrap,
    )
    from esper_triton.nissa import dashboard
    from esper_triton.oona import Oona
    from esper_triton.tamiyo import Heuristic, Manual
    from esper_triton.tezzeret.pool import Forge
    from esper_triton.urza import Artifact, Urza


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        import difflib  # not `contracts.errors.nearest`: this is asked before importing any submodule, of its name

        close = [] if name.startswith("_") else difflib.get_close_matches(name, __all__, n=2)
        hint = "; did you mean " + " or ".join(map(repr, close)) + "?" if close else ""
        raise AttributeError(f"module 'esper_triton' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    # Kept: `esper_triton.compile` is also a submodule, and importing it would otherwise shadow the function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
