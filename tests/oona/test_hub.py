"""The hub as a process of its own: who may do what, frames that are none, limits, and what it counts."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import pytest
from bus_servers import HubServer, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.envelope import COMMANDS, HEALTH, LIFECYCLE, RESULTS, Envelope
from esper_triton.contracts.errors import BusUnavailable
from esper_triton.oona import Oona
from esper_triton.oona.hub import Hub
from esper_triton.oona.tokens import Tokens
from esper_triton.oona.wire import FRAME_LIMIT, pack, pack_frame, unpack_frame

TRAINER, OPERATOR = "trainer's own secret", "operator's own secret"
ROLES = f"""
[[token]]
name = "trainer"
token = "{TRAINER}"
publish = ["telemetry.*", "audit.*", "control.kasmina.results"]
subscribe = ["control.kasmina.commands"]

[[token]]
name = "operator"
token = "{OPERATOR}"
publish = ["control.kasmina.commands"]
subscribe = ["*"]
"""


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that many frames are thrown at."""
    server = HubServer(tmp_path_factory.mktemp("fuzzed"), "--max-message-bytes", "20000").start()
    yield server
    server.stop()


def converse(address: str, *frames: bytes | str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The hub's answers to frames, and to a question for its counters at the end."""

    async def talk() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with aiohttp.ClientSession(headers=headers) as session, session.ws_connect(address) as socket:
            for frame in frames:
                await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
            await socket.send_bytes(pack_frame("stats", id=987654321))
            while not found or found[-1].get("id") != 987654321:
                found.append(unpack_frame(await asyncio.wait_for(socket.receive_bytes(), 10.0)))
        return found

    return asyncio.run(talk())


def envelope(topic: str = LIFECYCLE, sequence: int = 0, **payload: object) -> bytes:
    made = Envelope(
        event_id=f"e{sequence}", topic=topic, sender_id="s", sequence=sequence, timestamp=0.0, payload=payload
    )
    return pack(made.model_dump())


def subscribe(**fields: object) -> bytes:
    known = {"sub": 1, "topics": [HEALTH], "group": None, "member": "m", "start": "new", "window": 1}
    return pack_frame("subscribe", id=1, **(known | fields))


keys = st.text(max_size=8) | st.integers(0, 9)
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8)
plain_values = st.recursive(
    leaves | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
operations = st.sampled_from(["publish", "subscribe", "ack", "leave", "forget", "stats", "take", "_answer", ""])
fields = st.dictionaries(
    st.sampled_from(["id", "sub", "messages", "topics", "group", "member", "start", "window", "places"]), plain_values
)
frames = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda op, found: msgpack.packb({"op": op, **found}), operations, fields),
    plain_values.map(msgpack.packb),
    st.binary(min_size=1, max_size=60).map(lambda noise: envelope()[: len(noise)] + noise),
    st.lists(st.binary(max_size=60), max_size=3).map(lambda found: pack_frame("publish", id=1, messages=found)),
    st.text(max_size=50),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(thrown=st.lists(frames, max_size=8))
def test_no_frame_takes_the_hub_down(fuzzed: HubServer, thrown: list[bytes | str]) -> None:
    answers = converse(fuzzed.address, *thrown)
    assert answers[-1]["op"] == "stats"
    assert fuzzed.process.poll() is None


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"\xc1", "not msgpack"),
        (msgpack.packb([1, 2]), "a frame is a map"),
        ("text", "binary, found text"),
        (pack_frame("dance", id=3), "unknown op 'dance'; known: ack, forget"),
        (pack_frame("publish", id=3, messages=7), "a list of binaries"),
        (subscribe(topics=["telemetry.seed.helth"]), "topics must be some of"),
        (subscribe(window=0), "window is from 1"),
        (subscribe(group="~other"), "does not begin with '~'"),
        (pack_frame("forget", id=3, group="nobody"), "no group 'nobody'"),
    ],
)
def test_a_malformed_frame_is_answered_with_what_is_wrong(fuzzed: HubServer, frame: bytes | str, said: str) -> None:
    first, *_ = converse(fuzzed.address, frame)
    assert first["op"] == "error"
    assert said in first["reason"]


def test_of_a_batch_only_the_messages_that_are_none_are_refused(fuzzed: HubServer) -> None:
    before = converse(fuzzed.address)[0]["stats"]["topics"][LIFECYCLE]["messages"]
    newer = msgpack.packb({**msgpack.unpackb(envelope()), "schema_version": "9.0"})
    extra = msgpack.packb({**msgpack.unpackb(envelope()), "colour": "red"})
    batch = [envelope(sequence=90), b"noise", newer, extra, envelope(sequence=91), envelope(sequence=92, k="x" * 20000)]
    answer, last = converse(fuzzed.address, pack_frame("publish", id=5, messages=batch))
    assert answer["op"] == "published"
    refused = {k: (code, reason) for k, code, reason in answer["refused"]}
    assert {k: code for k, (code, _) in refused.items()} == {1: "malformed", 2: "malformed", 3: "malformed", 5: "size"}
    assert "schema_version 9.0 is newer than 1.0" in refused[2][1]
    assert "colour" in refused[3][1]
    assert last["stats"]["topics"][LIFECYCLE]["messages"] == before + 2


def test_a_frame_beyond_every_limit_ends_its_own_connection_alone(fuzzed: HubServer) -> None:
    async def send() -> bool:
        async with aiohttp.ClientSession() as session, session.ws_connect(fuzzed.address) as socket:
            try:
                await socket.send_bytes(b"x" * (FRAME_LIMIT + 1))
                await asyncio.wait_for(socket.receive(), 10.0)
            except ConnectionError:  # the hub did not wait for its end
                return True
            return socket.closed

    assert asyncio.run(send())
    assert converse(fuzzed.address)[-1]["op"] == "stats"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub with two tokens."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens.toml").write_text(ROLES)
    server = HubServer(folder, "--token-file", str(folder / "tokens.toml")).start()
    yield server
    server.stop()


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic " + TRAINER, "Bearer", TRAINER])
def test_without_a_valid_token_nobody_gets_in(guarded: HubServer, header: str | None) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
        converse(guarded.address, headers={} if header is None else {"Authorization": header})


def test_a_token_opens_its_own_topics_and_no_others(guarded: HubServer, bus_to: Callable[..., Oona]) -> None:
    trainer = bus_to(guarded, name="trainer", token=TRAINER)
    operator = bus_to(guarded, name="operator", token=OPERATOR)
    with pytest.raises(BusUnavailable, match=r"trainer may not subscribe to control\.kasmina\.results"):
        trainer.subscribe(RESULTS)
    audit, commands = operator.subscribe("*"), trainer.subscribe(COMMANDS, "model")
    trainer.publish(COMMANDS, {"k": "not allowed"})
    trainer.publish(LIFECYCLE, {"k": "allowed"})
    operator.publish(COMMANDS, {"k": "allowed"})
    assert commands.get(10.0).envelope.sender_id == operator.sender_id
    assert {audit.get(10.0).envelope.topic for _ in range(2)} == {LIFECYCLE, COMMANDS}
    eventually(lambda: trainer.stats()["sent"][COMMANDS]["refused"] == 1)


def test_a_sender_cannot_take_anothers_numbers(guarded: HubServer) -> None:
    """Or one could make the hub take another's messages for repetitions."""
    for token, topic in ((TRAINER, COMMANDS), (OPERATOR, COMMANDS)):
        frame = pack_frame("publish", id=1, messages=[envelope(topic, 7)])
        answer, _ = converse(guarded.address, frame, headers={"Authorization": f"Bearer {token}"})
        assert [code for _, code, _ in answer["refused"]] == (["role"] if token == TRAINER else [])


def test_a_wrong_token_is_named_as_the_reason(guarded: HubServer, bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(guarded, token="nobody's own secret")
    bus.publish(LIFECYCLE, {})
    eventually(lambda: bus.stats()["away"])
    with pytest.raises(BusUnavailable, match="does not know this token"):
        bus._transport.server_stats()
    bus.close(0.1)
    assert bus.stats()["journal"]["spilled"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no [[token]] table"),
        ("token = 3", "no [[token]] table"),
        ("[[token]", "not TOML"),
        ('[[token]]\nname = "a"', "needs one of token and sha256"),
        ('[[token]]\nname = "a"\ntoken = "short"', "at least 16 characters"),
        ('[[token]]\nname = "a"\nsha256 = "zz"', "64 hexadecimal digits"),
        (f'[[token]]\nname = "a"\ntoken = "{TRAINER}"\npublish = ["telemetri.*"]', "no topic matches 'telemetri.*'"),
        (f'[[token]]\nname = "a"\ntoken = "{TRAINER}"\nread = []', "unknown read"),
        (ROLES + ROLES, "one name is there twice; one token is there twice"),
    ],
)
def test_a_token_file_with_a_fault_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tokens.toml").write_text(text)
    with pytest.raises(ValueError, match=r"tokens\.toml") as refused:
        Tokens.read(tmp_path / "tokens.toml")
    assert said in str(refused.value)


def test_messages_travel_under_tls_and_an_unknown_certificate_is_not_trusted(
    scratch: Path, bus_to: Callable[..., Oona]
) -> None:
    certificate, key = scratch / "cert.pem", scratch / "key.pem"
    options = ["-subj", "/CN=hub", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *options],
        check=True,
        capture_output=True,
    )
    server = HubServer(scratch, "--tls-cert", str(certificate), "--tls-key", str(key), scheme="wss").start()
    try:
        bus = bus_to(server, tls_ca=certificate)
        with bus.subscribe(LIFECYCLE) as subscription:
            bus.publish(LIFECYCLE, {"k": 1})
            assert subscription.get(10.0).envelope.payload == {"k": 1}
        stranger = bus_to(server)
        with pytest.raises(BusUnavailable, match="certificate"):
            stranger._transport.server_stats()
        assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "needs a --token-file"),
        (["--tls-cert", "cert.pem"], "belong together"),
        (["--token-file", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_hub_that_cannot_be_started_says_why_in_one_line(scratch: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "esper_triton.oona", "serve", "--port", "0", "--state", scratch, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_two_hubs_do_not_share_a_folder(hub: HubServer) -> None:
    command = [sys.executable, "-m", "esper_triton.oona", "serve", "--port", "0", "--state", hub.folder / "state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, "does another hub use it?" in done.stderr) == (1, True)


def test_the_counters_can_be_asked_for_from_the_command_line(guarded: HubServer, bus_to: Callable[..., Oona]) -> None:
    (before,) = converse(guarded.address, headers={"Authorization": f"Bearer {OPERATOR}"})
    trainer = bus_to(guarded, token=TRAINER)
    trainer.publish(LIFECYCLE, {})
    assert trainer.flush()
    done = subprocess.run(
        [sys.executable, "-m", "esper_triton.oona", "stats", guarded.address],
        env={**os.environ, "ESPER_OONA_TOKEN": OPERATOR},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    counted = json.loads(done.stdout)["topics"][LIFECYCLE]["messages"]
    assert counted == before["stats"]["topics"][LIFECYCLE]["messages"] + 1


def test_a_page_in_a_browser_does_not_get_in(hub: HubServer) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        converse(hub.address, headers={"Origin": "http://somewhere.example"})


def test_a_group_that_will_not_come_back_is_forgotten_and_so_it_stays(
    hub: HubServer, bus_to: Callable[..., Oona]
) -> None:
    bus = bus_to(hub)
    with bus.subscribe(LIFECYCLE, "gone") as subscription:
        forget = [sys.executable, "-m", "esper_triton.oona", "forget", hub.address, "gone"]
        done = subprocess.run(forget, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, "has members" in done.stderr) == (1, True)
        bus.publish(LIFECYCLE, {})
        assert subscription.get(10.0) is not None
    eventually(lambda: converse(hub.address)[0]["stats"]["groups"]["gone"]["lag"] == 1)
    subprocess.run(forget, check=True, timeout=30)
    hub.kill()
    hub.start()
    stats = converse(hub.address)[0]["stats"]
    assert stats["groups"] == {}
    assert stats["topics"][LIFECYCLE]["messages"] == 1


@pytest.mark.parametrize("limit", [0, 2**24 + 1])
def test_a_message_limit_that_frames_have_no_room_for_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="max_message_bytes is from 1 to 16777216"):
        Oona(max_message_bytes=limit)


def test_a_message_that_is_too_large_is_refused_and_those_behind_it_arrive(
    hub: HubServer, bus_to: Callable[..., Oona]
) -> None:
    bus = bus_to(hub, max_message_bytes=2**24)
    with bus.subscribe(LIFECYCLE) as subscription:
        bus.publish(LIFECYCLE, {"k": "x" * 2**23})  # more than the hub takes, not more than this bus does
        bus.publish(LIFECYCLE, {"k": "x" * 2**24})
        bus.publish(LIFECYCLE, {"k": 1})
        delivery = subscription.get(20.0)
        assert delivery.envelope.payload == {"k": 1}
    assert bus.stats()["sent"][LIFECYCLE]["refused"] == 2


async def test_a_hub_that_cannot_write_stops_and_its_senders_keep_what_it_has_not_confirmed(
    scratch: Path, bus_to: Callable[..., Oona], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(state=scratch / "state")
    server = HubServer(scratch)
    await hub.start("127.0.0.1", server.port)

    def full(*message: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(hub._store, "add", full)
    bus = bus_to(server)
    bus.publish(LIFECYCLE, {"k": 1})
    await asyncio.wait_for(hub.stopped.wait(), 20.0)
    assert hub.failed
    await hub.stop()
    await asyncio.to_thread(eventually, lambda: bus.stats()["journal"]["messages"] == 1)
    again = Hub(state=scratch / "state")
    await again.start("127.0.0.1", server.port)
    await asyncio.to_thread(eventually, lambda: bus.stats()["sent"][LIFECYCLE]["sent"] == 1)
    assert again._exchange.stats()["topics"][LIFECYCLE]["messages"] == 1
    await asyncio.to_thread(bus.close)
    await again.stop()
