"""What a seed does for the validation metric: measured with its alpha as it is and with alpha 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esper_triton.kasmina.gates import Evaluation
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState

__all__ = ["measure", "undisturbed"]

_S = SeedLifecycleState
_MEASURED = (_S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING)


def measure(
    model: nn.Module,
    layer: KasminaLayer,
    seed: int,
    metric: Callable[[nn.Module], float],
    *,
    repeats: int,
    lower_is_better: bool,
) -> Evaluation:
    """See `MorphableModel.evaluate_seed`."""
    own = layer._seed(seed)
    who = f"seed {seed} of layer {layer._kasmina.name!r}"
    if own.state not in _MEASURED:
        allowed = ", ".join(state.name for state in _MEASURED)
        raise ValueError(f"{who} is {own.state.name}: a seed is evaluated in {allowed}")
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, to measure the metric's noise, found {repeats}")
    alpha = layer.state.alpha(seed)
    on, off = [], []
    with undisturbed(model):
        for _ in range(repeats):
            # Both of a pair draw the same random numbers; the next pair draws others.
            before = _random_state(model)
            on.append(float(metric(model)))
            after = _random_state(model)
            _set_random_state(before)
            try:
                alpha.zero_()
                off.append(float(metric(model)))
            finally:
                alpha.fill_(own.alpha)
            _set_random_state(after)
    own.evaluation = Evaluation(on=tuple(on), off=tuple(off), lower_is_better=lower_is_better)
    return own.evaluation


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and random streams as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    random_state = _random_state(model)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        _set_random_state(random_state)


_RandomState = tuple[torch.Tensor, dict[torch.device, torch.Tensor]]


def _random_state(model: nn.Module) -> _RandomState:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_random_state(state: _RandomState) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for device, value in cuda.items():
        torch.cuda.set_rng_state(value, device)
