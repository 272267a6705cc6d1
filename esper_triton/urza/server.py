"""A store over HTTP: `python -m esper_triton.urza serve`.

    GET, HEAD /v1/objects/{sha256}     an object; with Range a part of it, with If-None-Match perhaps 304    read
    PUT       /v1/objects/{sha256}     201 where it is new, 200 where it was there                      write, validate
    GET       /v1/artifacts            the ids of all                                                        read
    GET       /v1/artifacts/{id}       record and manifest; ETag is the SHA-256 of the record                read
    POST      /v1/artifacts            commits what was put: {"manifest": sha256, "record": null}            write
    POST      /v1/artifacts/{id}/status  {"status": "VALIDATED", "report": sha256, ...}                      validate
    POST      /v1/artifacts/{id}/pin     {"pinned": true}: no collection removes it, or false                write
    GET       /v1/pins                 the ids of all that are pinned                                        read
    POST      /v1/lineages/{name}      {"artifacts": [id, ...]}: none removes these; [] forgets the name     write
    POST      /v1/kernels/query        a KernelQuery                                                         read
    GET       /v1/history/{id or blueprint}                                                                  read
    GET       /health                  whether the store can be read, and its public keys                    -
    GET       /metrics                 Prometheus text                                                       read

What is wrong is answered with a 4xx and `{"error": {"code": ..., "message": ...}}`: 400 bad_request (a digest, an id,
JSON), 401 unauthorized, 403 forbidden (the token's role), 403 untrusted (the record's signer), 404 not_found, 404
corrupt (set aside), 405 method_not_allowed, 408 too_slow, 409 conflict (a status that cannot follow, another build),
413 too_large, 415 bad_encoding, 416 bad_range, 417 bad_expect, 422 wrong_digest and missing_objects (with `digests`),
429 too_many (with Retry-After). A store that cannot be read or written is 503 unavailable. What is no HTTP, an unknown
method too, is answered by aiohttp: 400, as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ValidationError

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    EsperError,
    InvalidCommit,
    NotAuthorized,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.query import MOST_ANSWERED, KernelQuery
from esper_triton.urza import serving
from esper_triton.urza.directory import Damage
from esper_triton.urza.incoming import Incoming, sweep
from esper_triton.urza.library import Urza
from esper_triton.urza.parsing import is_id
from esper_triton.urza.serving import Commit, Missing, Named, Pin, Verdict
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES
from esper_triton.urza.tokens import Access, Rate, Token, find

__all__ = ["Limits", "application", "runner_of", "serve"]

_logger = logging.getLogger(__name__)
_PIECE_BYTES = 256 << 10
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """object_bytes: the most that an object may have. json_bytes: another body. per_second, burst: requests of one
    token, or of one address without. header_s: seconds from a connection's beginning, or its last answer, in which a
    whole header must arrive. piece_s: seconds in which something of a body must arrive, or be taken; slowest: bytes per
    second that must arrive besides, on average. threads: calls of the store at a time."""

    object_bytes: int = BLOB_LIMIT_BYTES
    json_bytes: int = 1 << 16
    per_second: float = 200.0
    burst: int = 1000
    header_s: float = 30.0
    piece_s: float = 30.0
    slowest: int = 8 << 10
    threads: int = 8


class _Refused(Exception):
    """An answer other than 2xx, on its way."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, **more: object
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"code": code, "message": message, **more}}


def application(store: Urza, tokens: Sequence[Token], limits: Limits | None = None) -> web.Application:
    """An aiohttp application that serves `store`. It signs with the store's keys, as what the token of a request
    allows: `write` as the forge and `validate` as the prover."""
    return _Server(store, tokens, limits or Limits()).application()


def runner_of(store: Urza, tokens: Sequence[Token], limits: Limits | None = None) -> web.AppRunner:
    """What runs `application` as it is meant to be: bodies are taken as they are, compressed ones not at all, and who
    sends no header loses the connection."""
    limits = limits or Limits()
    return web.AppRunner(
        application(store, tokens, limits),
        access_log=None,
        keepalive_timeout=limits.header_s,  # aiohttp counts it from the first byte of a connection on, too
        shutdown_timeout=5.0,
        lingering_time=2.0,  # for whoever sends on after a refusal, which a connection closed at once could lose
        auto_decompress=False,
    )


def serve(
    store: Urza,
    tokens: Sequence[Token],
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    announce: Callable[[str], object] = lambda url: None,
) -> None:
    """Serves until SIGINT or SIGTERM. `announce` is told the URL once it can be asked; port 0 takes a free one.

    Raises OSError where the port cannot be had, StoreUnavailable where the store cannot be read.
    """
    store.ids()

    async def run() -> None:
        import signal

        runner = runner_of(store, tokens, limits)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port, ssl_context=tls, reuse_address=True)
            await site.start()
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            bound = runner.addresses[0][1]
            shown = f"[{host}]" if ":" in host else host
            announce(f"{'http' if tls is None else 'https'}://{shown}:{bound}")
            await stop.wait()
        finally:
            await runner.cleanup()

    asyncio.run(run())


class _Server:
    def __init__(self, store: Urza, tokens: Sequence[Token], limits: Limits) -> None:
        self._store, self._tokens, self._limits = store, tuple(tokens), limits
        self._rate = Rate(limits.per_second, limits.burst)
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="urza")
        self._committing = asyncio.Semaphore(2)  # each holds an artifact in memory
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "urza_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram("urza_request_seconds", "Time to answer", ["route"], registry=self._registry)
        self._received = Counter("urza_received_bytes", "Bytes of objects received", registry=self._registry)
        self._sent = Counter("urza_sent_bytes", "Bytes of objects sent", registry=self._registry)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answered], client_max_size=self._limits.json_bytes)
        routes: list[tuple[str, str, _Handler]] = [
            ("GET", "/v1/objects/{digest}", self._get_object),
            ("HEAD", "/v1/objects/{digest}", self._get_object),
            ("PUT", "/v1/objects/{digest}", self._put_object),
            ("GET", "/v1/artifacts", self._ids),
            ("POST", "/v1/artifacts", self._commit),
            ("GET", "/v1/artifacts/{id}", self._get_artifact),
            ("POST", "/v1/artifacts/{id}/status", self._set_status),
            ("POST", "/v1/artifacts/{id}/pin", self._pin),
            ("GET", "/v1/pins", self._pins),
            ("POST", "/v1/lineages/{name}", self._name_lineage),
            ("POST", "/v1/kernels/query", self._query),
            ("GET", "/v1/history/{id}", self._history),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
        ]
        for method, path, handler in routes:
            app.router.add_route(method, path, handler, expect_handler=_expect)

        async def sweeping(_: web.Application) -> None:
            with contextlib.suppress(StoreUnavailable):
                await self._call(sweep, self._store.directory, 60.0)

        async def ended(_: web.Application) -> None:
            self._threads.shutdown(wait=False)
            self._store.close()

        app.on_startup.append(sweeping)
        app.on_cleanup.append(ended)
        return app

    async def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """In a thread: nothing of the store is asked in the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *arguments))

    # ---- around every request

    @web.middleware
    async def _answered(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        began = time.perf_counter()
        resource = request.match_info.route.resource
        route = "unknown" if resource is None else resource.canonical
        response: web.StreamResponse
        try:
            response = await handler(request)
        except _Refused as refused:
            response = _json(refused.body, refused.status, refused.headers)
        except web.HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status, "bad_request")
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            message = f"{request.method} {request.path[:200]!r}: {error.reason}"
            response = _json({"error": {"code": code, "message": message}}, error.status, headers)
        except EsperError as error:
            response = _answer(error)
        if response.status >= 400 and not response.prepared and not request.content.is_eof():
            response.force_close()  # what was sent is not read
        if not response.prepared:
            response.headers["X-Content-Type-Options"] = "nosniff"
        method = request.method if request.method in ("GET", "HEAD", "PUT", "POST") else "other"
        self._requests.labels(method, route, response.status).inc()
        self._seconds.labels(route).observe(time.perf_counter() - began)
        return response

    def _allowed(self, request: web.Request, *needed: Access) -> frozenset[Access]:
        """What the request's token allows, one of `needed` at least. Raises _Refused."""
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        token = find(self._tokens, text.strip()) if scheme.lower() == "bearer" else None
        wait = self._rate.wait_s(request.remote if token is None else token)
        if wait > 0:
            after = {"Retry-After": str(int(wait) + 1)}
            raise _Refused(429, "too_many", f"too many requests; ask again in {wait:.1f} s", after)
        if token is None:
            message = "a token that this server knows is needed: 'Authorization: Bearer TOKEN'"
            raise _Refused(401, "unauthorized", message, {"WWW-Authenticate": 'Bearer realm="urza"'})
        if not token.access.intersection(needed):
            roles = " or ".join(repr(str(one)) for one in needed)
            has = " and ".join(repr(str(one)) for one in sorted(token.access))
            raise _Refused(403, "forbidden", f"this needs a token with the role {roles}; this one has {has}")
        return token.access

    # ---- objects

    async def _get_object(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        digest = _digest_of(request)
        try:
            descriptor, size = await self._call(self._open, digest)
        except Damage as damage:
            if damage.missing:
                raise _Refused(404, "not_found", f"no object has the SHA-256 {digest}") from None
            raise _Refused(404, "corrupt", str(damage)) from None
        try:
            return await self._send(request, digest, descriptor, size)
        finally:
            os.close(descriptor)

    async def _send(self, request: web.Request, digest: str, descriptor: int, size: int) -> web.StreamResponse:
        etag = f'"{digest}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, immutable, max-age=31536000"}
        if _matches(request.headers.get("If-None-Match"), etag):
            return web.Response(status=304, headers=headers)
        begin, end, status = 0, size, 200
        asked = request.headers.get("Range")
        if asked is not None and request.headers.get("If-Range", etag) == etag:
            found = _range_of(asked, size)
            if found is not None:
                begin, end = found
                status = 206
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        response = web.StreamResponse(status=status, headers=headers)
        response.content_type = "application/octet-stream"
        response.content_length = end - begin
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        try:
            while begin < end:
                piece = await self._call(os.pread, descriptor, min(_PIECE_BYTES, end - begin), begin)
                if not piece:
                    raise ConnectionError("the object became shorter")
                await asyncio.wait_for(response.write(piece), self._limits.piece_s)
                begin += len(piece)
                self._sent.inc(len(piece))
            await asyncio.wait_for(response.write_eof(), self._limits.piece_s)
        except (TimeoutError, ConnectionError):
            # Its length was promised, so whoever takes too long sees that it was cut short.
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _put_object(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.WRITE, Access.VALIDATE)
        digest = _digest_of(request)
        limit = self._limits.object_bytes
        if request.content_length is not None and request.content_length > limit:
            raise _Refused(413, "too_large", f"{request.content_length} bytes; an object has at most {limit}")
        with await self._call(Incoming, self._store.directory) as incoming:
            async for piece in _pieces(request, self._limits):
                if incoming.size_bytes + len(piece) > limit:
                    raise _Refused(413, "too_large", f"an object has at most {limit} bytes")
                await self._call(incoming.append, piece)
                self._received.inc(len(piece))
            if incoming.digest != digest:
                message = f"what was sent has the SHA-256 {incoming.digest} ({incoming.size_bytes} bytes), not {digest}"
                raise _Refused(422, "wrong_digest", message)
            new = not await self._call(self._has, digest)
            if new:
                await self._call(incoming.finish)
        return _json({"sha256": digest}, 201 if new else 200, {"ETag": f'"{digest}"'})

    def _open(self, digest: str) -> tuple[int, int]:
        # Not the limit of what is received: what is larger, and in the store already, is not damaged.
        return self._store.open_object(digest, limit_bytes=max(BLOB_LIMIT_BYTES, self._limits.object_bytes))

    def _has(self, digest: str) -> bool:
        try:
            descriptor, _ = self._open(digest)
        except Damage:
            return False
        os.close(descriptor)
        return True

    # ---- artifacts

    async def _ids(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        return _json({"ids": await self._call(self._store.ids)})

    async def _get_artifact(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        head, body = await self._call(serving.answer_of, self._store, _id_of(request))
        headers = {"ETag": f'"{head}"', "Cache-Control": "private, no-cache"}
        if _matches(request.headers.get("If-None-Match"), headers["ETag"]):
            return web.Response(status=304, headers=headers)
        return _json(body, headers=headers)

    async def _commit(self, request: web.Request) -> web.StreamResponse:
        access = self._allowed(request, Access.WRITE, Access.VALIDATE)
        asked = await self._body(request, Commit)
        async with self._committing:
            artifact_id = await self._call(serving.commit, self._store, asked, access)
        return await self._artifact(artifact_id, 201)

    async def _set_status(self, request: web.Request) -> web.StreamResponse:
        access = self._allowed(request, Access.WRITE, Access.VALIDATE)
        artifact_id = _id_of(request)
        asked = await self._body(request, Verdict)
        await self._call(serving.set_status, self._store, artifact_id, asked, access)
        return await self._artifact(artifact_id, 200)

    async def _pin(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.WRITE)
        artifact_id = _id_of(request)
        asked = await self._body(request, Pin)
        changed = await self._call(serving.pin, self._store, artifact_id, asked)
        return _json({"id": artifact_id, "pinned": asked.pinned, "changed": changed})

    async def _pins(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        return _json({"pins": await self._call(self._store.pins)})

    async def _name_lineage(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.WRITE)
        asked = await self._body(request, Named)
        name = request.match_info["name"]
        try:
            kept = await self._call(serving.name_lineage, self._store, name, asked)
        except ValueError as error:
            raise _Refused(400, "bad_request", str(error)[:300]) from None
        return _json({"name": name, "kept": kept})

    async def _artifact(self, artifact_id: str, status: int) -> web.StreamResponse:
        head, body = await self._call(serving.answer_of, self._store, artifact_id)
        return _json(body, status, {"ETag": f'"{head}"'})

    async def _query(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        query = await self._body(request, KernelQuery)
        if query.limit > MOST_ANSWERED:
            raise _Refused(400, "bad_request", f"limit {query.limit}: at most {MOST_ANSWERED} artifacts are answered")
        try:
            found = await self._call(self._store.query, query)
        except (OverflowError, UnicodeError) as error:
            raise _Refused(400, "bad_request", f"a value of the query is out of range: {error}") from None
        return _json({"artifacts": [match.model_dump(mode="json") for match in found]})

    async def _history(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        subject = request.match_info["id"]
        if not is_id(subject) and not re.fullmatch(r"[0-9a-f]{12,64}", subject):
            raise _Refused(400, "bad_request", f"{subject[:200]!r} is neither an artifact id nor that of a blueprint")
        found = await self._call(self._store.history, subject)
        return _json({"history": [change.model_dump(mode="json") for change in found]})

    # ---- the server

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if (wait := self._rate.wait_s(request.remote)) > 0:
            raise _Refused(429, "too_many", "too many requests", {"Retry-After": str(int(wait) + 1)})
        keys = await self._call(lambda: self._store.public_keys)
        return _json({"status": "ok", "schema_version": serving.SCHEMA_VERSION, "keys": keys})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self._allowed(request, Access.READ)
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _body(self, request: web.Request, model: type[_Model]) -> _Model:
        content = b""
        async for piece in _pieces(request, self._limits):
            content += piece
            if len(content) > self._limits.json_bytes:
                raise _Refused(413, "too_large", f"the body has more than {self._limits.json_bytes} bytes")
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))[:80] or "the whole"
            raise _Refused(400, "bad_request", f"{model.__name__}: {where}: {first['msg']}") from None


async def _pieces(request: web.Request, limits: Limits) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises _Refused where nothing does for too long, or too little, or it ends too early."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused(415, "bad_encoding", "a body is taken as it is: no Content-Encoding is")
    began, received = time.monotonic(), 0
    while True:
        late = began + limits.piece_s + received / limits.slowest - time.monotonic()
        try:
            piece = await asyncio.wait_for(request.content.readany(), max(0.0, min(limits.piece_s, late)))
        except TimeoutError:
            message = f"nothing more of the body came in {limits.piece_s:g} s"
            if late < limits.piece_s:
                message = f"the body came slower than {limits.slowest} bytes a second"
            raise _Refused(408, "too_slow", message) from None
        except web.HTTPException:
            raise
        except Exception as error:  # aiohttp's, of several kinds: a broken chunk, an encoding, a lost connection
            raise _Refused(400, "bad_request", f"the body cannot be read: {type(error).__name__}") from None
        if not piece:
            return
        received += len(piece)
        yield piece


async def _expect(request: web.Request) -> web.StreamResponse | None:
    if request.headers.get("Expect", "").lower() != "100-continue":
        refused = _json({"error": {"code": "bad_expect", "message": "only 'Expect: 100-continue' can be met"}}, 417)
        refused.force_close()
        return refused
    if request.version >= (1, 1) and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


def _digest_of(request: web.Request) -> str:
    digest = request.match_info["digest"]
    if not _DIGEST.fullmatch(digest):
        raise _Refused(400, "bad_request", f"{digest[:200]!r} is not a SHA-256 of 64 hex digits")
    return digest


def _id_of(request: web.Request) -> str:
    artifact_id = request.match_info["id"]
    if not is_id(artifact_id):
        form = "<blueprint sha256[:12]>-<target>-<pipeline>-<build sha256[:12]>"
        raise _Refused(400, "bad_request", f"{artifact_id[:200]!r} is not an artifact id ({form})")
    return artifact_id


def _range_of(text: str, size: int) -> tuple[int, int] | None:
    """Begin and end of what is asked for; None where all of it is to be sent (RFC 9110, 14.2). Raises _Refused."""
    found = _RANGE.fullmatch(text.strip())
    if found is None or not (found[1] or found[2]):
        return None  # several ranges at once, or nonsense: ignoring them is allowed
    if not found[1]:
        begin, end = max(0, size - int(found[2])), size
    else:
        begin, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < begin:
            return None
    if begin >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        raise _Refused(416, "bad_range", f"the object has {size} bytes, and {text[:100]!r} is none of them", headers)
    return begin, end


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in (one.strip().removeprefix("W/") for one in header.split(","))


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=json.dumps(body).encode() + b"\n",
        status=status,
        headers={"Content-Type": "application/json", **(headers or {})},
    )


def _answer(error: EsperError) -> web.Response:
    more: dict[str, object] = {}
    if isinstance(error, Missing):
        status, code, more = 422, "missing_objects", {"digests": error.digests}
    elif isinstance(error, InvalidCommit):
        status, code = 409, "conflict"
    elif isinstance(error, ArtifactNotFound):
        status, code = 404, "not_found"
    elif isinstance(error, CorruptObject):
        status, code = 404, "corrupt"
    elif isinstance(error, UntrustedArtifact):
        status, code = 403, "untrusted"
    elif isinstance(error, NotAuthorized):
        status, code = 403, "forbidden"
    elif isinstance(error, ArtifactRefused):
        status, code = 409, "conflict"
    elif isinstance(error, StoreUnavailable):
        _logger.error("%s", error)
        status, code = 503, "unavailable"
    else:
        _unknown(error)
    return _json({"error": {"code": code, "message": " ".join(str(error).split()), **more}}, status)


def _unknown(error: EsperError) -> NoReturn:
    raise error
