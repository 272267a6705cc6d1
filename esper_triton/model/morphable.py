"""MorphableModel: a model whose layers hold seeds."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from esper_triton.contracts.errors import nearest
from esper_triton.kasmina.adoption import Adopted, adopt_class, release_class
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.kinds import Chunking
from esper_triton.kasmina.layer import KasminaLayer, release_layer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.model.targets import Target, check_is_called, resolve_targets
from esper_triton.urza import Urza

__all__ = ["MorphableModel", "seed_parameters", "unwrap", "wrap"]


class MorphableModel(Adopted):
    """The root of a wrapped model: the same object as before, of a class of its own. It holds nothing itself, and finds
    its layers by walking its modules. Made by `wrap`.

    Layers are named as in `named_modules()`; an unknown name raises ValueError with the nearest ones.
    """

    @property
    def kasmina_layers(self) -> dict[str, KasminaLayer]:
        """Every adopted layer by qualified name; one that is shared appears under each of its names."""
        modules = self.named_modules(remove_duplicate=False)
        return {name: module for name, module in modules if isinstance(module, KasminaLayer)}

    async def load_kernel(self, name: str, seed: int, artifact_id: str) -> bool:
        """Loads an artifact into a seed off this thread; see `KasminaLayer.load_kernel`."""
        return await KasminaLayer.load_kernel(self._called_layer(name), seed, artifact_id)

    def load_kernel_sync(self, name: str, seed: int, artifact_id: str) -> bool:
        """As `load_kernel`, on this thread."""
        return KasminaLayer.load_kernel_sync(self._called_layer(name), seed, artifact_id)

    def unload_kernel(self, name: str, seed: int) -> bool:
        """Takes a seed back to DORMANT; see `KasminaLayer.unload_kernel`."""
        return KasminaLayer.unload_kernel(self._layer(name), seed)

    def graft(self, name: str, seed: int) -> None:
        """Lets a trained seed contribute, from alpha 0; see `KasminaLayer.graft`."""
        KasminaLayer.request_transition(self._layer(name), seed, SeedLifecycleState.GRAFTING)

    def set_alpha(self, name: str, seed: int, value: float) -> None:
        """Sets the blending coefficient of a seed; see `KasminaLayer.set_alpha`."""
        KasminaLayer.set_alpha(self._layer(name), seed, value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the host's parameters and of the seeds'."""
        cast(nn.Module, super()).zero_grad(set_to_none)
        for parameter in seed_parameters(cast(nn.Module, self)):
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)

    def step_boundary(self) -> None:
        """Call it between training steps: what failed in the last step takes effect now."""
        for layer in self._distinct_layers():
            layer.commit()

    def get_model_stats(self) -> dict[str, Any]:
        """Totals over the layers, the cache, and each layer's own `get_layer_stats()` by name."""
        layers = {name: layer.get_layer_stats() for name, layer in self.kasmina_layers.items()}
        distinct = [layer.get_layer_stats() for layer in self._distinct_layers()]
        seeds = [seed for stats in distinct for seed in stats["seeds"]]
        return {
            "layers": layers,
            "num_layers": len(distinct),
            "num_seeds": len(seeds),
            "active_seeds": sum(stats["active_seeds"] for stats in distinct),
            "error_count": sum(seed["error_count"] for seed in seeds),
            "specialisation_misses": sum(seed["specialisation_misses"] for seed in seeds),
            "cache": KernelCache.process().stats()._asdict(),
        }

    def _distinct_layers(self) -> Iterator[KasminaLayer]:
        return (module for module in self.modules() if isinstance(module, KasminaLayer))

    def _called_layer(self, name: str) -> KasminaLayer:
        layer = self._layer(name)
        try:
            check_is_called(dict(self.named_modules(remove_duplicate=False)), name)
        except TypeError as error:  # what it is part of was put there after wrapping
            raise ValueError(f"layer {name!r} is out of use: {error}") from error
        return layer

    def _layer(self, name: str) -> KasminaLayer:
        layers = self.kasmina_layers
        if name not in layers:
            _raise_if_module(name, layers, dict(self.named_modules(remove_duplicate=False)))
            raise ValueError(f"no wrapped layer {name!r}{nearest(name, layers)}")
        return layers[name]


def _raise_if_module(name: str, layers: Iterable[str], modules: dict[str, nn.Module]) -> None:
    """Raises ValueError where `name` is a module of the model, though no layer: something may have been put there."""
    within = [layer for layer in layers if name and layer.startswith(f"{name}.")]
    if within:
        raise ValueError(f"no wrapped layer {name!r}; within it: {', '.join(map(repr, within))}")
    if name in modules:
        raise ValueError(
            f"no wrapped layer {name!r}: it is a {type(modules[name]).__name__} that was no target, or that took the "
            "place of one after wrapping; what replaces modules comes first, then wrap"
        )


class MorphableLayer(MorphableModel, KasminaLayer):
    """A root that is itself the one layer. Its methods take the layer's name, "", before the seed, as a model's do, or
    start with the seed, as a layer's do."""

    def load_kernel(self, *args: Any) -> Any:
        return self._routed("load_kernel", args)

    def load_kernel_sync(self, *args: Any) -> Any:
        return self._routed("load_kernel_sync", args)

    def unload_kernel(self, *args: Any) -> Any:
        return self._routed("unload_kernel", args)

    def graft(self, *args: Any) -> Any:
        return self._routed("graft", args)

    def set_alpha(self, *args: Any) -> Any:
        return self._routed("set_alpha", args)

    def _routed(self, method: str, args: tuple[Any, ...]) -> Any:
        face = MorphableModel if args and isinstance(args[0], str) else KasminaLayer
        return getattr(face, method)(self, *args)


def wrap(
    model: nn.Module,
    target_layers: Sequence[Target],
    *,
    seeds_per_layer: int = 4,
    urza: Urza | None = None,
    chunking: Chunking = "features",
    copy: bool = False,
    guard: bool = False,
    telemetry_enabled: bool = True,
) -> MorphableModel:
    """Gives layers of `model` seeds, in place, and returns the model itself, now also a MorphableModel.

    While every seed is dormant nothing can be told from the outside: outputs, gradients, `state_dict` keys, parameters,
    hooks and the random stream are as they were (law 8).

    Args:
        target_layers: module types, exact qualified names, and globs such as `encoder.*.fc1` (`*` crosses dots).
        seeds_per_layer: seeds of each layer.
        urza: where `load_kernel` looks.
        chunking: `features` divides a layer's output columns among its seeds; `whole` gives each seed all of them.
        copy: wrap a deep copy and leave `model` alone.
        guard: select away non-finite outputs of a seed in every call, on the device.
        telemetry_enabled: measure the time of active calls.

    Raises ValueError for a target that matches nothing, with the closest names, or nothing that can be adopted, with
    the reasons; ValueError for a model that is wrapped already; TypeError for what cannot be a target. Nothing is
    changed then.
    """
    if isinstance(model, MorphableModel):
        raise ValueError(f"{type(model).__name__} is wrapped already; esper_triton.unwrap(model) first to wrap it anew")
    wrapped = [name for name, module in model.named_modules() if isinstance(module, (KasminaLayer, MorphableModel))]
    if wrapped:
        raise ValueError(
            f"{type(model).__name__} has modules that are wrapped already: {', '.join(map(repr, wrapped))}"
        )
    layers = resolve_targets(model, target_layers, seeds_per_layer, chunking)
    if copy:
        model = copying.deepcopy(model)
        layers = {name: model.get_submodule(name) for name in layers}
    adopted: list[KasminaLayer] = []
    try:
        for name, module in layers.items():
            adopted.append(
                KasminaLayer.adopt(
                    module,
                    num_seeds=seeds_per_layer,
                    urza=urza,
                    name=name,
                    chunking=chunking,
                    guard=guard,
                    telemetry_enabled=telemetry_enabled,
                )
            )
        adopt_class(model, MorphableLayer if isinstance(model, KasminaLayer) else MorphableModel)
    except Exception:
        for layer in adopted:
            release_layer(layer)
        raise
    return cast(MorphableModel, model)


def unwrap(model: nn.Module) -> nn.Module:
    """Puts every class back and takes every seed away; returns the model itself. Nothing of the wrap is left."""
    for module in model.modules():
        if isinstance(module, KasminaLayer):
            release_layer(module)
        elif isinstance(module, MorphableModel):
            release_class(module)
    return model


def seed_parameters(model: nn.Module, state: SeedLifecycleState | None = None) -> Iterator[nn.Parameter]:
    """The parameters of every seed of a model or a layer, or of those in one state, each once; for an optimizer."""
    for module in model.modules():
        if isinstance(module, KasminaLayer):
            for _, parameter in module.seed_parameters(state):
                yield parameter
