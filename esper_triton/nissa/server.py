"""The page's server: static files, `/metrics`, what is seen as JSON, a WebSocket of changes, and commands."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import secrets
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from pydantic import ValidationError

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.commands import CommandKind, CommandResult, KasminaCommand
from esper_triton.contracts.errors import BusUnavailable, nearest
from esper_triton.contracts.manifest import ARTIFACT_ID
from esper_triton.nissa.details import artifact_detail, seed_detail
from esper_triton.nissa.live import Feed, overview
from esper_triton.nissa.metrics import CONTENT_TYPE, Metrics
from esper_triton.nissa.view import View
from esper_triton.oona import Oona
from esper_triton.oona.tokens import Tokens
from esper_triton.oona.wire import faults, parse
from esper_triton.urza import Urza

__all__ = ["OPERATIONS", "NissaServer", "is_loopback"]

OPERATIONS = (CommandKind.ADVANCE, CommandKind.CULL, CommandKind.UNLOAD)
"""What an operator may ask for from the page."""

_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOOK_S = 0.25
_TOKEN_S = 5.0
_MOST_PAGES = 64
_BODY_BYTES = 16_384

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NissaServer:
    """Serves one View.

    Who may look: anybody, where there is no token file and the address is this machine's own; with one, whose token may
    subscribe to `telemetry.seed.health`. Who may command: whose token may publish to `control.kasmina.commands`, or
    without a token file who has `operator_token`, which is made here. Tokens come as `Authorization: Bearer ...`, in no
    cookie and no address, so that no other page can use them.

    Args:
        urza: where artifacts are looked up; without one their details are not shown.
        command_s: how long an answer to a command is waited for.
    """

    def __init__(
        self,
        view: View,
        metrics: Metrics,
        bus: Oona,
        *,
        urza: Urza | None = None,
        tokens: Tokens | None = None,
        operator_token: str | None = None,
        command_s: float = 20.0,
    ) -> None:
        self.operator_token = None if tokens is not None else operator_token or secrets.token_urlsafe(24)
        self._view, self._metrics, self._bus, self._urza, self._tokens = view, metrics, bus, urza, tokens
        self._command_s = command_s
        self._runner: web.AppRunner | None = None
        self._only_loopback = True
        self._pages: set[web.WebSocketResponse] = set()

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """Listens; returns the port, which a `port` of 0 leaves to the system. Raises OSError, and ValueError for an
        address that others can reach without a token file."""
        self._only_loopback = is_loopback(host)
        if not self._only_loopback and self._tokens is None:
            raise ValueError(f"a page that others can reach, at {host}, needs a --token-file")
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/", self._index)
        app.router.add_get("/static/{name}", self._static)
        app.router.add_get("/live", self._live)
        app.router.add_get("/metrics", self._watched(self._show_metrics))
        app.router.add_get("/api/overview", self._watched(self._overview))
        app.router.add_get("/api/seed", self._watched(self._seed))
        app.router.add_get("/api/artifacts/{id}", self._watched(self._artifact))
        app.router.add_post("/api/commands", self._command)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Ends every connection."""
        for page in tuple(self._pages):
            await page.close(code=1001, message=b"the server stops")
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- who may

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        # A page elsewhere can have its own name resolved to this machine, and would then be of one origin with us.
        host = request.host.rsplit(":", 1)[0].strip("[]")
        if self._only_loopback and not is_loopback(host):
            return _refusal(403, f"this page is served to this machine, and not as {host!r}")
        try:
            response = await handler(request)
        except web.HTTPRequestEntityTooLarge:
            response = _refusal(413, f"a command has at most {_BODY_BYTES} bytes")
        except web.HTTPException as error:
            response = _refusal(error.status, error.reason)
        if not response.prepared:
            response.headers.update(_HEADERS)
        return response

    def _may(self, token: str | None, *, operate: bool) -> int:
        """200, 401 where a token is needed and this is none, 403 where it is one that may not."""
        if self._tokens is None:
            if not operate:
                return 200
            assert self.operator_token is not None
            given = (token or "").encode("utf-8", "surrogateescape")  # bytes of a header that are no UTF-8
            known = hmac.compare_digest(given, self.operator_token.encode())
            return 200 if known else 401
        role = None if token is None else self._tokens.role(token)
        if role is None:
            return 401
        may = role.may_publish(topics.COMMANDS) if operate else role.may_subscribe(topics.HEALTH)
        return 200 if may else 403

    def _watched(self, handler: _Handler) -> _Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            status = self._may(_bearer(request), operate=False)
            if status != 200:
                return _refusal(status, "a token that may look is needed, as Authorization: Bearer ...")
            return await handler(request)

        return guarded

    # ---- what is served

    async def _index(self, _: web.Request) -> web.StreamResponse:
        return _file("index.html")

    async def _static(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        names = {path.name for path in _STATIC.iterdir() if path.suffix in _TYPES}
        if name not in names:
            return _refusal(404, f"no file {name!r}{nearest(name, names)}")
        return _file(name)

    async def _show_metrics(self, _: web.Request) -> web.StreamResponse:
        body = await asyncio.to_thread(self._metrics.text)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _overview(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(overview(self._view))

    async def _seed(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        number = query.get("seed", "")
        if not number.isdecimal() or len(number) > 9 or "model" not in query or "layer" not in query:
            return _refusal(400, "model, layer and seed (a number) are needed")
        found = seed_detail(self._view, query["model"], query["layer"], int(number))
        if found is None:
            return _refusal(404, f"no seed {number} of layer {query['layer']!r} of model {query['model']!r} was seen")
        return web.json_response(found)

    async def _artifact(self, request: web.Request) -> web.StreamResponse:
        artifact_id = request.match_info["id"]
        if not ARTIFACT_ID.fullmatch(artifact_id):
            return _refusal(400, f"{artifact_id[:80]!r} is not an artifact id")
        return web.json_response(await asyncio.to_thread(artifact_detail, self._urza, artifact_id))

    async def _live(self, request: web.Request) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            return _refusal(403, f"a page of {origin} may not look")
        if len(self._pages) >= _MOST_PAGES:
            return _refusal(503, f"{_MOST_PAGES} pages look already")
        page = web.WebSocketResponse(heartbeat=20.0, max_msg_size=4096, compress=True)
        await page.prepare(request)
        self._pages.add(page)
        try:
            if self._tokens is not None and not await self._shows_token(page):
                await page.close(code=4401, message=b"a token that may look is needed")
                return page
            sender = asyncio.create_task(self._send_changes(page))
            try:
                async for _ in page:  # nothing is expected; this notices the end
                    pass
            finally:
                sender.cancel()
        finally:
            self._pages.discard(page)
        return page

    async def _shows_token(self, page: web.WebSocketResponse) -> bool:
        """A browser cannot send headers with a WebSocket, so the first message is the token."""
        with contextlib.suppress(TimeoutError, ValueError, AttributeError):
            message = await page.receive(timeout=_TOKEN_S)
            if message.type is WSMsgType.TEXT:
                token = json.loads(message.data).get("token")
                return isinstance(token, str) and self._may(token, operate=False) == 200
        return False

    async def _send_changes(self, page: web.WebSocketResponse) -> None:
        feed = Feed(self._view)
        with contextlib.suppress(ConnectionError, RuntimeError):  # it is gone
            while True:
                changes = await asyncio.to_thread(feed.changes)
                if changes is not None:
                    await page.send_str(changes)
                await asyncio.sleep(_LOOK_S)

    # ---- commands

    async def _command(self, request: web.Request) -> web.StreamResponse:
        status = self._may(_bearer(request), operate=True)
        if status != 200:
            return _refusal(status, "an operator's token is needed, as Authorization: Bearer ...")
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict) or set(body) != {"model", "layer", "seed", "command"}:
                raise ValueError("a command has model, layer, seed and command, and nothing else")
            if body["command"] not in OPERATIONS:
                raise ValueError(f"no command {body['command']!r}{nearest(str(body['command']), OPERATIONS)}")
            command = KasminaCommand(
                command_id=uuid.uuid4().hex, deadline=time.time() + self._command_s, **_named(body)
            )
        except ValidationError as error:
            return _refusal(400, faults(error))
        except (ValueError, RecursionError) as error:
            return _refusal(400, str(error))
        try:
            answer = await asyncio.to_thread(
                self._bus.request, topics.COMMANDS, command, timeout_s=self._command_s, trace_id=command.command_id
            )
        except TimeoutError:
            return _refusal(
                504,
                f"model {command.model!r} has not answered within {self._command_s:g} s; commands are taken at its "
                "step boundaries, so it must be training",
            )
        except BusUnavailable as error:
            return _refusal(503, str(error))
        result = parse(answer)
        assert isinstance(result, CommandResult)
        return web.json_response(result.model_dump(mode="json"))


def is_loopback(host: str) -> bool:
    """Whether this address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(body: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(body[name], str) for name in ("model", "layer")):
        raise ValueError("model and layer are text")
    return body


def _bearer(request: web.Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _file(name: str) -> web.Response:
    path = _STATIC / name
    return web.Response(text=path.read_text(encoding="utf-8"), content_type=_TYPES[path.suffix])


def _refusal(status: int, reason: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.json_response({"error": reason}, status=status, headers=headers | _HEADERS)
