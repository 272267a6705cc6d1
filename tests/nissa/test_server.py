"""Who may look and who may command, and what is answered to what is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from messages import ARTIFACT, frame, one_of_everything, tell
from yarl import URL

from esper_triton.contracts.commands import CommandResult, CommandStatus
from esper_triton.contracts.envelope import COMMANDS
from esper_triton.nissa.metrics import Metrics
from esper_triton.nissa.server import NissaServer
from esper_triton.nissa.view import View
from esper_triton.oona import Oona
from esper_triton.oona.jobs import Job, JobServer
from esper_triton.oona.tokens import Tokens

WATCHER, OPERATOR, STRANGER = "watcher-0123456789", "operator-0123456789", "stranger-0123456789"
TOKENS = f"""
[[token]]
name = "watcher"
token = "{WATCHER}"
subscribe = ["telemetry.*"]
[[token]]
name = "operator"
token = "{OPERATOR}"
publish = ["control.kasmina.commands"]
[[token]]
name = "stranger"
token = "{STRANGER}"
subscribe = ["audit.*"]
"""
CULL = {"model": "m", "layer": "layers.0", "seed": 0, "command": "cull"}

Served = tuple[NissaServer, aiohttp.ClientSession, View]
Serve = Callable[..., Any]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """`await serve(**options)`: a server, a client of it and its view; gone at the end."""
    started: list[tuple[NissaServer, aiohttp.ClientSession, Oona]] = []

    async def start(*, tokens: str | None = None, bus: Oona | None = None, **options: Any) -> Served:
        (tmp_path / "tokens.toml").write_text(tokens or "")
        known = None if tokens is None else Tokens.read(tmp_path / "tokens.toml")
        metrics = Metrics()
        view = View(metrics)
        metrics.show(view)
        bus = bus or Oona()
        server = NissaServer(view, metrics, bus, tokens=known, **options)
        port = await server.start("127.0.0.1", 0)
        client = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
        started.append((server, client, bus))
        return server, client, view

    yield start
    for server, client, bus in started:
        await client.close()
        await server.stop()
        bus.close()


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


async def test_what_is_seen_is_served_as_a_page_as_json_and_as_metrics(serve: Serve) -> None:
    _, client, view = await serve()
    one_of_everything(view)
    async with client.get("/") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert "default-src 'none'; script-src 'self'" in answer.headers["Content-Security-Policy"]
    async with client.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        assert 'esper_seeds{model="m",state="FOSSILIZED"} 1.0' in await answer.text()
    async with client.get("/api/overview") as answer:
        assert (await answer.json())["models"]["m"]["seeds"] == 4
    async with client.get("/api/seed", params={"model": "m", "layer": "layers.0", "seed": "1"}) as answer:
        assert (await answer.json())["signal"]["alpha"] == 1.0
    async with client.get(f"/api/artifacts/{ARTIFACT}") as answer:
        assert (await answer.json())["error"] == "no store was given to this page (--store)"


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/api/seed", 400, "model, layer and seed"),
        ("/api/seed?model=m&layer=l&seed=-1", 400, "model, layer and seed"),
        ("/api/seed?model=m&layer=l&seed=1", 404, "no seed 1 of layer 'l' of model 'm'"),
        ("/api/artifacts/passwd", 400, "is not an artifact id"),
        ("/static/nothing.js", 404, "no file 'nothing.js'"),
        ("/static/..%2Fserver.py", 404, "no file '../server.py'"),
        ("/elsewhere", 404, "Not Found"),
        ("/api/commands", 405, "Method Not Allowed"),
    ],
)
async def test_what_there_is_not_is_said(serve: Serve, path: str, status: int, reason: str) -> None:
    _, client, _ = await serve()
    async with client.get(URL(path, encoded=True)) as answer:
        assert answer.status == status
        assert reason in (await answer.json())["error"]


async def test_a_name_that_another_page_has_for_this_machine_is_refused(serve: Serve) -> None:
    _, client, _ = await serve()
    async with client.get("/api/overview", headers={"Host": "evil.example:8767"}) as answer:
        assert answer.status == 403
        assert "not as 'evil.example'" in (await answer.json())["error"]
    async with client.get("/live", headers={"Origin": "http://evil.example"}) as answer:
        assert answer.status == 403
    async with client.get("/api/overview", headers={"Host": "localhost:1"}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("token", "looks", "commands"),
    [(None, 401, 401), ("wrong" * 5, 401, 401), (STRANGER, 403, 403), (WATCHER, 200, 403), (OPERATOR, 403, 504)],
)
async def test_with_a_token_file_each_token_may_what_it_may_on_the_bus(
    serve: Serve, token: str | None, looks: int, commands: int
) -> None:
    server, client, view = await serve(tokens=TOKENS, command_s=0.2)
    tell(view, frame(["DORMANT"]))
    assert server.operator_token is None
    for path in ("/api/overview", "/metrics", "/api/seed?model=m&layer=layers.0&seed=0"):
        async with client.get(path, headers=bearer(token)) as answer:
            assert (answer.status, path) == (looks, path)
    async with client.post("/api/commands", data=json.dumps(CULL), headers=bearer(token)) as answer:
        assert answer.status == commands  # 504: it went out, and no model was there
    async with client.ws_connect("/live") as page:
        await page.send_str(json.dumps({"token": token}))
        message = await page.receive(timeout=10)
        assert (message.type is aiohttp.WSMsgType.TEXT) == (looks == 200)
        assert looks == 200 or page.close_code == 4401


async def test_without_a_token_file_the_operators_token_is_needed_to_command(serve: Serve) -> None:
    server, client, _ = await serve(command_s=0.2)
    for token, status in ((None, 401), ("no", 401), ("ü", 401), (server.operator_token, 504)):
        async with client.post("/api/commands", data=json.dumps(CULL), headers=bearer(token)) as answer:
            assert answer.status == status
    assert len(server.operator_token) >= 32


async def test_bytes_that_are_no_text_are_no_token(serve: Serve) -> None:
    _, client, _ = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port)
    writer.write(b"POST /api/commands HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("", 400, "Expecting value"),
        ("[" * 5000, 400, "recursion"),
        ("[]", 400, "a command has model, layer, seed and command, and nothing else"),
        (json.dumps(CULL | {"force": True}), 400, "and nothing else"),
        (json.dumps(CULL | {"command": "reset"}), 400, "no command 'reset'"),
        (json.dumps(CULL | {"command": ["cull"]}), 400, "no command"),
        (json.dumps(CULL | {"seed": -1}), 400, "seed: Input should be greater than or equal to 0"),
        (json.dumps(CULL | {"layer": 3}), 400, "model and layer are text"),
        (json.dumps(CULL | {"layer": "x" * 20_000}), 413, "at most 16384 bytes"),
    ],
)
async def test_what_is_no_command_is_refused_and_does_not_go_out(
    serve: Serve, body: str, status: int, reason: str
) -> None:
    bus = Oona()
    server, client, _ = await serve(bus=bus)
    commands = bus.subscribe(COMMANDS)
    async with client.post("/api/commands", data=body, headers=bearer(server.operator_token)) as answer:
        assert answer.status == status
        assert reason in (await answer.json())["error"]
    bus.flush()
    assert commands.poll() is None


async def test_a_command_is_answered_with_what_became_of_it(serve: Serve) -> None:
    bus = Oona()

    def work(job: Job) -> list[CommandResult]:
        status = CommandStatus.APPLIED if job.message.deadline else CommandStatus.REFUSED
        return [CommandResult(command_id=job.message.command_id, model="m", status=status, state="CULLED")]

    model = JobServer(bus, COMMANDS, "kasmina:m", work, lambda *_: None)
    model.start()
    server, client, _ = await serve(bus=bus)
    async with client.post("/api/commands", data=json.dumps(CULL), headers=bearer(server.operator_token)) as answer:
        assert answer.status == 200
        result = await answer.json()
    assert (result["status"], result["state"]) == ("applied", "CULLED")
    model.stop()


async def test_an_address_that_others_reach_needs_a_token_file(serve: Serve) -> None:
    server, _, _ = await serve()
    with pytest.raises(ValueError, match=r"a page that others can reach, at 0\.0\.0\.0, needs a --token-file"):
        await server.start("0.0.0.0", 0)


async def test_a_page_is_sent_everything_once_and_then_what_has_changed(serve: Serve) -> None:
    _, client, view = await serve()
    tell(view, frame(["DORMANT", "GRAFTING", "DORMANT"], alpha=[0, 0.25, 0], health=[None, 0.5, None]))
    async with client.ws_connect("/live") as page:
        first = json.loads((await page.receive(timeout=10)).data)
        (model,) = first["models"]
        assert len(first["states"]) == 13
        assert model["seeds"]["alpha"] == [0.0, 0.25, 0.0]
        assert model["seeds"]["health"] == [None, 0.5, None]
        tell(view, frame(["DORMANT", "GRAFTING", "CULLED"], at=1001.0, alpha=[0, 0.25, 0], health=[None, 0.5, None]))
        second = json.loads((await page.receive(timeout=10)).data)
        (model,) = second["models"]
        assert "seeds" not in model
        changed = model["patch"]
        assert (changed["at"], changed["state"], changed["alpha"], changed["health"]) == ([2], [9], [0.0], [None])
        tell(view, frame(["DORMANT"], at=1002.0))  # another set of seeds
        third = json.loads((await page.receive(timeout=10)).data)
        assert third["models"][0]["seeds"]["state"] == [0]
