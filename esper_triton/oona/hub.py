"""The hub: WebSocket clients on one side, an exchange and its file on the other."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from esper_triton.contracts.envelope import TOPICS, is_telemetry
from esper_triton.contracts.errors import MalformedMessage
from esper_triton.oona.exchange import Consumer, Exchange, Group, Limits, Place, Taken
from esper_triton.oona.hub_store import HubStore
from esper_triton.oona.tokens import ANYBODY, Role, Tokens
from esper_triton.oona.wire import FRAME_LIMIT, check_message_limit, pack_frame, unpack, unpack_frame

__all__ = ["Hub"]

_log = logging.getLogger("esper_triton.oona.hub")
_BATCH = 256
_FRAME_BYTES = 4 * 2**20
_EXPIRE_EVERY_S = 5.0
_SENDERS_KEPT_S = 7 * 24 * 3600.0


@dataclass(eq=False)
class _Client:
    """One connection. `members` are its subscriptions, by the client's own numbers."""

    role: Role
    socket: web.WebSocketResponse
    members: dict[int, Consumer] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    malformed: int = 0


class Hub:
    """Takes messages in and hands them out, on one event loop.

    A message that is not telemetry is in the file before its sender is told that it was taken, and leaves it when every
    group that was there has acknowledged it (and it is among the oldest); a hub that is killed and started again with
    the same file has lost none and knows who has read what. Telemetry is kept in memory alone.

    A frame that is none, or asks for what there is not, is answered with an error and changes nothing. If the file
    cannot be written the hub stops, so that senders keep what they have.

    Args:
        state: the folder of the file; without one, everything ends with the process.
        tokens: who may connect; None lets anybody do anything.
        heartbeat_s: a client that does not answer for so long is dead, and what it held is delivered again.
        max_message_bytes: larger ones are refused; at most `MESSAGE_LIMIT`, which is 16 MiB.
        durable: wait for the disk, so that a failure of the power loses nothing either.

    Raises ValueError for the size of messages, sqlite3.Error for a file that is in use or damaged.
    """

    def __init__(
        self,
        *,
        state: Path | None = None,
        tokens: Tokens | None = None,
        limits: Limits | None = None,
        heartbeat_s: float = 10.0,
        max_message_bytes: int = 8 * 2**20,
        durable: bool = False,
    ) -> None:
        check_message_limit(max_message_bytes)
        self.stopped = asyncio.Event()
        self.failed = False
        self._exchange = Exchange(limits)
        self._store = HubStore(state / "oona.sqlite", durable=durable) if state is not None else None
        if self._store is not None:
            self._store.load(self._exchange)
        self._tokens = tokens
        self._heartbeat_s = heartbeat_s
        self._max_message_bytes = max_message_bytes
        self._clients: set[_Client] = set()
        self._owners: dict[Consumer, _Client] = {}
        self._named: dict[str, Consumer] = {}  # by the name that a subscriber keeps when it connects again
        self._runner: web.AppRunner | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """Listens; returns the port, which a `port` of 0 leaves to the system. Raises OSError."""
        app = web.Application()
        app.router.add_get("/", self._connect)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        self._expiry = asyncio.create_task(self._expire())
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Ends every connection and lets go of the file."""
        self.stopped.set()
        if self._expiry is not None:
            self._expiry.cancel()
        for client in tuple(self._clients):
            await client.socket.close(code=1001, message=b"the hub stops")
        if self._runner is not None:
            await self._runner.cleanup()
        if self._store is not None:
            self._store.close()

    # ---- connections

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        role: Role | None = ANYBODY
        if self._tokens is not None:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            role = self._tokens.role(token.strip()) if scheme.lower() == "bearer" else None
        if role is None:
            return web.Response(status=401, text="a valid token is needed, as Authorization: Bearer ...\n")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(status=426, text="this is a hub of esper_triton's bus; it speaks WebSocket\n")
        if "Origin" in request.headers:
            # Any page that somebody has open may connect to this machine, and a hub without tokens trusts it.
            return web.Response(status=403, text="browsers are not served here\n")
        socket = web.WebSocketResponse(heartbeat=self._heartbeat_s, max_msg_size=FRAME_LIMIT, compress=False)
        await socket.prepare(request)
        client = _Client(role, socket)
        self._clients.add(client)
        sender = asyncio.create_task(self._hand_out(client))
        try:
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    answer = self._answer(client, message.data)
                elif message.type is WSMsgType.TEXT:
                    answer = pack_frame("error", id=None, reason="frames are binary, found text")
                else:
                    break
                if answer is not None:
                    await socket.send_bytes(answer)
                if self.failed:
                    break
        except (ConnectionError, RuntimeError):
            pass  # it is gone, while it was being answered
        finally:
            sender.cancel()
            self._clients.discard(client)
            for member in client.members.values():
                self._detach(member)
        return socket

    async def _hand_out(self, client: _Client) -> None:
        """Sends one client what its subscriptions have room for. A slow one holds up nobody but itself."""
        try:
            while True:
                await client.wake.wait()
                client.wake.clear()
                for number, member in tuple(client.members.items()):
                    while taken := self._exchange.take(member, _BATCH):
                        for part in _parts(taken):
                            rows = [(*t.place, t.attempt, t.content) for t in part]
                            await client.socket.send_bytes(pack_frame("deliver", sub=number, messages=rows))
        except (ConnectionError, RuntimeError):
            await client.socket.close()

    def _detach(self, member: Consumer) -> None:
        self._exchange.detach(member)
        self._owners.pop(member, None)
        for name in [name for name, m in self._named.items() if m is member]:
            del self._named[name]
        self._wake(member.group)

    def _wake(self, group: Group) -> None:
        for member in group.consumers:
            owner = self._owners.get(member)
            if owner is not None:
                owner.wake.set()

    # ---- frames

    def _answer(self, client: _Client, content: bytes) -> bytes | None:
        frame: dict[str, Any] = {}
        try:
            frame = unpack_frame(content)
            answer = getattr(self, f"_on_{frame['op']}", None) if frame["op"] in _OPERATIONS else None
            if answer is None:
                raise MalformedMessage(f"unknown op {frame['op']!r}; known: {', '.join(sorted(_OPERATIONS))}")
            found: bytes | None = answer(client, frame)
            return found
        except sqlite3.Error as error:
            # What is in memory and what is on the disk are not the same any more: what is on the disk counts.
            _log.critical("%s", json.dumps({"event": "store_failed", "reason": str(error)}))
            self.failed = True
            self.stopped.set()
            return pack_frame("error", id=_number(frame.get("id")), reason=f"the hub cannot write its file: {error}")
        except (MalformedMessage, LookupError, TypeError, ValueError) as error:
            client.malformed += 1
            reason = str(error) if isinstance(error, MalformedMessage) else f"{type(error).__name__}: {error}"
            return pack_frame("error", id=_number(frame.get("id")), reason=reason[:1000])

    def _on_publish(self, client: _Client, frame: dict[str, Any]) -> bytes:
        """Messages, in order. The answer tells which were refused: `full` may be sent again, others not."""
        contents = frame.get("messages")
        if not isinstance(contents, list) or not all(isinstance(content, bytes) for content in contents):
            raise MalformedMessage("publish needs messages, a list of binaries")
        refused: list[tuple[int, str, str]] = []
        touched: set[str] = set()
        kept: list[tuple[Place, bytes, tuple[str, str, int]]] = []
        full: set[str] = set()
        for k, content in enumerate(contents):
            if len(content) > self._max_message_bytes:
                refused.append((k, "size", f"{len(content)} bytes, expected at most {self._max_message_bytes}"))
                continue
            try:
                envelope = unpack(content)
            except MalformedMessage as error:
                client.malformed += 1
                refused.append((k, "malformed", str(error)[:500]))
                continue
            topic = envelope.topic
            if not client.role.may_publish(topic):
                refused.append((k, "role", f"{client.role.name} may not publish to {topic}"))
                continue
            source = (client.role.name, envelope.sender_id, envelope.sequence)
            # After one that found no room the rest of its topic waits too, or they would change places.
            verdict, place = (
                ("full", None)
                if topic in full
                else self._exchange.publish(topic, *source[1:], content, len(content), principal=source[0])
            )
            if verdict == "full":
                full.add(topic)
                refused.append((k, "full", f"{topic} has no room for what some group has still to read"))
            elif place is not None:
                touched.add(topic)
                if not is_telemetry(topic):
                    kept.append((place, content, source))
        if kept and self._store is not None:
            with self._store.transaction():
                for place, content, source in kept:
                    self._store.add(place, content, self._exchange.clock(), source, self._exchange.groups.values())
        for group in self._exchange.groups.values():
            if not touched.isdisjoint(group.ready):
                self._wake(group)
        return pack_frame("published", id=_number(frame.get("id")), refused=refused)

    def _on_subscribe(self, client: _Client, frame: dict[str, Any]) -> bytes:
        """A subscription; one of the same `member` on another connection, which may be dead, ends."""
        number, name, member_name = frame["sub"], frame["group"], frame["member"]
        topics, start, window = frame["topics"], frame["start"], frame["window"]
        if not isinstance(number, int) or not isinstance(member_name, str) or not isinstance(window, int):
            raise MalformedMessage("subscribe needs sub, an integer, member, a string, and window, an integer")
        if not isinstance(topics, list) or not topics or not all(topic in TOPICS for topic in topics):
            raise MalformedMessage(f"topics must be some of {', '.join(TOPICS)}, found {topics!r}"[:800])
        if start not in ("new", "earliest") or not 1 <= window <= 1_000_000:
            raise MalformedMessage("start is new or earliest, and window is from 1 to 1000000")
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 200 or name.startswith("~")):
            raise MalformedMessage("group is null or a name of at most 200 characters that does not begin with '~'")
        denied = [topic for topic in topics if not client.role.may_subscribe(topic)]
        if denied:
            raise MalformedMessage(f"{client.role.name} may not subscribe to {', '.join(denied)}")
        member_key = f"{client.role.name}/{member_name}"
        if number in client.members:
            if self._named.get(member_key) is not client.members[number]:
                raise MalformedMessage(f"sub {number} is another subscription of this connection")
            return pack_frame("subscribed", id=_number(frame.get("id")))  # said twice
        private = name is None
        group_name = f"~{member_key}" if name is None else name
        known = self._exchange.groups.get(group_name)
        new = [topic for topic in topics if known is None or topic not in known.ready]
        group = self._exchange.join(group_name, topics, start=start, private=private)
        if new and self._store is not None:
            owed = [offset for topic in new if not is_telemetry(topic) for offset in group.ready[topic]]
            with self._store.transaction():
                self._store.join(group, owed)
        before = self._named.get(member_key)
        if before is not None:
            owner = self._owners.get(before)
            if owner is not None:
                owner.members = {k: m for k, m in owner.members.items() if m is not before}
            self._detach(before)
        member = self._exchange.attach(group, window=window)
        client.members[number] = self._named[member_key] = member
        self._owners[member] = client
        client.wake.set()
        return pack_frame("subscribed", id=_number(frame.get("id")))

    def _on_ack(self, client: _Client, frame: dict[str, Any]) -> None:
        member = client.members.get(frame["sub"])
        if member is None:
            return
        kept: list[int] = []
        for topic, offset in frame["places"]:
            place = Place(str(topic), int(offset))
            if self._exchange.ack(member.group, place) and not is_telemetry(place.topic):
                kept.append(place.offset)
        if kept and self._store is not None:
            with self._store.transaction():
                self._store.done(member.group, kept)
        client.wake.set()

    def _on_leave(self, client: _Client, frame: dict[str, Any]) -> None:
        member = client.members.pop(frame["sub"], None)
        if member is None:
            return
        self._detach(member)
        if member.group.private:
            self._forget(member.group)

    def _on_forget(self, client: _Client, frame: dict[str, Any]) -> bytes:
        """A group that will not come back; by one who may read all of its topics."""
        group = self._exchange.groups.get(frame["group"])
        if group is None or group.private:
            raise MalformedMessage(f"no group {frame['group']!r}")
        if group.consumers or not all(map(client.role.may_subscribe, group.topics)):
            raise MalformedMessage(f"group {group.name!r} has members, or topics that {client.role.name} may not read")
        self._forget(group)
        return pack_frame("forgotten", id=_number(frame.get("id")))

    def _on_stats(self, client: _Client, frame: dict[str, Any]) -> bytes:
        malformed = sum(other.malformed for other in self._clients)
        stats = {**self._exchange.stats(), "clients": len(self._clients), "malformed": malformed}
        return pack_frame("stats", id=_number(frame.get("id")), stats=stats)

    def _forget(self, group: Group) -> None:
        self._exchange.forget(group)
        if self._store is not None:
            with self._store.transaction():
                self._store.drop([], [group], 0.0)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            places, groups = self._exchange.expire()
            kept = [place for place in places if not is_telemetry(place.topic)]
            if self._store is not None:
                try:
                    with self._store.transaction():
                        self._store.drop(kept, groups, self._exchange.clock() - _SENDERS_KEPT_S)
                except sqlite3.Error as error:
                    _log.critical("%s", json.dumps({"event": "store_failed", "reason": str(error)}))
                    self.failed = True
                    self.stopped.set()


_OPERATIONS = frozenset({"publish", "subscribe", "ack", "leave", "forget", "stats"})


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _parts(taken: Sequence[Taken]) -> list[list[Taken]]:
    """In lists that each make a frame of a bearable size."""
    parts: list[list[Taken]] = [[]]
    size = 0
    for one in taken:
        size += len(one.content)
        if size > _FRAME_BYTES and parts[-1]:
            parts.append([])
            size = len(one.content)
        parts[-1].append(one)
    return parts
