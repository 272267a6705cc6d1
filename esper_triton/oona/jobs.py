"""The loop of a worker: jobs from a queue of the bus, each worked on, answered and then acknowledged."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esper_triton.contracts.envelope import Message
from esper_triton.contracts.errors import EsperError, MalformedMessage, StoreUnavailable
from esper_triton.oona.bus import Oona
from esper_triton.oona.subscription import Delivery, Subscription

__all__ = ["GivenBack", "Job", "JobServer", "Refuse", "Work"]

_POLL_S = 0.25
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before a job is tried again whose store was away
_log = logging.getLogger("esper_triton.oona.jobs")


class GivenBack(Exception):
    """Raised by work that was asked to end before it was done. Nothing is answered; another worker gets the job."""


@dataclass(frozen=True, eq=False)
class Job:
    """A message that asks for work.

    Attributes:
        message: its payload. trace_id: what follows it through everything. attempt: from 1; more where a worker had it
            before and has died.
        given_back: set when the worker is to end and does not wait for this job any longer; work that takes long looks
            at it, and raises GivenBack.
    """

    delivery: Delivery
    message: Message
    given_back: threading.Event

    @property
    def trace_id(self) -> str:
        """That of the message, or its id where it has none."""
        return self.delivery.envelope.trace_id or self.delivery.envelope.event_id

    @property
    def attempt(self) -> int:
        """How often it has been handed out."""
        return self.delivery.attempt


Work = Callable[[Job], Iterable[Message]]
"""Does a job and returns the answers. What it raises is answered by `Refuse`."""
Refuse = Callable[[Delivery, Exception], Message]
"""The answer to a job that could not be done, or is none."""


class JobServer:
    """Serves a queue with some threads, one job for each at a time.

    A job is done at least once: it is acknowledged when its answers are with the hub, or on this machine's disk while
    the hub is away, and not before. The job of a worker that dies goes to another, within 30 s by the defaults of the
    bus. So work must come to the same whoever does it, and twice; and one that has been handed out `most_attempts`
    times, since every worker has died of it, is refused.

    A job that is malformed, or whose work raises, is refused with the reason, and ends no worker. One whose store is
    away is tried again for half a minute before.

    Args:
        topic: of the queue. group: the workers that share it. slots: jobs at a time.
    """

    def __init__(
        self, bus: Oona, topic: str, group: str, work: Work, refuse: Refuse, *, slots: int = 1, most_attempts: int = 5
    ) -> None:
        if slots < 1 or most_attempts < 1:
            raise ValueError(f"slots and most_attempts must be at least 1, found {slots} and {most_attempts}")
        self._bus, self._topic, self._group = bus, topic, group
        self._work, self._refuse = work, refuse
        self._slots, self._most_attempts = slots, most_attempts
        self._stopping, self._given_back = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._counting = threading.Lock()
        self._counts = {"done": 0, "refused": 0, "given_back": 0, "running": 0}

    def start(self) -> None:
        """Begins to take jobs, also those that were submitted before there was a worker. Raises BusUnavailable from a
        hub that refuses, RuntimeError where it has been started before."""
        if self._threads:
            raise RuntimeError("the job server was started before")
        subscriptions: list[Subscription] = []
        try:
            for _ in range(self._slots):
                subscriptions.append(self._bus.subscribe(self._topic, self._group, start="earliest", window=1))
        except BaseException:
            for subscription in subscriptions:
                subscription.close()
            raise
        for number, subscription in enumerate(subscriptions):
            thread = threading.Thread(
                target=self._serve, args=(subscription,), name=f"{self._group}-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop(self, grace_s: float = 30.0) -> bool:
        """Takes no more jobs; those that are not done within `grace_s` are given back. False where some work does not
        end even so, whose job is another's when this process has ended."""
        self._stopping.set()
        self._join(grace_s)
        self._given_back.set()
        self._join(5.0)
        return not any(thread.is_alive() for thread in self._threads)

    def stats(self) -> dict[str, int]:
        """Jobs that are `running`, and since the start `done`, `refused` and `given_back`."""
        with self._counting:
            return dict(self._counts)

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _count(self, **changes: int) -> None:
        with self._counting:
            for name, change in changes.items():
                self._counts[name] += change

    # ---- one thread for each slot

    def _serve(self, subscription: Subscription) -> None:
        with subscription:
            while not self._stopping.is_set() and not subscription.closed:
                delivery = subscription.get(_POLL_S)
                if delivery is None or self._stopping.is_set():
                    continue
                self._count(running=1)
                outcome = "given_back"
                try:
                    outcome = self._do(subscription, delivery)
                finally:
                    self._count(running=-1, **{outcome: 1})

    def _do(self, subscription: Subscription, delivery: Delivery) -> str:
        outcome = "done"
        try:
            answers = self._answers(delivery)
        except GivenBack:
            return "given_back"
        except Exception as error:
            if not isinstance(error, (EsperError, ValueError, LookupError)):
                reason = f"{type(error).__name__}: {error}"
                _log.exception("%s", json.dumps({"event": "job_failed", "topic": self._topic, "reason": reason}))
            answers, outcome = [self._refuse(delivery, error)], "refused"
        for answer in answers:
            while not self._bus.reply(delivery, answer):  # no room, since the hub is away and the disk full
                if self._given_back.wait(_POLL_S):
                    return "given_back"
        while not self._bus.flush(1.0):
            if self._given_back.is_set():  # the answers are in the journal; the job is done once more, by another
                return "given_back"
        subscription.ack(delivery)
        return outcome

    def _answers(self, delivery: Delivery) -> list[Message]:
        if delivery.attempt > self._most_attempts:
            raise MalformedMessage(
                f"{delivery.envelope.event_id} was begun {delivery.attempt - 1} times, and each worker has died of it "
                "or was ended before it was done"
            )
        job = Job(delivery, delivery.parse(), self._given_back)
        for pause_s in _PAUSES_S:
            try:
                return list(self._work(job))
            except StoreUnavailable as error:
                _log.warning("%s", json.dumps({"event": "store_is_away", "reason": str(error)}))
                if self._given_back.wait(pause_s):
                    raise GivenBack from error
        return list(self._work(job))
