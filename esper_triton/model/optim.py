"""An optimizer that follows the seeds: their parameters come and go, everything else keeps its moments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper_triton.contracts.errors import nearest
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState

__all__ = ["SEED_KEY", "Attachment", "attach", "attachment_of", "has_scheduler", "seed_label"]

SEED_KEY = "esper_seed"
"""Key of a parameter group that belongs to a seed; its value is `seed_label(...)`."""

_S = SeedLifecycleState
_LEARNING = frozenset({_S.TRAINING, _S.GRAFTING, _S.FINE_TUNING})
_ON_OPTIMIZER = "_esper_attachment"
_REFUSED = {
    "LBFGS": "it optimizes its first parameter group and no other",
    "SparseAdam": "it takes sparse gradients, and those of seeds are dense",
    "Muon": "it takes matrices alone, and seeds have vectors too",
}
# What schedulers keep for each group in lists beside the optimizer. The first are learning rates, and proportional to
# the group's own.
_SCALED_LISTS = ("base_lrs", "_last_lr", "max_lrs")
_LISTS = (*_SCALED_LISTS, "lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
_SCALED_OPTIONS = ("lr", "initial_lr", "max_lr", "min_lr")
_CYCLED_OPTIONS = ("momentum", "betas")
_NOT_OPTIONS = ("params", "param_names", SEED_KEY)


def attach(
    optimizer: Optimizer, model: nn.Module, *, schedulers: Sequence[LRScheduler] | None = None, **group_defaults: Any
) -> Attachment:
    """Lets `optimizer` take the parameters of the seeds of `model`, those that are there and those to come.

    Every seed with parameters has a parameter group of its own, with `optimizer.defaults` and `group_defaults` over
    them. It is added when the parameters appear and removed, with their moments, when they go; groups and moments of
    everything else stay as they are. While a seed does not learn (frozen, or in recovery) its group stays, and its
    gradients are cleared at the transition, so that nothing moves it, weight decay included.

    Args:
        schedulers: every learning rate scheduler of the optimizer, `[]` for none any more. They keep a list entry for
            each group, which is added and removed with the group. A seed's group takes the place in the schedule that
            the first group has: its options of the schedule, learning rates times `lr` (the group's `initial_lr`) over
            the first group's. One that is built later is added with `follow`.
        group_defaults: options of the seeds' groups, such as `lr=1e-3, weight_decay=0.0`.

    Returns a handle whose `detach()` undoes it. Neither the optimizer nor the model keeps the other alive.

    Raises ValueError where `model` has no seeds, where it or the optimizer is attached already, where a seed's
    parameters are in another group of the optimizer, and for schedulers that were not named; TypeError for an optimizer
    that cannot take them and for an option that it does not have. Nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KasminaLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no seeds to attach; wrap it first")
    reason = next((_REFUSED[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in _REFUSED), None)
    if reason is not None:
        raise TypeError(f"{type(optimizer).__name__} cannot take seeds' parameters: {reason}")
    if attachment_of(optimizer) is not None:
        raise ValueError(f"this {type(optimizer).__name__} is attached already; detach() its handle first")
    for name, layer in layers.items():
        if any(isinstance(observer, _LayerObserver) for observer in layer._kasmina.observers):
            raise ValueError(f"layer {name!r} is attached to an optimizer already; detach() that handle first")
    for option in group_defaults:
        if option not in optimizer.defaults:
            known = nearest(option, optimizer.defaults)
            raise TypeError(f"{type(optimizer).__name__} has no option {option!r}{known}")
    for scheduler in schedulers or ():
        _check_schedules(scheduler, optimizer)
    if schedulers is None and has_scheduler(optimizer):
        raise ValueError(
            f"this {type(optimizer).__name__} has a learning rate scheduler, which must learn of new groups: "
            "attach(optimizer, model, schedulers=[scheduler])"
        )
    taken = {id(p) for group in optimizer.param_groups if SEED_KEY not in group for p in group["params"]}
    for name, layer in layers.items():
        for own_name, parameter in layer.seed_parameters():
            if id(parameter) in taken:
                raise ValueError(
                    f"parameter {own_name!r} of layer {name!r} is in a group of this optimizer already; build the "
                    "optimizer without the seeds' parameters, attach adds them"
                )
    return Attachment(optimizer, layers, schedulers, group_defaults)


def seed_label(layer: str, seed: int) -> str:
    """What a seed's group carries: `<qualified name of the layer>:<seed>`."""
    return f"{layer}:{seed}"


def attachment_of(optimizer: Optimizer) -> Attachment | None:
    """The handle of an attached optimizer."""
    found: Attachment | None = vars(optimizer).get(_ON_OPTIMIZER)
    return found


class Attachment:
    """An optimizer's tie to the seeds of a model. Made by `attach`."""

    def __init__(
        self,
        optimizer: Optimizer,
        layers: dict[str, KasminaLayer],
        schedulers: Sequence[LRScheduler] | None,
        group_defaults: dict[str, Any],
    ) -> None:
        # The layers' observers hold this object, so its reference to the optimizer must be weak, and vice versa.
        self._optimizer = weakref.ref(optimizer, lambda _: self._stop_observing())
        self._layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        self._told_of_schedulers = schedulers is not None
        self._schedulers = [weakref.ref(scheduler) for scheduler in schedulers or ()]
        self._group_defaults = group_defaults
        # A copy: where it is a tensor, the first group's is the same one, and schedulers write into it.
        self._default_lr = _times(optimizer.defaults["lr"], 1.0)
        self._unregister: list[Callable[[], None]] = [
            layer.on_transition(_LayerObserver(self, name, layer)) for name, layer in layers.items()
        ]
        vars(optimizer)[_ON_OPTIMIZER] = self
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
        ]
        for name, layer in layers.items():
            for seed in range(len(layer._kasmina.seeds)):
                self._sync(name, layer, seed)

    def follow(self, scheduler: LRScheduler) -> None:
        """Adds a scheduler that was built after `attach`; one that is followed already is no other. Raises ValueError
        where it is another optimizer's."""
        optimizer = self._optimizer()
        if optimizer is not None:
            _check_schedules(scheduler, optimizer)
        if not any(reference() is scheduler for reference in self._schedulers):
            self._schedulers.append(weakref.ref(scheduler))
        self._told_of_schedulers = True

    def detach(self) -> None:
        """Takes the seeds' groups, with their moments, out of the optimizer and follows them no longer. Idempotent."""
        self._stop_observing()
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).pop(_ON_OPTIMIZER, None) is self:
            for group in tuple(optimizer.param_groups):
                if SEED_KEY in group:
                    self._remove(optimizer, group[SEED_KEY])

    def is_of(self, layers: Mapping[str, KasminaLayer]) -> bool:
        """Whether it follows exactly these layers, under these names."""
        return self._layers.keys() == layers.keys() and all(self._layers[name]() is layers[name] for name in layers)

    def arrange(self, labels: Sequence[tuple[int, str]]) -> None:
        """Puts seeds' groups at given positions, ascending; schedulers' entries move with them."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        here = {group.get(SEED_KEY): index for index, group in enumerate(optimizer.param_groups)}
        moved = [here[label] for _, label in labels]
        order = [index for index in range(len(optimizer.param_groups)) if index not in moved]
        for (position, _), index in zip(labels, moved, strict=True):
            order.insert(position, index)
        for entries in (optimizer.param_groups, *(entries for _, entries in self._lists(len(order)))):
            entries[:] = [entries[index] for index in order]

    def _on_transition(self, name: str, layer: KasminaLayer, event: Transition) -> None:
        if event.target not in _LEARNING:
            for parameter in layer._kasmina.seeds[event.seed].parameters.values():
                parameter.grad = None
        self._sync(name, layer, event.seed)

    def _sync(self, name: str, layer: KasminaLayer, seed: int) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        label, parameters = seed_label(name, seed), layer._kasmina.seeds[seed].parameters
        group = next((g for g in optimizer.param_groups if g.get(SEED_KEY) == label), None)
        if group is not None:
            if list(map(id, group["params"])) == list(map(id, parameters.values())):
                return
            self._remove(optimizer, label)
        if parameters:
            self._add(optimizer, label, parameters)

    def _add(self, optimizer: Optimizer, label: str, parameters: dict[str, nn.Parameter]) -> None:
        first_index, first = next((i, g) for i, g in enumerate(optimizer.param_groups) if SEED_KEY not in g)
        options, ratio = self._options(optimizer, first)
        if "param_names" in first:
            options["params"] = [(f"{label}.{name}", parameter) for name, parameter in parameters.items()]
        else:
            options["params"] = list(parameters.values())
        lists = list(self._lists(len(optimizer.param_groups)))
        optimizer.add_param_group(options | {SEED_KEY: label})
        for name, entries in lists:
            entries.append(_times(entries[first_index], ratio if name in _SCALED_LISTS else 1.0))

    def _options(self, optimizer: Optimizer, first: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Options of a new group, and its learning rate over the first group's."""
        options = {name: _times(value, 1.0) for name, value in (optimizer.defaults | self._group_defaults).items()}
        schedulers = list(self._live_schedulers())
        if not schedulers:
            return options, 1.0
        base = first.get("initial_lr", self._default_lr)
        lr = self._group_defaults.get("lr", base)
        ratio = float(lr / base) if base else 1.0
        cycled = _CYCLED_OPTIONS if any(getattr(s, "cycle_momentum", False) for s in schedulers) else ()
        for name, value in first.items():
            if name in _SCALED_OPTIONS:
                options[name] = _times(value, ratio)
            elif name in cycled or (name not in optimizer.defaults and name not in _NOT_OPTIONS):
                options[name] = _times(value, 1.0)
        return options, ratio

    def _remove(self, optimizer: Optimizer, label: str) -> None:
        index = next(i for i, group in enumerate(optimizer.param_groups) if group.get(SEED_KEY) == label)
        for _, entries in self._lists(len(optimizer.param_groups)):
            del entries[index]
        for parameter in optimizer.param_groups.pop(index)["params"]:
            optimizer.state.pop(parameter, None)

    def _live_schedulers(self) -> Iterator[LRScheduler]:
        for reference in self._schedulers:
            scheduler = reference()
            if scheduler is not None:
                yield from _with_parts(scheduler)

    def _lists(self, groups: int) -> Iterator[tuple[str, list[Any]]]:
        """The schedulers' lists of one entry for each of so many groups, by name."""
        for scheduler in self._live_schedulers():
            for name in _LISTS:
                entries = vars(scheduler).get(name)
                if isinstance(entries, list) and len(entries) == groups:
                    yield name, entries

    def _stop_observing(self) -> None:
        while self._unregister:
            self._unregister.pop()()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # torch would say so too, in the scheduler's next step: "zip() argument 2 is shorter than argument 1".
        if not self._told_of_schedulers and has_scheduler(optimizer):
            raise RuntimeError(
                "a learning rate scheduler was built on this optimizer after attach(...), which must learn of new "
                "groups: attachment.follow(scheduler); with a GrowthHook build it before, and name it in schedulers="
            )

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = [group.get(SEED_KEY) for group in state_dict["param_groups"]]
        found = [group.get(SEED_KEY) for group in optimizer.param_groups]
        if saved != found and any((*saved, *found)):
            raise ValueError(
                f"the saved optimizer has groups of seeds {_labels(saved)}, this one has {_labels(found)}, in this "
                "order; load the seeds first: esper_triton.load_esper_state_dict(model, section, optimizer)"
            )


class _LayerObserver:
    """What a layer calls after a transition. Holds the layer weakly: the layer holds it."""

    def __init__(self, attachment: Attachment, name: str, layer: KasminaLayer) -> None:
        self._attachment, self._name, self._layer = attachment, name, weakref.ref(layer)

    def __call__(self, event: Transition) -> None:
        layer = self._layer()
        if layer is not None:
            self._attachment._on_transition(self._name, layer, event)


def _check_schedules(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    own = getattr(scheduler, "optimizer", None)
    if own is not optimizer and getattr(own, "optimizer", None) is not optimizer:  # accelerate puts one around another
        raise ValueError(f"{type(scheduler).__name__} does not schedule the optimizer that is attached")


def has_scheduler(optimizer: Optimizer) -> bool:
    """Whether a learning rate scheduler was built on it, ever."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")  # torch's own mark


def _with_parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):  # SequentialLR and ChainedScheduler
        yield from _with_parts(part)


def _times(value: Any, ratio: float) -> Any:
    """Scaled; at ratio 1 the same value, and of a tensor a copy, since schedulers write into theirs."""
    if isinstance(value, Tensor):
        return value.detach().clone() if ratio == 1.0 else value.detach() * ratio
    return value if ratio == 1.0 else value * ratio


def _labels(groups: Sequence[str | None]) -> str:
    return ", ".join(repr(label) for label in groups if label) or "none"
