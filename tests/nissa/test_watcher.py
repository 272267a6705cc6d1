"""A watcher shows what comes over a bus, from the earliest that is kept, and what becomes of the bus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from bus_servers import HubServer, Server, eventually
from messages import ARTIFACT, CUDA, frame, move

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE, SUBMITTED
from esper_triton.contracts.events import CompileRequest
from esper_triton.nissa.view import View
from esper_triton.nissa.watcher import Watcher
from esper_triton.oona import Oona


@pytest.fixture
def watch() -> Iterator[Callable[[Oona], View]]:
    """`watch(bus)`: the view of a watcher that is closed at the end."""
    made: list[Watcher] = []

    def start(bus: Oona) -> View:
        watcher = Watcher(bus, View())
        watcher.start()
        made.append(watcher)
        return watcher.view

    yield start
    for watcher in made:
        watcher.close()


def test_what_was_published_before_is_seen_and_telemetry_from_now_on(
    server: Server, bus_to: Callable[..., Oona], watch: Callable[[Oona], View]
) -> None:
    bus = bus_to(server)
    bus.subscribe(SUBMITTED, "tezzeret")
    bus.publish(HEALTH, frame(["TRAINING"], model="old"))
    bus.publish(LIFECYCLE, move("LOADING", "TRAINING"))
    assert bus.flush()
    view = watch(bus_to(server))
    eventually(lambda: len(view.entries) == 1)
    bus.publish(HEALTH, frame(["TRAINING", "DORMANT"]))
    bus.publish(SUBMITTED, CompileRequest(like_artifact_id=ARTIFACT, dtype="float32", targets=(CUDA,)))
    eventually(lambda: len(view.jobs) == 1 and view.models["m"].counts() == {"TRAINING": 1, "DORMANT": 1})
    assert list(view.models) == ["m"]
    eventually(lambda: "tezzeret" in view.server.get("groups", {}))
    assert view.bus["sent"][HEALTH]["dropped"] == 0


def test_what_is_no_message_is_a_line_and_ends_nothing(watch: Callable[[Oona], View]) -> None:
    with Oona() as bus:
        view = watch(bus)
        bus.publish(LIFECYCLE, {"model": "m", "layer": 3})
        bus.publish(LIFECYCLE, move("LOADING", "TRAINING"))
        eventually(lambda: len(view.entries) == 2)
        assert [(entry.kind, entry.failure) for entry in view.entries] == [("malformed", True), ("lifecycle", False)]
        assert "no TransitionEvent" in view.entries[0].text


def test_a_hub_that_goes_and_comes_back_is_told(
    hub: HubServer, bus_to: Callable[..., Oona], watch: Callable[[Oona], View], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper_triton.nissa.watcher._ASK_EVERY_S", 0.05)
    view = watch(bus_to(hub))
    eventually(lambda: bool(view.server))
    hub.kill()
    eventually(lambda: not view.server)
    hub.start()
    eventually(lambda: bool(view.server))
    assert [(entry.kind, entry.failure) for entry in view.entries] == [("bus", True), ("bus", False)]
    assert "away" in view.entries[0].text
