"""The bus within one process, and what is the same whatever is behind it."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from bus_servers import eventually
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.envelope import COMMANDS, EPOCH, HEALTH, LIFECYCLE, RESULTS, SUBMITTED, TOPICS
from esper_triton.contracts.errors import BusUnavailable, MalformedMessage
from esper_triton.contracts.events import EpochEvent
from esper_triton.oona import Limits, Oona, Subscription


@pytest.fixture
def bus() -> Iterator[Oona]:
    with Oona() as bus:
        yield bus


def taken(subscription: Subscription, count: int) -> list[object]:
    """The `k` of as many messages, acknowledged."""
    found = []
    for _ in range(count):
        delivery = subscription.get(10.0)
        assert delivery is not None, f"{len(found)} of {count} came"
        subscription.ack(delivery)
        found.append(delivery.envelope.payload["k"])
    return found


def test_a_bus_has_no_thread_until_it_is_used_and_needs_no_package() -> None:
    code = (
        "import sys, threading, _thread\n"
        "from esper_triton.oona import Oona\n"
        "bus = Oona()\n"
        "assert threading.active_count() == 1 and _thread._count() == 0, 'a thread'\n"
        "assert not {'aiohttp', 'redis', 'torch'} & set(sys.modules), 'a package'\n"
        "subscription = bus.subscribe('audit.*')\n"
        "bus.publish('audit.lifecycle', {'k': 1})\n"
        "assert subscription.get(10.0).envelope.payload == {'k': 1}\n"
        "assert _thread._count() == 1\n"
        "bus.close()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.tuples(st.sampled_from(TOPICS), st.integers(1, 40)), max_size=8),
    group=st.sampled_from([None, "g"]),
)
def test_messages_come_in_order_for_each_topic(counts: list[tuple[str, int]], group: str | None) -> None:
    with Oona() as bus, bus.subscribe("*", group) as subscription:
        wanted: dict[str, list[int]] = {topic: [] for topic in TOPICS}
        for topic, count in counts:
            for _ in range(count):
                wanted[topic].append(len(wanted[topic]))
                assert bus.publish(topic, {"k": wanted[topic][-1]})
        found: dict[str, list[int]] = {topic: [] for topic in TOPICS}
        for _ in range(sum(count for _, count in counts)):
            delivery = subscription.get(10.0)
            assert delivery is not None
            subscription.ack(delivery)
            envelope = delivery.envelope
            assert envelope.sequence == len(found[envelope.topic])
            found[envelope.topic].append(envelope.payload["k"])
        assert found == wanted
        assert subscription.missing == 0


@pytest.mark.parametrize("what", ["audit.lifecycel", "", 7, None, ["audit.lifecycle"]])
def test_publishing_to_no_topic_raises_nothing_and_is_counted(bus: Oona, what: object) -> None:
    assert bus.publish(what, {}) is False  # type: ignore[arg-type]
    assert bus.stats()["unknown_topic"] == 1


class AwayServer:
    """Nobody listens there."""

    address = "ws://127.0.0.1:9"


class _Bad(Mapping[str, object]):
    def __getitem__(self, key: str) -> object:
        raise RuntimeError("no values today")

    def __iter__(self) -> Iterator[str]:
        return iter("a")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("payload", [7, None, "text", _Bad()])
def test_what_is_no_message_is_counted_as_refused_and_those_behind_it_arrive(
    bus: Oona, payload: object, caplog: pytest.LogCaptureFixture
) -> None:
    with bus.subscribe(LIFECYCLE) as subscription:
        assert bus.publish(LIFECYCLE, payload)  # type: ignore[arg-type]
        bus.publish(LIFECYCLE, {"k": 1})
        assert taken(subscription, 1) == [1]
    assert bus.stats()["sent"][LIFECYCLE]["refused"] == 1
    assert "message_refused" in caplog.text


def test_a_subscriber_that_takes_nothing_holds_up_nobody_and_its_drops_are_counted(bus: Oona) -> None:
    with Oona(limits=Limits(telemetry_messages=50)) as bus:
        slow, quick = bus.subscribe(HEALTH, window=1), bus.subscribe(HEALTH)
        for k in range(500):
            bus.publish(HEALTH, {"k": k})
        assert taken(quick, 500) == list(range(500))
        assert bus.flush()
        assert taken(slow, 1) == [0]
        assert taken(slow, 50) == list(range(450, 500))
        assert slow.missing == 449


def test_the_publisher_drops_the_oldest_telemetry_and_receivers_see_a_gap_of_as_many(bus: Oona) -> None:
    with Oona(telemetry_bound=10) as bus:
        gaps = []
        with bus.subscribe(HEALTH, on_gap=gaps.append) as subscription:
            bus.publish(HEALTH, {"k": -1})
            assert taken(subscription, 1) == [-1]
            sent = 1
            while not bus.stats()["sent"][HEALTH]["dropped"]:
                for _ in range(2000):
                    bus.publish(HEALTH, {"k": sent})
                    sent += 1
            bus.publish(HEALTH, {"k": "last"})
            assert bus.flush()
            counts = bus.stats()["sent"][HEALTH]
            found = []
            while not found or found[-1] != "last":
                found += taken(subscription, 1)
        assert counts["sent"] + counts["dropped"] == sent + 1
        assert counts["sent"] == len(found) + 1
        assert subscription.missing == counts["dropped"] == sum(gap.missing for gap in gaps)


def test_large_telemetry_that_waits_for_a_hub_has_a_bound_in_bytes_too(bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(AwayServer(), telemetry_bytes=400_000)
    count, large = 100, {"values": "x" * 10_000}  # four times its bytes: room for nine
    bus.publish(HEALTH, {})
    eventually(lambda: bus.stats()["away"])
    for _ in range(count):
        bus.publish(HEALTH, large)
    eventually(lambda: len(bus._lanes[HEALTH].buffer) == 9)
    bus.close(0.1)
    assert bus.stats()["sent"][HEALTH]["dropped"] == count + 1


def test_what_must_not_be_lost_is_refused_when_its_lane_is_full_and_nothing_is_dropped() -> None:
    limits = Limits(messages=4)
    with Oona(kept_bound=3, limits=limits) as bus, bus.subscribe(LIFECYCLE, "g", window=1) as subscription:
        accepted = []
        for k in range(200):
            if bus.publish(LIFECYCLE, {"k": k}):
                accepted.append(k)
            time.sleep(0.001)
        counts = bus.stats()["sent"][LIFECYCLE]
        assert len(accepted) + counts["refused"] == 200
        assert counts["refused"] > 0
        assert counts["dropped"] == 0
        assert taken(subscription, len(accepted)) == accepted


def test_members_of_a_group_share_and_a_closed_one_leaves_its_messages_to_the_others(bus: Oona) -> None:
    first, second = bus.subscribe(SUBMITTED, "forge", window=2), bus.subscribe(SUBMITTED, "forge", window=2)
    for k in range(6):
        bus.publish(SUBMITTED, {"k": k})
    assert bus.flush()
    held = [first.get(10.0), first.get(10.0)]
    assert first.poll() is None
    first.ack(held[0])
    found = taken(second, 1)
    first.close()
    found += taken(second, 4)
    second.close()
    assert sorted([held[0].envelope.payload["k"], *found]) == list(range(6))
    assert held[1].envelope.payload["k"] in found


def test_a_message_that_is_tried_again_says_so(bus: Oona) -> None:
    first = bus.subscribe(SUBMITTED, "forge")
    bus.publish(SUBMITTED, {"k": 0})
    assert first.get(10.0).attempt == 1
    first.close()
    with bus.subscribe(SUBMITTED, "forge") as second:
        assert second.get(10.0).attempt == 2


def test_a_request_is_answered_with_the_reply_to_it(bus: Oona) -> None:
    command = KasminaCommand(command_id="c", layer="fc", seed=0, command=CommandKind.CULL)

    def answer() -> None:
        with bus.subscribe(COMMANDS, "model") as commands:
            ready.set()
            delivery = commands.get(10.0)
            bus.publish(RESULTS, {"k": "another's"}, in_reply_to="somebody")
            asked = delivery.parse()
            assert asked == command
            bus.reply(delivery, CommandResult(command_id=asked.command_id, model="m", status=CommandStatus.APPLIED))
            commands.ack(delivery)
            bus.flush()

    ready = threading.Event()
    thread = threading.Thread(target=answer)
    thread.start()
    ready.wait(10.0)
    envelope = bus.request(COMMANDS, command, timeout_s=10.0, trace_id="t")
    thread.join()
    assert envelope.payload["command_id"] == "c"
    assert envelope.trace_id == "t"


def test_a_request_that_nobody_answers_ends_in_time_and_one_to_another_topic_is_refused(bus: Oona) -> None:
    with pytest.raises(TimeoutError, match=RESULTS):
        bus.request(COMMANDS, {}, timeout_s=0.05)
    with pytest.raises(ValueError, match=r"telemetry.* are not answered"):
        bus.request(HEALTH, {})


def test_parsing_what_is_not_the_topics_model_says_what_is_wrong(bus: Oona) -> None:
    with bus.subscribe(EPOCH) as subscription:
        bus.publish(EPOCH, {"k": 1})
        bus.publish(EPOCH, EpochEvent(model="m", epoch=1, seeds_by_state={"DORMANT": 4}))
        with pytest.raises(MalformedMessage, match="model: Field required"):
            subscription.get(10.0).parse()
        assert subscription.get(10.0).parse().seeds_by_state == {"DORMANT": 4}


def test_patterns_and_groups_that_cannot_be_are_refused_with_the_nearest(bus: Oona) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'audit\.lifecycle'"):
        bus.subscribe("audit.lifecycel")
    with pytest.raises(ValueError, match="window"):
        bus.subscribe("*", window=0)
    with pytest.raises(ValueError, match="'~'"):
        bus.subscribe("*", "~mine")
    with pytest.raises(ValueError, match="ws://"):
        Oona("http://127.0.0.1")


async def test_an_event_loop_waits_for_messages_without_being_held_up(bus: Oona) -> None:
    subscription = bus.subscribe(LIFECYCLE)
    waiting = asyncio.create_task(subscription.receive())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    bus.publish(LIFECYCLE, {"k": 3})
    delivery = await asyncio.wait_for(waiting, 10.0)
    assert delivery.envelope.payload == {"k": 3}
    waiting = asyncio.create_task(subscription.receive())
    await asyncio.sleep(0)
    subscription.close()
    assert await asyncio.wait_for(waiting, 10.0) is None


def test_a_closed_bus_takes_nothing_and_ends_its_subscriptions() -> None:
    bus = Oona()
    subscription = bus.subscribe("*")
    bus.publish(LIFECYCLE, {"k": 1})
    bus.close()
    assert subscription.closed
    assert subscription.get() is None
    assert bus.publish(LIFECYCLE, {}) is False
    assert bus.stats()["sent"][LIFECYCLE]["refused"] == 1
    with pytest.raises(BusUnavailable, match="closed"):
        bus.subscribe("*")


def test_a_forked_child_is_a_sender_of_its_own() -> None:
    with Oona() as bus:
        subscription = bus.subscribe("*")
        bus.publish(LIFECYCLE, {"k": 1})
        assert taken(subscription, 1) == [1]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            own = bus.subscribe(LIFECYCLE)
            bus.publish(LIFECYCLE, {"k": 2})
            delivery = own.get(10.0)
            os.write(writer, f"{delivery.envelope.sequence} {delivery.envelope.sender_id}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        sequence, sender_id = os.read(reader, 200).decode().split()
        os.close(reader)
        assert (int(sequence), sender_id != bus.sender_id) == (0, True)
        bus.publish(LIFECYCLE, {"k": 3})
        assert taken(subscription, 1) == [3]
        assert bus.stats()["sent"][LIFECYCLE]["sent"] == 2


def test_telemetry_that_nobody_reads_is_not_kept_and_its_numbers_go_on(bus: Oona) -> None:
    for k in range(5):
        bus.publish(HEALTH, {"k": k})
    eventually(lambda: bus.stats()["sent"][HEALTH]["unheard"] == 5)
    with bus.subscribe(HEALTH) as subscription:
        bus.publish(HEALTH, {"k": 5})
        delivery = subscription.get(10.0)
        assert delivery.envelope.sequence == 5


@pytest.mark.filterwarnings("error")
def test_nothing_is_left_of_a_closed_bus(bus_to: Callable[..., Oona]) -> None:
    bus = bus_to()
    bus.subscribe("*")
    bus.publish(LIFECYCLE, {})
    bus.close()
    pump = bus._pump
    assert pump.ended.is_set()
    gc.collect()
