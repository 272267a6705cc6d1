"""States of a system that is only thought of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esper_triton.contracts.health import HealthFrame
from esper_triton.contracts.system import LayerForm, LayerGradients, SystemState


def form(name: str, *, x_width: int | None = 6, may_be_image: bool = False, **fields: Any) -> LayerForm:
    known = {"dtype": "float32", "target": "cpu", "parameters": 100} | fields
    return LayerForm(name=name, x_width=x_width, may_be_image=may_be_image, **known)


def gradients(bottleneck: float, rank: int | None = None, step: int = 100) -> LayerGradients:
    norm = 2 * bottleneck
    return LayerGradients(rows=100, step=step, gradient_norm=norm, bottleneck=bottleneck, unexpressed=0.25, rank=rank)


def system(
    layers: Sequence[tuple[LayerForm, LayerGradients | None, Sequence[str]]],
    *,
    width: int = 16,
    epoch: int = 10,
    step: int = 100,
    artifacts: dict[tuple[str, int], str] | None = None,
    opens_at: int = 0,
    **fields: Any,
) -> SystemState:
    """Layers with the states of their seeds, each over columns of its own."""
    seeds = [(k, seed, state) for k, (_, _, states) in enumerate(layers) for seed, state in enumerate(states)]
    frame = HealthFrame(
        model="model",
        timestamp=0.0,
        layers=tuple(form.name for form, _, _ in layers),
        epochs=(epoch,) * len(layers),
        steps=(step,) * len(layers),
        layer=tuple(k for k, _, _ in seeds),
        seed=tuple(seed for _, seed, _ in seeds),
        chunk_start=tuple(width * seed for _, seed, _ in seeds),
        chunk_stop=tuple(width * (seed + 1) for _, seed, _ in seeds),
        state=tuple(state for _, _, state in seeds),
        alpha=(0.0,) * len(seeds),
        error_count=(0,) * len(seeds),
        is_ready_for_transition=(False,) * len(seeds),
    )
    known = artifacts or {}
    return SystemState(
        epoch=epoch,
        step=step,
        layers=tuple(form for form, _, _ in layers),
        gradients=tuple(measured for _, measured, _ in layers),
        seeds=frame,
        opens_at=(opens_at,) * len(seeds),
        artifacts=tuple(known.get((layers[k][0].name, seed)) for k, seed, _ in seeds),
        **fields,
    )
