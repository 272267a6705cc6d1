"""Step boundaries: where what was asked for and what has failed takes effect.

A commit changes the seeds, writes the layer's state block in one copy and puts the new dispatch in place in one
assignment, so a call that runs at the same time follows the old plan or the new one. It holds the queue's lock, for
which `forward` never waits. Observers are told when all of it is done.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn

from esper_triton.contracts.errors import LoadLost
from esper_triton.kasmina import loading
from esper_triton.kasmina.adoption import host_class
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.events import SpecialisationMiss, Transition
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.measuring import Measured, measure_step, who
from esper_triton.kasmina.moves import Made, apply_faults, apply_requests, roll_back
from esper_triton.kasmina.plan import make_plan
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.schedules import Signals
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.state import pack_state
from esper_triton.kasmina.training import HostObserver, observe_call, trains, watches_drift
from esper_triton.kasmina.transitions import Loaded, LoadFailed, Move, Outlook, Request, follow

if TYPE_CHECKING:
    from esper_triton.kasmina.layer import KasminaLayer

__all__ = [
    "begin_epoch",
    "commit",
    "commits_at_once",
    "damaged_arrays",
    "drop_dispatch",
    "end_lost_loads",
    "end_step",
    "finish_step",
    "host_dtype",
    "host_forward",
    "install_dispatch",
    "is_silent",
    "lock_seed",
    "put",
    "refresh",
    "restore_state",
    "set_hook",
    "state_storage",
    "tell",
    "tell_misses",
    "write_state",
]

_S = SeedLifecycleState
_SILENT = (_S.DORMANT, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK)


def put(record: LayerRecord, request: Request) -> Outlook:
    """Queues a request; returns what its seed was to be before it. Any thread. Raises what `follow` raises.

    On a replica that follows another nothing is checked: what its own callers ask for does not count.
    """
    if record.follows:
        record.queue.order(request)
        return Outlook.of(record.seeds[request.seed])
    return record.queue.put(
        request,
        record.seeds[request.seed],
        lambda before: follow(
            record.name, request, before, epoch=record.epoch, embargo_epochs=record.policy.embargo_epochs
        ),
    )


def lock_seed(layer: KasminaLayer, seed: int) -> None:
    """After everything has been put back as it was: the seed, whatever it was then, is in ROLLED_BACK, without a
    kernel. Raises ValueError for a FOSSILIZED one, which is part of the model."""
    record, own = layer._kasmina, layer._seed(seed)
    with record.queue.lock:
        if own.state is _S.FOSSILIZED:
            raise ValueError(f"seed {seed} of layer {record.name!r} is FOSSILIZED: it cannot be rolled back")
        made = roll_back(record, own) if own.state is not _S.ROLLED_BACK else []
        refresh(layer)
    tell(record, made)


def commits_at_once(record: LayerRecord) -> bool:
    """Whether a request from this thread is a boundary itself."""
    return not record.deferred and record.owner == threading.get_ident()


def commit(layer: KasminaLayer) -> None:
    """Applies what has failed and what waits. This thread is the layer's owner from now on."""
    record = layer._kasmina
    record.owner = threading.get_ident()
    if not len(record.queue) and not any(seed.pending_faults for seed in record.seeds):
        return
    with record.queue.lock:
        made = [*apply_faults(record), *apply_requests(record, lambda loaded: _received(layer, loaded))]
        if made or record.replan:
            refresh(layer)
        else:
            write_state(layer)
    tell(record, made)


def end_step(layer: KasminaLayer, *, auto_advance: bool) -> None:
    """The boundary after a training step: as `commit`, and ramps advance, stages are found to be
    done."""
    record = layer._kasmina
    if is_silent(record):
        record.owner = threading.get_ident()
        record.step += 1
        return
    with record.queue.lock:
        measured = measure_step(record)
        end_lost_loads(record)
        made = finish_step(layer, measured, auto_advance=auto_advance)
    tell(record, made)
    tell_misses(record)


def is_silent(record: LayerRecord) -> bool:
    """Whether the layer has nothing to do at a boundary."""
    for seed in record.seeds:  # a loop: every layer is asked at every boundary, and all() takes twice as long
        if seed.state not in _SILENT or seed.pending_faults:
            return False
    return not len(record.queue)


def finish_step(layer: KasminaLayer, measured: Measured, *, auto_advance: bool) -> list[Made]:
    """The second half of `end_step`: everything that follows from what was measured and what is queued, and from
    nothing else. Call it with the queue's lock held, and `tell` afterwards."""
    record = layer._kasmina
    record.owner = threading.get_ident()
    record.step += 1
    made = apply_faults(record)
    alphas = [seed.alpha for seed in record.seeds]
    _advance(record, measured)
    made += apply_requests(record, lambda loaded: _received(layer, loaded))
    for seed in record.seeds:
        seed.is_ready = next_move(record, seed) is not None
    ramp_given = False
    if auto_advance:
        ramp_given = _order_next_moves(record)
        made += apply_requests(record, lambda loaded: _received(layer, loaded))
    every = record.policy.sample_every
    was_sampling, record.sampling = record.sampling, every > 0 and record.step % every == 0
    if made or ramp_given or record.replan:
        refresh(layer)
    else:
        if alphas != [seed.alpha for seed in record.seeds]:
            write_state(layer)
        if was_sampling is not record.sampling:
            _place_flags(record, state_storage(layer).device)
    if record.clock is not None:
        record.clock.spend(record.sampler.end())
        if record.clock.chooses(record.step):
            record.sampler.begin(record.seeds, state_storage(layer).device)
    return made


def next_move(record: LayerRecord, seed: Seed) -> SeedLifecycleState | None:
    """Where a seed goes now that its stage is done; None while it is not."""
    policy = record.policy
    match seed.state:
        case _S.TRAINING:
            return _S.GRAFTING if policy.to_grafting.opens(seed.reconstruction_error, seed.stage_steps) else None
        case _S.GRAFTING:
            done = seed.alpha >= 1.0 if seed.schedule is None else seed.schedule.is_complete(seed.progress)
            return _S.STABILIZATION if done else None
        case _S.STABILIZATION:
            return _S.EVALUATING if seed.stage_steps >= policy.stabilization_steps else None
        case _S.EVALUATING:
            onwards = _S.FINE_TUNING if seed.parameters else _S.FOSSILIZED
        case _S.FINE_TUNING if seed.stage_steps >= policy.fine_tuning_steps:
            onwards = _S.FOSSILIZED
        case _:
            return None
    if seed.evaluation is None:
        return None
    return {"better": onwards, "worse": _S.CULLED, "undecided": None}[policy.metric.verdict(seed.evaluation)]


def _order_next_moves(record: LayerRecord) -> bool:
    """Queues the move of every seed that is ready. True where one was given a ramp without a move."""
    ramp_given = False
    for seed in record.seeds:
        target = next_move(record, seed)
        if target is not None:
            schedule = record.policy.schedule if target is _S.GRAFTING else None
            record.queue.order(Move(seed=seed.index, target=target, schedule=schedule))
        elif seed.state is _S.GRAFTING and seed.schedule is None and seed.alpha == 0.0:
            # One without parameters comes from LOADING, with no ramp of its own.
            seed.schedule, ramp_given = record.policy.schedule, True
    return ramp_given


def end_lost_loads(record: LayerRecord) -> None:
    """Queues the failure of every load that stayed with the process that this one was forked from."""
    for seed in record.seeds:
        ticket = seed.ticket
        if ticket is not None and ticket.lost:
            error = LoadLost(f"{who(record, seed)}: the process was forked during the load; load the kernel again")
            record.queue.order(LoadFailed(seed=seed.index, ticket=ticket, error=error))


def _advance(record: LayerRecord, measured: Measured) -> None:
    for seed in record.seeds:
        seed.stage_steps += 1
        if seed.state is _S.GRAFTING and seed.schedule is not None:
            signals = Signals(drift=measured.drift, grad_norm=measured.grad_norms.get(seed.index))
            seed.progress = seed.schedule.advance(seed.progress, signals)
            seed.alpha = seed.schedule.alpha(seed.progress)


def _received(layer: KasminaLayer, loaded: Loaded) -> Loaded | LoadFailed:
    """What was loaded, for the layer as it is now: it may have been moved or cast while the artifact was on its way."""
    record, manifest = layer._kasmina, loaded.kernel.manifest
    whose = f"seed {loaded.seed} of layer {record.name!r}"
    try:
        loading.check_dtype(whose, manifest, host_dtype(layer))
        device = state_storage(layer).device
        if loaded.kernel.key.device != str(device):
            raise RuntimeError(
                f"{whose} was moved from {loaded.kernel.key.device} to {device} while its kernel was loaded"
            )
    except Exception as error:
        return LoadFailed(seed=loaded.seed, ticket=loaded.ticket, error=error)
    return loaded


def host_dtype(layer: KasminaLayer) -> torch.dtype | None:
    """The dtype that the host computes in, by its parameters and buffers; None for one without."""
    return next((t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), None)


def tell(record: LayerRecord, made: Sequence[Made]) -> None:
    """Call it without the queue's lock. Every observer hears of every transition; the first error of one of them is
    raised when all have."""
    if not record.observers:
        return
    first: Exception | None = None
    for seed, source, target, artifact_id in made:
        event = Transition(layer=record.name, seed=seed, source=source, target=target, artifact_id=artifact_id)
        for observer in tuple(record.observers):
            try:
                observer(event)
            except Exception as error:
                first = first or error
    if first is not None:
        raise first


def tell_misses(record: LayerRecord) -> None:
    """Observers hear of every artifact that is wanted for another dtype or device, once."""
    for seed in record.seeds:
        wanted, seed.wanted = seed.wanted, None
        if wanted is None or seed.kernel is None or not record.miss_observers:
            continue
        program = seed.kernel.program
        if wanted == (str(program.dtype), str(program.device)):
            continue  # the right kernel, for a tensor that no kernel is for
        event = SpecialisationMiss(
            layer=record.name, seed=seed.index, artifact_id=seed.kernel.manifest.id, dtype=wanted[0], device=wanted[1]
        )
        if event not in record.misses_told:
            record.misses_told.add(event)
            for observer in tuple(record.miss_observers):
                observer(event)


# ---- the device side and the dispatch


def state_storage(layer: KasminaLayer) -> Tensor:
    """The layer's state block."""
    storage = layer._buffers["_kasmina_state"]
    assert storage is not None
    return storage


def write_state(layer: KasminaLayer) -> None:
    """Writes the state block from the seeds, in one copy."""
    record = layer._kasmina
    seeds = record.seeds
    packed = pack_state(
        {
            "lifecycle_states": [seed.state for seed in seeds],
            "active_kernel_id": [seed.kernel_id for seed in seeds],
            "alpha_blend": [seed.alpha for seed in seeds],
            "health_accumulator": [seed.health for seed in seeds],
            "last_update_epoch": [seed.last_update_epoch for seed in seeds],
            "exec_latency_us": [round(seed.exec_latency_us or 0) for seed in seeds],
            "error_count": [seed.error_count for seed in seeds],
            "fallback_active": [seed.state is _S.ERROR_RECOVERY for seed in seeds],
        },
        len(seeds),
    )
    layer.state.write(packed)
    record.packed, record.crc32 = packed, crc32(packed)


def refresh(layer: KasminaLayer) -> None:
    """Writes the state block, and puts the dispatch in place that belongs to it."""
    write_state(layer)
    install_dispatch(layer)


def install_dispatch(layer: KasminaLayer) -> None:
    """Puts the dispatch in place that belongs to the seeds and to the state block as they are."""
    record, device = layer._kasmina, state_storage(layer).device
    record.replan = False
    _place_flags(record, device)
    learning = trains(record)
    plan = make_plan(record, _alphas(layer), device)
    if plan is None:
        drop_dispatch(layer)
    else:
        forward = host_forward(layer)
        if learning:
            forward = HostObserver(layer, record, forward)
        before = layer.__dict__.get("forward")
        if before is not None and not isinstance(before, Dispatch):
            record.prior_forward = before
        # One assignment: a call on another thread finds the old dispatch or this one, never the host alone.
        layer.__dict__["forward"] = Dispatch(layer, forward, plan)
    if not learning:
        record.observed = None
    set_hook(
        layer, observe_call if learning or watches_drift(record) else None if plan is None else _keep_fast_path_closed
    )


def _alphas(layer: KasminaLayer) -> tuple[Tensor, ...]:
    """Views of the alpha of each seed in the state block. Kept as long as the block is: making them takes more time
    than the rest of a small layer's plan."""
    record, storage = layer._kasmina, state_storage(layer)
    if record.alphas is None or record.alphas[0] is not storage:
        record.alphas = storage, layer.state.alpha_blend.unbind()
    return record.alphas[1]


def _place_flags(record: LayerRecord, device: torch.device) -> None:
    """Gives every seed whose calls are checked its place in the layer's flags, where one that stays keeps its value."""
    if record.sampling:
        checked = [seed.state.is_active for seed in record.seeds]
    else:
        checked = [seed.state is _S.EVALUATING for seed in record.seeds]
    before, record.nonfinite = record.nonfinite, None
    if not any(checked):
        if before is not None:
            for seed in record.seeds:
                seed.nonfinite_flag = None
        return
    with torch.inference_mode(False):  # or calls outside of it could not set them
        record.nonfinite = torch.zeros(len(checked), dtype=torch.bool, device=device)
        if before is not None and before.device == device:
            stay = torch.tensor([seed.nonfinite_flag is not None for seed in record.seeds], device=device)
            record.nonfinite.copy_(before & stay)
    for seed, is_checked, flag in zip(record.seeds, checked, record.nonfinite.unbind(), strict=True):
        seed.nonfinite_flag = flag if is_checked else None


def host_forward(layer: KasminaLayer) -> Callable[..., Any]:
    """The host's own forward, or what was in its place before a seed became active."""
    forward = layer.__dict__.get("forward")
    if forward is None:
        return types.MethodType(host_class(layer).forward, layer)
    if isinstance(forward, Dispatch):
        forward = forward.host_forward
    found: Callable[..., Any] = forward.forward if isinstance(forward, HostObserver) else forward
    return found


def drop_dispatch(layer: KasminaLayer) -> None:
    """The host's own forward is what runs again."""
    if isinstance(layer.__dict__.get("forward"), Dispatch):
        prior, layer._kasmina.prior_forward = layer._kasmina.prior_forward, None
        if prior is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = prior


def _keep_fast_path_closed(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """A forward hook that does nothing. `nn.TransformerEncoderLayer` computes its children's results without calling
    them in eval mode, unless one of them has a hook; an active seed must not be passed over."""


_Hook = Callable[[nn.Module, Any, Any, Any], None]
_OUR_HOOKS: tuple[_Hook, ...] = (observe_call, _keep_fast_path_closed)


def set_hook(layer: KasminaLayer, wanted: _Hook | None) -> None:
    """Makes `wanted` the one forward hook of ours that the layer has."""
    ours = [key for key, hook in layer._forward_hooks.items() if hook in _OUR_HOOKS]
    if [layer._forward_hooks[key] for key in ours] == [wanted]:
        return
    if wanted is not None:
        layer.register_forward_hook(wanted, with_kwargs=True)
    for key in ours:
        del layer._forward_hooks[key]
        layer._forward_hooks_with_kwargs.pop(key, None)


# ---- epochs


def damaged_arrays(layer: KasminaLayer) -> tuple[str, ...]:
    """Names of the state arrays that are not what the last commit wrote; by their CRC-32, so usually none are read."""
    record, state = layer._kasmina, layer.state
    if state.storage.is_meta or state.crc32() == record.crc32:
        return ()
    return state.differing_arrays(record.packed)


def restore_state(layer: KasminaLayer) -> None:
    """Writes the state arrays again as the last commit did."""
    record = layer._kasmina
    with record.queue.lock:
        layer.state.write(record.packed)


def begin_epoch(layer: KasminaLayer, epoch: int) -> None:
    """From now on it is `epoch`; measured times and health go into the state arrays."""
    record = layer._kasmina
    with record.queue.lock:
        record.epoch = epoch
        record.sampler.begin_epoch()
        if any(seed.state is not _S.DORMANT for seed in record.seeds):
            write_state(layer)
