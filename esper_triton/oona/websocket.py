"""The transport to a hub."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import random
import ssl
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import aiohttp

from esper_triton.contracts.errors import BusUnavailable, MalformedMessage
from esper_triton.oona.exchange import Place, Start
from esper_triton.oona.subscription import Delivery, Subscription
from esper_triton.oona.transport import Outgoing
from esper_triton.oona.wire import FRAME_LIMIT, pack_frame, unpack, unpack_frame

__all__ = ["WebSocketTransport"]

_log = logging.getLogger("esper_triton.oona")
_ANSWER_S = 15.0
_CONNECT_S = 5.0
_LONGEST_PAUSE_S = 2.0


class _Refused(Exception):
    """The hub has answered with an error."""


class WebSocketTransport:
    """One connection to a hub, kept by a thread with an event loop of its own, which starts with the first message or
    subscription. A connection that is lost is made again, after pauses that grow and are drawn, and subscriptions go
    on with it."""

    packs = True

    def __init__(self, address: str, *, token: str | None, tls_ca: str | os.PathLike[str] | None) -> None:
        self._address = address
        self._token = token
        self._tls_ca = tls_ca
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tried = threading.Event()  # to connect, with or without success
        self._connected = threading.Event()
        self._closing = False
        self._reason = "not tried yet"
        self._numbers = itertools.count(1)
        self._asked: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._members: dict[int, tuple[Subscription, Start, str]] = {}
        self._acks: deque[tuple[Subscription, Place]] = deque()
        self._acks_scheduled = False
        self._connections = 0

    # ---- for the bus

    def wants(self, topic: str) -> bool:
        """Always: who reads is the hub's matter."""
        return True

    def send(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Returns when the hub has them."""
        answer = self._ask("publish", messages=[message.content for message in messages])
        refusals: list[str | None] = [None] * len(messages)
        for k, code, reason in answer["refused"]:
            if code == "full":
                raise BusUnavailable(f"hub {self._address}: {reason}")
            refusals[k] = f"{code}: {reason}"
        return refusals

    def subscribe(self, subscription: Subscription, start: Start) -> None:
        """Returns when the hub lets it have what comes. While the hub is away it is kept for when it is back."""
        number = next(self._numbers)
        with self._lock:
            self._members[number] = (subscription, start, uuid.uuid4().hex)
        try:
            self._ask_raw("subscribe", **self._joining(number))
        except _Refused as error:
            with self._lock:
                self._members.pop(number, None)
            raise BusUnavailable(f"hub {self._address} refuses the subscription: {error}") from error
        except BusUnavailable as error:
            _log.warning("%s", json.dumps({"event": "subscription_waits", "reason": str(error)}))

    def acknowledge(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """Goes out with others, a moment later."""
        self._acks.extend((subscription, delivery.place) for delivery in deliveries)
        loop = self._loop
        if loop is not None and not self._acks_scheduled:
            self._acks_scheduled = True
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(lambda: loop.create_task(self._send_acks()))

    def unsubscribe(self, subscription: Subscription) -> None:
        """It has left, and what it has acknowledged before goes out before."""
        with self._lock:
            numbers = [k for k, (member, _, _) in self._members.items() if member is subscription]
        loop = self._loop
        for number in numbers:
            if loop is not None:
                with contextlib.suppress(RuntimeError):
                    asyncio.run_coroutine_threadsafe(self._leave(number), loop)

    def forget(self, group: str) -> None:
        """Ends a group that will not come back. Raises BusUnavailable."""
        self._ask("forget", group=group)

    def hub_stats(self) -> dict[str, Any]:
        """The hub's own counters. Raises BusUnavailable."""
        found: dict[str, Any] = self._ask("stats")["stats"]
        return found

    def stats(self) -> dict[str, Any]:
        """Whether there is a connection, and how many there have been."""
        return {"connected": self._connected.is_set(), "connections": self._connections}

    def close(self) -> None:
        """Ends the connection and the thread."""
        with self._lock:
            self._closing = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
                asyncio.run_coroutine_threadsafe(self._say_goodbye(), loop).result(2.0)
            thread.join(5.0)

    # ---- asking, from any thread

    def _ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        try:
            return self._ask_raw(operation, **fields)
        except _Refused as error:
            raise BusUnavailable(f"hub {self._address}: {error}") from error

    def _ask_raw(self, operation: str, **fields: Any) -> dict[str, Any]:
        self._ensure_started()
        self._tried.wait(_CONNECT_S)
        if not self._connected.is_set():
            raise BusUnavailable(f"hub {self._address} is away: {self._reason}")
        number = next(self._numbers)
        future: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        self._asked[number] = future
        loop = self._loop
        assert loop is not None
        try:
            asyncio.run_coroutine_threadsafe(self._send(pack_frame(operation, id=number, **fields)), loop)
            return future.result(_ANSWER_S)
        except concurrent.futures.TimeoutError:
            raise BusUnavailable(f"hub {self._address} did not answer within {_ANSWER_S:g} s") from None
        except RuntimeError as error:
            raise BusUnavailable(f"hub {self._address}: the transport is closed") from error
        finally:
            self._asked.pop(number, None)

    def _joining(self, number: int) -> dict[str, Any]:
        subscription, start, member = self._members[number]
        return {
            "sub": number,
            "topics": list(subscription.topics),
            "group": subscription.group,
            "member": member,
            "start": start,
            "window": subscription.window,
        }

    def _ensure_started(self) -> None:
        with self._lock:
            if self._closing:
                raise BusUnavailable(f"hub {self._address}: the transport is closed")
            if self._thread is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name="oona-hub", daemon=True)
                self._thread.start()

    # ---- the connection, on the thread's loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._stay_connected())
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    async def _stay_connected(self) -> None:
        pause_s = 0.05
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        tls: ssl.SSLContext | bool = True
        if self._address.startswith("wss:") and self._tls_ca is not None:
            tls = ssl.create_default_context()
            tls.load_verify_locations(os.fspath(self._tls_ca))
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as session:
            while not self._closing:
                try:
                    async with asyncio.timeout(_CONNECT_S):
                        socket = await session.ws_connect(
                            self._address, heartbeat=10.0, max_msg_size=FRAME_LIMIT, ssl=tls, compress=0
                        )
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self._reason = _reason(error)
                    self._tried.set()
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                    continue
                pause_s = 0.05
                try:
                    await self._converse(socket)
                finally:
                    self._connected.clear()
                    self._socket = None
                    await socket.close()
                    self._give_up("the connection was lost")

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._connections += 1
        with self._lock:
            members = list(self._members)
        try:
            for number in members:
                await socket.send_bytes(pack_frame("subscribe", id=None, **self._joining(number)))
            self._connected.set()
            self._tried.set()
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                self._receive(message.data)
        except (ConnectionError, KeyError, RuntimeError) as error:
            self._reason = _reason(error)

    def _receive(self, content: bytes) -> None:
        try:
            frame = unpack_frame(content)
            if frame["op"] == "deliver":
                self._delivered(frame)
                return
        except (MalformedMessage, LookupError, TypeError, ValueError) as error:
            _log.warning("%s", json.dumps({"event": "malformed_frame", "reason": str(error)}))
            return
        future = self._asked.get(frame.get("id") or 0)
        if future is None:
            if frame["op"] == "error":
                _log.warning("%s", json.dumps({"event": "hub_refused", "reason": str(frame.get("reason"))}))
        elif not future.done():
            if frame["op"] == "error":
                future.set_exception(_Refused(str(frame.get("reason"))))
            else:
                future.set_result(frame)

    def _delivered(self, frame: dict[str, Any]) -> None:
        member = self._members.get(frame["sub"])
        if member is None:
            return
        deliveries = [
            Delivery(unpack(content), Place(topic, offset), attempt)
            for topic, offset, attempt, content in frame["messages"]
        ]
        member[0].offer(deliveries)

    async def _send(self, frame: bytes) -> None:
        socket = self._socket
        if socket is None:
            return  # whoever asked is told when the connection's end is noticed, or by the time
        with contextlib.suppress(ConnectionError, RuntimeError):
            await socket.send_bytes(frame)

    async def _send_acks(self) -> None:
        self._acks_scheduled = False
        places: dict[Subscription, list[Place]] = {}
        while self._acks:
            subscription, place = self._acks.popleft()
            places.setdefault(subscription, []).append(place)
        with self._lock:
            numbers = {member: number for number, (member, _, _) in self._members.items()}
        for subscription, found in places.items():
            if subscription in numbers:
                await self._send(pack_frame("ack", sub=numbers[subscription], places=found))

    async def _leave(self, number: int) -> None:
        await self._send_acks()
        with self._lock:
            self._members.pop(number, None)
        await self._send(pack_frame("leave", sub=number))

    async def _say_goodbye(self) -> None:
        await self._send_acks()
        if self._socket is not None:
            await self._socket.close()

    def _give_up(self, reason: str) -> None:
        for future in tuple(self._asked.values()):
            if not future.done():
                future.set_exception(BusUnavailable(f"hub {self._address}: {reason}"))


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.WSServerHandshakeError) and error.status == 401:
        return "it does not know this token"
    return f"{type(error).__name__}: {error}"
