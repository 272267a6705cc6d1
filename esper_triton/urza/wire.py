"""The client's side of HTTP: requests that are asked again, downloads that go on where they broke off, and a server
that does not answer left alone for a while. Blocks; may be used from several threads."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
from esper_triton.urza.cached import Unreachable
from esper_triton.urza.incoming import Incoming

__all__ = ["Answer", "Patience", "Server"]

_ANSWER_LIMIT_BYTES = 64 << 20
_PIECE_BYTES = 256 << 10
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_T = TypeVar("_T")
_AGAIN = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Patience:
    """attempts: of one request. first_s: the longest first pause; each later one may be twice as long, up to most_s,
    and its length is drawn evenly from zero to that. timeout_s: for a connection, and for each piece. After `failures`
    requests in a row that no attempt had an answer to, none is sent for `pause_s`; the next one then is a trial."""

    attempts: int = 5
    first_s: float = 0.2
    most_s: float = 10.0
    timeout_s: float = 20.0
    failures: int = 3
    pause_s: float = 30.0


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. etag: without quotes. content: the body."""

    status: int
    etag: str | None
    content: bytes

    def json(self) -> Any:
        """Raises StoreUnavailable where the body is not JSON."""
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise StoreUnavailable(f"the server's answer is not JSON: {error}") from error


@dataclass
class _Broken(Exception):
    """An attempt came to nothing and may be made again, after `after_s` at the earliest."""

    reason: str
    after_s: float = 0.0
    answered: bool = False


@dataclass
class _Breaker:
    failures: int = 0
    until: float = 0.0
    reason: str = ""
    guard: threading.Lock = field(default_factory=threading.Lock)


class Server:
    """A server by its URL, `https://HOST[:PORT][/PREFIX]`. Certificates are checked, redirects are not followed (a
    token would go with them), and no proxy is asked."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        ca: str | Path | None = None,
        patience: Patience | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ca`: a file of certificates to trust instead of the system's. Raises ValueError for a URL that is none, or
        would send a token in the clear to another machine, and StoreUnavailable where `ca` cannot be read."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not of the form https://HOST[:PORT][/PREFIX]")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL with a user or password in it ends up in logs; give the token as token=...")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(f"{url!r}: only https is asked on another machine; over http anyone can read the token")
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
            raise ValueError("a token has printable ASCII characters and no spaces")
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._scheme, self._host, self._port, self._prefix = parts.scheme, parts.hostname, port, parts.path.rstrip("/")
        self._token, self._sleep, self._clock = token, sleep, clock
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=None if ca is None else os.fspath(ca))
            except OSError as error:
                raise StoreUnavailable(f"certificates {ca} cannot be read: {error}") from error
        self._idle: list[http.client.HTTPConnection] = []
        self._process = os.getpid()
        self._breaker = _Breaker()

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (200, 201),
    ) -> Answer:
        """The answer, of a status that is accepted; every request that is asked here may be asked twice.

        Raises Unreachable, or what a store would raise for what the server says is wrong.
        """

        def attempt() -> Answer:
            with self._exchange(method, path, body, headers or {}) as response:
                content = response.read(_ANSWER_LIMIT_BYTES)
                if not response.isclosed() and response.read(1):
                    raise StoreUnavailable(f"{self.url}{path}: the answer has more than {_ANSWER_LIMIT_BYTES} bytes")
                if response.length and method != "HEAD":
                    raise _Broken(f"it broke off {response.length} bytes before its end")
                self._check(response, content, path, accept)
                return Answer(response.status, (response.headers.get("ETag") or "").strip('"') or None, content)

        return self._patiently(attempt)

    def download(self, digest: str, incoming: Incoming, limit_bytes: int) -> None:
        """Gets the object's bytes, from where `incoming` has come to. Raises Unreachable, ArtifactNotFound (the server
        has no such object), CorruptObject (what it sends has another digest), StoreUnavailable."""
        path = f"/v1/objects/{digest}"

        def attempt() -> None:
            headers = {}
            if incoming.size_bytes:
                if incoming.digest == digest:
                    return
                headers = {"Range": f"bytes={incoming.size_bytes}-", "If-Range": f'"{digest}"'}
            with self._exchange("GET", path, None, headers) as response:
                if response.status == 416:
                    incoming.restart()
                    raise _Broken("it has fewer bytes than are here")
                if response.status not in (200, 206):
                    self._check(response, response.read(1 << 16), path, ())
                if response.status == 200:
                    incoming.restart()
                elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {incoming.size_bytes}-"):
                    incoming.restart()
                    raise _Broken("it sent another range than was asked for")
                while piece := response.read1(_PIECE_BYTES):
                    if incoming.size_bytes + len(piece) > limit_bytes:
                        incoming.restart()
                        raise StoreUnavailable(
                            f"{self.url}{path}: it has more than {limit_bytes} bytes, the most taken"
                        )
                    incoming.append(piece)
                if response.length:
                    raise _Broken(f"it broke off {response.length} bytes before its end")
                response.read()  # nothing: read1 alone does not see the end, and the connection could not be kept
            if incoming.digest != digest:
                found = incoming.digest
                incoming.restart()
                if response.status == 206:  # the part that was here may have been the wrong one
                    raise _Broken(f"the parts have the SHA-256 {found}")
                raise CorruptObject(f"{self.url}{path}: SHA-256 expected {digest}, found {found}")

        self._patiently(attempt, progress=lambda: incoming.size_bytes)

    def close(self) -> None:
        """Closes the connections that are not in use. More can be asked."""
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            self.close()

    # ---- one request

    @contextlib.contextmanager
    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """A response to be read; its connection is kept where it was read to its end."""
        every = {"Accept": "application/json", "User-Agent": "esper-urza"} | dict(headers)
        if self._token is not None:
            every["Authorization"] = f"Bearer {self._token}"
        if self._process != os.getpid():  # after a fork the parent goes on with its own
            self._idle, self._process = [], os.getpid()
        connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                connection.request(method, self._prefix + path, body, every)
                response = connection.getresponse()
            except (http.client.HTTPException, OSError):
                connection.close()  # it was kept for longer than the server wanted
                self.close()
                connection = None
        if connection is None:
            connection = self._connection()
            try:
                connection.request(method, self._prefix + path, body, every)
                response = connection.getresponse()
            except BaseException:
                connection.close()
                raise
        try:
            yield response
            if response.isclosed() and connection.sock is not None:
                self._idle.append(connection)
                connection = None
        finally:
            if connection is not None:
                response.close()
                connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        timeout = self.patience.timeout_s
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def _check(self, response: http.client.HTTPResponse, content: bytes, path: str, accept: tuple[int, ...]) -> None:
        status = response.status
        if status in accept:
            return
        where = f"{self.url}{path}"
        code, message, more = "", response.reason, {}
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            more = json.loads(content)["error"]
            code, message = str(more["code"]), str(more["message"])
        if status in _AGAIN:
            after = response.headers.get("Retry-After") or "0"
            raise _Broken(f"{status} {message}", float(after) if after.isdecimal() else 0.0, answered=status == 429)
        raise _error(status, code, f"{where}: {message}", more)

    # ---- attempts

    def _patiently(self, attempt: Callable[[], _T], progress: Callable[[], int] = lambda: 0) -> _T:
        self._enter()
        patience = self.patience
        made, got = 0, progress()
        while True:
            try:
                result = attempt()
            except EsperError as error:
                if not isinstance(error, Unreachable):
                    self._settle(None)
                raise
            except _Broken as error:
                broken = error
            except ssl.SSLCertVerificationError as error:
                raise StoreUnavailable(
                    f"{self.url}: its certificate is not trusted: {error.verify_message}; give its authority as ca=... "
                    "(--ca FILE)"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                broken = _Broken(f"{type(error).__name__}: {error}")
            else:
                self._settle(None)
                return result
            made = 1 if progress() > got else made + 1  # an attempt that got further begins a new count
            got = progress()
            if made >= patience.attempts:
                self._settle(broken.reason)
                raise Unreachable(f"{self.url} does not answer after {made} attempts: {broken.reason}")
            longest = min(patience.most_s, patience.first_s * 2 ** (made - 1))
            self._sleep(max(min(broken.after_s, patience.most_s), random.uniform(0, longest)))

    def _enter(self) -> None:
        breaker = self._breaker
        with breaker.guard:
            if breaker.failures < self.patience.failures:
                return
            now = self._clock()
            if now < breaker.until:
                raise Unreachable(
                    f"{self.url} did not answer {breaker.failures} requests in a row ({breaker.reason}); it is asked "
                    f"again in {breaker.until - now:.0f} s"
                )
            breaker.until = now + self.patience.pause_s  # this one is the trial; others wait for what becomes of it

    def _settle(self, failure: str | None) -> None:
        breaker = self._breaker
        with breaker.guard:
            if failure is None:
                breaker.failures = 0
                return
            breaker.failures += 1
            breaker.reason = failure
            breaker.until = self._clock() + self.patience.pause_s


def _error(status: int, code: str, message: str, more: Mapping[str, Any]) -> EsperError:
    if code == "untrusted":
        return UntrustedArtifact(message)
    if code == "missing_objects":
        error = MissingThere(message)
        error.digests = tuple(map(str, more.get("digests", ())))
        return error
    if code == "corrupt":
        return CorruptObject(message)
    if status in (401, 403):
        return NotAuthorized(message)
    if status == 404 and code == "not_found":
        return ArtifactNotFound(message)
    if status in (409, 422) or code == "bad_request":
        return InvalidCommit(message)
    if status == 413:
        return ArtifactRefused(message)
    return StoreUnavailable(f"{message} (status {status})")


class MissingThere(InvalidCommit):
    """A commit named objects that the server does not have, or not any more: `digests`."""

    digests: tuple[str, ...] = ()
