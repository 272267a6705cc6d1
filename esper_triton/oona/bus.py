"""Oona: publish, subscribe, acknowledge, ask."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.envelope import TOPICS, Envelope, Message, check_topic, topics_matching
from esper_triton.contracts.errors import BusUnavailable
from esper_triton.oona.exchange import Limits, Start
from esper_triton.oona.journal import Journal
from esper_triton.oona.lanes import Lane, Tally
from esper_triton.oona.local import LocalTransport
from esper_triton.oona.pump import Pump
from esper_triton.oona.subscription import Delivery, Gap, Subscription
from esper_triton.oona.transport import Transport
from esper_triton.oona.wire import MODELS, check_message_limit

__all__ = ["ANSWERS", "Oona"]

ANSWERS: Mapping[str, tuple[str, ...]] = {
    topics.COMMANDS: (topics.RESULTS,),
    topics.SUBMITTED: (topics.KERNEL_READY, topics.COMPILE_FAILED),
    topics.KERNEL_READY: (topics.CHARACTERIZED, topics.PROOF_FAILED),
}
"""The topics on which messages of a topic are answered; where there are several, the answer's model says which."""

_log = logging.getLogger("esper_triton.oona")
_time = time.time
_NAP_S = 0.5
_alive: weakref.WeakSet[Oona] = weakref.WeakSet()


class Oona:
    """A bus. `Oona()` is one within this process; `Oona("ws://host:port")` and `wss://` lead to a hub (`python -m
    esper_triton.oona serve`), `Oona("redis://host:port/0")` to a Redis server.

    `publish` leaves a message in a lane and returns; a thread of the bus, which is there from the first message on,
    sends it. While the hub or server is away telemetry waits in its lane, where the oldest is dropped and counted, and
    everything else goes to a journal on the disk, from where it is sent in order when the way is free. A journal that
    a process has left behind is sent by the next one with the same folder and address.

    Delivery is at least once, in order for each sender and topic. After a fork the child's bus is a new sender, and has
    no subscriptions.

    Args:
        address: see above. name: begins the sender's id. token: what the hub knows this process by.
        journal: the folder of the journals; `~/.cache/esper/oona` (or `ESPER_OONA`) by default.
        telemetry_bound: messages of one topic that wait at most. telemetry_bytes: the memory that they take about, at
            most, while the hub is away. kept_bound: as many for what is not telemetry, which
            `publish` refuses beyond, when the journal is full too. journal_bytes: the size of a full journal.
        max_message_bytes: a larger message is refused.
        limits: what the bus within the process keeps.
        tls_ca: a file of certificates to trust for `wss://`, besides the system's.
        lease_s: how long, over Redis, a member of a group that has died keeps what it held. (A hub sees it die.)
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str = "esper",
        token: str | None = None,
        journal: str | os.PathLike[str] | None = None,
        telemetry_bound: int = 65536,
        telemetry_bytes: int = 256 * 2**20,
        kept_bound: int = 100_000,
        journal_bytes: int = 256 * 2**20,
        max_message_bytes: int = 8 * 2**20,
        limits: Limits | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        lease_s: float = 20.0,
    ) -> None:
        if telemetry_bound < 1 or kept_bound < 1:
            raise ValueError(f"bounds must be at least 1, found {telemetry_bound} and {kept_bound}")
        check_message_limit(max_message_bytes)
        self.name = name
        self.address = address
        self._bounds = telemetry_bound, kept_bound
        self._journal_bytes, self._max_message_bytes = journal_bytes, max_message_bytes
        self._telemetry_bytes = telemetry_bytes
        default = os.environ.get("ESPER_OONA") or Path.home() / ".cache" / "esper" / "oona"
        # One folder for each address: what was meant for one hub must not be sent to another.
        self._folder = Path(journal if journal is not None else default) / _folder_name(address)
        self._make_transport = functools.partial(
            _transport, address, token=token, limits=limits, tls_ca=tls_ca, lease_s=lease_s
        )
        self._transport = self._make_transport()
        self._begin()
        _alive.add(self)

    def _begin(self) -> None:
        """What a new sender starts from."""
        telemetry_bound, kept_bound = self._bounds
        self.sender_id = f"{self.name}-{uuid.uuid4().hex[:16]}"
        self._lanes = {t: Lane(t, telemetry_bound if topics.is_telemetry(t) else kept_bound) for t in TOPICS}
        self._unknown = Tally()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sleeps = True  # whether the pump, or the lack of one, needs the bell
        self._closed = False
        self._starting = threading.Lock()
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        journal = Journal.of(self._folder, self.sender_id) if self._transport.packs else None
        self._pump = Pump(
            self.sender_id,
            self._lanes,
            self._transport,
            journal,
            journal_bytes=self._journal_bytes,
            max_message_bytes=self._max_message_bytes,
            telemetry_bytes=self._telemetry_bytes,
        )
        self._runs = False

    # ---- sending

    def publish(
        self,
        topic: str,
        payload: Message | Mapping[str, Any],
        *,
        trace_id: str | None = None,
        in_reply_to: str | None = None,
        event_id: str | None = None,
    ) -> bool:
        """Hands a message over, from any thread: takes no lock, waits for nothing, raises nothing.

        The payload belongs to the bus from now on; a model is packed later, on another thread. False for a message that
        is not taken and not sent: the topic is unknown, the bus is closed, or the lane of what must not be dropped is
        full, as when the hub has been away for longer than the journal holds. What turns out later to be no message
        (values without a form in msgpack, too many bytes, a topic that the token has no right to) is counted as
        refused, and logged.
        """
        try:
            lane = self._lanes[topic]
        except (KeyError, TypeError):
            self._unknown.add()
            return False
        buffer = lane.buffer
        if self._closed or (len(buffer) >= lane.bound and not lane.is_telemetry):
            lane.refused.add()
            return False
        buffer.append((payload, _time(), trace_id, in_reply_to, event_id))
        if len(buffer) > lane.bound:
            lane.drop_oldest()
        if self._sleeps:
            self._wake()
        return True

    def _wake(self) -> None:
        self._sleeps = False
        if self._runs:
            self._bell.put(None)
        elif self._starting.acquire(blocking=False):
            # Not released: one pump is started for each sender. Not threading.Thread, whose start() waits.
            try:
                _thread.start_new_thread(self._run, (self._pump, self._bell))
                self._runs = True
            except RuntimeError:  # no more threads: the next message tries again
                self._sleeps = True
                self._starting.release()

    def _run(self, pump: Pump, bell: queue.SimpleQueue[None]) -> None:
        while not pump.stopping.is_set():
            try:
                pause_s = pump.cycle()
            except Exception as error:
                _log.exception("%s", json.dumps({"event": "pump_failed", "error": type(error).__name__}))
                pause_s = 0.5
            if pause_s is not None:
                # Without the bell: it would ring for every message of a busy thread, or of a hub that is away.
                pump.stopping.wait(pause_s)
                continue
            self._sleeps = True
            if not pump.has_work:  # nothing was left between the cycle and the line above
                with contextlib.suppress(queue.Empty):
                    bell.get(timeout=_NAP_S)
            self._sleeps = False
        pump.end()

    def request(
        self, topic: str, payload: Message | Mapping[str, Any], *, timeout_s: float = 30.0, trace_id: str | None = None
    ) -> Envelope:
        """Publishes a message and waits for the answer to it.

        Raises TimeoutError when none has come, ValueError for a topic that is not answered, BusUnavailable when the
        message is not taken.
        """
        check_topic(topic)
        if topic not in ANSWERS:
            raise ValueError(f"messages of {topic!r} are not answered; those of {', '.join(map(repr, ANSWERS))} are")
        event_id = uuid.uuid4().hex
        until = time.monotonic() + timeout_s
        with self.subscribe(ANSWERS[topic]) as answers:
            if not self.publish(topic, payload, trace_id=trace_id, event_id=event_id):
                raise BusUnavailable(f"{self.sender_id}: a message to {topic!r} was not taken")
            while (left := until - time.monotonic()) > 0:
                delivery = answers.get(left)
                if delivery is not None and delivery.envelope.in_reply_to == event_id:
                    return delivery.envelope
        shown = " or ".join(map(repr, ANSWERS[topic]))
        raise TimeoutError(f"no answer on {shown} to {event_id} within {timeout_s:g} s")

    def reply(self, to: Delivery, payload: Message | Mapping[str, Any]) -> bool:
        """Answers a message, on the topic of such answers. Raises ValueError where there is none; otherwise as
        `publish`."""
        asked = to.envelope
        if asked.topic not in ANSWERS:
            raise ValueError(f"messages of {asked.topic!r} are not answered")
        found = ANSWERS[asked.topic]
        topic = next((one for one in found if isinstance(payload, MODELS[one])), found[0])
        return self.publish(topic, payload, trace_id=asked.trace_id or asked.event_id, in_reply_to=asked.event_id)

    # ---- receiving

    def subscribe(
        self,
        pattern: str | Sequence[str],
        group: str | None = None,
        *,
        start: Start = "new",
        window: int = 1024,
        on_gap: Callable[[Gap], None] | None = None,
    ) -> Subscription:
        """Messages of a topic, of several, or of all that a glob matches, from now on or from the earliest that is
        kept.

        Args:
            group: members of a group share the messages, and acknowledge each; the group stays when its members have
                gone. Without one, everything comes here while the subscription is open.
            start: where a group that is new begins. window: messages that are here and not acknowledged, at most.
            on_gap: told what is missing; without a group only.

        Raises ValueError for a pattern that no topic matches, or a window below 1; BusUnavailable from a hub that
        refuses.
        """
        patterns = (pattern,) if isinstance(pattern, str) else pattern
        found = tuple(dict.fromkeys(topic for one in patterns for topic in topics_matching(one)))
        if window < 1:
            raise ValueError(f"window must be at least 1, found {window}")
        if group is not None and (not group or group.startswith("~")):
            raise ValueError(f"a group's name is not empty and does not begin with '~', found {group!r}")
        if self._closed:
            raise BusUnavailable(f"{self.sender_id} is closed")
        subscription = Subscription(
            found,
            group,
            window=window,
            acknowledge=self._transport.acknowledge,
            leave=self._transport.unsubscribe,
            on_gap=on_gap,
        )
        self._transport.subscribe(subscription, start)
        self._subscriptions.add(subscription)
        return subscription

    # ---- the bus itself

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until everything that was handed over is in the hands of the hub. False when the time is over."""
        until = time.monotonic() + timeout_s
        while self._pump.has_work or self._pump.busy:
            if time.monotonic() >= until:
                return False
            if self._sleeps:
                self._wake()
            time.sleep(0.002)
        return True

    def stats(self) -> dict[str, Any]:
        """Counters of this sender by topic, of the journal, and of the transport."""
        return {
            "sender_id": self.sender_id,
            "away": self._pump.away,
            "unknown_topic": self._unknown.read(),
            "journal": {"messages": self._pump.journaled, "spilled": self._pump.spilled},
            "sent": {
                topic: {
                    "sent": self._pump.sent[topic],
                    "unheard": self._pump.unheard[topic],
                    "dropped": lane.dropped.read(),
                    "refused": lane.refused.read(),
                    "waiting": len(lane.buffer),
                }
                for topic, lane in self._lanes.items()
            },
            "transport": self._transport.stats(),
        }

    def server_stats(self) -> dict[str, Any]:
        """Counters of the hub or server: `groups`, with the `lag` and what is `held` of each, and what else it counts.
        It is asked, and answers when it does. Raises BusUnavailable."""
        return self._transport.server_stats()

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is here, or leaves what must not be lost in the journal, and lets go of everything. Publishing
        returns False from now on."""
        if self._closed:
            return
        self._closed = True
        _alive.discard(self)
        if self._runs:
            self.flush(timeout_s)
            self._pump.stopping.set()
            self._bell.put(None)
            self._pump.ended.wait(timeout_s + 1.0)
        for subscription in tuple(self._subscriptions):
            subscription.close()
        self._transport.close()

    def __enter__(self) -> Oona:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _transport(
    address: str | None,
    *,
    token: str | None,
    limits: Limits | None,
    tls_ca: str | os.PathLike[str] | None,
    lease_s: float,
) -> Transport:
    scheme = (address or "").partition("://")[0]
    if address is None:
        return LocalTransport(limits)
    if scheme in ("ws", "wss"):
        from esper_triton.oona.websocket import WebSocketTransport

        return WebSocketTransport(address, token=token, tls_ca=tls_ca)
    if scheme in ("redis", "rediss", "unix"):
        from esper_triton.oona.redis_streams import RedisTransport

        return RedisTransport(address, password=token, limits=limits, lease_s=lease_s)
    raise ValueError(f"the address of a bus begins with ws://, wss:// or redis://, found {address!r}")


def _folder_name(address: str | None) -> str:
    return hashlib.sha256((address or "").rstrip("/").encode()).hexdigest()[:16]


def _after_fork() -> None:
    for bus in tuple(_alive):
        bus._pump.abandon()
        bus._transport = bus._make_transport()
        bus._begin()


@atexit.register
def _close_all() -> None:
    for bus in tuple(_alive):
        bus.close(2.0)


os.register_at_fork(after_in_child=_after_fork)
