"""One load under way, from the request to its result in the layer's queue."""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina import background, loading
from esper_triton.kasmina.boundary import host_dtype, put, state_storage
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import LoadedKernel, LoadTicket, Seed
from esper_triton.kasmina.transitions import Loaded, LoadFailed, Specialised
from esper_triton.urza import Urza

if TYPE_CHECKING:
    from esper_triton.kasmina.layer import KasminaLayer

__all__ = ["PendingLoad", "PendingSpecialisation", "load_request"]

_log = logging.getLogger("esper_triton.kasmina")


def load_request(
    layer: KasminaLayer, seed: Seed, artifact_id: str, *, holder: object, force: bool = True
) -> loading.LoadRequest:
    """What is loaded for a seed of a layer as it is now."""
    record = layer._kasmina
    return loading.LoadRequest(
        artifact_id=artifact_id,
        layer_name=record.name,
        layer_key=id(record),
        seed=seed.index,
        span=seed.span,
        kind=record.kind,
        device=state_storage(layer).device,
        dtype=host_dtype(layer),
        holder=holder,
        force=force,
    )


@dataclass(frozen=True)
class PendingLoad:
    """A load of `request` for a layer's record, which may run for `seconds` beside the training thread.

    Its result goes into the layer's queue and takes effect at a boundary; the first of `fail` and the load's own end
    counts, and neither does for a seed that waits for another load by now.
    """

    record: LayerRecord
    request: loading.LoadRequest
    urza: Urza
    ticket: LoadTicket
    seconds: float

    @classmethod
    def of(cls, layer: KasminaLayer, seed: int, artifact_id: str, *, force: bool, seconds: float | None) -> PendingLoad:
        """Of a seed of a layer that has a store. Nothing is queued or started."""
        record, ticket = layer._kasmina, LoadTicket()
        assert record.urza is not None
        request = load_request(layer, record.seeds[seed], artifact_id, holder=ticket, force=force)
        limit = record.policy.load_deadline_s if seconds is None else seconds
        return cls(record, request, record.urza, ticket, limit)

    def start(self) -> Future[None]:
        """Runs beside the training thread, when those asked for before it have ended. The future is done when the
        result is in the queue or the load was given up; it holds no error."""
        future, self.ticket.give_up = background.start(self)
        return future

    def run(self) -> None:
        """Runs on this thread. What is no Exception (an interrupt) passes through, once the failure is queued."""
        try:
            self.attempt()
        except BaseException as error:
            self.fail(error)
            raise

    def attempt(self) -> None:
        """Fetches, checks and loads, and queues what came of it."""
        try:
            kernel, parameters = loading.fetch(self.request, self.urza)
        except Exception as error:
            self.fail(error)
            return
        before = put(
            self.record, Loaded(seed=self.request.seed, ticket=self.ticket, kernel=kernel, parameters=parameters)
        )
        self.ticket.arrived = self.record.follows or before.ticket is self.ticket

    def fail(self, error: BaseException) -> None:
        """The load is over, without a result."""
        put(self.record, LoadFailed(seed=self.request.seed, ticket=self.ticket, error=error))

    def lose(self) -> None:
        """The load stayed with the process that this one was forked from; the next boundary ends it here."""
        self.ticket.lost = True

    @property
    def who(self) -> str:
        """For messages."""
        return self.request.who

    @property
    def succeeded(self) -> bool:
        """Whether the kernel is in place, or will be at the next boundary."""
        return self.ticket.arrived if self.ticket.took_effect is None else self.ticket.took_effect


@dataclass(frozen=True)
class PendingSpecialisation:
    """A load of a kernel for the tensors that a seed is given, in the place of its own, which is for others. The seed
    goes on meanwhile as it is, the host serving it; so it does where this fails, which leaves one line in the log."""

    record: LayerRecord
    request: loading.LoadRequest
    urza: Urza
    instead_of: LoadedKernel
    seconds: float

    @classmethod
    def of(cls, layer: KasminaLayer, seed: int, artifact_id: str) -> PendingSpecialisation:
        """Of a seed that has a kernel, of a layer that has a store and no replicas. Nothing is queued or started."""
        record = layer._kasmina
        own = record.seeds[seed]
        assert record.urza is not None
        assert own.kernel is not None
        request = load_request(layer, own, artifact_id, holder=LoadTicket(), force=False)
        return cls(record, request, record.urza, own.kernel, record.policy.load_deadline_s)

    def start(self) -> Future[None]:
        """As `PendingLoad.start`."""
        return background.start(self)[0]

    def attempt(self) -> None:
        """Fetches, checks and loads, and queues the kernel."""
        try:
            kernel = loading.load(self.request, self.urza)
            _check_same_design(self.instead_of, kernel, self.request.who)
        except Exception as error:
            self.fail(error)
            return
        specialised = Specialised(
            seed=self.request.seed, instead_of=self.instead_of, kernel=kernel, holder=self.request.holder
        )
        put(self.record, specialised)

    def fail(self, error: BaseException) -> None:
        """The seed keeps the kernel that it has."""
        fields = {"layer": self.request.layer_name, "seed": self.request.seed, "artifact_id": self.request.artifact_id}
        reason = {"error": type(error).__name__, "reason": str(error)[:500]}
        _log.warning("%s", json.dumps({"event": "specialisation_failed"} | fields | reason))

    def lose(self) -> None:
        """The process that it stayed with has the seed too."""

    @property
    def who(self) -> str:
        """For messages."""
        return self.request.who


def _check_same_design(before: LoadedKernel, after: LoadedKernel, who: str) -> None:
    a, b = before.manifest, after.manifest
    for what, had, has in (
        ("blueprint", a.blueprint_id, b.blueprint_id),
        ("dims", dict(a.dims), dict(b.dims)),
        ("parameters", _shapes(before), _shapes(after)),
    ):
        if had != has:
            raise ArtifactRefused(f"artifact {b.id} has {what} {has}, that of {who} has {had}: it is no specialisation")


def _shapes(kernel: LoadedKernel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(record.shape) for name, record in kernel.manifest.parameters.items()}
