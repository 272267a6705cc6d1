"""A server of a store on this machine, over real TLS, for tests."""

from __future__ import annotations

import asyncio
import datetime
import functools
import http.client
import ipaddress
import json
import ssl
import tempfile
import threading
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from esper_triton.urza import Urza
from esper_triton.urza.client import RemoteUrza
from esper_triton.urza.server import Limits, runner_of
from esper_triton.urza.tokens import Token, read_tokens
from esper_triton.urza.wire import Patience

TOKENS = {name: f"{name}-{'0123456789' * 2}" for name in ("read", "write", "validate", "all")}
QUICK = Patience(attempts=3, first_s=0.01, most_s=0.02, timeout_s=5.0, failures=2, pause_s=30.0)


@functools.cache
def certificate() -> tuple[str, str]:
    """Paths of a certificate for localhost, which is its own authority, and of its key; gone with the process."""
    folder = Path(_folder().name)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def token_file(folder: Path) -> Path:
    path = folder / "tokens"
    path.write_text(
        f"# of a test\nread {TOKENS['read']}\nwrite {TOKENS['write']}\nvalidate {TOKENS['validate']}\n"
        f"write,validate {TOKENS['all']}\n"
    )
    path.chmod(0o600)
    return path


def tokens(folder: Path) -> tuple[Token, ...]:
    return read_tokens(token_file(folder))


class Loopback:
    """`store` served in a thread of this process. `stop` and `start` may follow each other; the port stays."""

    def __init__(self, store: Urza, folder: Path, *, tls: bool = True, limits: Limits | None = None) -> None:
        self.store, self._folder, self._tls = store, folder, tls
        self._limits = limits or Limits(per_second=1e6, burst=10**6)
        self._clients: list[RemoteUrza] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def begin() -> web.AppRunner:
            runner = runner_of(self.store, tokens(self._folder), self._limits)
            runner._shutdown_timeout = 0.1
            await runner.setup()
            context = None
            if self._tls:
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(*certificate())
            await web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True).start()
            self.port = runner.addresses[0][1]
            return runner

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._runner = self._loop.run_until_complete(begin())
            ready.set()
            self._loop.run_forever()
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert ready.wait(20)

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(20)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    def client(self, cache: Path, token: str = "all", **options: Any) -> RemoteUrza:
        client = RemoteUrza(
            self.url,
            **{
                "cache": cache,
                "token": TOKENS.get(token, token),
                "ca": certificate()[0],
                "patience": QUICK,
                "fresh_s": 0.0,
                **options,
            },
        )
        self._clients.append(client)
        return client

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        token: str | None = "all",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one raw request."""
        if self._tls:
            context = ssl.create_default_context(cafile=certificate()[0])
            connection = http.client.HTTPSConnection("localhost", self.port, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection("localhost", self.port, timeout=10)
        every = dict(headers or {})
        if token is not None:
            every.setdefault("Authorization", f"Bearer {TOKENS.get(token, token)}")
        try:
            connection.request(method, path, body, every)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def error(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        """Status and code of a request that is refused."""
        status, headers, body = self.ask(*arguments, **options)
        assert headers["Content-Type"] == "application/json"
        answer = json.loads(body)
        assert answer["error"]["message"]
        return status, answer["error"]["code"]
