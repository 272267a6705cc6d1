"""That no fault of a seed reaches a model (law 1), with the faults to try it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.boundary import end_step, refresh
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.seed import Seed
from esper_triton.model.morphable import unwrap
from esper_triton.urza import Urza

__all__ = ["FAULTS", "Fault", "assert_never_breaks"]

Fault = Callable[[KasminaLayer, int], contextlib.AbstractContextManager[None]]
"""Does something to one seed of a layer, and takes back what outlives the layer."""


class _Broken(RuntimeError):
    """What a launch raises here."""


@contextlib.contextmanager
def _launches(layer: KasminaLayer, seed: int, instead: Callable[..., None]) -> Iterator[None]:
    """Every launch of the seed's kernel is `instead`; other seeds with the same kernel keep theirs."""
    record = layer._kasmina.seeds[seed]
    kernel = record.kernel
    if kernel is None:
        yield
        return
    program = copy.copy(kernel.program)
    for which in ("_forward", "_backward"):
        changed = [dataclasses.replace(launch, run=instead) for launch in getattr(program, which)]
        object.__setattr__(program, which, changed)
    record.kernel = dataclasses.replace(kernel, program=program)
    refresh(layer)
    yield


def _raises(layer: KasminaLayer, seed: int) -> contextlib.AbstractContextManager[None]:
    def broken(*_: object) -> None:
        raise _Broken("the launch failed")

    return _launches(layer, seed, broken)


def _out_of_memory(layer: KasminaLayer, seed: int) -> contextlib.AbstractContextManager[None]:
    def broken(*_: object) -> None:
        raise MemoryError("the launch had no memory")

    return _launches(layer, seed, broken)


@contextlib.contextmanager
def _filled(layer: KasminaLayer, seed: int, value: float) -> Iterator[None]:
    with torch.no_grad():
        for parameter in _parameters(layer, seed):
            parameter.fill_(value)
    yield


def _parameters(layer: KasminaLayer, seed: int) -> list[nn.Parameter]:
    return list(layer._kasmina.seeds[seed].parameters.values())


@contextlib.contextmanager
def _reloaded(layer: KasminaLayer, seed: int, damage: Callable[[Urza, str], str]) -> Iterator[None]:
    """The seed's artifact is loaded again from a copy of its store that has been damaged."""
    record = layer._kasmina
    source, artifact_id = record.urza, record.seeds[seed].artifact_id
    assert source is not None
    assert artifact_id is not None
    with tempfile.TemporaryDirectory(prefix="esper-testing-") as folder:
        store = Urza(Path(folder) / "urza")
        artifact, blobs = source.load(artifact_id)
        store.commit(artifact.manifest, blobs)
        asked_for = damage(store, artifact_id)
        KasminaLayer.rollback(layer, seed)
        KasminaLayer.reset_seed(layer, seed, force=True)
        record.urza = store
        KernelCache.process().reset()
        loaded = KasminaLayer.load_kernel_sync(layer, seed, asked_for, force=True)
        if loaded:
            raise AssertionError(f"artifact {asked_for} was loaded from a store in which it was damaged")
        try:
            yield
        finally:
            record.urza = source
            KernelCache.process().reset()


def _missing(store: Urza, artifact_id: str) -> str:
    digit = "0" if artifact_id[0] != "0" else "1"
    return digit + artifact_id[1:]


def _corrupt(store: Urza, artifact_id: str) -> str:
    record = next(iter(store.get(artifact_id).manifest.kernels.values()))
    path = store.object_path(record.binary)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    return artifact_id


def _rejected(store: Urza, artifact_id: str) -> str:
    store.set_status(artifact_id, KernelStatus.REJECTED)
    return artifact_id


def _from_store(damage: Callable[[Urza, str], str]) -> Fault:
    return lambda layer, seed: _reloaded(layer, seed, damage)


FAULTS: Mapping[str, Fault] = {
    "launch raises": _raises,
    "launch has no memory": _out_of_memory,
    "parameters are NaN": lambda layer, seed: _filled(layer, seed, float("nan")),
    "parameters are infinite": lambda layer, seed: _filled(layer, seed, float("inf")),
    "artifact is missing": _from_store(_missing),
    "artifact is corrupt": _from_store(_corrupt),
    "artifact is rejected": _from_store(_rejected),
}
"""By name. What is of a launch shows at once; what is not finite shows at the next step boundary, in a call that is
looked at (`Policy.sample_every`); what is of an artifact shows when it is loaded."""

_AT_ONCE = ("launch", "artifact")


def assert_never_breaks(model: nn.Module, *inputs: Any, fault: str | Fault | None = None, **options: Any) -> None:
    """Asserts that a fault of its active seeds leaves a wrapped model the host, bit for bit, forward and backward: in
    the call in which it happens, or from the step boundary on that finds it, where only that can.

    All active seeds of a copy of the model are broken; the model itself stays as it is.

    Args:
        model: a wrapped model or a KasminaLayer with at least one active seed. inputs, options: of a call.
        fault: a name in `FAULTS`, or a function of a layer and a seed that does it to them; all of `FAULTS` by default.

    Raises AssertionError; ValueError for an unknown fault or a model without an active seed.
    """
    if isinstance(fault, str) and fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}{nearest(fault, FAULTS)}")
    if not _active(model):
        raise ValueError(f"{type(model).__name__} has no active seed that could fail: load a kernel and graft it")
    named: Mapping[str, Fault]
    if fault is None:
        named = FAULTS
    elif isinstance(fault, str):
        named = {fault: FAULTS[fault]}
    else:
        named = {getattr(fault, "__name__", "the fault"): fault}
    for name, one in named.items():
        _assert_host(model, name, one, inputs, options)


def _active(model: nn.Module) -> list[tuple[KasminaLayer, Seed]]:
    layers = [module for module in model.modules() if isinstance(module, KasminaLayer)]
    return [(layer, seed) for layer in layers for seed in layer._kasmina.seeds if seed.state.is_active]


def _assert_host(model: nn.Module, name: str, fault: Fault, inputs: Any, options: Any) -> None:
    broken, host = copy.deepcopy(model), unwrap(copy.deepcopy(model))
    expected = _call(host, inputs, options)
    at_once = name.startswith(_AT_ONCE)
    active = _active(broken)
    with contextlib.ExitStack() as stack:
        for layer, seed in active:
            stack.enter_context(fault(layer, seed.index))
        # Where a seed's own input is no number any more, it cannot be told to be at fault: one is found at a boundary.
        for boundaries in range(1 + (1 if at_once else len(active))):
            for layer in {id(layer): layer for layer, _ in active}.values():
                layer._kasmina.sampling = True  # the call is looked at
                refresh(layer)
            found = _call(broken, inputs, options)
            if at_once or boundaries == len(active):
                moment = f"after {boundaries} step boundaries" if boundaries else "in the call"
                _compare(name, moment, found, expected)
            for module in broken.modules():
                if isinstance(module, KasminaLayer):
                    end_step(module, auto_advance=False)


def _call(model: nn.Module, inputs: Any, options: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs that are tensors, and the gradients of the host's parameters, with the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(*inputs, **options)
    tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not wanted or not parameters:
        return [tensor.detach() for tensor in tensors], []
    grads = torch.autograd.grad(wanted, parameters, [torch.ones_like(tensor) for tensor in wanted], allow_unused=True)
    return [tensor.detach() for tensor in tensors], list(grads)


def _compare(name: str, moment: str, found: Any, expected: Any) -> None:
    for what, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same = (a is None) == (b is None) and (a is None or _same_bits(a, b))
            if not same:
                raise AssertionError(f"{name}: {what} {index} {moment} is not the host's to the bit")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
    return torch.equal(*cast(tuple[Tensor, Tensor], tuple(flat)))
