"""The HTTP surface: what is asked rightly is answered, and what is not is refused with one clear error."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import ARTIFACT_ID, BINARY, make_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import TOKENS, Loopback, token_file

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.contracts.record import Record, Role
from esper_triton.urza import Event, Urza
from esper_triton.urza.server import Limits
from esper_triton.urza.tokens import Rate, read_tokens
from esper_triton.urza.trust import signed

DOCUMENTED = {200, 201, 206, 304, 400, 401, 403, 404, 405, 408, 409, 413, 415, 416, 417, 422, 429}


@pytest.fixture
def server(urza: Urza, tmp_path: Path) -> Iterator[Loopback]:
    running = Loopback(urza, tmp_path, limits=Limits(object_bytes=1 << 20, per_second=1e6, burst=10**6, piece_s=0.5))
    yield running
    running.stop()


def put_all(server: Loopback, blobs: dict[str, bytes]) -> None:
    for digest, content in blobs.items():
        assert server.ask("PUT", f"/v1/objects/{digest}", content)[0] in (200, 201)


def commit(server: Loopback, token: str = "write") -> tuple[int, dict[str, str], bytes]:
    manifest, blobs = make_artifact()
    content = manifest.canonical_bytes()
    put_all(server, {**blobs, sha256(content): content})
    return server.ask("POST", "/v1/artifacts", json.dumps({"manifest": sha256(content)}).encode(), token)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_object_that_was_put_is_got(server: Loopback, urza: Urza):
    content = bytes(range(256)) * 2000
    path = f"/v1/objects/{sha256(content)}"
    assert server.error("GET", path) == (404, "not_found")
    assert server.ask("PUT", path, content)[0] == 201
    assert server.ask("PUT", path, content)[0] == 200
    assert urza.object_path(sha256(content)).read_bytes() == content
    status, headers, body = server.ask("GET", path, token="read")
    assert (status, body, headers["ETag"]) == (200, content, f'"{sha256(content)}"')
    status, headers, body = server.ask("HEAD", path, token="read")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(content)))
    assert server.ask("GET", path, headers={"If-None-Match": headers["ETag"]})[::2] == (304, b"")


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=0-0", 206, b"0"),
        ("bytes=3-", 206, b"3456789"),
        ("bytes=-4", 206, b"6789"),
        ("bytes=-99", 206, b"0123456789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=5-2", 200, b"0123456789"),
        ("bytes=0-1,3-4", 200, b"0123456789"),
        ("lines=1-2", 200, b"0123456789"),
        ("bytes=-", 200, b"0123456789"),
    ],
)
def test_a_part_of_an_object_is_got(server: Loopback, asked: str, status: int, expected: bytes | None):
    path = f"/v1/objects/{sha256(b'0123456789')}"
    server.ask("PUT", path, b"0123456789")
    found, headers, body = server.ask("GET", path, headers={"Range": asked})
    assert found == status
    if expected is not None:
        assert body == expected
    else:
        assert headers["Content-Range"] == "bytes */10"
    assert server.ask("GET", path, headers={"Range": asked, "If-Range": '"other"'})[::2] == (200, b"0123456789")


def test_nothing_appears_before_its_digest_matches(server: Loopback, urza: Urza):
    digest = sha256(b"promised")
    assert server.error("PUT", f"/v1/objects/{digest}", b"something else") == (422, "wrong_digest")
    assert not urza.object_path(digest).exists()
    assert not urza.object_path(sha256(b"something else")).exists()
    assert list((urza.root / "incoming").iterdir()) == []


def test_an_upload_that_is_cut_off_leaves_nothing(server: Loopback, urza: Urza):
    content = b"x" * 100_000
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(
            f"PUT /v1/objects/{sha256(content)} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
            f"{TOKENS['write']}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content[:50_000]
        )
        deadline = time.monotonic() + 10
        while not (urza.root / "incoming").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    while any((urza.root / "incoming").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list((urza.root / "incoming").iterdir()) == []
    assert not urza.object_path(sha256(content)).exists()


def test_a_client_that_sends_nothing_more_is_told_so(server: Loopback):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(
            f"PUT /v1/objects/{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKENS['write']}\r\n"
            "Content-Length: 10\r\n\r\nabc".encode()
        )
        answer = b""
        while piece := secure.recv(4096):
            answer += piece
            if b"too_slow" in answer:
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_not_held_by_who_sends_hardly_anything(urza: Urza, tmp_path: Path):
    limits = Limits(per_second=1e6, burst=10**6, header_s=1.5, piece_s=1.5, slowest=1000)
    server = Loopback(urza, tmp_path, tls=False, limits=limits)
    write = f"Authorization: Bearer {TOKENS['write']}\r\n"
    body = f"PUT /v1/objects/{'0' * 64} HTTP/1.1\r\nHost: localhost\r\n{write}Content-Length: 100000\r\n\r\n".encode()

    def dripped(begin: bytes) -> bytes:
        """What a client is answered that sends `begin` and then a byte now and then, until it is cut off."""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
            plain.sendall(begin)
            plain.settimeout(0.05)
            answer, deadline = b"", time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    piece = plain.recv(4096)
                    if not piece:
                        return answer
                    answer += piece
                except TimeoutError:
                    with contextlib.suppress(ConnectionError):
                        plain.sendall(b"x")
                except ConnectionError:
                    return answer
        raise AssertionError(f"still open, and answered {answer!r}")

    try:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
        for one in held:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert server.ask("GET", "/health", token=None)[0] == 200, "others are served meanwhile"
        assert dripped(b"GET /health HTTP/1.1\r\nX-Long: ") == b"", "no header is waited for"
        assert dripped(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200 "), "nor a second"
        answer = dripped(body)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"slower than 1000 bytes a second" in answer
        for one in held:
            one.settimeout(20)
            assert one.recv(1) == b""
            one.close()
        assert list((urza.root / "incoming").iterdir()) == []
    finally:
        server.stop()


def test_what_is_larger_than_what_is_received_is_served_from_a_store_that_has_it(server: Loopback, urza: Urza):
    big = bytes((1 << 20) + 1)
    urza.commit(*make_artifact(binary=big))
    path = f"/v1/objects/{sha256(big)}"
    assert server.error("PUT", path, big) == (413, "too_large")
    assert server.ask("GET", path)[2] == big
    assert urza.load(ARTIFACT_ID)


def test_a_damaged_object_is_not_served_and_can_be_put_again(server: Loopback, urza: Urza):
    path = f"/v1/objects/{sha256(b'right')}"
    server.ask("PUT", path, b"right")
    told: list[Event] = []
    urza.on_event(told.append)
    for count, asked in enumerate(("GET", "PUT"), start=1):
        urza.object_path(sha256(b"right")).write_bytes(b"wrong")
        if asked == "GET":
            assert server.error("GET", path) == (404, "corrupt")
            assert server.error("GET", path) == (404, "not_found"), "it was set aside"
        assert server.ask("PUT", path, b"right")[0] == 201
        assert server.ask("GET", path)[2] == b"right"
        assert len(list((urza.root / "quarantine").iterdir())) == 2 * count, "and a report with it"
        assert [(event.kind, event.details["reason"][:10]) for event in told] == [("quarantined", "is corrupt")] * count


def test_an_artifact_is_committed_proven_and_found(server: Loopback, urza: Urza):
    status, headers, body = commit(server)
    assert status == 201
    artifact, blobs = urza.load(ARTIFACT_ID)
    assert BINARY in blobs.values()
    assert json.loads(body)["manifest"] == json.loads(artifact.manifest.canonical_bytes())
    path = f"/v1/artifacts/{ARTIFACT_ID}"
    assert server.ask("GET", path, token="read", headers={"If-None-Match": headers["ETag"]})[0] == 304
    server.ask("PUT", f"/v1/objects/{sha256(b'report')}", b"report", "validate")
    verdict = {"status": "VALIDATED", "report": sha256(b"report"), "tags": ["high_speed"], "figures": {"latency_us": 3}}
    status, _, body = server.ask("POST", f"{path}/status", json.dumps(verdict).encode(), "validate")
    assert status == 200
    assert json.loads(body)["record"]["signature"]["role"] == "prover"
    assert server.ask("GET", path, headers={"If-None-Match": headers["ETag"]})[0] == 200
    status, _, body = server.ask("POST", "/v1/kernels/query", b'{"required": ["high_speed"]}', "read")
    assert (status, [one["id"] for one in json.loads(body)["artifacts"]]) == (200, [ARTIFACT_ID])
    assert json.loads(server.ask("GET", "/v1/artifacts", token="read")[2]) == {"ids": [ARTIFACT_ID]}
    _, _, body = server.ask("GET", f"/v1/history/{ARTIFACT_ID}", token="read")
    assert [one["target"] for one in json.loads(body)["history"]] == ["PENDING_BENCHMARKING", "VALIDATED"]
    assert urza.verify().faults == ()


def test_each_role_may_do_its_own(server: Loopback):
    blob = f"/v1/objects/{sha256(b'blob')}"
    status = f"/v1/artifacts/{ARTIFACT_ID}/status"
    assert server.error("PUT", blob, b"blob", "read") == (403, "forbidden")
    assert server.error("POST", "/v1/artifacts", b"{}", "read") == (403, "forbidden")
    assert commit(server, "validate")[0] == 403
    assert commit(server, "write")[0] == 201
    validated = b'{"status": "VALIDATED"}'
    assert server.error("POST", status, validated, "read") == (403, "forbidden")
    assert server.error("POST", status, validated, "write") == (403, "forbidden")
    assert server.ask("POST", status, validated, "validate")[0] == 200
    assert server.error("POST", status, b'{"status": "ARCHIVED", "tags": []}', "write") == (403, "forbidden")
    assert server.ask("POST", status, b'{"status": "ARCHIVED"}', "write")[0] == 200


def test_whoever_may_write_pins_and_names_lineages_and_a_collection_heeds_it(server: Loopback, urza: Urza):
    commit(server)
    pin, lineage = f"/v1/artifacts/{ARTIFACT_ID}/pin", "/v1/lineages/model-1"
    for token in ("read", "validate"):
        assert server.error("POST", pin, b'{"pinned": true}', token) == (403, "forbidden")
        assert server.error("POST", lineage, b'{"artifacts": []}', token) == (403, "forbidden")
    unknown = f"/v1/artifacts/{ARTIFACT_ID[:-1]}f/pin"
    assert server.error("POST", unknown, b'{"pinned": true}') == (404, "not_found")
    for body in (b"{}", b'{"pinned": "perhaps"}', b'{"pinned": true, "for": "ever"}'):
        assert server.error("POST", pin, body) == (400, "bad_request")
    for changed in (True, False):
        answer = server.ask("POST", pin, b'{"pinned": true}', "write")
        assert (answer[0], json.loads(answer[2])["changed"]) == (200, changed)
    assert json.loads(server.ask("GET", "/v1/pins", token="read")[2]) == {"pins": [ARTIFACT_ID]}
    assert urza.gc(0).kept == {"pinned": (ARTIFACT_ID,)}
    assert json.loads(server.ask("POST", pin, b'{"pinned": false}', "write")[2])["changed"] is True
    urza.promote(ARTIFACT_ID)
    named = json.dumps({"artifacts": [ARTIFACT_ID]}).encode()
    assert server.error("POST", "/v1/lineages/%2e%2e%2frefs", named) == (400, "bad_request")
    assert server.error("POST", lineage, b'{"artifacts": ["../refs"]}') == (400, "bad_request")
    assert json.loads(server.ask("POST", lineage, named, "write")[2]) == {"name": "model-1", "kept": True}
    assert urza.gc(0).kept == {"named by a lineage": (ARTIFACT_ID,)}
    assert json.loads(server.ask("POST", lineage, b'{"artifacts": []}', "write")[2])["kept"] is False
    assert urza.gc(0).removed == (ARTIFACT_ID,)
    assert [change.what for change in urza.history(ARTIFACT_ID)] == [
        "committed", "pinned", "unpinned", "status", "removed",
    ]  # fmt: skip
    assert urza.verify().faults == ()


@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer ", "Basic YTpi", "Bearer wrong-0123456789", f"bearer{TOKENS['all']}", "Bearer \xff"],
)
def test_without_a_token_that_is_known_nothing_is_told(server: Loopback, header: str | None):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("GET", "/v1/artifacts"),
        ("GET", f"/v1/objects/{'0' * 64}"),
        ("PUT", f"/v1/objects/{'0' * 64}"),
        ("POST", "/v1/kernels/query"),
        ("GET", "/metrics"),
    ):
        assert server.error(method, path, token=None, headers=headers) == (401, "unauthorized")


def test_a_record_that_is_signed_elsewhere_is_taken_only_where_it_is_trusted(
    server: Loopback, urza: Urza, tmp_path: Path
):
    other = Urza(tmp_path / "other")
    manifest, blobs = make_artifact()
    other.commit(manifest, blobs)
    other.promote(manifest.id)
    record, content, _, _ = other.whole(manifest.id)
    put_all(server, {**blobs, sha256(content): content})
    body = json.dumps({"manifest": sha256(content), "record": record.model_dump(mode="json")}).encode()
    assert server.error("POST", "/v1/artifacts", body, "write") == (403, "forbidden")
    assert server.error("POST", "/v1/artifacts", body, "validate") == (403, "untrusted")
    assert urza.ids() == []
    forged = record.model_copy(update={"tags": ("high_speed",)})
    body = json.dumps({"manifest": sha256(content), "record": forged.model_dump(mode="json")}).encode()
    assert server.error("POST", "/v1/artifacts", body, "validate") == (409, "conflict")
    own = Record(id=manifest.id, manifest=sha256(content))
    commit(server)
    mine = signed(own, urza._keys.signer([Role.PROVER]))
    body = json.dumps({"manifest": sha256(content), "record": mine.model_dump(mode="json")}).encode()
    assert server.ask("POST", "/v1/artifacts", body, "validate")[0] == 201
    assert urza.get(manifest.id).status is KernelStatus.VALIDATED


def test_a_record_that_nobody_signed_needs_the_role_that_may_say_anything(urza: Urza, tmp_path: Path):
    server = Loopback(Urza(urza.root, trust="unsigned-ok"), tmp_path)
    try:
        manifest, blobs = make_artifact(status=KernelStatus.VALIDATED)
        content = manifest.canonical_bytes()
        put_all(server, {**blobs, sha256(content): content})
        record = Record(id=manifest.id, manifest=sha256(content)).model_dump(mode="json")
        body = json.dumps({"manifest": sha256(content), "record": record}).encode()
        assert server.error("POST", "/v1/artifacts", body, "write") == (403, "forbidden")
        assert server.ask("POST", "/v1/artifacts", body, "validate")[0] == 201
    finally:
        server.stop()


def test_a_reader_that_takes_nothing_is_cut_off(urza: Urza, tmp_path: Path):
    content = b"x" * (32 << 20)
    server = Loopback(urza, tmp_path, tls=False, limits=Limits(per_second=1e6, burst=10**6, piece_s=0.2))
    try:
        assert server.ask("PUT", f"/v1/objects/{sha256(content)}", content)[0] == 201
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
            plain.sendall(
                f"GET /v1/objects/{sha256(content)} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
                f"{TOKENS['read']}\r\n\r\n".encode()
            )
            time.sleep(1.0)
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := plain.recv(1 << 20):
                    got += len(piece)
        assert got < len(content)
    finally:
        server.stop()


def test_a_commit_names_what_is_missing(server: Loopback, urza: Urza):
    manifest, blobs = make_artifact()
    content = manifest.canonical_bytes()
    body = json.dumps({"manifest": sha256(content)}).encode()
    assert server.error("POST", "/v1/artifacts", body) == (422, "missing_objects")
    put_all(server, {sha256(content): content})
    status, _, answer = server.ask("POST", "/v1/artifacts", body)
    assert (status, sorted(json.loads(answer)["error"]["digests"])) == (422, sorted(blobs))
    assert urza.ids() == []
    validated = manifest.model_copy(update={"status": KernelStatus.VALIDATED}).canonical_bytes()
    put_all(server, {**blobs, sha256(validated): validated})
    body = json.dumps({"manifest": sha256(validated)}).encode()
    assert server.error("POST", "/v1/artifacts", body) == (409, "conflict")


def test_too_much_is_refused(server: Loopback, urza: Urza):
    big = b"x" * ((1 << 20) + 1)
    assert server.error("PUT", f"/v1/objects/{sha256(big)}", big) == (413, "too_large")
    chunked = {"Transfer-Encoding": "chunked"}
    chunks = b"".join(b"40000\r\n" + b"x" * 0x40000 + b"\r\n" for _ in range(5)) + b"0\r\n\r\n"
    assert server.error("PUT", f"/v1/objects/{sha256(big)}", chunks, headers=chunked) == (413, "too_large")
    assert server.error("POST", "/v1/kernels/query", b" " * (1 << 17)) == (413, "too_large")
    assert server.error("POST", "/v1/kernels/query", b'{"limit": 100000}') == (400, "bad_request")
    assert list((urza.root / "incoming").iterdir()) == []


def test_who_asks_too_often_waits(urza: Urza, tmp_path: Path):
    server = Loopback(urza, tmp_path, limits=Limits(per_second=0.01, burst=3))
    try:
        assert [server.ask("GET", "/v1/artifacts", token="read")[0] for _ in range(4)] == [200, 200, 200, 429]
        status, headers, _ = server.ask("GET", "/v1/artifacts", token="read")
        assert (status, int(headers["Retry-After"]) > 50) == (429, True)
        assert server.ask("GET", "/v1/artifacts", token="write")[0] == 200
    finally:
        server.stop()


def test_a_rate_fills_up_again():
    now = 0.0
    rate = Rate(2.0, 4, clock=lambda: now)
    assert [rate.wait_s("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert rate.wait_s("b") == 0
    now = 1.0
    assert [rate.wait_s("a") for _ in range(3)] == [0, 0, 0.5]


def test_health_and_metrics_tell_of_the_server(server: Loopback, urza: Urza):
    commit(server)
    status, _, body = server.ask("GET", "/health", token=None)
    assert status == 200
    assert json.loads(body)["keys"] == {role.value: key for role, key in urza.public_keys.items()}
    status, headers, body = server.ask("GET", "/metrics", token="read")
    assert headers["Content-Type"].startswith("text/plain")
    assert b'urza_requests_total{method="POST",route="/v1/artifacts",status="201"} 1.0' in body
    assert b"urza_received_bytes_total" in body


def test_the_private_keys_and_the_audit_log_cannot_be_got(server: Loopback):
    commit(server)
    for path in (
        "keys/forge.key", "../keys/forge.key", "%2e%2e/keys/forge.key", "..%2fkeys%2fforge.key", "audit.log",
    ):  # fmt: skip
        for root in ("/", "/v1/objects/", "/v1/artifacts/", "/v1/history/"):
            assert server.error("GET", root + path)[0] in (400, 404)


_TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
_PLACES = (
    f"/health /metrics /v1/artifacts /v1/kernels/query /v1/pins /v1/lineages/model /v1/history/{ARTIFACT_ID} "
    f"/v1/artifacts/{ARTIFACT_ID}/status /v1/artifacts/{ARTIFACT_ID}/pin"
).split()
_PATHS = st.one_of(
    st.sampled_from(_PLACES),
    st.builds(lambda text: "/v1/lineages/" + urllib.parse.quote(text, safe="/.%"), _TEXT),
    st.builds(lambda text: "/v1/objects/" + urllib.parse.quote(text, safe="/.%"), _TEXT),
    st.builds(lambda text: "/v1/artifacts/" + urllib.parse.quote(text, safe="/.%"), _TEXT),
    st.builds(lambda content: f"/v1/objects/{sha256(content)}", st.binary(max_size=4)),
    st.builds(lambda text: "/" + urllib.parse.quote(text, safe="/.%?"), _TEXT),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT | st.sampled_from(["VALIDATED", "cpu", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    "manifest record status report tags figures blueprint_id target dtype dims statuses required preferred excluded "
    "max_latency_us max_memory_bytes limit schema_version pinned artifacts".split()
)
_BODIES = st.one_of(
    st.none(),
    st.binary(max_size=200),
    st.builds(lambda value: json.dumps(value).encode(), _JSON),
    st.builds(lambda value: json.dumps(value).encode(), st.dictionaries(_FIELDS, _JSON, max_size=4)),
)
_HEADERS = st.dictionaries(
    st.sampled_from(["Range", "If-Range", "If-None-Match", "Content-Type", "Content-Encoding", "Expect", "Accept"]),
    st.one_of(
        st.sampled_from(["bytes=0-", "bytes=-1", "*", "gzip", "deflate", "100-continue", "application/json"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("fuzz")
    store = Urza(folder / "urza")
    store.commit(*make_artifact())
    running = Loopback(store, folder, tls=False, limits=Limits(per_second=1e6, burst=10**6, piece_s=0.3))
    yield running
    running.stop()


@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "BREW"]),
    path=_PATHS,
    body=_BODIES,
    token=st.sampled_from([None, "read", "write", "validate", "all", "nobody"]),
    headers=_HEADERS,
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_is_answered_as_documented(
    fuzzed: Loopback, method: str, path: str, body: bytes | None, token: str | None, headers: dict[str, str]
):
    status, answered, content = fuzzed.ask(method, path, body, token, headers)
    assert status in DOCUMENTED, (status, content)
    if method == "BREW" or status == 417:  # aiohttp's own answer
        assert status in (400, 417)
    elif status >= 400 and method != "HEAD":
        assert answered["Content-Type"] == "application/json"
        assert json.loads(content)["error"]["message"]
    top = {name.split("/")[0] for name in files(fuzzed.store.root)}
    assert top <= set("objects refs pins lineages keys index audit.log urza.json lock incoming quarantine".split())
    assert {path.name for path in fuzzed.store.root.parent.iterdir()} == {"urza", "tokens"}


@given(content=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_what_is_no_http_is_answered_with_400_or_waits_for_more(fuzzed: Loopback, content: bytes):
    with socket.create_connection(("127.0.0.1", fuzzed.port), timeout=10) as plain:
        plain.sendall(content + b"\r\n\r\n")
        plain.settimeout(0.1)
        answer = b""
        with contextlib.suppress(TimeoutError):  # it waits for more
            while piece := plain.recv(4096):
                answer += piece
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert fuzzed.ask("GET", "/health")[0] == 200


def test_requests_at_the_same_time_do_not_mix(server: Loopback, urza: Urza):
    contents = [bytes([number]) * 50_000 for number in range(8)]
    failed: list[object] = []

    def work(content: bytes) -> None:
        path = f"/v1/objects/{sha256(content)}"
        for _ in range(5):
            if server.ask("PUT", path, content)[0] not in (200, 201) or server.ask("GET", path)[2] != content:
                failed.append(path)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list((urza.root / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 tokens"),
        ("read", "line 1: 'ROLE"),
        ("admin 0123456789012345678901", "'admin' is not a role"),
        ("read short", "has 5 characters"),
    ],
)
def test_a_token_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str):
    path = token_file(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tokens(path)
    path.chmod(0o644)
    with pytest.raises(StoreUnavailable, match="can be read by others"):
        read_tokens(path)
