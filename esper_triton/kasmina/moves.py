"""What requests and faults make of a layer's seeds, on the host. Called by a commit, with the queue's lock held."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from esper_triton.contracts.errors import EsperError
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.transitions import (
    Assign,
    Loaded,
    LoadFailed,
    Move,
    Outlook,
    Request,
    Reset,
    SetAlpha,
    Specialised,
    Unload,
    follow,
)

__all__ = ["Made", "apply_faults", "apply_requests", "release", "roll_back", "warn"]

_S = SeedLifecycleState
_FROZEN = tuple(state for state in _S if state.is_frozen)
_WITHOUT_KERNEL = (_S.DORMANT, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK)
_log = logging.getLogger("esper_triton.kasmina")


Made = tuple[int, SeedLifecycleState, SeedLifecycleState, str | None]
"""A transition that has been made on the host, before the commit is whole and anybody is told: the seed, the state it
came from, the one it is in, and its artifact."""


def apply_requests(record: LayerRecord, receive: Callable[[Loaded], Loaded | LoadFailed]) -> list[Made]:
    """Applies what waits, in order; returns the transitions made. A request whose ground a fault has taken away is
    dropped, with a line in the log. `receive` looks at what was loaded once more, as the layer is now."""
    made: list[Made] = []
    for request, before, after in record.queue.take():
        seed = record.seeds[request.seed]
        received = request
        if isinstance(request, Loaded) and seed.ticket is request.ticket:
            received = receive(request)
        as_foreseen = before is not None and before.state is seed.state and before.ticket is seed.ticket
        if after is None or received is not request or not as_foreseen:
            now = Outlook.of(seed)
            try:
                after = follow(
                    record.name, received, now, epoch=record.epoch, embargo_epochs=record.policy.embargo_epochs
                )
            except (EsperError, ValueError) as error:
                warn("request_dropped", record.name, seed.index, seed.artifact_id, error)
                continue
        _apply(record, seed, received, after, made)
    return made


def _apply(record: LayerRecord, seed: Seed, request: Request, after: Outlook, made: list[Made]) -> None:
    match request:
        case Move():
            _enter(record, seed, request.target, made)
            if request.target is _S.GRAFTING:
                seed.schedule = request.schedule
        case Assign():
            if seed.state is not _S.ERROR_RECOVERY:
                if seed.state is not _S.DORMANT:
                    _enter(record, seed, _S.DORMANT, made)
                _enter(record, seed, _S.GERMINATED, made)
            _enter(record, seed, _S.LOADING, made)
            if seed.artifact_id != request.artifact_id:
                seed.parameters = {}
            seed.artifact_id, seed.last_error = request.artifact_id, None
        case Loaded():
            request.ticket.took_effect = seed.ticket is request.ticket
            if request.ticket.took_effect:
                seed.kernel, seed.load_latency_us = request.kernel, request.kernel.load_latency_us
                seed.activations = None
                seed.parameters = seed.parameters or request.parameters
                KernelCache.process().pin(seed.kernel.key, seed.kernel.program, seed)
                _enter(record, seed, after.state, made)
        case LoadFailed():
            if seed.ticket is request.ticket:
                request.ticket.took_effect = False
                seed.last_error = request.error
                warn("load_kernel_failed", record.name, seed.index, seed.artifact_id, request.error)
                _enter(record, seed, _S.CULLED, made)
        case SetAlpha():
            seed.alpha, seed.schedule = request.value, None
        case Specialised():
            _specialise(record, seed, request)
        case Unload():
            if seed.state not in (_S.DORMANT, _S.CULLED, _S.CANCELLED):
                _enter(record, seed, _S.CANCELLED if seed.state in (_S.GERMINATED, _S.TRAINING) else _S.CULLED, made)
            if seed.state is not _S.DORMANT:
                _enter(record, seed, _S.DORMANT, made)
        case Reset():
            if seed.state is not _S.DORMANT:
                _enter(record, seed, _S.DORMANT, made)
        case _:
            raise TypeError(f"unknown request {request!r}")
    seed.ticket, seed.opens_at = after.ticket, after.opens_at


def _specialise(record: LayerRecord, seed: Seed, request: Specialised) -> None:
    kernel, cache = request.kernel, KernelCache.process()
    fits = all((p.dtype, p.device) == (kernel.program.dtype, kernel.program.device) for p in seed.parameters.values())
    if seed.kernel is not request.instead_of or not fits:
        return  # the seed has another by now, or its layer is as it was before
    cache.unpin(seed.kernel.key, seed)
    cache.pin(kernel.key, kernel.program, seed)
    seed.kernel, seed.artifact_id, seed.load_latency_us = kernel, kernel.manifest.id, kernel.load_latency_us
    seed.activations, record.replan = None, True


def apply_faults(record: LayerRecord) -> list[Made]:
    """Applies what forward, backward and the seeds' own training have noted since the last commit."""
    made: list[Made] = []
    calls = record.forward_calls_active - record.calls_counted
    record.calls_counted = record.forward_calls_active
    for seed in record.seeds:
        if calls > 0 and seed.state.is_active:
            seed.count_calls(calls)
        if not seed.pending_faults:
            continue
        seed.count_faults()
        if seed.kernel is None:
            continue
        if seed.state.is_active:
            was_permanent = seed.state is _S.FOSSILIZED
            _discard_kernel(record, seed)
            seed.kernel, seed.alpha, seed.activations = None, 0.0, None
            _enter(record, seed, _S.ERROR_RECOVERY, made)
            if not was_permanent and record.policy.error_rate.culls(seed.error_count, seed.calls):
                _cull(record, seed, made)
        elif seed.state is _S.TRAINING:
            _discard_kernel(record, seed)
            _cull(record, seed, made)
    return made


def roll_back(record: LayerRecord, seed: Seed) -> list[Made]:
    """To ROLLED_BACK from wherever the seed is: nobody's request, so the table is not asked."""
    made: list[Made] = []
    _enter(record, seed, _S.ROLLED_BACK, made)
    return made


def _discard_kernel(record: LayerRecord, seed: Seed) -> None:
    assert seed.kernel is not None
    warn("kernel_failed", record.name, seed.index, seed.artifact_id, seed.last_error)
    cache = KernelCache.process()
    cache.record_failure(seed.kernel.manifest.id, id(record), raised=True)
    cache.discard(seed.kernel.key)


def _cull(record: LayerRecord, seed: Seed, made: list[Made]) -> None:
    _enter(record, seed, _S.CULLED, made)
    seed.opens_at = record.epoch + record.policy.embargo_epochs


def _enter(record: LayerRecord, seed: Seed, state: SeedLifecycleState, made: list[Made]) -> None:
    # That the table has this move was seen by `follow`, for all but the moves that are nobody's request.
    source, artifact_id = seed.state, seed.artifact_id
    if state is _S.FOSSILIZED:
        seed.permanent_since_step, seed.permanent_evaluation = record.step, seed.evaluation
    seed.enter(state, record.epoch)
    if state in _WITHOUT_KERNEL:
        release(seed)
    if state is _S.DORMANT:
        seed.reset()
    if state is _S.GRAFTING:
        seed.alpha = 0.0
    learns = state not in _FROZEN
    if learns is (source in _FROZEN) or source is _S.LOADING:  # otherwise a commit of many seeds touches no parameter
        for parameter in seed.parameters.values():
            parameter.requires_grad = learns
    made.append((seed.index, source, state, artifact_id))


def release(seed: Seed) -> None:
    """Lets go of the seed's kernel, its parameters and any load under way."""
    if seed.kernel is not None:
        KernelCache.process().unpin(seed.kernel.key, seed)
    if seed.ticket is not None and seed.ticket.give_up is not None:
        seed.ticket.give_up()
    seed.kernel, seed.artifact_id, seed.parameters, seed.alpha, seed.ticket = None, None, {}, 0.0, None
    seed.activations = None


def warn(event: str, layer: str, seed: int, artifact_id: str | None, error: BaseException | None) -> None:
    """One line of JSON, for people and machines."""
    fields = {
        "event": event,
        "layer": layer,
        "seed": seed,
        "artifact_id": artifact_id,
        "error": type(error).__name__,
        "reason": str(error),
    }
    _log.warning("%s", json.dumps(fields))
