"""What a command asks of a seed, as the call that a training loop would make itself."""

from __future__ import annotations

import time
from collections.abc import Mapping

from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.errors import EsperError, nearest
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.schedules import Schedule, schedule_from

__all__ = ["ask", "carry_out"]

_S = SeedLifecycleState
_ONWARDS = {
    _S.TRAINING: _S.GRAFTING,
    _S.GRAFTING: _S.STABILIZATION,
    _S.STABILIZATION: _S.EVALUATING,
    _S.FINE_TUNING: _S.FOSSILIZED,
}


def ask(layer: KasminaLayer, command: KasminaCommand) -> SeedLifecycleState | None:
    """Makes the request of any command but `request_germination`, whose load the caller runs as it sees fit. Returns
    the state that the seed enters by it, None where it enters none.

    Raises what the layer's method raises; nothing was changed then.
    """
    seed = command.seed
    match command.command:
        case CommandKind.CANCEL:
            KasminaLayer.request_transition(layer, seed, _S.CANCELLED)
            return _S.CANCELLED
        case CommandKind.CULL:
            KasminaLayer.request_transition(layer, seed, _S.CULLED)
            return _S.CULLED
        case CommandKind.ROLLBACK:
            KasminaLayer.rollback(layer, seed)
            return _S.ROLLED_BACK
        case CommandKind.ADVANCE:
            return _advance(layer, command)
        case CommandKind.SET_ALPHA:
            assert command.alpha is not None
            KasminaLayer.set_alpha(layer, seed, command.alpha)
            return None
        case CommandKind.UNLOAD:
            return _S.DORMANT if KasminaLayer.unload_kernel(layer, seed) else None
        case CommandKind.RESET:
            return _S.DORMANT if KasminaLayer.reset_seed(layer, seed, force=command.force) else None
        case _:
            raise ValueError(f"{command.command} is not asked for here: its load is another matter")


def carry_out(layers: Mapping[str, KasminaLayer], command: KasminaCommand) -> CommandResult:
    """Carries a command out between two steps, on this thread; returns the answer.

    A kernel is loaded here and not in the background, so that it is there at the same step in every run.
    """
    layer = layers.get(command.layer)
    status, reason = CommandStatus.APPLIED, None
    try:
        if layer is None:
            raise ValueError(f"no wrapped layer {command.layer!r}{nearest(command.layer, layers)}")
        if command.deadline is not None and time.time() > command.deadline:
            status, reason = CommandStatus.EXPIRED, f"its deadline was {time.time() - command.deadline:.3f} s ago"
        elif command.command is not CommandKind.REQUEST_GERMINATION:
            ask(layer, command)
        elif not KasminaLayer.load_kernel_sync(layer, command.seed, command.artifact_id or "", force=command.force):
            error = layer.last_error(command.seed)
            status, reason = CommandStatus.FAILED, f"{type(error).__name__}: {error}"
    except (EsperError, ValueError, LookupError) as error:
        status, reason = CommandStatus.REFUSED, str(error)
    record = None if layer is None else layer._kasmina
    return CommandResult(
        command_id=command.command_id,
        model=command.model,
        status=status,
        layer=command.layer,
        seed=command.seed,
        state=record.seeds[command.seed].state.name if record and command.seed < len(record.seeds) else None,
        step=None if record is None else record.step,
        reason=reason,
    )


def _advance(layer: KasminaLayer, command: KasminaCommand) -> SeedLifecycleState:
    seed = layer._seed(command.seed)
    target = None if command.target is None else _state(command.target)
    if target is None:
        target = _ONWARDS.get(seed.state)
        if seed.state is _S.EVALUATING:
            target = _S.FINE_TUNING if seed.parameters else _S.FOSSILIZED
    if target is None:
        raise ValueError(f"seed {command.seed} of layer {command.layer!r} is {seed.state.name}: nothing follows it")
    schedule = None if command.strategy is None else _schedule(command.strategy)
    if target is _S.GRAFTING:
        KasminaLayer.graft(layer, command.seed, schedule or layer._kasmina.policy.schedule)
    elif schedule is not None:
        raise ValueError(f"a strategy belongs to a move to GRAFTING, found {command.strategy!r} for {target.name}")
    else:
        KasminaLayer.request_transition(layer, command.seed, target)
    return target


def _state(name: str) -> SeedLifecycleState:
    if name not in _S.__members__:
        raise ValueError(f"no state {name!r}{nearest(name, _S.__members__)}")
    return SeedLifecycleState[name]


def _schedule(strategy: str) -> Schedule:
    """`linear:1000` and the like. Raises ValueError."""
    kind, _, steps = strategy.partition(":")
    if not steps.isdecimal():
        raise ValueError(f"a strategy is a schedule with its steps, as linear:1000, found {strategy!r}")
    return schedule_from({"schedule": kind, "steps": int(steps)})
