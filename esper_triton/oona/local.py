"""The transport within one process: no dependency, no thread, no bytes."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any

from esper_triton.oona.exchange import Consumer, Exchange, Limits, Start
from esper_triton.oona.subscription import Delivery, Subscription
from esper_triton.oona.transport import Outgoing

__all__ = ["LocalTransport"]

_DELIVER_EVERY = 32  # messages: a quick reader must have them before the limits of telemetry take them away


class LocalTransport:
    """Hands messages from the thread that sends to the subscriptions of this process. The values of a payload are
    shared, not copied."""

    packs = False

    def __init__(self, limits: Limits | None = None) -> None:
        self._exchange = Exchange(limits)
        self._lock = threading.RLock()
        self._members: dict[Subscription, Consumer] = {}

    def wants(self, topic: str) -> bool:
        """Whether anybody reads a topic."""
        return any(topic in group.ready for group in tuple(self._exchange.groups.values()))

    def send(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Takes all of them in."""
        with self._lock:
            for k, message in enumerate(messages, start=1):
                topic, sender_id, sequence, content = message
                verdict, _ = self._exchange.publish(topic, sender_id, sequence, content, 0)
                if verdict == "full":
                    raise ConnectionError(
                        f"{topic} holds {self._exchange.limits.messages} messages that some group has still to read"
                    )
                if k % _DELIVER_EVERY == 0 or k == len(messages):
                    for subscription in tuple(self._members):
                        self._deliver(subscription)
        return [None] * len(messages)

    def subscribe(self, subscription: Subscription, start: Start) -> None:
        """Lets it have what comes."""
        with self._lock:
            private = subscription.group is None
            name = subscription.group or f"~{uuid.uuid4().hex}"
            group = self._exchange.join(name, subscription.topics, start=start, private=private)
            self._members[subscription] = self._exchange.attach(group, window=subscription.window)
            self._deliver(subscription)

    def acknowledge(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """Its group is done with these."""
        with self._lock:
            member = self._members.get(subscription)
            if member is None:
                return
            for delivery in deliveries:
                self._exchange.ack(member.group, delivery.place)
            self._deliver(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        """It has left."""
        with self._lock:
            member = self._members.pop(subscription, None)
            if member is None:
                return
            self._exchange.detach(member)
            if member.group.private:
                self._exchange.forget(member.group)
            for other in tuple(self._members):
                self._deliver(other)

    def stats(self) -> dict[str, Any]:
        """Counters by topic and by group."""
        with self._lock:
            return self._exchange.stats()

    def server_stats(self) -> dict[str, Any]:
        """There is no server: the same."""
        return self.stats()

    def close(self) -> None:
        """Nothing to let go of."""

    def _deliver(self, subscription: Subscription) -> None:
        member = self._members[subscription]
        taken = self._exchange.take(member, member.window)
        if taken:
            subscription.offer([Delivery(t.content, t.place, t.attempt) for t in taken])
