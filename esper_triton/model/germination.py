"""A seed from a design in one call: what the layer asks for is found out, compiled in the background, and loaded."""

from __future__ import annotations

import asyncio
import enum
import threading
import weakref
from collections.abc import Collection, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.dims import dim_faults
from esper_triton.contracts.errors import BlueprintError, CompileError
from esper_triton.contracts.graph import X_DIM
from esper_triton.kasmina.boundary import host_dtype
from esper_triton.kasmina.kinds import kind_of
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.pending import PendingLoad
from esper_triton.kasmina.record import LayerRecord
from esper_triton.tezzeret.library import find
from esper_triton.tezzeret.pool import DEFAULT_BUDGET_S, CompileTask, Forge, TaskState, shared_forge

__all__ = ["Germination", "GerminationState", "Place", "free_seed", "germinate", "place_of", "target_name"]

_S = SeedLifecycleState


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a layer asks of a kernel: the width of the span, that of the layer's input (None where rows of it do not fit
    those of the output), the dtype, and the target of its device. `who` is for messages."""

    who: str
    width: int
    x_width: int | None
    dtype: str
    target: str

    def dims(self, blueprint: Blueprint, given: Mapping[str, int]) -> dict[str, int]:
        """Numbers for a blueprint's dims: of the place, as given, and the blueprint's defaults.

        Raises BlueprintError for a dim that has none or is outside of its limits, one that is given and is another
        here, and a blueprint that reads an input which there is not.
        """
        dims = {blueprint.feature_dim: self.width}
        if "x" in blueprint.inputs:
            if self.x_width is None:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r} reads the layer's input, which {self.who} has not row by row; "
                    'take one with input = "h"'
                )
            if X_DIM not in blueprint.dims and self.x_width != self.width:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r} reads an input as wide as the output ({self.width}); that of "
                    f"{self.who} is {self.x_width} wide; give the blueprint a dim {X_DIM!r}"
                )
            if X_DIM in blueprint.dims:
                dims[X_DIM] = self.x_width
        for name, size in given.items():
            if dims.get(name, size) != size:
                raise BlueprintError(
                    f"blueprint {blueprint.name!r}: {name}={size} was given, and {self.who} asks for {dims[name]}"
                )
        dims = {n: d.default for n, d in blueprint.dims.items() if d.default is not None} | dims | dict(given)
        faults = dim_faults(blueprint.dims, dims)
        if faults:
            raise BlueprintError(f"blueprint {blueprint.name!r} for {self.who}: " + "; ".join(faults))
        return dims


def place_of(layer: nn.Module, seed: int | None = None) -> Place:
    """What a layer asks of a kernel: of a KasminaLayer for `seed`, by default its first free one; of another module for
    the whole width.

    Raises TypeError for a module that cannot hold seeds, ValueError for a dtype or a device that no kernel is for or a
    layer without a free seed.
    """
    if isinstance(layer, KasminaLayer):
        record = layer._kasmina
        who, kind = f"layer {record.name!r}", record.kind
        start, stop = layer.seed_span(free_seed(layer) if seed is None else seed)
        width = stop - start
    else:
        who, kind = type(layer).__name__, kind_of(layer)
        width = kind.width
    dtype = host_dtype(cast(KasminaLayer, layer)) or torch.float32
    names = {value: name for name, value in TORCH_DTYPE.items()}
    if dtype not in names:
        raise ValueError(f"{who} is {dtype}; kernels exist for {', '.join(TORCH_DTYPE)}")
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    return Place(who=who, width=width, x_width=kind.x_width, dtype=names[dtype], target=target_name(device))


def target_name(device: torch.device) -> str:
    """The compile target of a device: `cpu`, `cuda:90`, `hip:gfx942`. Raises ValueError for any other device."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"no kernel is for a device of type {device.type!r}; move the layer to cpu or cuda")
    if torch.version.hip is not None:
        return f"hip:{str(torch.cuda.get_device_properties(device).gcnArchName).partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def free_seed(layer: KasminaLayer, taken: Collection[int] = ()) -> int:
    """The first seed that an artifact can be loaded into now, dormant ones before those that are gone. `taken` are left
    out. Raises ValueError with the states where there is none."""
    record = layer._kasmina
    outlooks = {seed.index: record.queue.outlook(seed) for seed in record.seeds if seed.index not in taken}
    for wanted in (_S.DORMANT, _S.CANCELLED, _S.CULLED):
        for index, outlook in outlooks.items():
            if outlook.state is wanted and (wanted is not _S.CULLED or record.epoch >= outlook.opens_at):
                return index
    states = ", ".join(
        f"{seed.index} {'waits for a compile' if seed.index in taken else outlooks[seed.index].state.name}"
        for seed in record.seeds
    )
    raise ValueError(f"layer {record.name!r} has no free seed: {states}")


class GerminationState(enum.StrEnum):
    """How far a germination is. Once it is LOADING the seed's own state says more."""

    COMPILING = "COMPILING"
    LOADING = "LOADING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Germination:
    """A design on its way into a seed. `await germination` gives the index of the seed that has it, or raises what went
    wrong.

    It goes on without being awaited: the compile in a process of its own, the load on a thread of its own; what comes
    of them takes effect at the layer's next step boundary, or at the `await` where that is on the training thread.

    Attributes:
        layer, seed: where it goes; the slot is kept for it. artifact_id: None until it is compiled and proven.
    """

    def __init__(self, layer: KasminaLayer, seed: int, compiling: CompileTask) -> None:
        self.layer, self.seed = layer, seed
        self.artifact_id: str | None = None
        self._compiling, self._load = compiling, cast(PendingLoad | None, None)
        self._error: BaseException | None = None
        self._over: Future[None] = Future()
        self._over.set_running_or_notify_cancel()
        compiling.add_done_callback(self._compiled)

    def __repr__(self) -> str:
        return f"<Germination of {self._compiling.name!r} in seed {self.seed}: {self.state}, {self.stage}>"

    @property
    def state(self) -> GerminationState:
        """How far it is."""
        if self._compiling.state is TaskState.CANCELLED:
            return GerminationState.CANCELLED
        if not self._over.done():
            return GerminationState.COMPILING if self._load is None else GerminationState.LOADING
        return GerminationState.FAILED if self.error is not None else GerminationState.DONE

    @property
    def stage(self) -> str:
        """What is being done, in words."""
        return self._compiling.stage if self._load is None else self.state.lower()

    @property
    def progress(self) -> float:
        """The part that is done, from 0 to 1."""
        return 1.0 if self._over.done() else 0.9 * self._compiling.progress

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None while it has not."""
        if self._error is not None or self._load is None or not self._over.done() or self._load.succeeded:
            return self._error
        seed = self._load.record.seeds[self.seed]
        return seed.last_error or CompileError(f"{self._load.who}: artifact {self.artifact_id} was not loaded")

    def __await__(self) -> Generator[Any, None, int]:
        yield from asyncio.wait([asyncio.wrap_future(self._over)]).__await__()
        return self.result()

    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self._over.done()

    def result(self, timeout_s: float | None = None) -> int:
        """Waits on this thread, for code with no event loop. Raises what went wrong, and TimeoutError."""
        self._over.result(timeout_s)
        KasminaLayer._settle(self.layer)
        if self.error is not None:
            raise self.error
        return self.seed

    def cancel(self) -> bool:
        """Ends the compile and frees the slot. False where it is over, or loading: `unload_kernel` ends that."""
        return self._compiling.cancel()

    # ---- on the pool's thread, and on the loader's

    def _compiled(self, compiling: CompileTask) -> None:
        try:
            self.artifact_id = compiling.result().id
            self._load = KasminaLayer._begin_load(self.layer, self.seed, self.artifact_id, False, None)
            if self._load is None:
                raise CompileError(f"seed {self.seed}: artifact {self.artifact_id} has failed in this process")
            loading = self._load.start()
        except BaseException as error:  # nobody above could do anything about it
            self._error = error
            self._end()
        else:
            loading.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        _release(self.layer, self.seed)
        self._over.set_result(None)


_reserved: weakref.WeakKeyDictionary[LayerRecord, set[int]] = weakref.WeakKeyDictionary()
_reserving = threading.Lock()


def _reserve(layer: KasminaLayer, seed: int | None) -> int:
    with _reserving:
        taken = _reserved.setdefault(layer._kasmina, set())
        chosen = free_seed(layer, taken) if seed is None else seed
        if chosen in taken:
            raise ValueError(f"seed {chosen} of layer {layer._kasmina.name!r} waits for a compile already")
        taken.add(chosen)
        return chosen


def _release(layer: KasminaLayer, seed: int) -> None:
    record = layer.__dict__.get("_kasmina")  # None where it has been unwrapped
    with _reserving:
        if record is not None:
            _reserved.get(record, set()).discard(seed)


def germinate(
    layer: KasminaLayer,
    design: str | Path | Blueprint | nn.Module,
    dims: Mapping[str, int],
    *,
    seed: int | None = None,
    pipeline: str = "standard",
    budget_s: float = DEFAULT_BUDGET_S,
    example_inputs: Any = None,
    forge: Forge | None = None,
) -> Germination:
    """See `MorphableModel.germinate`."""
    record = layer._kasmina
    if record.urza is None:
        raise ValueError(f"layer {record.name!r}: no Urza to store in; give one to wrap or adopt")
    if isinstance(design, nn.Module):
        blueprint = Blueprint.from_module(design, _examples(layer) if example_inputs is None else example_inputs)
    else:
        blueprint = design if isinstance(design, Blueprint) else Blueprint.load(find(design))
    layer_seed = _reserve(layer, seed)
    try:
        place = place_of(layer, layer_seed)
        compiling = (forge or shared_forge()).submit(
            blueprint,
            place.dims(blueprint, dims),
            place.dtype,
            place.target,
            pipeline,
            urza=record.urza,
            budget_s=budget_s,
        )
    except BaseException:
        _release(layer, layer_seed)
        raise
    return Germination(layer, layer_seed, compiling)


def _examples(layer: KasminaLayer) -> torch.Tensor:
    """An input of the layer's kind, of a few rows."""
    kind = layer._kasmina.kind
    if kind.x_width is None:
        raise BlueprintError(f"layer {layer._kasmina.name!r}: what its input is like is not known; give example_inputs")
    if kind.feature_dim == -1:
        return torch.zeros(2, kind.x_width)
    return torch.zeros(1, kind.x_width, *[4] * (2 if kind.positions is None else kind.positions))
