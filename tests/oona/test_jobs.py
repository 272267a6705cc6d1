"""Queues of jobs: each is done, answered, and only then acknowledged, whatever happens to the one that does it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from bus_servers import HubServer, eventually

from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.envelope import COMMANDS, COMPILE_FAILED, RESULTS, SUBMITTED, Message
from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.events import CompileFailed
from esper_triton.oona import Oona, jobs
from esper_triton.oona.jobs import GivenBack, Job, JobServer
from esper_triton.oona.subscription import Delivery, Subscription

GROUP = "workers"


def command(k: int) -> KasminaCommand:
    return KasminaCommand(command_id=str(k), layer="0", seed=0, command=CommandKind.CULL)


def result(command_id: str, status: CommandStatus, reason: str | None = None) -> CommandResult:
    return CommandResult(command_id=command_id, model="m", status=status, reason=reason)


def applied(job: Job) -> list[Message]:
    assert isinstance(job.message, KasminaCommand)
    return [result(job.message.command_id, CommandStatus.APPLIED)]


def refused(delivery: Delivery, error: Exception) -> Message:
    command_id = str(delivery.envelope.payload.get("command_id", "?"))
    return result(command_id, CommandStatus.REFUSED, f"{type(error).__name__}: {error}")


@contextmanager
def serving(bus: Oona, work: Callable[[Job], list[Message]], **options: int) -> Iterator[JobServer]:
    server = JobServer(bus, COMMANDS, GROUP, work, refused, **options)
    server.start()
    try:
        yield server
    finally:
        assert server.stop(0.0)


def answers(results: Subscription, count: int) -> list[CommandResult]:
    found = [results.get(20.0) for _ in range(count)]
    assert None not in found
    return [one.parse() for one in found if one is not None]


@pytest.fixture
def bus() -> Iterator[Oona]:
    with Oona() as bus:
        yield bus


def test_every_job_is_answered_once_with_the_trace_of_its_message(bus: Oona) -> None:
    results = bus.subscribe(RESULTS)
    for k in range(20):  # before there is anybody
        bus.publish(COMMANDS, command(k), trace_id=f"trace {k}", event_id=f"event {k}")
    with serving(bus, applied, slots=2) as one, serving(bus, applied) as other:
        got = [results.get(20.0) for _ in range(20)]
        eventually(lambda: one.stats()["done"] + other.stats()["done"] == 20)
        assert results.get(0.3) is None
    assert sorted(int(d.parse().command_id) for d in got) == list(range(20))
    for delivery in got:
        k = delivery.parse().command_id
        assert (delivery.envelope.trace_id, delivery.envelope.in_reply_to) == (f"trace {k}", f"event {k}")


def test_what_is_no_job_and_work_that_raises_are_refused_and_end_no_worker(bus: Oona) -> None:
    def work(job: Job) -> list[Message]:
        match job.message.command_id:
            case "1":
                raise ValueError("no such layer")
            case "2":
                raise ZeroDivisionError("a bug")
        return applied(job)

    results = bus.subscribe(RESULTS)
    with serving(bus, work) as server:
        bus.publish(COMMANDS, {"command_id": "0", "what": "is this"})
        for k in (1, 2, 3):
            bus.publish(COMMANDS, command(k))
        got = {one.command_id: one for one in answers(results, 4)}
        eventually(lambda: server.stats() == {"done": 1, "refused": 3, "given_back": 0, "running": 0})
    assert got["0"].reason.startswith("MalformedMessage: control.kasmina.commands of ")
    assert "what: Extra inputs are not permitted" in got["0"].reason
    assert got["1"].reason == "ValueError: no such layer"
    assert got["2"].reason == "ZeroDivisionError: a bug"
    assert got["3"].status is CommandStatus.APPLIED


def test_a_server_that_stops_finishes_its_job_or_gives_it_back(bus: Oona) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(job: Job) -> list[Message]:
        begun.set()
        while not may_end.wait(0.01):
            if job.given_back.is_set():
                raise GivenBack
        return applied(job)

    results = bus.subscribe(RESULTS)
    server = JobServer(bus, COMMANDS, GROUP, slow, refused)
    server.start()
    bus.publish(COMMANDS, command(1))
    assert begun.wait(20.0)
    threading.Timer(0.3, may_end.set).start()
    assert server.stop(20.0)  # waits for it
    assert [one.status for one in answers(results, 1)] == [CommandStatus.APPLIED]
    assert server.stats() == {"done": 1, "refused": 0, "given_back": 0, "running": 0}

    begun.clear()
    may_end.clear()
    server = JobServer(bus, COMMANDS, GROUP, slow, refused)
    server.start()
    bus.publish(COMMANDS, command(2))
    assert begun.wait(20.0)
    assert server.stop(0.0)
    assert server.stats() == {"done": 0, "refused": 0, "given_back": 1, "running": 0}
    assert results.get(0.2) is None
    attempts = []
    with serving(bus, lambda job: [attempts.append(job.attempt), *applied(job)][1:]):
        assert [one.command_id for one in answers(results, 1)] == ["2"]
    assert attempts == [2]


def test_a_job_that_every_worker_dies_of_is_refused(bus: Oona) -> None:
    begun = threading.Event()

    def dies(job: Job) -> list[Message]:
        begun.set()
        assert job.given_back.wait(20.0)
        raise GivenBack

    results = bus.subscribe(RESULTS)
    bus.publish(COMMANDS, command(1), event_id="bad")
    for _ in range(2):
        begun.clear()
        with serving(bus, dies, most_attempts=2):
            assert begun.wait(20.0)
    with serving(bus, applied, most_attempts=2):
        (answer,) = answers(results, 1)
    assert answer.status is CommandStatus.REFUSED
    assert "bad was begun 2 times, and each worker has died of it" in answer.reason


def test_a_job_whose_store_is_away_is_tried_again(bus: Oona, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAUSES_S", (0.01, 0.02))
    tries: list[str] = []

    def work(job: Job) -> list[Message]:
        tries.append(job.message.command_id)
        if job.message.command_id == "2" or len(tries) < 3:
            raise StoreUnavailable("store /urza: no route to it")
        return applied(job)

    results = bus.subscribe(RESULTS)
    with serving(bus, work):
        bus.publish(COMMANDS, command(1))
        bus.publish(COMMANDS, command(2))
        first, second = answers(results, 2)
    assert tries == ["1"] * 3 + ["2"] * 3
    assert first.status is CommandStatus.APPLIED
    assert second.reason == "StoreUnavailable: store /urza: no route to it"


def test_a_hub_that_is_killed_while_a_job_is_done_gets_the_answer_and_the_job_is_done_once(
    hub: HubServer, bus_to: Callable[..., Oona]
) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), []

    def work(job: Job) -> list[Message]:
        begun.set()
        assert may_end.wait(20.0)
        done.append(job.message.command_id)
        return applied(job)

    asker, worker = bus_to(hub), bus_to(hub)
    results = asker.subscribe(RESULTS)
    with serving(worker, work) as server:
        asker.publish(COMMANDS, command(1))
        assert begun.wait(20.0)
        hub.kill()
        may_end.set()
        eventually(lambda: worker.stats()["away"])  # it has its answer and cannot send it
        assert server.stats()["running"] == 1  # so that it does not acknowledge either
        hub.start()
        assert [one.command_id for one in answers(results, 1)] == ["1"]
        eventually(lambda: server.stats()["running"] == 0)
        time.sleep(0.5)
        assert done == ["1"]
    with serving(bus_to(hub), work):
        assert results.get(0.5) is None


def test_an_answer_goes_to_the_topic_of_its_model(bus: Oona) -> None:
    queue = bus.subscribe(SUBMITTED, GROUP)
    failures = bus.subscribe(COMPILE_FAILED)
    bus.publish(SUBMITTED, {"anything": 1}, event_id="e")
    delivery = queue.get(20.0)
    assert bus.reply(delivery, CompileFailed(error="ValueError", message="no"))
    assert failures.get(20.0).envelope.in_reply_to == "e"


@pytest.mark.parametrize("options", [{"slots": 0}, {"most_attempts": 0}])
def test_a_server_that_could_do_nothing_is_refused(bus: Oona, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="slots and most_attempts must be at least 1"):
        JobServer(bus, COMMANDS, GROUP, applied, refused, **options)
