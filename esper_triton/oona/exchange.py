"""Streams of messages, the groups that read them, and who has what. Knows no network and no thread."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from esper_triton.contracts.envelope import TOPICS, is_telemetry

__all__ = ["Consumer", "Exchange", "Group", "Limits", "Place", "Start", "Stored", "Taken", "Verdict"]

Start = Literal["new", "earliest"]
Verdict = Literal["taken", "duplicate", "full"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is kept, by topic. Telemetry is dropped beyond that, the oldest first. Of everything else what some
    group has still to read stays, and nothing more is taken in beyond these limits.

    Attributes:
        telemetry_age_s: 72 hours by default; what is not telemetry goes after as long, unless some group has still to
            read it. telemetry_messages, telemetry_bytes, messages, bytes: of one topic.
        absent_s: how long the place of a subscriber without a group is kept after it has gone.
    """

    telemetry_age_s: float = 72 * 3600.0
    telemetry_messages: int = 200_000
    telemetry_bytes: int = 256 * 2**20
    messages: int = 250_000
    bytes: int = 256 * 2**20
    absent_s: float = 600.0


class Place(NamedTuple):
    """Where a message lies. Redis's own offsets are text."""

    topic: str
    offset: Any


class Stored(NamedTuple):
    """A message of a stream. `at` is when it came in, in seconds since 1970."""

    offset: int
    content: Any
    size: int
    at: float


class Taken(NamedTuple):
    """A message for a consumer."""

    place: Place
    content: Any
    attempt: int


@dataclass(eq=False)
class _Stream:
    """One topic. `owed` counts, for each offset, the groups that have not acknowledged it."""

    topic: str
    messages: OrderedDict[int, Stored] = field(default_factory=OrderedDict)
    owed: dict[int, int] = field(default_factory=dict)
    size_bytes: int = 0
    trimmed: int = 0
    gaps: int = 0
    duplicates: int = 0

    @property
    def is_telemetry(self) -> bool:
        return is_telemetry(self.topic)


@dataclass(eq=False)
class Consumer:
    """A member of a group. It holds at most `window` messages that it has not acknowledged."""

    group: Group
    window: int
    holds: dict[Place, None] = field(default_factory=dict)


@dataclass(eq=False)
class Group:
    """Readers that share messages; a `private` one is a single subscriber's. `ready` waits to be taken, by topic."""

    name: str
    topics: tuple[str, ...]
    private: bool
    ready: dict[str, deque[int]]
    consumers: list[Consumer] = field(default_factory=list)
    attempts: dict[Place, int] = field(default_factory=dict)
    lost: int = 0  # telemetry that was dropped before this group had read it
    seen_at: float = 0.0

    @property
    def lag(self) -> int:
        """Messages that nobody of the group has taken yet."""
        return sum(map(len, self.ready.values()))


class Exchange:
    """What a hub, or a process by itself, knows of messages.

    A message is in a stream once it has been published, is ready for every group of its topic, is held by one consumer
    of each at a time, and is done with for a group that has acknowledged it. Messages are taken in the order of their
    stream; those of a consumer that has left come first again.

    Offsets rise, also over the life of several exchanges: they begin with the time.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits or Limits()
        self.groups: dict[str, Group] = {}
        self.clock = clock
        self._streams = {topic: _Stream(topic) for topic in TOPICS}
        self._next_offset = int(clock() * 1e6)
        self._last: dict[tuple[str, str, str], int] = {}  # sequence, by principal, sender and topic

    # ---- streams

    def publish(
        self, topic: str, sender_id: str, sequence: int, content: Any, size: int, *, principal: str = ""
    ) -> tuple[Verdict, Place | None]:
        """Takes a message in, unless it is here already or there is no room for it."""
        stream = self._streams[topic]
        key = (principal, sender_id, topic)
        last = self._last.get(key)
        if last is not None and sequence <= last:
            stream.duplicates += 1
            return "duplicate", None
        if not stream.is_telemetry and self._is_full(stream, size):
            self._trim(stream)
            if self._is_full(stream, size):
                return "full", None
        if last is not None:
            stream.gaps += sequence - last - 1
        self._last[key] = sequence
        place = Place(topic, self._next_offset)
        self._next_offset += 1
        self.restore(place, content, size, self.clock())
        for group in self.groups.values():
            if topic in group.ready:
                self.owe(group, place)
        if stream.is_telemetry:
            self._trim(stream)
        return "taken", place

    def restore(self, place: Place, content: Any, size: int, at: float) -> None:
        """Puts a message into its stream, owed to nobody yet. Offsets of a stream must rise."""
        stream = self._streams[place.topic]
        stream.messages[place.offset] = Stored(place.offset, content, size, at)
        stream.size_bytes += size
        self._next_offset = max(self._next_offset, place.offset + 1)

    def owe(self, group: Group, place: Place) -> None:
        """The message is ready for the group."""
        stream, ready = self._streams[place.topic], group.ready[place.topic]
        ready.append(place.offset)
        stream.owed[place.offset] = stream.owed.get(place.offset, 0) + 1
        while ready and ready[0] not in stream.messages:  # or an absent group's would pile up
            ready.popleft()
            group.lost += 1

    def remember(self, principal: str, sender_id: str, topic: str, sequence: int) -> None:
        """Messages of the sender up to this one are here already."""
        self._last[principal, sender_id, topic] = sequence

    def _is_full(self, stream: _Stream, size: int) -> bool:
        limits = self.limits
        return len(stream.messages) >= limits.messages or stream.size_bytes + size > limits.bytes

    def _trim(self, stream: _Stream) -> list[Place]:
        limits, gone, telemetry = self.limits, [], stream.is_telemetry
        oldest_at = self.clock() - limits.telemetry_age_s
        most, most_bytes = (
            (limits.telemetry_messages, limits.telemetry_bytes) if telemetry else (limits.messages - 1, limits.bytes)
        )
        while stream.messages:
            first = next(iter(stream.messages.values()))
            fits = len(stream.messages) <= most and stream.size_bytes <= most_bytes and first.at >= oldest_at
            if fits or (not telemetry and stream.owed.get(first.offset)):
                break
            stream.messages.popitem(last=False)
            stream.owed.pop(first.offset, None)
            stream.size_bytes -= first.size
            stream.trimmed += 1
            gone.append(Place(stream.topic, first.offset))
        return gone

    # ---- groups

    def join(self, name: str, topics: Iterable[str], *, start: Start = "new", private: bool = False) -> Group:
        """The group, with these topics besides those it has. A new one, or a new topic, begins with what comes, or with
        the earliest that is still here."""
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(name, (), private, {}, seen_at=self.clock())
        for topic in topics:
            if topic not in group.ready:
                group.topics = (*group.topics, topic)
                group.ready[topic] = deque()
                if start == "earliest":
                    for offset in self._streams[topic].messages:
                        self.owe(group, Place(topic, offset))
        return group

    def attach(self, group: Group, *, window: int) -> Consumer:
        """A new member."""
        consumer = Consumer(group, window)
        group.consumers.append(consumer)
        return consumer

    def detach(self, consumer: Consumer) -> None:
        """The member has left: what it held is ready again, before everything else."""
        group = consumer.group
        if consumer not in group.consumers:
            return
        group.consumers.remove(consumer)
        group.seen_at = self.clock()
        for topic in group.topics:
            held = sorted(place.offset for place in consumer.holds if place.topic == topic)
            for offset in held:
                place = Place(topic, offset)
                group.attempts[place] = group.attempts.get(place, 1) + 1
            group.ready[topic] = deque(sorted([*held, *group.ready[topic]])) if held else group.ready[topic]
        consumer.holds.clear()

    def take(self, consumer: Consumer, limit: int) -> list[Taken]:
        """At most `limit` messages for a member, and no more than its window has room for."""
        group = consumer.group
        taken: list[Taken] = []
        room = min(limit, consumer.window - len(consumer.holds))
        for topic in group.topics:
            ready, stream = group.ready[topic], self._streams[topic]
            while ready and len(taken) < room:
                offset = ready.popleft()
                stored = stream.messages.get(offset)
                place = Place(topic, offset)
                if stored is None:
                    group.lost += 1
                    group.attempts.pop(place, None)
                    continue
                consumer.holds[place] = None
                taken.append(Taken(place, stored.content, group.attempts.get(place, 1)))
        return taken

    def ack(self, group: Group, place: Place) -> bool:
        """The group is done with a message. False where it was before, or never had it."""
        for consumer in group.consumers:
            if place in consumer.holds:
                del consumer.holds[place]
                break
        else:
            # From a member that was taken for dead: the work is done all the same.
            ready = group.ready.get(place.topic)
            if ready is None or place.offset not in ready:
                return False
            ready.remove(place.offset)
        group.attempts.pop(place, None)
        owed = self._streams[place.topic].owed
        left = owed.get(place.offset, 0) - 1
        if left > 0:
            owed[place.offset] = left
        else:
            owed.pop(place.offset, None)
        return True

    def forget(self, group: Group) -> None:
        """The group is no more, and nothing is kept for it."""
        del self.groups[group.name]
        places = [Place(topic, offset) for topic, ready in group.ready.items() for offset in ready]
        places += [place for consumer in group.consumers for place in consumer.holds]
        for place in places:
            owed = self._streams[place.topic].owed
            owed[place.offset] = owed.get(place.offset, 0) - 1
            if owed[place.offset] <= 0:
                del owed[place.offset]

    def expire(self) -> tuple[list[Place], list[Group]]:
        """Drops what has become too old or too much, and private groups whose subscriber does not come back; call it
        from time to time. Returns what has gone."""
        absent = self.clock() - self.limits.absent_s
        gone = [g for g in self.groups.values() if g.private and not g.consumers and g.seen_at <= absent]
        for group in gone:
            self.forget(group)
        return [place for stream in self._streams.values() for place in self._trim(stream)], gone

    def stats(self) -> dict[str, Any]:
        """Counters by topic and by group."""
        return {
            "topics": {
                topic: {
                    "messages": len(stream.messages),
                    "bytes": stream.size_bytes,
                    "trimmed": stream.trimmed,
                    "gaps": stream.gaps,
                    "duplicates": stream.duplicates,
                }
                for topic, stream in self._streams.items()
            },
            "groups": {
                name: {
                    "consumers": len(group.consumers),
                    "lag": group.lag,
                    "held": sum(len(consumer.holds) for consumer in group.consumers),
                    "lost": group.lost,
                }
                for name, group in self.groups.items()
            },
        }
