"""`Urza("https://...")`: what a server says is checked here, what broke off goes on, and what is here is served."""

from __future__ import annotations

import copy
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import ARTIFACT_ID, BINARY, make_artifact
from loopback import QUICK, TOKENS, Loopback, certificate, token_file

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    CorruptObject,
    InvalidCommit,
    NotAuthorized,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.contracts.record import Figures
from esper_triton.urza import Event, Urza
from esper_triton.urza.__main__ import main
from esper_triton.urza.cached import Unreachable
from esper_triton.urza.client import RemoteUrza
from esper_triton.urza.directory import Directory
from esper_triton.urza.incoming import Incoming, sweep
from esper_triton.urza.wire import Server

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"
BIG = os.urandom(1 << 20)


@pytest.fixture
def server(urza: Urza, tmp_path: Path) -> Iterator[Loopback]:
    running = Loopback(urza, tmp_path)
    yield running
    running.stop()


@pytest.fixture
def client(server: Loopback, tmp_path: Path) -> RemoteUrza:
    return server.client(tmp_path / "cache")


def told(store: Urza) -> list[Event]:
    events: list[Event] = []
    store.on_event(events.append)
    return events


def test_a_url_opens_a_client(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Urza(server.url, cache=tmp_path / "cache", token=TOKENS["read"], ca=certificate()[0])
    assert isinstance(store, RemoteUrza)
    assert (store.location, store.root) == (server.url, tmp_path / "cache")
    pickled = pickle.dumps(store)
    assert TOKENS["read"].encode() not in pickled, "it may come to lie in a file"
    monkeypatch.setenv("ESPER_URZA_TOKEN", TOKENS["read"])
    opened = pickle.loads(pickled)
    monkeypatch.delenv("ESPER_URZA_TOKEN")
    for copied in (opened, copy.deepcopy(store), Urza.received(json.loads(json.dumps(store.sent())))):
        assert isinstance(copied, RemoteUrza)
        assert copied.ids() == [], "it has the token and the certificate"
        assert copied.sent() == store.sent()
        copied.close()
    with pytest.raises(TypeError, match="token are for a URL"):
        Urza(tmp_path / "directory", token="secret")


def test_what_is_committed_through_it_is_in_the_store_and_the_other_way_round(
    client: RemoteUrza, urza: Urza, server: Loopback, tmp_path: Path
):
    manifest, blobs = make_artifact()
    committed = client.commit(manifest, blobs)
    assert urza.get(ARTIFACT_ID) == committed
    assert client.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)
    validated = client.set_status(
        ARTIFACT_ID, KernelStatus.VALIDATED, b"a report", tags=["high_speed"], figures=Figures(latency_us=3.0)
    )
    assert urza.get(ARTIFACT_ID) == validated
    assert urza.record(ARTIFACT_ID) == client.record(ARTIFACT_ID)
    assert b"a report" in client.load(ARTIFACT_ID)[1].values()
    assert [match.id for match in client.query(required=("high_speed",))] == [ARTIFACT_ID]
    assert client.query() == urza.query()
    assert client.history(ARTIFACT_ID) == urza.history(ARTIFACT_ID)
    assert ARTIFACT_ID in client
    assert OTHER_ID not in client
    second = server.client(tmp_path / "second", "read")
    assert second.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)
    urza.reject(ARTIFACT_ID)
    assert second.get(ARTIFACT_ID).status is KernelStatus.REJECTED
    assert second.verify().faults == ()
    assert urza.verify().faults == ()


def test_one_build_at_a_time_goes_to_the_server(client: RemoteUrza, urza: Urza):
    manifest, blobs = make_artifact()
    with client.building(manifest.id) as existing:
        assert existing is None
        client.commit(manifest, blobs)
    with client.building(manifest.id) as existing:
        assert existing == urza.get(manifest.id)


def test_what_is_pinned_or_grown_here_stays_there(client: RemoteUrza, server: Loopback, urza: Urza, tmp_path: Path):
    client.commit(*make_artifact())
    client.commit(*make_artifact(OTHER_ID, binary=b"other"))
    client.promote(OTHER_ID)
    assert [client.pin(ARTIFACT_ID) for _ in range(2)] == [True, False]
    client.keep_named("model", [OTHER_ID])
    reader = server.client(tmp_path / "reader", "read")
    assert client.pins() == reader.pins() == urza.pins() == [ARTIFACT_ID]
    with pytest.raises(NotAuthorized, match="'write'"):
        reader.unpin(ARTIFACT_ID)
    with pytest.raises(ArtifactNotFound, match="no artifact"):
        client.pin(ARTIFACT_ID[:-1] + "f")
    with pytest.raises(ArtifactNotFound, match="not an artifact id"):
        client.pin("../../keys")
    for directory in (urza, Urza(client.root)):  # there and here
        kept = directory.gc(0).kept
        assert {reason: kept[reason] for reason in ("pinned", "named by a lineage")} == {
            "pinned": (ARTIFACT_ID,),
            "named by a lineage": (OTHER_ID,),
        }
    server.stop()
    assert client.pins() == [ARTIFACT_ID]
    server.start()
    client = server.client(client.root)
    assert [client.unpin(ARTIFACT_ID) for _ in range(2)] == [True, False]
    assert client.unpin("../../keys") is False
    client.forget_lineage("model")
    assert urza.gc(0).removed == (ARTIFACT_ID, OTHER_ID)
    assert urza.verify().faults == ()


def test_what_was_removed_there_is_gone_here(client: RemoteUrza, urza: Urza):
    client.commit(*make_artifact())
    client.load(ARTIFACT_ID)
    client.pin(ARTIFACT_ID)
    client.keep_named("model", [OTHER_ID])  # which is not in the cache
    urza.unpin(ARTIFACT_ID)
    urza.drop(ARTIFACT_ID)
    with pytest.raises(ArtifactNotFound):
        client.load(ARTIFACT_ID)
    assert client.verify().faults == ()
    client.commit(*make_artifact(binary=b"built again"))
    assert b"built again" in client.load(ARTIFACT_ID)[1].values()


def test_errors_of_the_server_are_those_of_a_store(client: RemoteUrza, server: Loopback, tmp_path: Path):
    client.commit(*make_artifact())
    with pytest.raises(ArtifactNotFound, match=OTHER_ID):
        client.load(OTHER_ID)
    with pytest.raises(ArtifactNotFound, match="not an artifact id"):
        client.get("../../keys")
    with pytest.raises(NotAuthorized, match="'write'"):
        server.client(tmp_path / "reader", "read").commit(*make_artifact(OTHER_ID))
    with pytest.raises(NotAuthorized, match="'validate'"):
        server.client(tmp_path / "writer", "write").promote(ARTIFACT_ID)
    with pytest.raises(NotAuthorized, match="a token that this server knows"):
        server.client(tmp_path / "stranger", "nobody-0123456789012345").load(ARTIFACT_ID)
    client.reject(ARTIFACT_ID)
    with pytest.raises(InvalidCommit, match="cannot go from REJECTED"):
        client.promote(ARTIFACT_ID)


def test_what_only_a_directory_can_do_is_refused(client: RemoteUrza, urza: Urza, tmp_path: Path):
    client.commit(*make_artifact())
    with pytest.raises(InvalidCommit, match="sign it in the store that has it"):
        client.sign(ARTIFACT_ID)
    assert client.export(tmp_path / "archive.tar")[0] == 1
    with pytest.raises(InvalidCommit, match="imported into a directory, and from there pushed"):
        client.import_(tmp_path / "archive.tar")
    with pytest.raises(InvalidCommit, match=rf"collects its garbage where its directory is.*--urza {client.root}"):
        client.gc()
    with pytest.raises(ValueError, match="keys= is for a directory"):
        Urza(client.location, keys=tmp_path / "keys")


def test_without_the_server_what_is_here_is_served(client: RemoteUrza, server: Loopback, urza: Urza):
    client.commit(*make_artifact())
    client.promote(ARTIFACT_ID)
    urza.commit(*make_artifact(OTHER_ID, binary=b"other"))
    events = told(client)
    server.stop()
    assert client.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)
    assert [match.id for match in client.query()] == [ARTIFACT_ID]
    assert client.ids() == [ARTIFACT_ID]
    with pytest.raises(Unreachable, match=f"{OTHER_ID}.*is not in the cache"):
        client.load(OTHER_ID)
    with pytest.raises(StoreUnavailable):
        client.commit(*make_artifact(OTHER_ID))
    assert [(event.kind, event.details) for event in events] == [("degraded", {"what": "offline"})]
    server.start()
    fresh = server.client(client.root)
    assert b"other" in fresh.load(OTHER_ID)[1].values()


def test_a_server_that_does_not_answer_is_left_alone_for_a_while():
    now, paused = 0.0, list[float]()
    server = Server("http://127.0.0.1:1", patience=QUICK, sleep=paused.append, clock=lambda: now)
    for _ in range(2):
        with pytest.raises(Unreachable, match="after 3 attempts"):
            server.ask("GET", "/health")
    assert len(paused) == 4
    assert all(0 <= pause <= 0.02 for pause in paused)
    with pytest.raises(Unreachable, match="again in 30 s"):
        server.ask("GET", "/health")
    assert len(paused) == 4
    now = 31.0
    with pytest.raises(Unreachable, match="after 3 attempts"):
        server.ask("GET", "/health")
    with pytest.raises(Unreachable, match="again in 30 s"):
        server.ask("GET", "/health")


def test_a_damaged_cache_is_repaired_from_the_server(client: RemoteUrza, urza: Urza):
    client.commit(*make_artifact())
    client.object_path(sha256(BINARY)).write_bytes(b"damaged")
    assert client.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)
    (client.root / "refs" / ARTIFACT_ID).write_bytes(b"damaged")
    assert client.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)


@pytest.mark.parametrize("leaves", [lambda content: b"", lambda content: bytes(len(content))], ids=["empty", "zeros"])
def test_a_cache_whose_power_was_cut_is_filled_again(
    client: RemoteUrza, server: Loopback, urza: Urza, leaves: Callable[[bytes], bytes]
):
    client.commit(*make_artifact())
    client.commit(*make_artifact(OTHER_ID, binary=b"other"))
    for folder in ("refs", "objects"):
        for path in (client.root / folder).rglob("*"):
            if path.is_file():
                path.write_bytes(leaves(path.read_bytes()))
    after = server.client(client.root)
    for artifact_id in (ARTIFACT_ID, OTHER_ID):
        assert after.load(artifact_id) == urza.load(artifact_id)
        assert after.load(artifact_id) == urza.load(artifact_id)


def test_a_load_waits_for_the_disk_once_and_a_download_keeps_its_connection(
    client: RemoteUrza, urza: Urza, monkeypatch: pytest.MonkeyPatch
):
    urza.commit(*make_artifact())
    client.load(ARTIFACT_ID)
    urza.commit(*make_artifact(OTHER_ID, binary=b"other"))
    synced: list[str] = []
    opened = []
    connection = Server._connection
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Server, "_connection", lambda self: opened.append(1) or connection(self))
    client.load(OTHER_ID)
    assert [path for path in synced if path.startswith(str(client.root))] == [str(client.root / "audit.log")]
    assert opened == []


def test_a_server_with_other_keys_is_refused(client: RemoteUrza, server: Loopback, urza: Urza, tmp_path: Path):
    client.commit(*make_artifact())
    other = Urza(tmp_path / "other")
    other.commit(*make_artifact(OTHER_ID))
    server.stop()
    server.store = other
    server.start()
    with pytest.raises(UntrustedArtifact, match="has other keys than when it was first asked"):
        server.client(client.root).load(OTHER_ID)
    named = ",".join(f"{role}={key}" for role, key in urza.public_keys.items())
    with pytest.raises(UntrustedArtifact, match="which the trust policy does not name"):
        server.client(tmp_path / "fresh", trust=f"keys:{named}").load(OTHER_ID)


def test_a_cache_is_kept_small_and_what_it_lost_comes_again(server: Loopback, urza: Urza, tmp_path: Path):
    ids = [f"0123456789ab-cpu-standard-{number:012x}" for number in range(4)]
    for number, artifact_id in enumerate(ids):
        urza.commit(*make_artifact(artifact_id, binary=bytes([number]) * 20_000))
    client = server.client(tmp_path / "cache", max_bytes=50_000)
    for artifact_id in (*ids, *ids):
        assert client.load(artifact_id) == urza.load(artifact_id)
        client.release()
        assert sum(path.stat().st_size for path in (client.root / "objects").rglob("*") if path.is_file()) <= 70_000
    assert urza.ids() == ids


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(server: Loopback, tmp_path: Path):
    with pytest.raises(StoreUnavailable, match="its certificate is not trusted"):
        server.client(tmp_path / "fresh", ca=None).ids()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org", "only https"),
        ("https://user:secret@example.org", "ends up in logs"),
        ("https://", "not of the form"),
        ("https://example.org:99999", "Port out of range"),
        ("https://example.org/?a=b", "not of the form"),
    ],
)
def test_a_url_that_would_be_unsafe_is_refused(url: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        Urza(url, cache=tmp_path)
    assert "secret" not in str(caught.value)


class _Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with what `script` says of a path and the requests so far; may break off."""

    protocol_version = "HTTP/1.1"
    script: Callable[[_Scripted], None]
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Range")))
        type(self).script(self)

    def log_message(self, *_: object) -> None:
        pass

    def send(self, content: bytes, *, status: int = 200, promised: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        self.end_headers()
        self.wfile.write(content)
        if promised is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[Any], None]], tuple[Server, list[tuple[str, str | None]]]]]:
    """`scripted(script)`: a client of a server that does as the script says, and the requests that it has seen."""
    running = []

    def start(script: Callable[[Any], None]) -> tuple[Server, list[tuple[str, str | None]]]:
        handler = type("Handler", (_Scripted,), {"script": script, "seen": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return Server(f"http://127.0.0.1:{server.server_address[1]}", patience=QUICK), handler.seen

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def part(request: Any, most: int) -> None:
    """Sends at most `most` bytes of what is asked of BIG, and promises all of it."""
    asked = request.headers.get("Range")
    begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    headers = {"Content_Range": f"bytes {begin}-{len(BIG) - 1}/{len(BIG)}"} if asked else {}
    request.send(BIG[begin : begin + most], status=206 if asked else 200, promised=len(BIG) - begin, **headers)


def test_a_download_that_breaks_off_goes_on_where_it_was(scripted, tmp_path: Path):
    server, seen = scripted(lambda request: part(request, 300_000))
    directory = Directory(tmp_path / "cache")
    with Incoming(directory, sha256(BIG)) as incoming:
        server.download(sha256(BIG), incoming, len(BIG))
        incoming.finish()
    assert directory.read_object(sha256(BIG), "object", limit_bytes=len(BIG)) == BIG
    assert [asked for _, asked in seen] == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_download_goes_on_in_the_next_process(scripted, tmp_path: Path):
    def once(request: Any) -> None:
        part(request, 300_000 if len(request.seen) == 1 else 0)

    server, _ = scripted(once)
    directory = Directory(tmp_path / "cache")
    with Incoming(directory, sha256(BIG)) as incoming, pytest.raises(Unreachable, match="broke off"):
        server.download(sha256(BIG), incoming, len(BIG))
    assert (tmp_path / "cache" / "incoming" / sha256(BIG)).stat().st_size == 300_000
    other, seen = scripted(lambda request: part(request, len(BIG)))
    with Incoming(directory, sha256(BIG)) as incoming:
        other.download(sha256(BIG), incoming, len(BIG))
        incoming.finish()
    assert directory.read_object(sha256(BIG), "object", limit_bytes=len(BIG)) == BIG
    assert [asked for _, asked in seen] == ["bytes=300000-"]


def test_a_wrong_beginning_is_downloaded_again(scripted, tmp_path: Path):
    server, seen = scripted(lambda request: part(request, len(BIG)))
    directory = Directory(tmp_path / "cache")
    with Incoming(directory, sha256(BIG)) as incoming:
        incoming.append(b"not the beginning")
        server.download(sha256(BIG), incoming, len(BIG))
        incoming.finish()
    assert directory.read_object(sha256(BIG), "object", limit_bytes=len(BIG)) == BIG
    assert [asked for _, asked in seen] == ["bytes=17-", None]


def test_bytes_with_another_digest_are_refused_and_not_kept(scripted, tmp_path: Path):
    server, _ = scripted(lambda request: request.send(b"evil"))
    directory = Directory(tmp_path / "cache")
    with Incoming(directory, sha256(b"good")) as incoming:
        with pytest.raises(CorruptObject, match="SHA-256 expected"):
            server.download(sha256(b"good"), incoming, 100)
        assert incoming.size_bytes == 0
    with (
        Incoming(directory, sha256(b"good")) as incoming,
        pytest.raises(StoreUnavailable, match="more than 3 bytes"),
    ):
        server.download(sha256(b"good"), incoming, 3)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(scripted, status: int):
    def busy(request: Any) -> None:
        request.send(b"{}", status=status if len(request.seen) < 3 else 200, Retry_After="0")

    server, seen = scripted(busy)
    assert server.ask("GET", "/health").json() == {}
    assert len(seen) == 3


def test_a_redirect_is_not_followed(scripted):
    server, seen = scripted(lambda request: request.send(b"", status=302, Location="https://example.org/"))
    with pytest.raises(StoreUnavailable, match="status 302"):
        server.ask("GET", "/health")
    assert len(seen) == 1


def test_a_record_that_was_changed_on_the_way_is_refused(client: RemoteUrza, urza: Urza, scripted, tmp_path: Path):
    client.commit(*make_artifact())
    client.promote(ARTIFACT_ID)
    record = urza.record(ARTIFACT_ID)
    lies = [
        record.model_copy(update={"tags": ("high_speed",)}),
        record.model_copy(update={"signature": None}),
        record.model_copy(update={"id": OTHER_ID}),
        record.model_copy(update={"manifest": sha256(BINARY)}),
    ]
    for number, lie in enumerate(lies):

        def lying(request: Any, lie: Any = lie) -> None:
            if request.path.startswith("/v1/artifacts"):
                request.send(json.dumps({"record": lie.model_dump(mode="json")}).encode())
            elif request.path == "/health":
                request.send(json.dumps({"keys": urza.public_keys}).encode())
            else:
                request.send(urza.object_path(request.path.rsplit("/", 1)[1]).read_bytes())

        server, _ = scripted(lying)
        store = Urza(server.url, cache=tmp_path / str(number), patience=QUICK)
        with pytest.raises((CorruptObject, UntrustedArtifact)):
            store.load(ARTIFACT_ID)
        assert not (store.root / "refs").exists()
        store.close()


def test_what_nobody_receives_any_more_is_swept(tmp_path: Path):
    directory = Directory(tmp_path)
    with Incoming(directory, "a" * 64) as kept, Incoming(directory) as open_one:
        kept.append(b"some")
        open_one.append(b"some")
        assert sweep(directory, 0.0) == 0
    assert sweep(directory, 1000.0) == 0
    assert sweep(directory, 0.0) == 4, "bytes"
    assert list((tmp_path / "incoming").iterdir()) == []


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    """`process(port)`: `python -m esper_triton.urza serve` of a store in `tmp_path/"urza"`: its URL, and itself."""
    running = []

    def start(port: int = 0) -> tuple[str, subprocess.Popen[str]]:
        cert, key = certificate()
        command = [sys.executable, "-m", "esper_triton.urza", "serve", "--json", "--host", "127.0.0.1"]
        options = ["--port", str(port), "--token-file", str(token_file(tmp_path)), "--urza", str(tmp_path / "urza")]
        one = subprocess.Popen(
            [*command, *options, "--tls-cert", cert, "--tls-key", key], stdout=subprocess.PIPE, text=True
        )
        running.append(one)
        assert one.stdout is not None
        url = json.loads(one.stdout.readline())["url"]
        return url.replace("127.0.0.1", "localhost"), one

    yield start
    for one in running:
        one.kill()
        one.wait(20)
        assert one.stdout is not None
        one.stdout.close()


def test_a_server_that_is_killed_loses_nothing_that_was_committed(process, tmp_path: Path):
    url, first = process()
    options = {"token": TOKENS["all"], "ca": certificate()[0], "patience": QUICK, "fresh_s": 0.0}
    client = Urza(url, cache=tmp_path / "cache", **options)
    client.commit(*make_artifact())
    failures = []

    def commit_big() -> None:
        try:
            for number in range(1000):
                client.commit(
                    *make_artifact(f"0123456789ab-cpu-standard-{number:012x}", binary=BIG + bytes([number % 256]))
                )
        except StoreUnavailable as error:
            failures.append(error)

    worker = threading.Thread(target=commit_big)
    worker.start()
    while not list((tmp_path / "urza").glob("incoming/*")) and worker.is_alive():
        pass
    first.send_signal(signal.SIGKILL)
    worker.join(60)
    assert len(failures) == 1
    store = Urza(tmp_path / "urza")
    assert ARTIFACT_ID in store.ids()
    assert [fault for fault in store.verify().faults if "incoming" not in fault.subject] == []
    again, second = process(int(url.rsplit(":", 1)[1]))
    assert again == url
    fresh = Urza(url, cache=tmp_path / "cache", **options)
    assert fresh.load(ARTIFACT_ID) == store.load(ARTIFACT_ID)
    fresh.commit(*make_artifact(OTHER_ID, binary=BIG))
    assert OTHER_ID in store
    client.close()
    fresh.close()
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0


def test_push_and_pull_carry_artifacts_as_they_are_signed(server: Loopback, urza: Urza, tmp_path: Path, capsys):
    source = Urza(tmp_path / "source")
    source.commit(*make_artifact())
    source.promote(ARTIFACT_ID)
    (tmp_path / "token").write_text(TOKENS["all"] + "\n")
    url = ["--token-file", str(tmp_path / "token"), "--ca", certificate()[0], "--cache", str(tmp_path / "cache")]
    assert main(["push", server.url, "--urza", str(source.root), *url]) == 1
    assert "the trust policy does not name" in capsys.readouterr().err
    assert main(["push", server.url, "--resign", "--json", "--urza", str(source.root), *url]) == 0
    assert json.loads(capsys.readouterr().out)["unproven"] == [ARTIFACT_ID]
    assert urza.get(ARTIFACT_ID).status is KernelStatus.PENDING_BENCHMARKING
    urza.promote(ARTIFACT_ID)
    keys = ",".join(f"{role}={key}" for role, key in urza.public_keys.items())
    target = ["--urza", str(tmp_path / "target"), "--trust", f"keys:{keys}"]
    for expected in ("taken", "kept"):
        assert main(["pull", server.url, "--json", *target, *url]) == 0
        assert json.loads(capsys.readouterr().out)[expected] == [ARTIFACT_ID]
    pulled = Urza(tmp_path / "target", trust=f"keys:{keys}")
    assert pulled.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)
    assert main(["push", str(tmp_path / "third"), "--other-trust", f"keys:{keys}", *target]) == 0
    assert Urza(tmp_path / "third", trust=f"keys:{keys}").load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--token-file is needed"),
        (["--token-file", "TOKENS", "--host", "0.0.0.0"], "needs --tls-cert and --tls-key"),
        (["--token-file", "TOKENS", "--tls-cert", "nowhere"], "are needed together"),
        (["--token-file", "nowhere"], "cannot be read"),
        (["--token-file", "TOKENS", "--tls-cert", "nowhere", "--tls-key", "nowhere"], "No such file"),
        (["--token-file", "TOKENS", "--tls-cert", "TOKENS", "--tls-key", "TOKENS"], "cannot be used: [SSL]"),
        (["--token-file", "TOKENS", "--urza", "https://build"], "only a directory can be served"),
        (["--token-file", "TOKENS", "--rate", "0"], "a number above 0"),
        (["--token-file", "TOKENS", "--port", "99999999"], "port"),
    ],
)
def test_a_server_that_would_not_be_safe_does_not_start(arguments: list[str], message: str, tmp_path: Path, capsys):
    arguments = [str(token_file(tmp_path)) if one == "TOKENS" else one for one in arguments]
    assert main(["serve", "--urza", str(tmp_path / "urza"), *arguments]) == 2
    assert message in capsys.readouterr().err
