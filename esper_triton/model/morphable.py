"""MorphableModel: a model whose layers hold seeds."""

from __future__ import annotations

import contextlib
import copy as copying
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import StateCorruption, nearest
from esper_triton.kasmina.adoption import Adopted, adopt_class, release_class
from esper_triton.kasmina.boundary import begin_epoch, damaged_arrays, end_step, restore_state
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.gates import Evaluation, Policy
from esper_triton.kasmina.kinds import Chunking
from esper_triton.kasmina.layer import KasminaLayer, release_layer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.schedules import Schedule
from esper_triton.kasmina.seed import SeedLoss
from esper_triton.model.agreement import agreement_of
from esper_triton.model.distributed import Replicas
from esper_triton.model.evaluation import measure
from esper_triton.model.germination import Germination, germinate
from esper_triton.model.targets import Target, check_is_called, resolve_targets
from esper_triton.tezzeret.pool import DEFAULT_BUDGET_S, Forge, shared_forge
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

    async def load_kernel(
        self, name: str, seed: int, artifact_id: str, *, force: bool = False, deadline_s: float | None = None
    ) -> bool:
        """Loads an artifact into a seed off this thread; see `KasminaLayer.load_kernel`."""
        layer = self._called_layer(name)
        return await KasminaLayer.load_kernel(layer, seed, artifact_id, force=force, deadline_s=deadline_s)

    def load_kernel_sync(self, name: str, seed: int, artifact_id: str, *, force: bool = False) -> bool:
        """As `load_kernel`, on this thread."""
        return KasminaLayer.load_kernel_sync(self._called_layer(name), seed, artifact_id, force=force)

    def germinate(
        self,
        name: str,
        design: str | Path | Blueprint | nn.Module,
        *,
        seed: int | None = None,
        pipeline: str = "standard",
        budget_s: float = DEFAULT_BUDGET_S,
        example_inputs: Any = None,
        forge: Forge | None = None,
        **dims: int,
    ) -> Germination:
        """Compiles a design for a layer in the background, has it proven, and loads it into a free seed:
        `await model.germinate("encoder.0.fc1", "bottleneck_adapter", r=16)`.

        Returns at once, with the seed's slot kept; a module is turned into a graph before, on this thread. From the
        load on, the seed goes as with `load_kernel`. Progress and failure are in what is returned, and awaiting it
        gives the seed's index or raises what went wrong.

        Args:
            name: of the layer. design: the name of a blueprint that ships, the path of one, a Blueprint, or a module.
            seed: the slot; the first free one by default. dims: sizes that do not follow from the layer and have no
                default. dtype, target, the widths of span and input are the layer's.
            pipeline, budget_s, example_inputs: as of `esper.compile`; a module's input is by default like the layer's.
            forge: the pool that compiles; the process's own by default.

        Raises at once, with nothing begun: BlueprintError for a design that is wrong or does not fit the layer,
        ValueError for the name, without a free seed, a store, or a kernel dtype.
        """
        return germinate(
            self._called_layer(name),
            design,
            dims,
            seed=seed,
            pipeline=pipeline,
            budget_s=budget_s,
            example_inputs=example_inputs,
            forge=forge,
        )

    def germinate_sync(self, name: str, design: str | Path | Blueprint | nn.Module, **options: Any) -> int:
        """As `germinate`, waiting on this thread: for code with no event loop. The index of the seed that has it. The
        process's own pool then compiles at this process's priority, as this thread has nothing else to do."""
        options["forge"] = options.get("forge") or shared_forge(waited_for=True)
        return MorphableModel.germinate(self, name, design, **options).result()

    def unload_kernel(self, name: str, seed: int) -> bool:
        """Takes a seed back to DORMANT; see `KasminaLayer.unload_kernel`."""
        return KasminaLayer.unload_kernel(self._layer(name), seed)

    def graft(self, name: str, seed: int, schedule: Schedule | None = None) -> None:
        """Lets a trained seed contribute, from alpha 0; see `KasminaLayer.graft`."""
        KasminaLayer.graft(self._layer(name), seed, schedule)

    def request_transition(self, name: str, seed: int, state: SeedLifecycleState) -> None:
        """Moves a seed along the lifecycle table; see `KasminaLayer.request_transition`."""
        KasminaLayer.request_transition(self._layer(name), seed, state)

    def rollback(self, name: str, seed: int) -> None:
        """Takes a seed out at once and locks its slot; see `KasminaLayer.rollback`."""
        KasminaLayer.rollback(self._layer(name), seed)

    def reset_seed(self, name: str, seed: int, *, force: bool = False) -> bool:
        """Opens the slot of a seed that is gone; see `KasminaLayer.reset_seed`."""
        return KasminaLayer.reset_seed(self._layer(name), seed, force=force)

    def set_alpha(self, name: str, seed: int, value: float) -> None:
        """Sets the blending coefficient of a seed; see `KasminaLayer.set_alpha`."""
        KasminaLayer.set_alpha(self._layer(name), seed, value)

    def set_seed_loss(self, name: str, seed: int, loss: SeedLoss | None) -> None:
        """What a seed learns in TRAINING; see `KasminaLayer.set_seed_loss`."""
        KasminaLayer.set_seed_loss(self._layer(name), seed, loss)

    def is_ready_for_transition(self, name: str, seed: int) -> bool:
        """Whether the stage of a seed is done; see `KasminaLayer.is_ready_for_transition`."""
        return KasminaLayer.is_ready_for_transition(self._layer(name), seed)

    def evaluate_seed(
        self,
        name: str,
        seed: int,
        metric: Callable[[nn.Module], float],
        *,
        repeats: int = 3,
        lower_is_better: bool = True,
    ) -> Evaluation:
        """Measures what a seed does for `metric(model)`, such as the validation loss, and remembers it for the gate.

        Calls the metric `repeats` times with the seed's alpha as it is and as often with alpha 0, in pairs that draw
        the same random numbers, in eval mode and without gradients. Alpha, modes and random streams are as they were
        afterwards. Call it between steps. Of replicas it is a collective, and the first rank's figures count on all of
        them. Raises ValueError for a seed that is not in STABILIZATION, EVALUATING or FINE_TUNING, or fewer than two
        repeats; what the metric raises passes through.
        """
        layer = self._layer(name)
        model = cast(nn.Module, self)
        found = measure(model, layer, seed, metric, repeats=repeats, lower_is_better=lower_is_better)
        agreed = layer._seed(seed).evaluation = agreement_of([layer]).first(found)
        return agreed

    def seed_loss(self) -> Tensor | None:
        """The sum of the losses of all seeds in TRAINING over the last training call of each layer, 0-d; None where
        there is none. Add it to the loss of the model: its graph reaches the seeds' parameters alone."""
        total: Tensor | None = None
        for layer in self._distinct_layers():
            loss = KasminaLayer.seed_loss(layer)
            if loss is not None:
                total = loss if total is None else total + loss.to(total.device)
        return total

    def train_seeds(self) -> float | None:
        """Backward of `seed_loss()` alone, for a loop that does not add it to its own: adds to the gradients of the
        seeds' parameters and returns the loss. None where no seed is in TRAINING."""
        loss = self.seed_loss()
        if loss is None:
            return None
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return float(loss.detach())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the host's parameters and of the seeds'."""
        cast(nn.Module, super()).zero_grad(set_to_none)
        for parameter in seed_parameters(cast(nn.Module, self)):
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)

    def step_boundary(self, *, auto_advance: bool | None = None) -> None:
        """Call it between training steps: what was asked for and what failed in the last step takes effect now, in all
        layers; ramps advance, stages are found to be done.

        With `auto_advance` seeds that are ready make their next move, through the gates of their layer's policy; by
        default as `wrap` was told.
        """
        end_step_of(list(self._distinct_layers()), auto_advance=auto_advance)

    def epoch_boundary(self, epoch: int) -> None:
        """Call it when `epoch` begins: embargoes are counted in epochs, and the state arrays are checked.

        Raises StateCorruption where the arrays of a layer are not those that the last commit wrote (by their CRC-32);
        nothing is changed then. `restore_state()` writes them again. ValueError for a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, found {epoch}")
        damaged = {layer._kasmina.name: damaged_arrays(layer) for layer in self._distinct_layers()}
        damaged = {name: arrays for name, arrays in damaged.items() if arrays}
        boundary = next((layer._kasmina.boundary for layer in self._distinct_layers()), None)
        if damaged:
            if boundary is not None:
                boundary.begun_epoch(epoch, damaged)
            raise StateCorruption(damaged)
        for layer in self._distinct_layers():
            begin_epoch(layer, epoch)
        if boundary is not None:
            boundary.begun_epoch(epoch, {})

    def restore_state(self) -> None:
        """Writes the state arrays of every layer again as the last commit did."""
        for layer in self._distinct_layers():
            restore_state(layer)

    def defer_transitions(self, deferred: bool = True) -> None:
        """From now on every request waits for `step_boundary`, whoever makes it: for a training loop whose boundaries
        come by themselves, as from a hook of the optimizer. `False` ends it."""
        for layer in self._distinct_layers():
            layer._kasmina.deferred = deferred

    @contextlib.contextmanager
    def within_step(self) -> Iterator[None]:
        """One step: `with model.within_step():` around forward, backward and the optimizer's step. Requests made
        inside wait for its end, which is a step boundary, after an exception too."""
        layers = list(self._distinct_layers())
        before = [layer._kasmina.deferred for layer in layers]
        self.defer_transitions()
        try:
            yield
        finally:
            for layer, deferred in zip(layers, before, strict=True):
                layer._kasmina.deferred = deferred
            self.step_boundary()

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


def end_step_of(layers: Sequence[KasminaLayer], *, auto_advance: bool | None) -> None:
    """The step boundary of a model with these layers: `MorphableModel.step_boundary` for who knows them already. A walk
    through the modules takes longer than all the rest of a boundary at which nothing happens."""
    boundary = next((layer._kasmina.boundary for layer in layers), None)
    if boundary is not None:
        boundary.before_boundary()
    replicas = next((layer._kasmina.replicas for layer in layers), None)
    if isinstance(replicas, Replicas):
        replicas.step_boundary(auto_advance=auto_advance)
    else:
        for layer in layers:
            auto = layer._kasmina.auto_advance if auto_advance is None else auto_advance
            end_step(layer, auto_advance=auto)
    if boundary is not None:
        boundary.after_boundary()


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

    def _routed(self, method: str, *args: Any, **options: Any) -> Any:
        face = MorphableModel if args and isinstance(args[0], str) else KasminaLayer
        return getattr(face, method)(self, *args, **options)

    load_kernel = functools.partialmethod(_routed, "load_kernel")
    load_kernel_sync = functools.partialmethod(_routed, "load_kernel_sync")
    unload_kernel = functools.partialmethod(_routed, "unload_kernel")
    graft = functools.partialmethod(_routed, "graft")
    request_transition = functools.partialmethod(_routed, "request_transition")
    rollback = functools.partialmethod(_routed, "rollback")
    reset_seed = functools.partialmethod(_routed, "reset_seed")
    set_alpha = functools.partialmethod(_routed, "set_alpha")
    set_seed_loss = functools.partialmethod(_routed, "set_seed_loss")
    is_ready_for_transition = functools.partialmethod(_routed, "is_ready_for_transition")


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
    policy: Policy | None = None,
    auto_advance: bool = False,
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
        telemetry_enabled: measure the time of active calls, and sample what seeds put out, as often as the policy says.
        policy: gates and times of the lifecycle; the defaults of `Policy`.
        auto_advance: at step boundaries seeds whose stage is done make their next move by themselves.

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
                    policy=policy,
                )
            )
            adopted[-1]._kasmina.auto_advance = auto_advance
            adopted[-1]._kasmina.clock = adopted[0]._kasmina.clock  # what samples cost counts for all layers together
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
