"""A grown model in a directory: its weights and seeds, and the lineage that says what grew in it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

import esper_triton
from esper_triton.contracts.errors import CheckpointError, EsperError
from esper_triton.contracts.lineage import SCHEMA_VERSION, Lineage, LineageEntry
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.persistence import Missing, version_fault
from esper_triton.model.checkpoint import esper_state_dict, prepare
from esper_triton.urza import Urza

__all__ = ["load_model", "save_model", "weight_faults"]

_logger = logging.getLogger(__name__)
_LINEAGE = "lineage.json"
_PATTERN = "weights-*.pt"
_UNFINISHED = ".esper-"
_M = TypeVar("_M", bound=nn.Module)


def save_model(model: nn.Module, directory: str | Path) -> Path:
    """Saves a wrapped model into a directory, made if need be; returns the path of its `lineage.json`.

        lineage.json          the fossilised seeds; which file has the weights, and its SHA-256
        weights-<sha256>.pt   {"model": state_dict with the host's keys, "esper": the seeds' section}

    Replacing `lineage.json` is the commit: a reader, or whoever comes after a crash, finds the model that was saved
    before or this one, whole. The weights of the one before are removed then. Two that save at once take turns.

    In the stores of its layers the artifacts of the lineage are then named under this directory, so that no collection
    removes them (`Urza.name_lineage`); where a store cannot be written, a warning is logged.

    Raises ValueError where the model has no seeds, OSError where the directory cannot be written; what was there before
    is still there then.
    """
    directory = Path(directory)
    section = esper_state_dict(model)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) as folder:
        with _written(directory, lambda file: torch.save({"model": model.state_dict(), "esper": section}, file)) as new:
            digest = _sha256(new)
            name = f"weights-{digest[:16]}.pt"
            new.replace(directory / name)
        os.fsync(folder)  # the weights have their name before a lineage names them, after a power cut too
        lineage = Lineage(
            esper_triton=esper_triton.__version__,
            saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            weights=name,
            weights_sha256=digest,
            seeds=tuple(_entries(model)),
        )
        text = lineage.model_dump_json(indent=1) + "\n"
        with _written(directory, lambda file: file.write(text.encode())) as new:
            new.replace(directory / _LINEAGE)
        os.fsync(folder)
        for old in directory.glob(_PATTERN):
            if old.name != name:
                old.unlink()
        _keep(model, directory, lineage)
    return directory / _LINEAGE


def load_model(directory: str | Path, model: _M, urza: Urza | None = None, *, missing: Missing = "error") -> _M:
    """Gives `model`, wrapped as the saved one was, the weights and seeds that `save_model` wrote into a directory, and
    returns it. Kernels are fetched and verified again, as `load_esper_state_dict` does; see there for `urza` and
    `missing`.

    Raises CheckpointError, which lists everything that does not fit, ValueError where the model has no seeds, and
    FileNotFoundError for a directory without a saved model. Nothing is changed then.
    """
    directory = Path(directory)
    saved = _read(directory)
    weights, section = saved.get("model"), saved.get("esper")
    if not isinstance(weights, Mapping) or not isinstance(section, Mapping):
        raise CheckpointError(f"the weights in {directory} have no 'model' or no 'esper' section")
    if not any(isinstance(module, KasminaLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no seeds; wrap it first{_how_to_wrap(section)}")
    faults = list(weight_faults(model, weights))
    if faults:
        raise CheckpointError(f"the weights in {directory} do not fit this model: " + "; ".join(faults))
    prepared = prepare(model, section, urza=urza, missing=missing)
    model.load_state_dict(weights)
    prepared.apply()
    return model


def _keep(model: nn.Module, directory: Path, lineage: Lineage) -> None:
    """Names the lineage in every store that the model's layers load from."""
    path = directory.resolve()
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', path.name).lstrip('_.-')[:60] or 'model'}-{place}"
    stores = {layer: one._kasmina.urza for layer, one in model.named_modules() if isinstance(one, KasminaLayer)}
    for location, store in {urza.location: urza for urza in stores.values() if urza is not None}.items():
        named = name
        of_it = {layer for layer, urza in stores.items() if urza is not None and urza.location == location}
        seeds = tuple(entry for entry in lineage.seeds if entry.layer in of_it)
        if "://" in location:  # other machines name theirs there, and may save to the same path
            named = f"{re.sub(r'[^A-Za-z0-9-]', '_', platform.node()).lstrip('_-')[:20] or 'machine'}-{name}"
        try:
            if seeds:
                store.name_lineage(named, lineage.model_copy(update={"seeds": seeds}))
            else:
                store.forget_lineage(named)
        except EsperError as error:  # also where this may only read the store: the model is saved
            _logger.warning("a collection may remove what the model saved in %s has grown: %s", directory, error)


def _entries(model: nn.Module) -> Iterator[LineageEntry]:
    for name, layer in model.named_modules():
        if not isinstance(layer, KasminaLayer):
            continue
        for seed in layer._kasmina.seeds:
            if seed.state is SeedLifecycleState.FOSSILIZED and seed.kernel is not None:
                measured = seed.permanent_evaluation
                yield LineageEntry(
                    layer=name,
                    seed=seed.index,
                    artifact_id=seed.kernel.manifest.id,
                    manifest_digest=seed.kernel.digest,
                    parameters=tuple(seed.parameters),
                    alpha=seed.alpha,
                    metric_before=None if measured is None else statistics.fmean(measured.off),
                    metric_after=None if measured is None else statistics.fmean(measured.on),
                    step=seed.permanent_since_step,
                )


def _read(directory: Path) -> dict[str, Any]:
    lineage = _lineage(directory)
    while True:
        path = directory / lineage.weights
        try:
            found = _sha256(path)
            if found != lineage.weights_sha256:
                raise CheckpointError(f"{path} is damaged: SHA-256 expected {lineage.weights_sha256}, found {found}")
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return saved
        except FileNotFoundError:
            # A save that has ended since the lineage was read has removed the weights that it named.
            lineage, before = _lineage(directory), lineage
            if lineage == before:
                raise


def _lineage(directory: Path) -> Lineage:
    path = directory / _LINEAGE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no saved model in {directory}: it has no {_LINEAGE}") from error
    try:
        body = json.loads(text)
        version = version_fault(body.get("schema_version") if isinstance(body, dict) else None, SCHEMA_VERSION)
        if version:
            raise CheckpointError(f"{path} cannot be read: {version}")
        return Lineage.model_validate_json(text)
    except (json.JSONDecodeError, ValidationError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def weight_faults(model: nn.Module, weights: Mapping[str, Any]) -> Iterator[str]:
    """What of a saved `state_dict` does not fit the model's own."""
    own = model.state_dict()
    for name in own.keys() - weights.keys():
        yield f"{name!r} is missing"
    for name, value in weights.items():
        if name not in own:
            yield f"{name!r} is unexpected"
        elif isinstance(value, Tensor) and isinstance(own[name], Tensor) and value.shape != own[name].shape:
            yield f"{name!r} is {tuple(value.shape)}, the model has {tuple(own[name].shape)}"


def _how_to_wrap(section: Mapping[str, Any]) -> str:
    layers = section.get("layers")
    if not isinstance(layers, Mapping):
        return ""
    seeds = sorted({len(layer["seeds"]) for layer in layers.values()})
    return f": esper_triton.wrap(model, {list(layers)}, seeds_per_layer={', '.join(map(str, seeds))})"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """The opened directory, exclusive among processes and threads that save here; the kernel drops the lock with its
    holder."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        for left in directory.glob(f"{_UNFINISHED}*"):
            left.unlink()  # by a save that died: none is under way now
        yield opened
    finally:
        os.close(opened)


@contextlib.contextmanager
def _written(directory: Path, write: Callable[[IO[bytes]], object]) -> Iterator[Path]:
    """A new file with what `write` writes, on the disk, to be moved to its name; gone afterwards if it was not."""
    path = directory / f"{_UNFINISHED}{secrets.token_hex(8)}"
    try:
        with path.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
