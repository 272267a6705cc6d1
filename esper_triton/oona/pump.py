"""The pump: takes messages out of the lanes and sees to it that they arrive."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sqlite3
import threading
import time
from collections.abc import Mapping

from esper_triton.contracts.envelope import SCHEMA_VERSION, Envelope, is_telemetry
from esper_triton.contracts.errors import MalformedMessage
from esper_triton.oona.journal import Journal, Journaled
from esper_triton.oona.lanes import Handed, Lane
from esper_triton.oona.transport import Outgoing, Transport
from esper_triton.oona.wire import pack, plain

__all__ = ["Pump"]

_log = logging.getLogger("esper_triton.oona")
_BATCH = 512
_BATCH_BYTES = 2**20
_YIELD_EVERY = 64  # messages, after which another thread may have the interpreter
_BUSY_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 2.0
_AWAY_PAUSE_S = 0.05
_WEIGH_EVERY_S = 1.0
_TIMES_PACKED = 4  # of its bytes, what a message takes as Python's objects


class Pump:
    """One sender's messages on their way. Everything but the properties is for the one thread that runs `cycle`.

    Order is kept for each topic because a message goes through one way at a time: what could not be sent goes into the
    journal, and while something is there, what follows goes there too.
    """

    def __init__(
        self,
        sender_id: str,
        lanes: Mapping[str, Lane],
        transport: Transport,
        journal: Journal | None,
        *,
        journal_bytes: int,
        max_message_bytes: int,
        telemetry_bytes: int,
    ) -> None:
        self.sender_id = sender_id
        self.sent = dict.fromkeys(lanes, 0)
        self.unheard = dict.fromkeys(lanes, 0)  # of a topic that nobody in the process reads
        self.spilled = 0
        self.away = False
        self.busy = False
        self.stopping = threading.Event()
        self.ended = threading.Event()
        self._lanes = sorted(lanes.values(), key=lambda lane: lane.is_telemetry)
        self._transport = transport
        self._journal = journal
        self._journal_bytes, self._max_message_bytes = journal_bytes, max_message_bytes
        self._orphans: list[Journal] | None = None  # None: not looked for yet
        self._again: list[Outgoing] = []  # sent, perhaps, and to be sent again
        self._pause_s, self._try_at = 0.05, 0.0
        self._telemetry_bytes, self._weighed_at = telemetry_bytes, 0.0

    @property
    def has_work(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._again) or self.journaled > 0 or any(lane.buffer for lane in self._lanes)

    @property
    def journaled(self) -> int:
        """Messages in this sender's journal, and in those that were left behind and are sent by it."""
        journals = [self._journal, *(self._orphans or ())]
        return sum(len(journal) for journal in journals if journal is not None)

    def cycle(self) -> float | None:
        """Sends what one batch holds. Returns the seconds to pause, None where there is nothing to do."""
        self.busy = True
        try:
            waits = any(not is_telemetry(message.topic) for message in self._again)
            if self._journal is not None and (self.away or len(self._journal)) and not waits:
                self._spill()
            if self.away:
                self._bound_telemetry()
                if (left := self._try_at - time.monotonic()) > 0:
                    return min(left, _AWAY_PAUSE_S)
            try:
                worked = self._send_next()
            except ConnectionError as error:
                return self._lost(error)
            if self.away:
                self._note("bus_is_back")
                for lane in self._lanes:
                    lane.bound = lane.most
            self.away, self._pause_s = False, 0.05
            return _BUSY_PAUSE_S if worked else None
        finally:
            self.busy = False

    def end(self) -> None:
        """What must not be lost goes into the journal, and telemetry that is still here counts as dropped. Called last,
        by the thread that has run `cycle`."""
        try:
            if self._journal is not None:
                try:
                    self._again = self._keep(self._again)
                    self._spill()
                finally:
                    for journal in (self._journal, *(self._orphans or ())):
                        journal.close()
        except sqlite3.Error as error:
            self._note("journal_failed", error)
        finally:
            for lane in self._lanes:
                left = [message for message in self._again if message.topic == lane.topic]
                for _ in range(len(left) + (lane.discard() if lane.is_telemetry else 0)):
                    lane.dropped.add()
            self._again = []
            self.ended.set()

    def abandon(self) -> None:
        """After a fork, in the child: nothing here is this process's."""
        for journal in (self._journal, *(self._orphans or ())):
            if journal is not None:
                journal.abandon()

    # ---- sending

    def _send_next(self) -> bool:
        """Sends one batch: of what has to be sent again, of the journals, or of the lanes. False if there is none."""
        if self._again:
            self._send(self._again)
            self._again = []
            return True
        for journal in self._journals():
            rows = journal.oldest(_BATCH)
            if rows:
                self._send([Outgoing(r.topic, r.sender_id, r.sequence, r.content) for r in _limited(rows)])
                journal.forget(_limited(rows))
                return True
        for journal in self._orphans or ():
            journal.close()
        self._orphans = []
        batch = self._batch()
        if not batch:
            return False
        try:
            self._send(batch)
        except BaseException:
            self._again = batch
            raise
        return True

    def _journals(self) -> list[Journal]:
        if self._journal is None:
            return []
        if self._orphans is None:
            self._orphans = list(Journal.orphans(self._journal.path.parent, besides=self._journal.path))
        return [*self._orphans, self._journal]

    def _send(self, batch: list[Outgoing]) -> None:
        for message, refusal in zip(batch, self._transport.send(batch), strict=True):
            if refusal is None:
                self.sent[message.topic] += 1
            else:
                self._refused(message.topic, refusal)

    def _batch(self) -> list[Outgoing]:
        batch: list[Outgoing] = []
        size = 0
        for lane in self._lanes:
            if not lane.buffer:
                continue
            if not self._transport.wants(lane.topic):
                self.unheard[lane.topic] += lane.discard()
                continue
            while len(batch) < _BATCH and size < _BATCH_BYTES and (message := self._take(lane)) is not None:
                batch.append(message)
                size += len(message.content) if self._transport.packs else 0
                if len(batch) % _YIELD_EVERY == 0:
                    time.sleep(0)
        return batch

    def _take(self, lane: Lane) -> Outgoing | None:
        """The lane's next message that is one."""
        while (taken := lane.take()) is not None:
            sequence, handed = taken
            try:
                return self._outgoing(lane.topic, sequence, handed)
            except Exception as error:  # a payload may raise anything while it is dumped
                lane.void()
                self._refused(lane.topic, f"{type(error).__name__}: {error}", counted=True)
        return None

    def _outgoing(self, topic: str, sequence: int, handed: Handed) -> Outgoing:
        payload, timestamp, trace_id, in_reply_to, event_id = handed
        values = {
            "event_id": event_id or f"{self.sender_id}/{topic}/{sequence}",
            "topic": topic,
            "sender_id": self.sender_id,
            "sequence": sequence,
            "timestamp": timestamp,
            "trace_id": trace_id,
            "in_reply_to": in_reply_to,
            "schema_version": SCHEMA_VERSION,
            "payload": plain(payload),
        }
        if not self._transport.packs:
            return Outgoing(topic, self.sender_id, sequence, Envelope.model_validate(values))
        content = pack(values)  # the hub looks at it closely; an Envelope made here would take twice as long
        if len(content) > self._max_message_bytes:
            raise MalformedMessage(f"{len(content)} bytes, expected at most {self._max_message_bytes}")
        return Outgoing(topic, self.sender_id, sequence, content)

    # ---- while the hub is away

    def _lost(self, error: ConnectionError) -> float:
        """The batch was not sent, or nobody knows: what must not be lost goes into the journal, telemetry is sent
        again first of all."""
        if not self.away:
            self._note("bus_is_away", error)
        self.away = True
        with contextlib.suppress(sqlite3.Error):  # then it stays here
            self._again = self._keep(self._again)
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        pause_s *= random.uniform(0.5, 1.0)  # or all senders of a hub would be back in one moment
        self._try_at = time.monotonic() + pause_s
        return min(pause_s, _AWAY_PAUSE_S)  # lanes are looked at more often than the hub

    def _bound_telemetry(self) -> None:
        """Messages of a large model are large, and may wait for days: by the newest one, as many stay in each lane as
        have room."""
        if time.monotonic() - self._weighed_at < _WEIGH_EVERY_S:
            return
        self._weighed_at = time.monotonic()
        for lane in self._lanes:
            if lane.is_telemetry:
                with contextlib.suppress(Exception):  # none is there, or it is no message: that is told when it is sent
                    size = len(pack({"topic": lane.topic, "payload": plain(lane.buffer[-1][0])}))
                    lane.hold_at_most(self._telemetry_bytes // (_TIMES_PACKED * size))

    def _keep(self, batch: list[Outgoing]) -> list[Outgoing]:
        """Writes what is not telemetry to the journal, and returns the rest. What came out of a journal is there."""
        if self._journal is None:
            return batch
        kept = [message for message in batch if not is_telemetry(message.topic)]
        if kept:
            self._journal.append(kept)
            self.spilled += len(kept)
        return [message for message in batch if is_telemetry(message.topic)]

    def _spill(self) -> None:
        """Brings what must not be lost from the lanes into the journal, as far as that has room."""
        assert self._journal is not None
        for lane in self._lanes:
            if lane.is_telemetry:
                continue
            while lane.buffer and self._journal.size_bytes < self._journal_bytes:
                batch: list[Outgoing] = []
                while len(batch) < _BATCH and (message := self._take(lane)) is not None:
                    batch.append(message)
                try:
                    self._keep(batch)
                except sqlite3.Error as error:
                    # Not lost: sent, or written, before everything that follows.
                    self._again += batch
                    self._note("journal_failed", error)
                    return

    def _refused(self, topic: str, reason: str, *, counted: bool = False) -> None:
        if not counted:
            next(lane for lane in self._lanes if lane.topic == topic).refused.add()
        _log.warning("%s", json.dumps({"event": "message_refused", "topic": topic, "reason": reason}))

    def _note(self, event: str, error: BaseException | None = None) -> None:
        reason = None if error is None else f"{type(error).__name__}: {error}"
        _log.warning("%s", json.dumps({"event": event, "sender_id": self.sender_id, "reason": reason}))


def _limited(rows: list[Journaled]) -> list[Journaled]:
    """The first ones that fit into a batch."""
    size = 0
    for k, row in enumerate(rows):
        size += len(row.content)
        if size > _BATCH_BYTES:
            return rows[: k + 1]
    return rows
