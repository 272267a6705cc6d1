"""A model on the bus: it announces what its seeds do, and takes commands between steps."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.errors import (
    EsperError,
    MalformedMessage,
    NonFiniteOutput,
    OutputDrifted,
    ReplicaFailed,
    nearest,
)
from esper_triton.contracts.events import (
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    StoreEvent,
    TransitionEvent,
)
from esper_triton.contracts.manifest import ARTIFACT_ID, KernelStatus
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.pending import PendingLoad
from esper_triton.model.commanding import ask
from esper_triton.model.drift import DriftWatch
from esper_triton.model.health import HealthReader
from esper_triton.model.missing import MissingKernels
from esper_triton.model.morphable import MorphableModel
from esper_triton.oona import Delivery, Oona
from esper_triton.urza import Event, Urza

__all__ = ["Remote", "connect"]

_S = SeedLifecycleState
_REPORTED: dict[SeedLifecycleState, Literal["FOSSILIZED", "CULLED", "ROLLED_BACK", "FAULTED"]] = {
    _S.FOSSILIZED: "FOSSILIZED",
    _S.CULLED: "CULLED",
    _S.ROLLED_BACK: "ROLLED_BACK",
    _S.ERROR_RECOVERY: "FAULTED",
}
_FAULTS: dict[type[EsperError], Literal["non_finite", "drift"]] = {
    NonFiniteOutput: "non_finite",
    OutputDrifted: "drift",
}
_REMEMBERED = 10_000
_GONE = frozenset((_S.DORMANT, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK))
_PER_BOUNDARY = 256  # commands; the rest waits for the next one, so that nobody can stop the training with many
_log = logging.getLogger("esper_triton.model")


@dataclass(frozen=True)
class _Loading:
    """A command whose load is under way."""

    delivery: Delivery
    command: KasminaCommand
    layer: KasminaLayer
    load: PendingLoad
    future: Future[None]


@dataclass(frozen=True)
class _Asked:
    """A command that takes effect at the boundary: the seed enters `target` then, unless that is None."""

    delivery: Delivery
    command: KasminaCommand
    layer: KasminaLayer
    target: SeedLifecycleState | None


class Remote:
    """What connects one model with a bus. Made by `connect`; `close` ends it.

    Commands to the model's name are taken at its step boundaries, on the training thread, and go through the methods
    that the training loop itself would call, so they wait for nothing that those do not wait for. Each `command_id` is
    carried out once and answered each time; results tell what became of the command when it had taken effect, and a
    load is answered at the boundary where its kernel is in place or its seed is culled.

    A verdict that rejects a kernel takes it out of the seeds that use it at the next boundary. A kernel that a seed's
    calls have missed (they had another dtype, or were on another device) is asked for, loaded in the background when it
    is there and proven, and takes the place of the seed's own at a boundary: the seed keeps its state and its
    parameters. Of a model with replicas it is only asked for.

    Every transition is published, every epoch that `epoch_boundary` begins, what kernels are missing, what happens to
    the stores of the layers (as far as this process does it), and the health of all seeds in one message.

    Args: see `connect`.
    """

    def __init__(
        self,
        model: MorphableModel,
        bus: Oona,
        *,
        name: str,
        health_every: int,
        latency_budget_us: float,
        drift_every: int,
    ) -> None:
        self.model = model
        self.bus = bus
        self.name = name
        self._health_every = health_every
        self._drift_every = drift_every
        self._steps = 0
        self._answered: OrderedDict[str, CommandResult] = OrderedDict()
        self._loading: dict[str, _Loading] = {}
        self._asked: list[_Asked] = []
        self._entered: set[tuple[str, int, SeedLifecycleState]] = set()  # states, since the last boundary began
        self._traces: dict[tuple[str, int], str] = {}
        self._endings: list[Callable[[], None]] = []
        self._layers = model.kasmina_layers
        self._health = HealthReader(name, self._layers, latency_budget_us=latency_budget_us)
        self._drift = DriftWatch(list(dict.fromkeys(self._layers.values())))
        self._commands = bus.subscribe(topics.COMMANDS, f"kasmina:{name}")
        self._verdicts = bus.subscribe(topics.CHARACTERIZED)
        self._missing = MissingKernels(bus, name, self._layers, self._traces, self._announce)

    def open(self) -> None:
        """Listens to the layers, and stands at the model's boundaries."""
        for layer in dict.fromkeys(self._layers.values()):
            self._endings += [layer.on_transition(self._moved), layer.on_specialisation_miss(self._missing.ask)]
            layer._kasmina.boundary = self
        stores = {id(layer._kasmina.urza): layer._kasmina.urza for layer in self._layers.values()}
        self._endings += [
            store.on_event(partial(self._stored, store)) for store in stores.values() if store is not None
        ]

    def close(self) -> None:
        """Takes the model off the bus. Commands that have not been answered are another's, or nobody's."""
        for end in self._endings:
            end()
        self._endings.clear()
        for layer in self._layers.values():
            record = layer.__dict__.get("_kasmina")  # None: unwrapped meanwhile
            if record is not None and record.boundary is self:
                record.boundary = None
        self._commands.close()
        self._verdicts.close()
        self._missing.close()

    # ---- boundaries, on the training thread

    def before_boundary(self) -> None:
        """Gives the layers the commands that have come since the last time, takes out what was rejected since, and has
        loaded what was waited for."""
        self._entered.clear()
        self._missing.before_boundary()
        for _ in range(_PER_BOUNDARY):
            verdict = self._verdicts.poll()
            if verdict is None:
                break
            self._heed(verdict)
        for _ in range(_PER_BOUNDARY):
            delivery = self._commands.poll()
            if delivery is None:
                return
            try:
                self._take(delivery)
            except Exception as error:  # a command must not end the training, whatever it meets
                _log.exception("%s", json.dumps({"event": "command_failed", "error": type(error).__name__}))
                self._answer(delivery, self._result(delivery, None, CommandStatus.FAILED, f"{error!r}"))

    def after_boundary(self) -> None:
        """Answers what has taken effect now, and publishes the health of the seeds when it is time."""
        self._steps += 1
        asked, self._asked = self._asked, []
        for one in asked:
            if self._took_effect(one):
                result = self._done(one.command, one.layer, CommandStatus.APPLIED)
            else:
                reason = "what the seed met in the last step came first"
                result = self._done(one.command, one.layer, CommandStatus.FAILED, reason)
            self._answer(one.delivery, result)
        for command_id, loading in tuple(self._loading.items()):
            took_effect = loading.load.ticket.took_effect
            if took_effect is None and not self._was_dropped(loading):
                continue
            del self._loading[command_id]
            status, reason = CommandStatus.APPLIED, ""
            if not took_effect:
                error = loading.layer.last_error(loading.command.seed)
                status = CommandStatus.FAILED
                reason = "the seed did not wait for it" if error is None else f"{type(error).__name__}: {error}"
            self._answer(loading.delivery, self._done(loading.command, loading.layer, status, reason or None))
        self._missing.after_boundary()
        if self._health_every and self._steps % self._health_every == 0:
            self.publish_health()

    def begun_epoch(self, epoch: int, damaged: Mapping[str, tuple[str, ...]]) -> None:
        """Announces an epoch, or that the state arrays are damaged. Before it, where it is time, one active seed is
        looked at for drift."""
        if self._drift_every and epoch % self._drift_every == 0 and not damaged:
            self._drift.look()
        seeds = [seed for layer in dict.fromkeys(self._layers.values()) for seed in layer._kasmina.seeds]
        states = Counter(seed.state.name for seed in seeds)
        cache = KernelCache.process().stats()._asdict()
        event = EpochEvent(
            model=self.name, epoch=epoch, seeds_by_state=dict(states), damaged=dict(damaged), cache=cache
        )
        self.bus.publish(topics.EPOCH, event)
        self.publish_health()

    def publish_health(self) -> bool:
        """One message with what was measured of every seed. Returns what `Oona.publish` does."""
        return self.bus.publish(topics.HEALTH, self._health.read())

    def _heed(self, delivery: Delivery) -> None:
        """A kernel that has been rejected while seeds use it is taken out of them, and not loaded again in this
        process. Of a seed that is permanent that is not possible: it is told, once."""
        try:
            verdict = delivery.parse()
        except MalformedMessage as error:
            _log.warning("%s", json.dumps({"event": "malformed_verdict", "reason": str(error)[:500]}))
            return
        assert isinstance(verdict, KernelCharacterized)
        self._missing.heed(verdict)
        if verdict.status is not KernelStatus.REJECTED:
            return
        for name, layer in self._layers.items():
            record = layer.__dict__.get("_kasmina")
            for seed in () if record is None else record.seeds:
                if seed.artifact_id != verdict.artifact_id or seed.state in _GONE:
                    continue
                KernelCache.process().record_failure(verdict.artifact_id, id(record), raised=True)
                try:
                    layer.request_transition(seed.index, _S.CULLED)
                    what = "is culled"
                except (EsperError, ValueError) as error:
                    what = f"cannot be culled: {error}"
                told = {"event": "artifact_rejected", "artifact": verdict.artifact_id, "layer": name}
                _log.warning(
                    "%s", json.dumps(told | {"seed": seed.index, "what": what, "reasons": verdict.reasons[:3]})
                )

    # ---- commands

    def _take(self, delivery: Delivery) -> None:
        payload = delivery.envelope.payload
        if payload.get("model", "model") != self.name:
            self._commands.ack(delivery)
            return
        try:
            command = delivery.parse()
        except MalformedMessage as error:
            self._answer(delivery, self._result(delivery, None, CommandStatus.REFUSED, str(error)))
            return
        assert isinstance(command, KasminaCommand)
        answered = self._answered.get(command.command_id)
        if answered is not None:
            self._answer(delivery, answered)
            return
        if command.command_id in self._loading or any(a.command.command_id == command.command_id for a in self._asked):
            self._commands.ack(delivery)  # the answer to the first of them is to come
            return
        if command.deadline is not None and time.time() > command.deadline:
            reason = f"its deadline was {time.time() - command.deadline:.3f} s ago"
            self._answer(delivery, self._result(delivery, command, CommandStatus.EXPIRED, reason))
            return
        try:
            layer = self._layer(command.layer)
            self._carry_out(delivery, command, layer)
        except (EsperError, ValueError, LookupError) as error:
            self._answer(delivery, self._result(delivery, command, CommandStatus.REFUSED, str(error)))

    def _layer(self, name: str) -> KasminaLayer:
        layer = self._layers.get(name)
        if layer is None or "_kasmina" not in layer.__dict__:
            raise ValueError(f"model {self.name!r} has no layer {name!r}{nearest(name, self._layers)}")
        return layer

    def _carry_out(self, delivery: Delivery, command: KasminaCommand, layer: KasminaLayer) -> None:
        """Raises what the layer's method raises; nothing was changed then."""
        if command.command is CommandKind.REQUEST_GERMINATION:
            self._germinate(delivery, command, layer)
            return
        target = ask(layer, command)
        self._asked.append(_Asked(delivery, command, layer, target))

    def _took_effect(self, asked: _Asked) -> bool:
        """A request that waited for the boundary is dropped there where a fault has taken its ground away."""
        name, seed = asked.layer._kasmina.name, asked.command.seed
        if asked.command.command is CommandKind.SET_ALPHA:
            return (name, seed, _S.ERROR_RECOVERY) not in self._entered
        return asked.target is None or (name, seed, asked.target) in self._entered

    def _germinate(self, delivery: Delivery, command: KasminaCommand, layer: KasminaLayer) -> None:
        assert command.artifact_id is not None
        deadline_s = None if command.deadline is None else max(0.0, command.deadline - time.time())
        key = layer._kasmina.name, command.seed
        before = self._traces.get(key)
        self._traces[key] = delivery.envelope.trace_id or command.command_id  # its first moves may come at once
        load: PendingLoad | None = None
        try:
            load = layer._begin_load(command.seed, command.artifact_id, command.force, deadline_s)
        finally:
            if load is None and before is not None:
                self._traces[key] = before
            elif load is None:
                del self._traces[key]
        if load is None:
            raise ValueError(f"{layer.last_error(command.seed)}")
        self._loading[command.command_id] = _Loading(delivery, command, layer, load, load.start())

    @staticmethod
    def _was_dropped(loading: _Loading) -> bool:
        """Whether the seed waits for another load by now, or for none."""
        if loading.layer.__dict__.get("_kasmina") is None:
            return True
        seed = loading.layer._kasmina.seeds[loading.command.seed]
        waits = seed.ticket is loading.load.ticket or len(loading.layer._kasmina.queue) > 0
        return not waits

    # ---- answers and events

    def _done(
        self, command: KasminaCommand, layer: KasminaLayer, status: CommandStatus, reason: str | None = None
    ) -> CommandResult:
        record = layer.__dict__.get("_kasmina")
        return CommandResult(
            command_id=command.command_id,
            model=self.name,
            status=status,
            layer=command.layer,
            seed=command.seed,
            state=None if record is None else record.seeds[command.seed].state.name,
            step=None if record is None else record.step,
            reason=reason,
        )

    def _result(
        self, delivery: Delivery, command: KasminaCommand | None, status: CommandStatus, reason: str
    ) -> CommandResult:
        """Of a command that has changed nothing; of what is no command too, by the id that it gives."""
        if command is None:
            given = delivery.envelope.payload.get("command_id")
            command_id = given if isinstance(given, str) and given else delivery.envelope.event_id
            return CommandResult(command_id=command_id, model=self.name, status=status, reason=reason)
        layer = self._layers.get(command.layer)
        if layer is None or "_kasmina" not in layer.__dict__ or command.seed >= len(layer._kasmina.seeds):
            return CommandResult(
                command_id=command.command_id,
                model=self.name,
                status=status,
                layer=command.layer,
                seed=command.seed,
                reason=reason,
            )
        return self._done(command, layer, status, reason)

    def _answer(self, delivery: Delivery, result: CommandResult) -> None:
        self._answered[result.command_id] = result
        while len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)
        if self.bus.reply(delivery, result):
            self._commands.ack(delivery)

    def _moved(self, event: Transition) -> None:
        self._entered.add((event.layer, event.seed, event.target))
        self._announce(event)
        if event.target in _REPORTED and event.artifact_id is not None:
            self._report(event, self._traces.get((event.layer, event.seed)))

    def _announce(self, event: Transition) -> None:
        record = self._layers[event.layer]._kasmina if event.layer in self._layers else None
        self.bus.publish(
            topics.LIFECYCLE,
            TransitionEvent(
                model=self.name,
                layer=event.layer,
                seed=event.seed,
                source=event.source.name,
                target=event.target.name,
                artifact_id=event.artifact_id,
                error=self._met(event),
                step=0 if record is None else record.step,
                epoch=0 if record is None else record.epoch,
            ),
            trace_id=self._traces.get((event.layer, event.seed)),
        )

    def _met(self, event: Transition) -> str | None:
        layer = self._layers.get(event.layer)
        if layer is None or event.target not in (_S.ERROR_RECOVERY, _S.CULLED):
            return None
        error = layer._kasmina.seeds[event.seed].last_error
        return None if error is None else type(error).__name__[:100]

    def _report(self, event: Transition, trace_id: str | None) -> None:
        layer = self._layers.get(event.layer)
        assert event.artifact_id is not None
        if layer is None or not ARTIFACT_ID.fullmatch(event.artifact_id):
            return
        evaluation = layer._kasmina.seeds[event.seed].permanent_evaluation if event.target is _S.FOSSILIZED else None
        on, off = ((), ()) if evaluation is None else (evaluation.on, evaluation.off)
        fault: Literal["launch", "non_finite", "drift"] | None = None
        message = ""
        if event.target is _S.ERROR_RECOVERY:
            error = layer._kasmina.seeds[event.seed].last_error
            if isinstance(error, ReplicaFailed):  # another replica's, which reports it
                return
            fault = next((kind for of, kind in _FAULTS.items() if isinstance(error, of)), "launch")
            message = f"{type(error).__name__}: {error}"[:2000]
        self.bus.publish(
            topics.FIELD_REPORTS,
            FieldReport(
                model=self.name,
                blueprint=event.artifact_id[:12],
                artifact_id=event.artifact_id,
                layer=event.layer,
                seed=event.seed,
                outcome=_REPORTED[event.target],
                fault=fault,
                message=message,
                metric_before=sum(off) / len(off) if off else None,
                metric_after=sum(on) / len(on) if on else None,
            ),
            trace_id=trace_id,
        )

    def _stored(self, store: Urza, event: Event) -> None:
        """On whichever thread it has happened."""
        self.bus.publish(
            topics.STORE,
            StoreEvent(
                model=self.name,
                store=store.location,
                kind=event.kind,
                artifact_id=event.artifact_id,
                message=event.message,
                details=event.details,
            ),
        )


def connect(
    model: nn.Module,
    bus: Oona,
    *,
    name: str = "model",
    health_every: int = 0,
    latency_budget_us: float = 1000.0,
    drift_every: int = 1,
) -> Remote:
    """Puts a wrapped model on a bus: from now on it takes commands and tells what it does.

    Args:
        name: what commands call it; models of one bus need different ones. Of replicas, the one with rank 0 is
            connected and no other.
        health_every: boundaries between two messages with the health of all seeds; 0 for those that
            `Remote.publish_health` and epochs send.
        latency_budget_us: the launch time, in microseconds, that counts as too slow in the health score.
        drift_every: epochs from one look at a kernel to the next, at one active seed each time, in turn: see
            `esper_triton.model.drift`. What is off is reported as a fault; 0 for no looks.

    Raises ValueError for a model that is not wrapped or is connected already, BusUnavailable from a hub that refuses.
    """
    if not isinstance(model, MorphableModel):
        raise ValueError(f"{type(model).__name__} is not wrapped; esper_triton.wrap(model, ...) first")
    if min(health_every, drift_every) < 0 or not latency_budget_us > 0:
        raise ValueError(
            f"health_every >= 0, drift_every >= 0 and latency_budget_us > 0 are expected, found {health_every}, "
            f"{drift_every} and {latency_budget_us}"
        )
    if any(layer._kasmina.boundary is not None for layer in model.kasmina_layers.values()):
        raise ValueError(f"{type(model).__name__} is on a bus already; close that connection first")
    remote = Remote(
        model,
        bus,
        name=name,
        health_every=health_every,
        latency_budget_us=latency_budget_us,
        drift_every=drift_every,
    )
    remote.open()
    return remote
