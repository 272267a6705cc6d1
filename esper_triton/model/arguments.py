"""What a GrowthHook is given, looked at before it changes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from esper_triton.contracts.arguments import check_at_least, number, refuse
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.model.divergence import LossWatch
from esper_triton.model.morphable import MorphableModel
from esper_triton.model.optim import attachment_of, has_scheduler
from esper_triton.tamiyo.controller import check_controller

__all__ = ["check_arguments", "check_belongs", "measuring"]

_LEAST = {
    "repeats": 2,
    "keep": 1,
    "checkpoint_every": 1,
    "undecided_evaluations": 1,
    "control_every": 1,
    "measure_every": 0,
    "max_rollbacks": 1,
}


def check_arguments(
    *,
    model: object,
    optimizer: object,
    schedulers: object,
    controller: object,
    validate: object,
    checkpoints: object,
    carry: object,
    divergence: object,
    **counts: object,
) -> None:
    """Raises TypeError for an argument of the wrong kind, ValueError for one out of range."""
    if not isinstance(model, MorphableModel):
        raise ValueError(
            f"{type(model).__name__} is not wrapped; esper_triton.wrap(model, ...) first, and give the wrapped "
            "model itself, not what DDP or torch.compile made of it"
        )
    for name, value, kinds, expected in (
        ("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer"),
        ("schedulers", schedulers, (Sequence, type(None)), "a list of learning rate schedulers, as [scheduler]"),
        ("validate", validate, (Callable, type(None)), "a function of the model that returns a number"),
        ("checkpoints", checkpoints, (str, Path, type(None)), "a directory"),
        ("carry", carry, (Mapping, type(None)), "a dict of objects by name, as {'scaler': scaler}"),
        ("divergence", divergence, (LossWatch, type(None)), "a LossWatch, as esper.LossWatch(factor=10.0), or None"),
    ):
        if not isinstance(value, kinds):  # type: ignore[arg-type]  # Callable is a class too
            raise refuse(name, value, expected)
    assert isinstance(schedulers, (Sequence, type(None)))
    for k, scheduler in enumerate(schedulers or ()):
        if isinstance(scheduler, type) or not all(hasattr(scheduler, own) for own in ("optimizer", "state_dict")):
            raise refuse(f"schedulers[{k}]", scheduler, "a learning rate scheduler of the optimizer")
    if controller is not None:
        check_controller(controller)
    check_at_least(_LEAST, counts)


def check_belongs(model: nn.Module, optimizer: Optimizer, schedulers: Sequence[object] | None) -> None:
    """Raises ValueError where the optimizer is another model's, or has a scheduler that was not named."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KasminaLayer)}
    who = f"this {type(optimizer).__name__}"
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if learning and learning.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{who} has none of the parameters of this {type(model).__name__}; build it with model.parameters(), of "
            "the very model that is given here (a copy, as of wrap(copy=True), has others)"
        )
    attachment = attachment_of(optimizer)
    if attachment is not None and not attachment.is_of(layers):
        raise ValueError(f"{who} is attached to another model; detach() that handle first")
    if schedulers is None and has_scheduler(optimizer):
        raise ValueError(
            f"{who} has a learning rate scheduler, which has to be in checkpoints and learn of new groups: "
            "GrowthHook(..., schedulers=[scheduler]); [] where it is out of use"
        )


def measuring(validate: Callable[[nn.Module], object]) -> Callable[[nn.Module], float]:
    """`validate`, with a TypeError for what it returns that is no number."""
    return lambda model: number("what validate(model) returned", validate(model))
