"""The `esper` section of a checkpoint: what `state_dict()` leaves out, so that it keeps the host's keys (law 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_triton.contracts.errors import CheckpointError, nearest
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.persistence import Missing, PreparedLayer, layer_section, prepare_layer, version_fault
from esper_triton.model.optim import SEED_KEY, Attachment, attachment_of, seed_label
from esper_triton.urza import Urza

__all__ = ["esper_state_dict", "load_esper_state_dict", "prepare"]

SCHEMA_VERSION = "1.0"
_NOT_KEPT = ("params", "param_names", SEED_KEY)


def esper_state_dict(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """The section of a model's seeds: states, alpha, artifact ids and manifest digests, parameters, counters, and what
    their stages and ramps have come to; with an attached optimizer also the seeds' moments and their groups' options.

    Only dicts, lists, tuples, tensors and plain values, for `torch.save({"model": model.state_dict(), "esper":
    section}, f)` and `torch.load(f, weights_only=True)`. Tensors are the model's own memory, as those of `state_dict`:
    to keep them in this process, copy them. Take it between training steps. A seed whose load is under way is saved as
    DORMANT, or in ERROR_RECOVERY where it had learned before.

    Raises ValueError where the model has no seeds or the optimizer is not attached to it, and TypeError for a schedule
    of the user's own or a group's option that is no plain value.
    """
    layers = _layers(model)
    section: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "layers": {name: layer_section(layer) for name, layer in layers.items()},
    }
    if optimizer is not None:
        _attachment(optimizer, layers)
        section["optimizer"] = _optimizer_section(optimizer, layers)
    return section


def load_esper_state_dict(
    model: nn.Module,
    section: Mapping[str, Any],
    optimizer: Optimizer | None = None,
    urza: Urza | None = None,
    *,
    missing: Missing = "error",
) -> None:
    """Makes the seeds of `model` those of a section, all or nothing. Kernels are fetched from Urza and verified as at
    any load, and must be of the recorded manifests (law 4).

    The model is wrapped as it was: the same layers, seeds and chunking. To go on training, attach the optimizer, load
    the section with it, and only then its own state and its schedulers', which have entries for the seeds' groups:

        esper.attach(optimizer, model, schedulers=[scheduler])
        model.load_state_dict(saved["model"])
        esper.load_esper_state_dict(model, saved["esper"], optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])

    Seeds that the model has already are replaced, whatever their state; their parameters stay the same objects where
    they have the same form.

    Args:
        optimizer: takes the seeds' groups and moments. Must be attached to `model`, and be of the class that was saved.
        urza: where artifacts are fetched; by default the store that each layer was wrapped with.
        missing: `recover` puts a seed whose artifact cannot be had into ERROR_RECOVERY, with the reason in
            `last_error`, instead of raising.

    Raises CheckpointError, which lists everything that does not fit, and ValueError where the model has no seeds or the
    optimizer is not attached to it. Nothing is changed then.
    """
    prepare(model, section, optimizer, urza, missing=missing).apply()


class Prepared:
    """A section that fits a model. `apply` does what `load_esper_state_dict` promises and cannot fail."""

    def __init__(self, layers: dict[str, PreparedLayer], optimizer: Optimizer | None, groups: Sequence[Any]) -> None:
        self._layers, self._optimizer, self._groups = layers, optimizer, groups

    def apply(self) -> None:
        for prepared in self._layers.values():
            prepared.apply()
        if self._optimizer is not None:
            attachment = attachment_of(self._optimizer)
            assert attachment is not None  # prepare has seen to it
            _restore_groups(self._optimizer, attachment, self._groups, self._layers)


def prepare(
    model: nn.Module,
    section: Mapping[str, Any],
    optimizer: Optimizer | None = None,
    urza: Urza | None = None,
    *,
    missing: Missing = "error",
) -> Prepared:
    """Everything of `load_esper_state_dict` that can fail. Changes nothing."""
    if missing not in ("error", "recover"):
        raise ValueError(f"missing is {missing!r}, expected 'error' or 'recover'")
    layers = _layers(model)
    if optimizer is not None:
        _attachment(optimizer, layers)
    faults: list[str] = []
    if not isinstance(section, Mapping):
        raise CheckpointError(f"the section of the seeds is a {type(section).__name__}, a dict is expected")
    version = version_fault(section.get("schema_version"), SCHEMA_VERSION)
    if version:
        raise CheckpointError(f"the section of the seeds cannot be read: {version}")
    for key in section:
        if key not in ("schema_version", "layers", "optimizer"):
            faults.append(f"unknown key {key!r}{nearest(str(key), ['layers', 'optimizer'])}")
    saved = section.get("layers")
    if not isinstance(saved, Mapping):
        saved = {}
        faults.append("it has no 'layers'")
    unknown = [name for name in saved if name not in layers]
    faults += [f"the model has no wrapped layer {name!r}{nearest(name, layers)}" for name in unknown]
    faults += [f"layer {name!r} is wrapped and not in the checkpoint" for name in layers if name not in saved]
    prepared = {
        name: one
        for name, layer in layers.items()
        if name in saved and (one := prepare_layer(name, layer, saved[name], urza, missing, faults)) is not None
    }
    groups: Sequence[Any] = ()
    if optimizer is not None and not faults:
        groups = _checked_groups(optimizer, section.get("optimizer"), prepared, faults)
    if faults:
        raise CheckpointError("the checkpoint does not fit this model: " + "; ".join(faults))
    return Prepared(prepared, optimizer, groups)


def _layers(model: nn.Module) -> dict[str, KasminaLayer]:
    """Each layer once, by the first of its names."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KasminaLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no seeds; wrap it first, with the same layers and seeds")
    return layers


def _attachment(optimizer: Optimizer, layers: Mapping[str, KasminaLayer]) -> Attachment:
    attachment = attachment_of(optimizer)
    if attachment is None or not attachment.is_of(layers):
        raise ValueError(
            f"this {type(optimizer).__name__} is not attached to this model; "
            "esper_triton.attach(optimizer, model) first"
        )
    return attachment


def _optimizer_section(optimizer: Optimizer, layers: Mapping[str, KasminaLayer]) -> dict[str, Any]:
    own = {
        seed_label(name, seed.index): (name, seed)
        for name, layer in layers.items()
        for seed in layer._kasmina.seeds
        if seed.parameters
    }
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        if SEED_KEY not in group:
            continue
        name, seed = own[group[SEED_KEY]]
        who = f"group of seed {seed.index} of layer {name!r}"
        groups.append(
            {
                "index": index,
                "layer": name,
                "seed": seed.index,
                "options": {k: _plain(v, f"{who}: option {k!r}") for k, v in group.items() if k not in _NOT_KEPT},
                "state": {
                    own_name: _plain(optimizer.state[parameter], f"{who}: state of {own_name!r}")
                    for own_name, parameter in seed.parameters.items()
                    if parameter in optimizer.state
                },
            }
        )
    return {
        "class": type(optimizer).__name__,
        "host_groups": len(optimizer.param_groups) - len(groups),
        "groups": groups,
    }


def _plain(value: Any, where: str) -> Any:
    """What `weights_only` loading accepts. Raises TypeError for anything else."""
    match value:
        case Tensor():
            return value.detach()
        case None | bool():
            return value
        case int():
            return int(value)
        case float():  # numpy's float64 is one, and would not be accepted
            return float(value)
        case str():
            return str(value)
        case list():
            return [_plain(item, where) for item in value]
        case tuple():
            return tuple(_plain(item, where) for item in value)
        case dict():
            return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}; only tensors and plain values can be saved")


def _checked_groups(
    optimizer: Optimizer, section: Any, layers: Mapping[str, PreparedLayer], faults: list[str]
) -> Sequence[Any]:
    """The groups of an optimizer's section, or none and the faults."""
    if section is None:
        faults.append("it has no optimizer; save it with esper_state_dict(model, optimizer), or load without one")
        return ()
    expected = {(name, seed): names for name, layer in layers.items() for seed, names in layer.parameters.items()}
    try:
        if section["class"] != type(optimizer).__name__:
            faults.append(f"its optimizer is {section['class']}, this one is {type(optimizer).__name__}")
        host_groups = sum(SEED_KEY not in group for group in optimizer.param_groups)
        if section["host_groups"] != host_groups:
            faults.append(
                f"its optimizer has {section['host_groups']} groups besides those of seeds, this one has {host_groups}"
            )
        groups: list[Any] = sorted(section["groups"], key=lambda group: group["index"])
        found = [(group["layer"], group["seed"]) for group in groups]
        for layer, seed in sorted(set(found) ^ set(expected)):
            has = "a group and no parameters" if (layer, seed) in found else "parameters and no group"
            faults.append(f"seed {seed} of layer {layer!r} has {has}")
        for group in groups:
            if (group["layer"], group["seed"]) not in expected:
                continue
            known = set(expected[group["layer"], group["seed"]])
            if not known.issuperset(group["state"]) or not all(isinstance(v, dict) for v in group["state"].values()):
                faults.append(f"moments of seed {group['seed']} of layer {group['layer']!r} are not of its parameters")
            for option in group["options"]:
                if not isinstance(option, str) or option in _NOT_KEPT:
                    faults.append(f"a group cannot have option {option!r}")
        positions = [group["index"] for group in groups]
        if len(set(positions)) != len(groups) or not all(0 <= p < host_groups + len(groups) for p in positions):
            faults.append(f"its groups of seeds have positions {positions}")
    except (KeyError, TypeError, AttributeError) as error:
        faults.append(f"its optimizer is damaged: {type(error).__name__}: {error}")
        return ()
    return groups


def _restore_groups(
    optimizer: Optimizer, attachment: Attachment, groups: Sequence[Any], layers: Mapping[str, PreparedLayer]
) -> None:
    attachment.arrange([(saved["index"], seed_label(saved["layer"], saved["seed"])) for saved in groups])
    for saved in groups:
        group = optimizer.param_groups[saved["index"]]
        group.update({name: _copied(value) for name, value in saved["options"].items()})
        for name, parameter in layers[saved["layer"]].layer._kasmina.seeds[saved["seed"]].parameters.items():
            if name in saved["state"]:
                optimizer.state[parameter] = {
                    key: _moment(value, key, parameter, group) for key, value in saved["state"][name].items()
                }
            else:
                optimizer.state.pop(parameter, None)


def _moment(value: Any, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    # Where the optimizer itself keeps it: the step count stays on the CPU unless its kernels read it on the device.
    if isinstance(value, Tensor) and (key != "step" or group.get("capturable") or group.get("fused")):
        return value.detach().to(parameter.device, copy=True)
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    return value
