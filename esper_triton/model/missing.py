"""Kernels that a model's calls have missed: asked for on the bus, loaded when they are there, put in place."""

from __future__ import annotations

import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.errors import MalformedMessage
from esper_triton.contracts.events import CompileFailed, CompileRequest, KernelCharacterized, KernelReady
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.events import SpecialisationMiss, Transition
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.pending import PendingSpecialisation
from esper_triton.kasmina.seed import LoadedKernel
from esper_triton.model.germination import target_name
from esper_triton.oona import Delivery, Oona
from esper_triton.tezzeret.targets import parse_target

__all__ = ["MissingKernels"]

_PER_BOUNDARY = 256  # answers; the rest waits for the next one
_REMEMBERED = 10_000
_log = logging.getLogger("esper_triton.model")


@dataclass(frozen=True)
class _Wanted:
    """A kernel that has been asked for, in the place of the one that the seed has."""

    layer: KasminaLayer
    seed: int
    instead_of: LoadedKernel


class MissingKernels:
    """Those of one model's layers, by name. All of it runs at boundaries, on the training thread, but the loads.

    Args:
        traces: by layer and seed, what its messages are traced by.
        announce: tells of a seed that goes on with another kernel, as a transition that keeps its state.
    """

    def __init__(
        self,
        bus: Oona,
        model: str,
        layers: Mapping[str, KasminaLayer],
        traces: Mapping[tuple[str, int], str],
        announce: Callable[[Transition], None],
    ) -> None:
        self._bus, self._model, self._layers, self._traces, self._announce = bus, model, layers, traces, announce
        self._wanted: OrderedDict[str, _Wanted] = OrderedDict()  # by the request's id
        self._unproven: OrderedDict[str, _Wanted] = OrderedDict()  # by the artifact's
        self._loading: list[tuple[_Wanted, str, Future[None]]] = []  # the artifact, and its load
        self._answers = bus.subscribe((topics.KERNEL_READY, topics.COMPILE_FAILED))

    def close(self) -> None:
        """What has been asked for is nobody's any more."""
        self._answers.close()

    def ask(self, miss: SpecialisationMiss) -> None:
        """Sends a request to compile."""
        try:
            target = parse_target(target_name(torch.device(miss.device)))
        except ValueError as error:  # nothing compiles for such a device
            _log.warning("%s", json.dumps({"event": "no_target", "device": miss.device, "reason": str(error)}))
            return
        event_id, layer = uuid.uuid4().hex, self._layers.get(miss.layer)
        kernel = None if layer is None else layer._kasmina.seeds[miss.seed].kernel
        if layer is not None and kernel is not None:
            _remember(self._wanted, event_id, _Wanted(layer, miss.seed, kernel))
        self._bus.publish(
            topics.SUBMITTED,
            CompileRequest(
                reason="specialisation_miss",
                like_artifact_id=miss.artifact_id,
                dtype=miss.dtype.removeprefix("torch."),
                targets=(target,),
                model=self._model,
                layer=miss.layer,
                seed=miss.seed,
            ),
            trace_id=self._traces.get((miss.layer, miss.seed)),
            event_id=event_id,
        )

    def heed(self, verdict: KernelCharacterized) -> None:
        """Loads what has been waiting for this verdict, if it is a good one."""
        wanted = self._unproven.pop(verdict.artifact_id, None)
        if wanted is not None and verdict.status is KernelStatus.VALIDATED:
            self._load(wanted, verdict.artifact_id)

    def before_boundary(self) -> None:
        """Takes in what has come of requests."""
        for _ in range(_PER_BOUNDARY):
            answer = self._answers.poll()
            if answer is None:
                return
            self._receive(answer)

    def after_boundary(self) -> None:
        """Announces the seeds that go on with another kernel."""
        waiting, self._loading = self._loading, []
        for wanted, artifact_id, future in waiting:
            record = wanted.layer.__dict__.get("_kasmina")
            if record is None:  # unwrapped meanwhile
                continue
            seed = record.seeds[wanted.seed]
            if seed.kernel is wanted.instead_of:
                if not future.done() or len(record.queue):  # else it has failed
                    self._loading.append((wanted, artifact_id, future))
            elif seed.artifact_id == artifact_id and seed.kernel is not None:
                kept = {"source": seed.state, "target": seed.state}
                self._announce(Transition(layer=record.name, seed=seed.index, artifact_id=artifact_id, **kept))

    def _receive(self, delivery: Delivery) -> None:
        wanted = self._wanted.pop(delivery.envelope.in_reply_to or "", None)
        if wanted is None:
            return
        try:
            answer = delivery.parse()
        except MalformedMessage as error:
            _log.warning("%s", json.dumps({"event": "malformed_answer", "reason": str(error)[:500]}))
            return
        if isinstance(answer, CompileFailed):
            record = wanted.layer.__dict__.get("_kasmina")
            told = {"event": "specialisation_failed", "layer": record and record.name, "seed": wanted.seed}
            _log.warning("%s", json.dumps(told | {"error": answer.error, "reason": answer.message[:500]}))
            return
        assert isinstance(answer, KernelReady)
        if answer.status is KernelStatus.VALIDATED:
            self._load(wanted, answer.artifact_id)
        elif answer.status is KernelStatus.PENDING_BENCHMARKING:
            _remember(self._unproven, answer.artifact_id, wanted)

    def _load(self, wanted: _Wanted, artifact_id: str) -> None:
        record = wanted.layer.__dict__.get("_kasmina")
        if record is None or record.urza is None or record.replicas is not None:
            return
        if record.seeds[wanted.seed].kernel is wanted.instead_of:
            future = PendingSpecialisation.of(wanted.layer, wanted.seed, artifact_id).start()
            self._loading.append((wanted, artifact_id, future))


def _remember(waiting: OrderedDict[str, _Wanted], key: str, wanted: _Wanted) -> None:
    waiting[key] = wanted
    while len(waiting) > _REMEMBERED:
        waiting.popitem(last=False)
