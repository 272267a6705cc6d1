"""Everything that a training run consists of, as one value, and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper_triton.contracts.errors import CheckpointError
from esper_triton.kasmina.persistence import version_fault
from esper_triton.model.checkpoint import prepare
from esper_triton.model.optim import SEED_KEY
from esper_triton.model.random_streams import random_streams, set_random_streams
from esper_triton.model.saving import weight_faults

__all__ = ["SCHEMA_VERSION", "RunState", "check_version"]

SCHEMA_VERSION = "1.1"  # 1.0 had no gradients, and no losses since the last step


class RunState:
    """A model, its attached optimizer with its schedulers, the random streams, and what else the loop has.

    Args:
        carry: by name, what has `state_dict` and `load_state_dict`, or a torch.Generator.

    Raises TypeError for what has neither.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, schedulers: Sequence[LRScheduler], carry: Mapping[str, Any]
    ) -> None:
        for name, carried in carry.items():
            methods = ("state_dict", "load_state_dict")
            if not isinstance(carried, torch.Generator) and not all(hasattr(carried, method) for method in methods):
                raise TypeError(
                    f"carry[{name!r}] is a {type(carried).__name__}, which has no state_dict and load_state_dict"
                )
        self._model, self._optimizer = model, optimizer
        self._schedulers, self._carry = list(schedulers), dict(carry)

    def read(self, growth: Mapping[str, Any], *, gradients: bool = True) -> dict[str, Any]:
        """The state, with the hook's own; with `gradients` also those of the optimizer's parameters that have one.
        Tensors are the run's own memory."""
        places = _by_place(self._optimizer).items() if gradients else ()
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            "random": random_streams(),
            "carry": {
                name: carried.get_state() if isinstance(carried, torch.Generator) else carried.state_dict()
                for name, carried in self._carry.items()
            },
            "gradients": [[*place, p.grad.detach()] for place, p in places if p.grad is not None],
            "growth": dict(growth),
        }

    def restore(self, state: Mapping[str, Any], *, gradients: bool = True) -> None:
        """Makes the run what `read` returned, but for the hook's own. Gradients that are not in it, and without
        `gradients` all of them, are cleared.

        Raises CheckpointError, with nothing changed, for a state that does not fit.
        """
        check_version(state)
        check_version(state["growth"])
        faults = list(weight_faults(self._model, state["model"]))
        if len(state["schedulers"]) != len(self._schedulers):
            faults.append(f"it has {len(state['schedulers'])} schedulers, this run has {len(self._schedulers)}")
        if state["carry"].keys() != self._carry.keys():
            faults.append(f"it carries {sorted(state['carry'])}, this run {sorted(self._carry)}")
        saved_gradients = state.get("gradients", []) if gradients else []
        faults += _gradient_faults(self._optimizer, saved_gradients)
        if faults:
            raise CheckpointError("the checkpoint does not fit this run: " + "; ".join(faults))
        prepared = prepare(self._model, state["growth"]["esper"], self._optimizer)
        self._model.load_state_dict(state["model"])
        prepared.apply()
        self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.zero_grad()
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        for name, carried in self._carry.items():
            if isinstance(carried, torch.Generator):
                carried.set_state(state["carry"][name])
            else:
                carried.load_state_dict(state["carry"][name])
        places = _by_place(self._optimizer)
        for group, position, gradient in saved_gradients:
            parameter = places[group, position]
            parameter.grad = gradient.to(parameter.device, copy=True)
        set_random_streams(state["random"])


def _by_place(optimizer: Optimizer) -> dict[tuple[str, int], Tensor]:
    """The optimizer's parameters by group and position: a seed's group by its label, the others by their number."""
    others = itertools.count()
    return {
        (label, position): parameter
        for group in optimizer.param_groups
        for label in [group.get(SEED_KEY) or str(next(others))]
        for position, parameter in enumerate(group["params"])
    }


def _gradient_faults(optimizer: Optimizer, gradients: Sequence[Any]) -> Iterator[str]:
    """Of the parameters that are there before and after; those of seeds come with the seeds."""
    places = {place: p for place, p in _by_place(optimizer).items() if place[0].isdecimal()}
    for group, position, gradient in gradients:
        found = places.get((group, position))
        if group.isdecimal() and (found is None or found.shape != gradient.shape):
            here = "is not there" if found is None else f"is {tuple(found.shape)}"
            yield f"it has a gradient {tuple(gradient.shape)} of parameter {position} of group {group}, which {here}"


def check_version(state: Any) -> None:
    """Raises CheckpointError for what is no state, or one of a newer release."""
    version = version_fault(state.get("schema_version") if isinstance(state, Mapping) else None, SCHEMA_VERSION)
    if version:
        raise CheckpointError(f"the checkpoint cannot be read: {version}")
