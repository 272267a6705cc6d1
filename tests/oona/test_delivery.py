"""What arrives when hubs, Redis servers and consumers are killed and started again. Each test runs with both."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bus_servers import Server, eventually

from esper_triton.contracts.envelope import COMMANDS, HEALTH, LIFECYCLE, RESULTS, SUBMITTED
from esper_triton.oona import Oona

Process = subprocess.Popen[str]


@pytest.fixture
def consumer(server: Server, scratch: Path) -> Iterator[Callable[..., Process]]:
    """`consumer(group, ledger, seconds=None)`: a process of its own that is a member of a group."""
    running: list[Process] = []

    def start(group: str, ledger: Path, seconds: float | None = None) -> Process:
        script = Path(__file__).with_name("consumer.py")
        arguments = [server.address, str(scratch / "consumers"), group, str(ledger)]
        arguments += [] if seconds is None else [str(seconds)]
        process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nothing_is_lost_or_seen_twice_while_the_server_is_killed_and_started_again(
    server: Server, bus_to: Callable[..., Oona]
) -> None:
    topics, count = (COMMANDS, RESULTS, LIFECYCLE), 3000
    sender, reader = bus_to(server, name="sender", lease_s=2.0), bus_to(server, name="reader", lease_s=2.0)
    shared, private = reader.subscribe("*", "group"), reader.subscribe("*")
    published = threading.Event()

    def publish() -> None:
        for k in range(count):
            for topic in topics:
                assert sender.publish(topic, {"k": k})
            if k % 100 == 0:
                time.sleep(0.03)
        published.set()

    thread = threading.Thread(target=publish)
    thread.start()
    found = {name: {topic: [] for topic in topics} for name in ("shared", "private")}

    def take(name: str, subscription: object, wanted: int) -> None:
        while sum(map(len, found[name].values())) < wanted:
            delivery = subscription.get(30.0)
            assert delivery is not None, {topic: len(got) for topic, got in found[name].items()}
            found[name][delivery.envelope.topic].append(delivery.envelope.payload["k"])
            subscription.ack(delivery)

    for wanted in (300, 3000):
        take("shared", shared, wanted)
        server.kill()
        time.sleep(0.2)
        server.start()
    take("shared", shared, count * len(topics))
    take("private", private, count * len(topics))
    thread.join()
    everything = {topic: list(range(count)) for topic in topics}
    assert found == {"shared": everything, "private": everything}
    assert private.missing == 0
    assert sender.flush()
    counts = sender.stats()
    assert counts["journal"]["spilled"] > 0
    assert all(counts["sent"][topic]["refused"] == counts["sent"][topic]["dropped"] == 0 for topic in topics)


def test_work_of_killed_consumers_is_done_by_others_and_none_is_forgotten(
    server: Server, bus_to: Callable[..., Oona], consumer: Callable[..., Process], scratch: Path
) -> None:
    count, ledger = 1500, scratch / "ledger"
    bus = bus_to(server)
    first, second = consumer("forge", ledger), consumer("forge", ledger)
    for k in range(count):
        bus.publish(SUBMITTED, {"k": k})
        if k == 500:
            first.kill()
        if k == 1000:
            second.kill()
            consumer("forge", ledger)
        if k % 10 == 0:
            time.sleep(0.002)

    def lines() -> list[list[str]]:
        return [line.split() for line in ledger.read_text().splitlines()]

    eventually(lambda: len({k for k, *_ in lines()}) == count, timeout_s=30.0)
    done = Counter(int(k) for k, *_ in lines())
    assert sorted(done) == list(range(count))
    # Done before it died, and not acknowledged: of what each of the two had at most.
    assert sum(done.values()) - count <= 2 * 64


def test_a_job_that_takes_longer_than_a_lease_stays_with_the_worker_that_lives(
    server: Server, bus_to: Callable[..., Oona], consumer: Callable[..., Process], scratch: Path
) -> None:
    bus, ledger = bus_to(server, lease_s=2.0), scratch / "ledger"
    worker = consumer("forge", ledger, seconds=4.0)
    bus.publish(SUBMITTED, {"k": 0})
    assert worker.stdout.readline() == "0\n"
    with bus.subscribe(SUBMITTED, "forge") as other:
        eventually(lambda: ledger.read_text() != "")
        assert ledger.read_text().split()[:2] == ["0", "1"]
        assert other.poll() is None


def test_a_killed_workers_job_is_taken_over_within_thirty_seconds(
    server: Server, bus_to: Callable[..., Oona], consumer: Callable[..., Process], scratch: Path
) -> None:
    bus = bus_to(server, lease_s=2.0)
    worker = consumer("forge", scratch / "ledger", seconds=60.0)
    bus.publish(SUBMITTED, {"k": 0})
    assert worker.stdout.readline() == "0\n"
    worker.kill()
    with bus.subscribe(SUBMITTED, "forge") as other:
        delivery = other.get(30.0)
        assert (delivery.envelope.payload["k"], delivery.attempt) == (0, 2)
        other.ack(delivery)


def test_drops_of_telemetry_are_counted_exactly_while_the_server_is_away(
    server: Server, bus_to: Callable[..., Oona]
) -> None:
    sender, reader = bus_to(server, telemetry_bound=50), bus_to(server)
    subscription = reader.subscribe(HEALTH)
    sender.publish(HEALTH, {"k": -1})
    assert subscription.get(10.0).envelope.payload["k"] == -1
    server.kill()
    for k in range(400):
        sender.publish(HEALTH, {"k": k})
        time.sleep(0.0005)
    server.start()
    sender.publish(HEALTH, {"k": "last"})
    assert sender.flush(20.0)
    found = []
    while not found or found[-1] != "last":
        delivery = subscription.get(20.0)
        assert delivery is not None
        found.append(delivery.envelope.payload["k"])
    dropped = sender.stats()["sent"][HEALTH]["dropped"]
    assert dropped > 0
    assert len(found) + dropped == 401
    assert subscription.missing == dropped


def test_a_journal_that_a_killed_process_left_is_sent_by_the_next(
    server: Server, bus_to: Callable[..., Oona], scratch: Path
) -> None:
    reader = bus_to(server)
    subscription = reader.subscribe(LIFECYCLE, "audit")
    server.kill()
    code = (
        "import os, time\n"
        "from esper_triton.oona import Oona\n"
        f"bus = Oona({server.address!r}, name='dead', journal={str(scratch / 'journal')!r})\n"
        "for k in range(700):\n"
        "    bus.publish('audit.lifecycle', {'k': k})\n"
        "    bus.publish('telemetry.seed.health', {'k': k})\n"
        "    time.sleep(0.0005)\n"
        "while bus.stats()['journal']['messages'] < 700:\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == -9
    server.start()
    heir = bus_to(server, name="heir")
    heir.publish(LIFECYCLE, {"k": 700})
    found = []
    for _ in range(701):
        delivery = subscription.get(20.0)
        assert delivery is not None, len(found)
        subscription.ack(delivery)
        found.append(delivery.envelope.payload["k"])
    assert found == list(range(701))
    eventually(lambda: not list((scratch / "journal").rglob("dead*")))


def test_a_slow_consumer_does_not_slow_the_others_or_the_sender(server: Server, bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(server)
    slow, quick = bus.subscribe(LIFECYCLE, "slow", window=1), bus.subscribe(LIFECYCLE, "quick")
    held = None
    for k in range(2000):
        bus.publish(LIFECYCLE, {"k": k})
    for k in range(2000):
        delivery = quick.get(20.0)
        assert delivery.envelope.payload["k"] == k
        quick.ack(delivery)
        held = held or slow.poll()
    assert held.envelope.payload["k"] == 0
    assert bus.flush()
    slow.ack(held)
    assert slow.get(10.0).envelope.payload["k"] == 1
