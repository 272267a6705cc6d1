"""What a subscriber holds: messages as they arrive, to be acknowledged when their work is done."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from esper_triton.contracts.envelope import Envelope, Message
from esper_triton.oona.wire import parse

__all__ = ["Delivery", "Gap", "Subscription"]

_REMEMBERED = 65536


@dataclass(eq=False)
class Delivery:
    """A message that has arrived. `attempt` counts from 1; more than 1 where somebody had it before and did not
    acknowledge it. `place` is the transport's own."""

    envelope: Envelope
    place: Any
    attempt: int = 1

    def parse(self) -> Message:
        """The payload as its topic's model. Raises MalformedMessage."""
        return parse(self.envelope)


class Gap(NamedTuple):
    """Messages of one sender on one topic that did not arrive: `missing` of them, before `sequence`."""

    topic: str
    sender_id: str
    sequence: int
    missing: int


class Subscription:
    """Messages of some topics, in order for each sender and topic. Made by `Oona.subscribe`.

    With a group, the messages are shared among its members, and each is delivered again, to whoever is there, until
    somebody acknowledges it. Without one everything comes here, counts as acknowledged when it is taken, and gaps are
    noticed: `missing` counts what did not arrive, and `on_gap` is called, on the thread that takes.

    Any thread may call; one that waits does so without holding anything.
    """

    def __init__(
        self,
        topics: tuple[str, ...],
        group: str | None,
        *,
        window: int,
        acknowledge: Callable[[Subscription, list[Delivery]], None],
        leave: Callable[[Subscription], None],
        on_gap: Callable[[Gap], None] | None = None,
    ) -> None:
        self.topics = topics
        self.group = group
        self.window = window
        self.on_gap = on_gap
        self.missing = 0
        self.duplicates = 0
        self.closed = False
        self._acknowledge, self._leave = acknowledge, leave
        self._inbox: deque[Delivery] = deque()
        self._held: dict[str, Delivery] = {}  # by event_id, delivered and not acknowledged
        self._done: OrderedDict[str, None] = OrderedDict()  # acknowledged lately
        self._expected: dict[tuple[str, str], int] = {}
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []

    def __len__(self) -> int:
        """How many messages wait to be taken."""
        return len(self._inbox)

    def poll(self) -> Delivery | None:
        """The next message; None where none waits."""
        try:
            delivery = self._inbox.popleft()
        except IndexError:
            return None
        if self.group is None:
            self._notice_gap(delivery.envelope)
            self.ack(delivery)
        return delivery

    def get(self, timeout_s: float | None = None) -> Delivery | None:
        """The next message, waited for; None when the time is over or the subscription is closed."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            delivery = self.poll()
            if delivery is not None or self.closed:
                return delivery
            with self._changed:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                if not self._inbox and not self.closed:
                    self._changed.wait(left)

    async def receive(self) -> Delivery | None:
        """As `get`, for an event loop; None when the subscription is closed."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(arrived.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                arrived.clear()
                delivery = self.poll()
                if delivery is not None or self.closed:
                    return delivery
                await arrived.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def __iter__(self) -> Iterator[Delivery]:
        """Messages until the subscription is closed."""
        while (delivery := self.get()) is not None:
            yield delivery

    def ack(self, *deliveries: Delivery) -> None:
        """Their work is done: they are not delivered again, to anybody."""
        with self._changed:
            for delivery in deliveries:
                event_id = delivery.envelope.event_id
                self._held.pop(event_id, None)
                self._done[event_id] = None
            while len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        self._acknowledge(self, list(deliveries))

    def close(self) -> None:
        """Leaves; what was not acknowledged goes to the rest of the group."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._inbox.clear()
            self._held.clear()
        self._leave(self)
        self._wake()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # For transports.

    def offer(self, deliveries: Iterable[Delivery]) -> None:
        """Takes in what has arrived. What is here already, since a hub was started again or did not hear of an
        acknowledgement, is not shown twice."""
        again: list[Delivery] = []
        with self._changed:
            if self.closed:
                return
            for delivery in deliveries:
                event_id = delivery.envelope.event_id
                held = self._held.get(event_id)
                if held is not None:
                    held.place = delivery.place
                    self.duplicates += 1
                elif event_id in self._done:
                    self.duplicates += 1
                    again.append(delivery)
                else:
                    self._held[event_id] = delivery
                    self._inbox.append(delivery)
        if again:
            self._acknowledge(self, again)
        self._wake()

    def held(self) -> list[Delivery]:
        """What has been delivered and is not acknowledged."""
        with self._changed:
            return list(self._held.values())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for wake in wakers:
            wake()

    def _notice_gap(self, envelope: Envelope) -> None:
        key = (envelope.topic, envelope.sender_id)
        expected = self._expected.get(key)
        self._expected[key] = envelope.sequence + 1
        if expected is not None and envelope.sequence > expected:
            missing = envelope.sequence - expected
            self.missing += missing
            if self.on_gap is not None:
                self.on_gap(Gap(envelope.topic, envelope.sender_id, envelope.sequence, missing))
