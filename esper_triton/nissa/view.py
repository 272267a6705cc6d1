"""What is known of models, seeds, compiles and proofs, from the messages of the bus alone."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from esper_triton.contracts.commands import CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.envelope import Envelope, Message
from esper_triton.contracts.events import (
    CompileFailed,
    CompileRequest,
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    KernelReady,
    ProofFailed,
    StoreEvent,
    TransitionEvent,
)
from esper_triton.contracts.health import HealthFrame
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.nissa.history import History

__all__ = ["ACTIVE", "STATES", "UNKNOWN", "CompileJob", "Counted", "Entry", "ModelView", "View", "state_name"]

STATES = (
    *("DORMANT", "GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING"),
    *("FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK", "ERROR_RECOVERY"),
)
"""Names of a seed's states, in the order of their numbers. (`kasmina.lifecycle` has them, and needs torch.)"""
UNKNOWN = len(STATES)
"""The number of a state that a newer release has."""
ACTIVE = frozenset(STATES.index(name) for name in STATES[4:9])
_NUMBERS = {name: number for number, name in enumerate(STATES)}
_FAILURES = frozenset({"CULLED", "ROLLED_BACK", "ERROR_RECOVERY"})

_MOST_ENTRIES = 5000
_MOST_JOBS = 500
_MOST_MODELS = 64

Outcome = Literal["waiting", "ready", "failed"]


class Counted(Protocol):
    """Told of what is counted, and not only shown. The metrics are one; see `nissa.metrics`."""

    def moved(self, event: TransitionEvent) -> None:
        """A seed is in another state."""

    def loaded(self, model: str, seconds: float) -> None:
        """A seed was LOADING for so long."""

    def submitted(self, request: CompileRequest) -> None:
        """Somebody wants an artifact."""

    def compiled(self, ready: KernelReady, waited_s: float | None) -> None:
        """One is there; `waited_s` from the request to the last of its artifacts, None for the others."""

    def failed(self, failure: CompileFailed, waited_s: float | None) -> None:
        """A request has failed."""

    def proven(self, verdict: KernelCharacterized, waited_s: float | None) -> None:
        """An artifact has a verdict."""

    def reported(self, report: FieldReport) -> None:
        """A seed has come to its end."""

    def answered(self, result: CommandResult) -> None:
        """A command was answered."""

    def stored(self, event: StoreEvent) -> None:
        """Something has happened to a store."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the log. `number` rises by one; `failure` where something went wrong."""

    number: int
    at: float
    kind: str
    text: str
    failure: bool = False
    model: str | None = None
    layer: str | None = None
    seed: int | None = None
    artifact_id: str | None = None
    trace_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return dict(self.__dict__)


@dataclass(kw_only=True)
class CompileJob:
    """A request to compile, and what came of it. Times in seconds since 1970."""

    id: str
    at: float
    what: str
    dtype: str
    targets: tuple[str, ...]
    pipeline: str
    reason: str
    trace_id: str | None
    model: str | None = None
    layer: str | None = None
    seed: int | None = None
    outcome: Outcome = "waiting"
    answered_at: float | None = None
    artifacts: dict[int, str] = field(default_factory=dict)
    compile_seconds: float | None = None
    message: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        artifacts = [self.artifacts[part] for part in sorted(self.artifacts)]
        return self.__dict__ | {"targets": list(self.targets), "artifacts": artifacts}


class ModelView:
    """The seeds of one model, as its last HealthFrame and what has come since say. Columns have one value a seed; NaN
    is what was not measured. `version` rises with every change."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        self.layers: tuple[str, ...] = ()
        self.epochs: tuple[int, ...] = ()
        self.steps: tuple[int, ...] = ()
        self.layer: NDArray[np.int32] = np.zeros(0, np.int32)
        self.seed: NDArray[np.int32] = np.zeros(0, np.int32)
        self.state: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.alpha = _nothing(0)
        self.health = _nothing(0)
        self.latency_us = _nothing(0)
        self.errors: NDArray[np.int64] = np.zeros(0, np.int64)
        self.ready: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.frame: HealthFrame | None = None
        self.cache: dict[str, int] = {}
        self.epoch: int | None = None
        self.damaged: dict[str, tuple[str, ...]] = {}
        self.artifacts: dict[tuple[str, int], str | None] = {}  # as far as moves have been seen
        self.alphas, self.healths = History(0), History(0)
        self.means = History(2)  # of alpha and health, over active seeds
        self._places: dict[tuple[str, int], int] = {}
        self._moved: dict[tuple[str, int], tuple[float, int]] = {}  # when, and to what, since the last frame was made

    def place(self, layer: str, seed: int) -> int | None:
        """Where a seed stands in the columns; None where no frame has had it."""
        return self._places.get((layer, seed))

    def take_frame(self, frame: HealthFrame) -> None:
        """Everything as the frame has it."""
        count = len(frame.seed)
        layer, seed = np.array(frame.layer, np.int32), np.array(frame.seed, np.int32)
        same = frame.layers == self.layers and np.array_equal(layer, self.layer) and np.array_equal(seed, self.seed)
        if not same:
            self.layers, self.layer, self.seed = frame.layers, layer, seed
            self._places = {
                (frame.layers[k], number): i for i, (k, number) in enumerate(zip(frame.layer, frame.seed, strict=True))
            }
            self.alphas, self.healths = History(count), History(count)
        self.epochs, self.steps = frame.epochs, frame.steps
        self.state = np.array([_NUMBERS.get(name, UNKNOWN) for name in frame.state], np.uint8)
        # Telemetry and moves come on their own ways: a move that was made after the frame may be here before it.
        self._moved = {key: move for key, move in self._moved.items() if move[0] > frame.timestamp}
        for key, (_, number) in self._moved.items():
            if key in self._places:
                self.state[self._places[key]] = number
        self.alpha = np.array(frame.alpha, np.float32)
        self.health, self.latency_us = _column(frame.health_score, count), _column(frame.execution_latency_us, count)
        self.errors = np.array(frame.error_count, np.int64)
        self.ready = np.array(frame.is_ready_for_transition, np.bool_)
        self.frame = frame
        self.alphas.add(frame.timestamp, self.alpha)
        self.healths.add(frame.timestamp, self.health)
        self.means.add(frame.timestamp, np.array([_mean(self.alpha, self.active), _mean(self.health, self.active)]))
        self.version += 1

    def take_move(self, event: TransitionEvent, at: float) -> None:
        """One seed is in another state, since `at`."""
        self.artifacts[event.layer, event.seed] = None if event.target == "DORMANT" else event.artifact_id
        if self.frame is not None and at < self.frame.timestamp:
            return
        place, number = self.place(event.layer, event.seed), _NUMBERS.get(event.target, UNKNOWN)
        self._moved[event.layer, event.seed] = at, number
        if place is not None:
            self.state[place] = number
            self.version += 1

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which seeds contribute to their layer's output."""
        return np.isin(self.state, list(ACTIVE))

    def counts(self) -> dict[str, int]:
        """Seeds by state; states that no seed is in are left out."""
        found = Counter(self.state.tolist())
        return {state_name(number): found[number] for number in sorted(found)}


class View:
    """What has been seen. `take` is called with each message, by one thread at a time; every other method by any, and
    what they return is a copy.

    Args:
        counted: see `Counted`.
    """

    def __init__(self, counted: Counted | None = None) -> None:
        self.lock = threading.RLock()
        self.models: OrderedDict[str, ModelView] = OrderedDict()
        self.jobs: OrderedDict[str, CompileJob] = OrderedDict()
        self.entries: deque[Entry] = deque(maxlen=_MOST_ENTRIES)
        self.server: dict[str, Any] = {}  # what the hub or server says of its queues; see Watcher
        self.bus: dict[str, Any] = {}  # what this process's bus says of itself
        self.version = 0  # of jobs, entries and models together
        self._counted = counted
        self._numbers = itertools.count(1)
        self._loading: dict[tuple[str, str, int], float] = {}
        self._unproven: OrderedDict[str, float] = OrderedDict()
        self._takers: dict[type[Message], Callable[[Envelope, Any], None]] = {
            HealthFrame: self._take_frame,
            TransitionEvent: self._take_move,
            EpochEvent: self._take_epoch,
            CompileRequest: self._take_request,
            KernelReady: self._take_ready,
            CompileFailed: self._take_failure,
            KernelCharacterized: self._take_verdict,
            ProofFailed: self._take_unproven,
            FieldReport: self._take_report,
            KasminaCommand: self._take_command,
            CommandResult: self._take_result,
            StoreEvent: self._take_store,
        }

    def take(self, envelope: Envelope, message: Message) -> None:
        """A message has come."""
        with self.lock:
            self._takers[type(message)](envelope, message)
            self.version += 1

    def note(self, at: float, kind: str, text: str, *, failure: bool = False) -> None:
        """A line that is about the bus itself, such as that it is away."""
        with self.lock:
            self._enter(at=at, kind=kind, text=text, failure=failure)
            self.version += 1

    def entries_after(self, number: int, limit: int = 500) -> list[Entry]:
        """The last ones with a larger number, oldest first."""
        with self.lock:
            found = itertools.takewhile(lambda entry: entry.number > number, reversed(self.entries))
            return list(itertools.islice(found, limit))[::-1]

    def entries_of(self, model: str, layer: str, seed: int, limit: int = 100) -> list[Entry]:
        """The last ones that are about a seed, oldest first."""
        with self.lock:
            about = (e for e in reversed(self.entries) if (e.model, e.layer, e.seed) == (model, layer, seed))
            return list(itertools.islice(about, limit))[::-1]

    def waiting(self) -> tuple[int, int]:
        """Requests to compile without an answer, and artifacts without a verdict, as far as they were seen."""
        with self.lock:
            return sum(job.outcome == "waiting" for job in self.jobs.values()), len(self._unproven)

    # ---- messages, within the lock

    def _model(self, name: str) -> ModelView | None:
        """None beyond the most that are shown: names come from anywhere, and memory does not."""
        found = self.models.get(name)
        if found is None and len(self.models) < _MOST_MODELS:
            found = self.models[name] = ModelView(name)
        return found

    def _enter(self, **fields: Any) -> None:
        self.entries.append(Entry(number=next(self._numbers), **fields))

    def _tell(self, envelope: Envelope, message: Message, kind: str, text: str, *, failure: bool = False) -> None:
        """An entry about a message, and about what the message says that it is about."""
        about = {name: getattr(message, name, None) for name in ("model", "layer", "seed", "artifact_id")}
        self._enter(at=envelope.timestamp, kind=kind, text=text, failure=failure, trace_id=envelope.trace_id, **about)

    def _take_frame(self, _: Envelope, frame: HealthFrame) -> None:
        model = self._model(frame.model)
        if model is not None and (model.frame is None or frame.timestamp >= model.frame.timestamp):
            model.take_frame(frame)

    def _take_move(self, envelope: Envelope, event: TransitionEvent) -> None:
        model = self._model(event.model)
        if model is not None:
            model.take_move(event, envelope.timestamp)
        key = event.model, event.layer, event.seed
        began = self._loading.pop(key, None)
        if event.target == "LOADING":
            self._loading[key] = envelope.timestamp
        if self._counted is not None:
            if event.source != event.target:
                self._counted.moved(event)
            if began is not None and event.target in ("TRAINING", "GRAFTING"):
                self._counted.loaded(event.model, max(0.0, envelope.timestamp - began))
        reason = "" if event.error is None else f": {event.error}"
        text = f"{event.source} to {event.target}{reason}"
        if event.source == event.target:
            text = f"goes on in {event.target} with {event.artifact_id}"
        self._tell(envelope, event, "lifecycle", text, failure=event.target in _FAILURES)

    def _take_epoch(self, envelope: Envelope, event: EpochEvent) -> None:
        model = self._model(event.model)
        if model is not None:
            model.epoch, model.cache, model.damaged = event.epoch, dict(event.cache), dict(event.damaged)
            model.version += 1
        states = ", ".join(f"{count} {name}" for name, count in sorted(event.seeds_by_state.items()))
        text = f"epoch {event.epoch}: {states or 'no seeds'}"
        if event.damaged:
            text += "; state arrays are damaged in " + ", ".join(sorted(event.damaged))
        self._enter(at=envelope.timestamp, kind="epoch", text=text, failure=bool(event.damaged), model=event.model)

    def _take_request(self, envelope: Envelope, request: CompileRequest) -> None:
        job = CompileJob(
            id=envelope.event_id,
            at=envelope.timestamp,
            what=_design_name(request),
            dtype=request.dtype,
            targets=tuple(target.label for target in request.targets),
            pipeline=request.pipeline,
            reason=request.reason,
            trace_id=envelope.trace_id,
            model=request.model,
            layer=request.layer,
            seed=request.seed,
        )
        self.jobs[job.id] = job
        while len(self.jobs) > _MOST_JOBS:
            self.jobs.popitem(last=False)
        if self._counted is not None:
            self._counted.submitted(request)
        self._tell(
            envelope, request, "compile", f"{request.reason}: {job.what} for {', '.join(job.targets)} in {job.dtype}"
        )

    def _take_ready(self, envelope: Envelope, ready: KernelReady) -> None:
        job = self.jobs.get(envelope.in_reply_to or "")
        waited_s = None
        if job is not None:
            job.artifacts[ready.part] = ready.artifact_id
            job.compile_seconds = ready.compile_seconds
            if job.outcome != "ready" and len(job.artifacts) >= ready.parts:
                job.outcome, job.answered_at = "ready", envelope.timestamp
                waited_s = max(0.0, envelope.timestamp - job.at)
        if ready.status is KernelStatus.PENDING_BENCHMARKING:
            self._unproven.setdefault(ready.artifact_id, envelope.timestamp)
            while len(self._unproven) > _MOST_JOBS:
                self._unproven.popitem(last=False)
        if self._counted is not None:
            self._counted.compiled(ready, waited_s)
        self._tell(
            envelope, ready, "compile", f"{ready.artifact_id} is {'there' if ready.hit else 'built'}, {ready.status}"
        )

    def _take_failure(self, envelope: Envelope, failure: CompileFailed) -> None:
        job = self.jobs.get(envelope.in_reply_to or "")
        waited_s = None
        if job is not None and job.outcome == "waiting":
            job.outcome, job.answered_at = "failed", envelope.timestamp
            job.message = f"{failure.error}: {failure.message}"
            waited_s = max(0.0, envelope.timestamp - job.at)
        if self._counted is not None:
            self._counted.failed(failure, waited_s)
        self._tell(envelope, failure, "compile", f"{failure.error}: {failure.message}", failure=True)

    def _take_unproven(self, envelope: Envelope, failure: ProofFailed) -> None:
        self._tell(
            envelope,
            failure,
            "proof",
            f"{failure.artifact_id or 'what was to be proven'}: {failure.error}: {failure.message}",
            failure=True,
        )

    def _take_verdict(self, envelope: Envelope, verdict: KernelCharacterized) -> None:
        began = self._unproven.pop(verdict.artifact_id, None)
        if self._counted is not None:
            self._counted.proven(verdict, None if began is None else max(0.0, envelope.timestamp - began))
        reasons = ": " + "; ".join(verdict.reasons) if verdict.reasons else ""
        self._tell(
            envelope,
            verdict,
            "proof",
            f"{verdict.artifact_id} is {verdict.status}{reasons}",
            failure=verdict.status is KernelStatus.REJECTED,
        )

    def _take_report(self, envelope: Envelope, report: FieldReport) -> None:
        if self._counted is not None:
            self._counted.reported(report)
        change = ""
        if report.metric_before is not None and report.metric_after is not None:
            change = f": metric {report.metric_before:.6g} to {report.metric_after:.6g}"
        self._tell(envelope, report, "report", f"{report.outcome}{change}", failure=report.outcome != "FOSSILIZED")

    def _take_command(self, envelope: Envelope, command: KasminaCommand) -> None:
        self._tell(envelope, command, "command", str(command.command))

    def _take_result(self, envelope: Envelope, result: CommandResult) -> None:
        if self._counted is not None:
            self._counted.answered(result)
        reason = f": {result.reason}" if result.reason else ""
        self._tell(
            envelope, result, "command", f"{result.status}{reason}", failure=result.status is not CommandStatus.APPLIED
        )

    def _take_store(self, envelope: Envelope, event: StoreEvent) -> None:
        if self._counted is not None:
            self._counted.stored(event)
        self._tell(
            envelope,
            event,
            "store",
            f"{event.kind}: {event.message}",
            failure=event.kind in ("quarantined", "degraded"),
        )


def state_name(number: int) -> str:
    """Of a state's number."""
    return STATES[number] if number < UNKNOWN else "UNKNOWN"


def _design_name(request: CompileRequest) -> str:
    """For people; the text may be anybody's, and is checked by whoever compiles it."""
    if request.like_artifact_id is not None:
        return f"as {request.like_artifact_id}"
    try:
        return str(json.loads(request.blueprint or "")["name"])[:63]
    except (ValueError, LookupError, TypeError, RecursionError):
        return "what is no blueprint"


def _nothing(count: int) -> NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)


def _column(values: Iterable[float | None] | None, count: int) -> NDArray[np.float32]:
    if values is None:
        return _nothing(count)
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _mean(values: NDArray[np.float32], which: NDArray[np.bool_]) -> float:
    chosen = values[which & ~np.isnan(values)]
    return float(chosen.mean()) if chosen.size else float("nan")
