"""`python -m esper_triton.nissa`: the page of a hub, `top` and `status`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bus_servers import HubServer, eventually
from messages import frame, move, one_of_everything
from rich.console import Console

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE
from esper_triton.nissa.live import overview
from esper_triton.nissa.terminal import draw
from esper_triton.nissa.view import View
from esper_triton.oona import Oona

NISSA = [sys.executable, "-m", "esper_triton.nissa"]


@pytest.fixture
def page(hub: HubServer, scratch: Path) -> Iterator[str]:
    """Where the page of a hub is."""
    with (scratch / "nissa.log").open("w") as log:
        process = subprocess.Popen(
            [*NISSA, "--bus", hub.address, "--store", str(scratch / "urza"), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"ESPER_OONA": str(scratch / "journal")},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("page at http://127.0.0.1:"), (scratch / "nissa.log").read_text()
    assert process.stdout.readline().startswith("operator's token: ")
    yield line.removeprefix("page at ").strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NISSA, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_status_is_that_of_the_models_on_the_hub(hub: HubServer, page: str, bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(hub)
    bus.publish(HEALTH, frame(["TRAINING", "GRAFTING"], alpha=[0.0, 0.5]))
    bus.publish(LIFECYCLE, move("GRAFTING", "CULLED", seed=7, error="NonFiniteOutput"))
    found: dict[str, dict] = {}

    def arrived() -> bool:
        done = asked("status", "--page", page, "--json")
        assert done.returncode == 0, done.stderr
        found.update(json.loads(done.stdout))
        return bool(found["models"].get("m", {}).get("seeds")) and bool(found["failures"])

    eventually(arrived, 60.0)
    assert found["models"]["m"]["seeds_by_state"] == {"TRAINING": 1, "GRAFTING": 1}
    assert found["bus"]["up"] is True
    shown = asked("status", "--page", page).stdout
    assert "1 training  1 grafting" in shown
    assert "GRAFTING to CULLED: NonFiniteOutput" in shown


@pytest.mark.parametrize("is_terminal", [False, True])
def test_top_draws_until_it_is_ended(page: str, is_terminal: bool) -> None:
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    with open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen([*NISSA, "top", "--page", page, "--every", "0.1"], stdout=theirs)
        os.close(theirs)
        seen = b""
        while seen.count(b"failures") < 2:
            content = screen.read(65536)
            assert content
            seen += content
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):  # what Linux has for the end of a terminal
            while screen.read(65536):
                pass
        assert process.wait(20) == 0
    assert (b"\x1b[?1049h" in seen) is is_terminal  # the alternate screen, given back at the end
    assert b"no model was seen yet" in seen


def drawn(view: View) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=120, record=True, file=nowhere)
        console.print(draw(overview(view)))
    return console.export_text()


def test_the_terminal_shows_what_the_view_has() -> None:
    view = View()
    one_of_everything(view)
    text = drawn(view)
    assert "4 seeds in 1 layers, epoch 3, step 70, cache 7 hits, 3 misses, 4,096 bytes, 3 faults" in text
    assert "1 fossilized" in text
    (line,) = (line for line in text.splitlines() if "layers.0" in line and "█" in line)
    assert line.split()[1:] == ["layers.0", "1", "fossilized", "1", "█" * 20, "0.9", "90", "2", "│"]
    assert "compile: 4 waiting, 2 with a worker" in text
    assert "BlueprintError: unknown op" in text
    view.server = {}
    text = drawn(view)
    assert "compile: 1 without an answer, no worker" in text
    assert "is away" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--page", "http://127.0.0.1:1"], "does not answer: [Errno 111] Connection refused; is the page"),
        (["status", "--page", "ftp://x"], "begins with http:// or https://, found 'ftp://x'"),
        (["top", "--every", "0"], "--every is 0"),
        (["--bus", "http://x"], "the address of a bus begins with ws://"),
        (["--host", "0.0.0.0"], "a page that others can reach, at 0.0.0.0, needs a --token-file"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key belong together"),
        (["--token-file", "/nowhere"], "No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str) -> None:
    done = asked(*arguments)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[:7]) == (1, "error: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(page: str, hub: HubServer) -> None:
    done = asked("--bus", hub.address, "--port", page.rstrip("/").rsplit(":", 1)[1])
    assert done.returncode == 1
    assert "address already in use" in done.stderr
