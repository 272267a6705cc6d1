"""From what the user asked for to the layers that are adopted."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from esper_triton.contracts.errors import nearest
from esper_triton.kasmina.kinds import OUT_PROJ_REASON, Chunking, kind_of, seed_spans

__all__ = ["Target", "check_is_called", "resolve_targets"]

Target = type[nn.Module] | str
_MANY_REASONS = 3


def resolve_targets(
    model: nn.Module, targets: Sequence[Target], seeds_per_layer: int, chunking: Chunking
) -> dict[str, nn.Module]:
    """The layers to adopt by the first of their qualified names; each module once, in the order of `named_modules`.

    A type or a glob leaves out what cannot be adopted, an exact name does not. Raises ValueError for a target that
    matches nothing or nothing that can be adopted, with the reason or the closest names, and TypeError for one that is
    neither a module type nor a string. Changes nothing.
    """
    if isinstance(targets, (str, type)):
        raise TypeError(
            f"target_layers is a list of module types and names, found {targets!r}; write [{_show(targets)}]"
        )
    if not targets:
        raise ValueError("target_layers is empty: name at least one module type, qualified name or glob")
    named = dict(model.named_modules(remove_duplicate=False))
    chosen: set[int] = set()
    for target in targets:
        names = _matches(target, named)
        if not names:
            raise ValueError(f"target {_show(target)} matches no layer{_closest(target, named)}")
        refused: list[str] = []
        found = False
        for name in names:
            try:
                check_is_called(named, name)
                seed_spans(kind_of(named[name]).width, seeds_per_layer, chunking)
            except (TypeError, ValueError) as error:
                refused.append(f"{name!r}: {error}")
            else:
                chosen.add(id(named[name]))
                found = True
        if not found:
            more = f"; and {len(refused) - _MANY_REASONS} more" if len(refused) > _MANY_REASONS else ""
            reasons = "; ".join(refused[:_MANY_REASONS]) + more
            raise ValueError(f"target {_show(target)} matches no layer that can be adopted: {reasons}")
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


def check_is_called(named: dict[str, nn.Module], name: str) -> None:
    """Raises TypeError for a module whose parent uses its weight without calling it, or calls another in its place."""
    path = name.split(".")
    for depth, own in enumerate(path):
        above = ".".join(path[:depth])
        parent = named[above]
        if isinstance(parent, nn.MultiheadAttention) and own == "out_proj":
            reason = OUT_PROJ_REASON
        elif isinstance(parent._modules.get("base_layer"), nn.MultiheadAttention) and own != "base_layer":
            reason = f"an adapter of an attention is added to its weights and never called; target '{above}.base_layer'"
        elif own == "original_module" and "modules_to_save" in parent._modules:
            reason = "PEFT trains a copy and calls that; target the one in modules_to_save"
        else:
            continue
        raise TypeError(f"{type(named[name]).__name__} cannot hold seeds: {reason}")


def _matches(target: Target, named: dict[str, nn.Module]) -> list[str]:
    if isinstance(target, str):
        if target in named:
            return [target]
        return [name for name in named if fnmatch.fnmatchcase(name, target)]
    if isinstance(target, type) and issubclass(target, nn.Module):
        return [name for name, module in named.items() if isinstance(module, target)]
    raise TypeError(f"target {target!r} is neither a subclass of nn.Module nor a string")


def _show(target: Target) -> str:
    return (
        repr(target) if isinstance(target, str) else f"nn.{target.__name__}" if _is_torchs(target) else target.__name__
    )


def _is_torchs(target: type) -> bool:
    return target.__module__.startswith("torch.nn.")


def _closest(target: Target, named: dict[str, nn.Module]) -> str:
    if isinstance(target, str):
        return nearest(target, (name for name in named if name))
    return nearest(target.__name__, (type(module).__name__ for module in named.values()))
