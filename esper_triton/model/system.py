"""A model with seeds as a controller sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from esper_triton.contracts.commands import CommandResult
from esper_triton.contracts.system import LayerForm, LayerGradients, SystemState
from esper_triton.kasmina.boundary import host_dtype, state_storage
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.model.germination import target_name
from esper_triton.model.health import HealthReader
from esper_triton.tezzeret.targets import parse_target

__all__ = ["SystemReader"]

_DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}


class SystemReader:
    """Reads the layers of one model, on the host alone: no tensor is looked at."""

    def __init__(self, layers: Mapping[str, KasminaLayer], *, latency_budget_us: float = 1000.0) -> None:
        self._layers = {layer._kasmina.name: layer for layer in layers.values()}
        self._health = HealthReader("model", self._layers, latency_budget_us=latency_budget_us)
        self._forms: tuple[LayerForm, ...] = ()
        self._moved: list[tuple[torch.device, torch.dtype | None]] = []

    def read(
        self,
        *,
        epoch: int,
        step: int,
        gradients: Mapping[str, LayerGradients],
        metrics: Sequence[float | None],
        lower_is_better: bool,
        results: Sequence[CommandResult],
    ) -> SystemState:
        """The model as it is now, between two steps. `gradients` by name of the layer."""
        where = [(state_storage(layer).device, _own_dtype(layer)) for layer in self._layers.values()]
        if where != self._moved:
            self._forms, self._moved = tuple(map(_form, self._layers.values())), where
        seeds = [seed for layer in self._layers.values() for seed in layer._kasmina.seeds]
        # Not validated, as in HealthReader: with ten thousand seeds that takes longer than the rest.
        return SystemState.model_construct(
            epoch=epoch,
            step=step,
            layers=self._forms,
            gradients=tuple([gradients.get(form.name) for form in self._forms]),
            seeds=self._health.read(),
            opens_at=tuple([seed.opens_at for seed in seeds]),
            artifacts=tuple([seed.artifact_id for seed in seeds]),
            metrics=tuple(metrics),
            lower_is_better=lower_is_better,
            results=tuple(results),
        )


def _own_dtype(layer: KasminaLayer) -> torch.dtype | None:
    """Of the first parameter of the layer itself: a cast changes it, and asking takes little."""
    return next((parameter.dtype for parameter in layer._parameters.values() if parameter is not None), None)


def _form(layer: KasminaLayer) -> LayerForm:
    record = layer._kasmina
    try:
        target = parse_target(target_name(state_storage(layer).device)).label
    except ValueError:  # a device that no kernel is for
        target = None
    return LayerForm(
        name=record.name,
        x_width=record.kind.x_width,
        dtype=_DTYPE_NAME.get(host_dtype(layer) or torch.float32),  # type: ignore[arg-type]  # names of dtypes
        target=target,
        may_be_image=record.kind.may_be_image,
        parameters=sum(parameter.numel() for parameter in layer.parameters(recurse=False)),
    )
