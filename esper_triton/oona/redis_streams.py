"""The transport over Redis Streams, for teams whose Redis is there already. Needs the extra `redis`.

A topic is the stream `esper:<topic>`; the hash `esper:sender:<id>` has the last sequence number of a sender on each
topic, so that a batch that is sent twice counts once. What must not be lost is as safe as the server makes it: give it
`appendonly yes`, and `appendfsync always` where not even the last second may be lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from esper_triton.contracts.envelope import TOPICS, is_telemetry
from esper_triton.contracts.errors import BusUnavailable, MalformedMessage
from esper_triton.oona.exchange import Limits, Place, Start
from esper_triton.oona.subscription import Delivery, Subscription
from esper_triton.oona.transport import Outgoing
from esper_triton.oona.wire import unpack

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as missing:
    raise ImportError("a bus over Redis needs the package redis: pip install 'esper-triton[redis]'") from missing

__all__ = ["RedisTransport"]

_log = logging.getLogger("esper_triton.oona")
_BLOCK_MS = 100
_BATCH = 256
_TRIM_EVERY_S = 30.0
_LEFT = "~left"  # a consumer that nobody is: what it holds may be claimed at once
_SENDER_KEPT_S = 7 * 24 * 3600

# KEYS: stream, sender's hash, stream, ... ARGV: most messages, seconds that a sender is remembered; then topic,
# sequence and content of each message, with "1" for telemetry.
_PUBLISH = """
for i = 1, #KEYS, 2 do
  local at = 3 + (i - 1) * 2
  local topic, sequence, content = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
  local last = tonumber(redis.call('HGET', KEYS[i + 1], topic) or '-1')
  if sequence > last then
    if sequence > last + 1 then redis.call('HINCRBY', 'esper:gaps', topic, sequence - last - 1) end
    if ARGV[at + 3] == '1' then
      redis.call('XADD', KEYS[i], 'MAXLEN', '~', ARGV[1], '*', 'e', content)
    else
      redis.call('XADD', KEYS[i], '*', 'e', content)
    end
    redis.call('HSET', KEYS[i + 1], topic, ARGV[at + 1])
    redis.call('EXPIRE', KEYS[i + 1], ARGV[2])
  end
end
return #KEYS / 2
"""


class RedisTransport:
    """Sends from the bus's thread; each subscription has a thread of its own.

    Members of a group share its pending entries: a member that lives says so every few seconds, and what one that does
    not has held for `lease_s` is claimed by another. A subscription without a group reads from where it was, also after
    the server was away.
    """

    packs = True

    def __init__(
        self, address: str, *, password: str | None, limits: Limits | None = None, lease_s: float = 20.0
    ) -> None:
        self._address = address
        self._limits = limits or Limits()
        self._lease_s = lease_s
        options: dict[str, Any] = {} if password is None else {"password": password}
        # The client must not try again by itself: what an answer held that was lost, only `_read_again` finds.
        once = Retry(NoBackoff(), 0)
        self._redis = redis.Redis.from_url(
            address, socket_timeout=10.0, socket_connect_timeout=3.0, retry=once, **options
        )
        self._publish = self._redis.register_script(_PUBLISH)
        self._readers: dict[Subscription, _Reader] = {}
        self._lock = threading.Lock()
        self._trimmed_at = time.monotonic()

    def wants(self, topic: str) -> bool:
        """Always: who reads is the server's matter."""
        return True

    def send(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Returns when the server has them."""
        keys: list[str] = []
        values: list[Any] = [self._limits.telemetry_messages, _SENDER_KEPT_S]
        for message in messages:
            keys += [_stream(message.topic), f"esper:sender:{message.sender_id}"]
            values += [message.topic, message.sequence, message.content, int(is_telemetry(message.topic))]
        with self._available():
            self._publish(keys=keys, args=values)
            if time.monotonic() - self._trimmed_at > _TRIM_EVERY_S:
                self._trimmed_at = time.monotonic()
                self.trim()
        return [None] * len(messages)

    def subscribe(self, subscription: Subscription, start: Start) -> None:
        """Returns when the place of the subscription is fixed, or with a line in the log when the server is away."""
        reader = _Reader(self._redis, subscription, start, self._lease_s)
        with self._lock:
            self._readers[subscription] = reader
        reader.thread.start()
        if not reader.placed.wait(5.0):
            reason = f"Redis at {self._address} is away: {reader.reason}"
            _log.warning("%s", json.dumps({"event": "subscription_waits", "reason": reason}))

    def acknowledge(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """Goes out with others, a moment later."""
        reader = self._readers.get(subscription)
        if reader is not None and subscription.group is not None:
            reader.acks.extend(delivery.place for delivery in deliveries)
            reader.freed.set()

    def unsubscribe(self, subscription: Subscription) -> None:
        """It has left: what it has not acknowledged may be claimed at once."""
        with self._lock:
            reader = self._readers.pop(subscription, None)
        if reader is not None:
            reader.stop()

    def trim(self) -> None:
        """Takes away what is older than the limit and, if it is not telemetry, acknowledged by every group."""
        oldest = f"{int((time.time() - self._limits.telemetry_age_s) * 1000)}-0"
        for topic in TOPICS:
            limit = oldest
            if not is_telemetry(topic):
                for needed in self._needed(topic):
                    limit = min(limit, needed, key=_order)
            self._redis.xtrim(_stream(topic), minid=limit, approximate=is_telemetry(topic))

    def _needed(self, topic: str) -> Iterator[str]:
        """The first entry that each group has still to read or to acknowledge."""
        try:
            groups = self._redis.xinfo_groups(_stream(topic))
        except redis.ResponseError:  # no such stream
            return
        for group in groups:
            if group["pending"]:
                yield self._redis.xpending(_stream(topic), group["name"])["min"].decode()
            first, _, second = group["last-delivered-id"].decode().partition("-")
            yield f"{first}-{int(second) + 1}"

    def stats(self) -> dict[str, Any]:
        """As `server_stats`; empty while the server is away."""
        try:
            return self.server_stats()
        except BusUnavailable:
            return {}

    def server_stats(self) -> dict[str, Any]:
        """Gaps that the server has seen, by topic, and the lag of each group. Raises BusUnavailable."""
        with self._available():
            gaps = {k.decode(): int(v) for k, v in self._redis.hgetall("esper:gaps").items()}
            groups: dict[str, dict[str, int]] = {}
            for topic in TOPICS:
                with contextlib.suppress(redis.ResponseError):  # no such stream
                    for group in self._redis.xinfo_groups(_stream(topic)):
                        entry = groups.setdefault(group["name"].decode(), {"lag": 0, "held": 0})
                        entry["lag"] += int(group.get("lag") or 0)
                        entry["held"] += int(group["pending"])
        return {"gaps": gaps, "groups": groups}

    def close(self) -> None:
        """Ends the threads and the connections."""
        with self._lock:
            readers, self._readers = list(self._readers.values()), {}
        for reader in readers:
            reader.stop()
        self._redis.close()

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise BusUnavailable(f"Redis at {self._address}: {type(error).__name__}: {error}") from error


class _Reader:
    """The thread that reads for one subscription."""

    def __init__(self, client: redis.Redis, subscription: Subscription, start: Start, lease_s: float) -> None:
        self.acks: deque[Place] = deque()
        self.freed = threading.Event()
        self.placed = threading.Event()
        self.reason = "not tried yet"
        self.thread = threading.Thread(target=self._run, name="oona-redis", daemon=True)
        self._redis = client
        self._subscription = subscription
        self._start = start
        self._lease_s = lease_s
        self._name = uuid.uuid4().hex
        self._streams = {_stream(topic): topic for topic in subscription.topics}
        self._positions: dict[str, str] = {}
        self._looked_at = time.monotonic()
        self._missed = False  # whether the server may have given this member messages that did not arrive
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.freed.set()
        if self.thread is not threading.current_thread():
            self.thread.join(5.0)

    def _run(self) -> None:
        pause_s = 0.05
        while not self._stopping.is_set():
            try:
                if not self.placed.is_set():
                    self._place()
                    self.placed.set()
                self._read()
                pause_s = 0.05
            except redis.ResponseError as error:
                # The server was started again without what it had: the groups are made anew, from the earliest.
                self.reason, self._start = str(error), "earliest"
                _log.warning("%s", json.dumps({"event": "redis_refused", "reason": self.reason}))
                self.placed.clear()
                self._stopping.wait(pause_s)
            except (redis.RedisError, OSError) as error:
                self._missed = True
                self.reason = f"{type(error).__name__}: {error}"
                self._stopping.wait(pause_s)
                pause_s = min(2 * pause_s, 1.0)
        with contextlib.suppress(redis.RedisError, OSError):
            self._leave()

    def _place(self) -> None:
        group = self._subscription.group
        for stream in self._streams:
            if group is not None:
                try:
                    self._redis.xgroup_create(stream, group, "$" if self._start == "new" else "0", mkstream=True)
                except redis.ResponseError as error:
                    if "BUSYGROUP" not in str(error):
                        raise
            elif stream not in self._positions:
                last = self._redis.xrevrange(stream, count=1) if self._start == "new" else []
                self._positions[stream] = last[0][0].decode() if last else "0-0"

    def _read(self) -> None:
        group = self._subscription.group
        self._send_acks()
        if group is not None and time.monotonic() - self._looked_at > self._lease_s / 4:
            self._looked_at = time.monotonic()
            self._keep_alive(group)
            self._claim(group)
        if group is not None and self._missed:
            self._read_again(group)
            self._missed = False
        room = self._subscription.window - len(self._subscription.held())
        if room <= 0:
            self.freed.wait(0.1)
            self.freed.clear()
            return
        count = min(room, _BATCH)
        if group is None:
            found = self._redis.xread(self._positions, count=count, block=_BLOCK_MS)
        else:
            found = self._redis.xreadgroup(
                group, self._name, dict.fromkeys(self._streams, ">"), count=count, block=_BLOCK_MS
            )
        for stream, entries in found or []:
            self._offer(stream.decode(), entries, attempt=1)

    def _offer(self, stream: str, entries: list[tuple[bytes, dict[bytes, bytes]]], *, attempt: int) -> None:
        deliveries: list[Delivery] = []
        for entry, fields in entries:
            place = Place(self._streams[stream], entry.decode())
            try:
                deliveries.append(Delivery(unpack(fields[b"e"]), place, attempt))
            except (MalformedMessage, LookupError, TypeError) as error:
                self.acks.append(place)
                reason = f"{stream} {entry.decode()}: {error}"
                _log.warning("%s", json.dumps({"event": "malformed_message", "reason": reason}))
            if self._subscription.group is None:
                self._positions[stream] = entry.decode()
        self._subscription.offer(deliveries)

    def _send_acks(self) -> None:
        group = self._subscription.group
        while group is not None and self.acks:
            batch = [self.acks.popleft() for _ in range(min(len(self.acks), _BATCH))]
            try:
                with self._redis.pipeline(transaction=False) as pipeline:
                    for place in batch:
                        pipeline.xack(_stream(place.topic), group, place.offset)
                    pipeline.execute()
            except BaseException:
                self.acks.extendleft(reversed(batch))
                raise

    def _mine(self, stream: str, group: str) -> list[bytes]:
        pending = self._redis.xpending_range(
            stream, group, min="-", max="+", count=self._subscription.window, consumername=self._name
        )
        return [entry["message_id"] for entry in pending]

    def _keep_alive(self, group: str) -> None:
        """What is held here is being worked on, however long that takes."""
        held = {delivery.place for delivery in self._subscription.held()}
        for stream, topic in self._streams.items():
            mine = self._mine(stream, group)
            worked_on = [entry for entry in mine if Place(topic, entry.decode()) in held]
            if worked_on:
                self._redis.xclaim(stream, group, self._name, 0, worked_on, justid=True)
            self._missed |= len(worked_on) < len(mine)

    def _read_again(self, group: str) -> None:
        """What the server has given to this member and was not acknowledged: an answer may have been lost with the
        connection. What did arrive is recognised."""
        for stream, topic in self._streams.items():
            after = "0"
            while True:
                found = self._redis.xreadgroup(group, self._name, {stream: after}, count=_BATCH)
                entries = [entry for _, entries in found or [] for entry in entries]
                if not entries:
                    break
                after = entries[-1][0].decode()
                self._offer(stream, [(entry, fields) for entry, fields in entries if fields], attempt=1)
                self.acks.extend(Place(topic, entry.decode()) for entry, fields in entries if not fields)  # trimmed

    def _claim(self, group: str) -> None:
        for stream in self._streams:
            room = self._subscription.window - len(self._subscription.held())
            if room <= 0:
                return
            _, entries, *_ = self._redis.xautoclaim(
                stream, group, self._name, int(self._lease_s * 1000), count=min(room, _BATCH)
            )
            entries = [(entry, fields) for entry, fields in entries if fields]  # None where it was trimmed
            for entry, fields in entries:
                pending = self._redis.xpending_range(stream, group, min=entry, max=entry, count=1)
                attempt = int(pending[0]["times_delivered"]) if pending else 2
                self._offer(stream, [(entry, fields)], attempt=attempt)

    def _leave(self) -> None:
        group = self._subscription.group
        if group is None:
            return
        self._send_acks()
        for stream in self._streams:
            mine = self._mine(stream, group)
            if mine:
                self._redis.xclaim(stream, group, _LEFT, 0, mine, idle=int(self._lease_s * 2000), justid=True)
            self._redis.xgroup_delconsumer(stream, group, self._name)


def _stream(topic: str) -> str:
    return f"esper:{topic}"


def _order(entry: str) -> tuple[int, int]:
    first, _, second = entry.partition("-")
    return int(first), int(second or 0)
