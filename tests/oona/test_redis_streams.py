"""What is Redis's own: trimming, and servers that have lost what they had."""

from __future__ import annotations

import importlib.abc
import sys
import time
from collections.abc import Callable

import pytest
from bus_servers import RedisServer, eventually

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE
from esper_triton.oona import Limits, Oona


def test_what_is_too_old_goes_unless_some_group_has_still_to_read_it(
    redis_server: RedisServer, bus_to: Callable[..., Oona]
) -> None:
    bus = bus_to(redis_server, limits=Limits(telemetry_age_s=0.3))
    with bus.subscribe(LIFECYCLE, "slow", window=2) as slow, bus.subscribe(LIFECYCLE, "quick") as quick:
        for k in range(5):
            bus.publish(LIFECYCLE, {"k": k})
        for _ in range(5):
            quick.ack(quick.get(10.0))
        first = slow.get(10.0)
        slow.get(10.0)
        slow.ack(first)
        client = bus._transport._redis
        eventually(lambda: client.xpending(f"esper:{LIFECYCLE}", "slow")["pending"] == 2)
        time.sleep(0.35)
        bus._transport.trim()
        # The first one is acknowledged by both; the second is held, the third too by now, and two are to come.
        assert client.xlen(f"esper:{LIFECYCLE}") == 4


def test_old_telemetry_goes(redis_server: RedisServer, bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(redis_server, limits=Limits(telemetry_age_s=0.2))
    for k in range(300):  # Redis trims whole blocks of a hundred
        bus.publish(HEALTH, {"k": k})
    assert bus.flush()
    time.sleep(0.3)
    bus._transport.trim()
    assert bus._transport._redis.xlen(f"esper:{HEALTH}") <= 100


def test_groups_are_made_anew_on_a_server_that_has_lost_them(
    redis_server: RedisServer, bus_to: Callable[..., Oona]
) -> None:
    bus = bus_to(redis_server)
    with bus.subscribe(LIFECYCLE, "group") as subscription:
        bus._transport._redis.flushall()
        bus.publish(LIFECYCLE, {"k": 1})
        assert subscription.get(20.0).envelope.payload == {"k": 1}


def test_what_the_server_gave_in_an_answer_that_was_lost_is_read_again(
    redis_server: RedisServer, bus_to: Callable[..., Oona]
) -> None:
    bus = bus_to(redis_server, lease_s=12.0)
    with bus.subscribe(LIFECYCLE, "group", window=1) as subscription:
        bus.publish(LIFECYCLE, {"k": 0})
        first = subscription.get(10.0)
        bus.publish(LIFECYCLE, {"k": 1})
        assert bus.flush()
        # As this member, and the answer goes nowhere.
        name = bus._transport._readers[subscription]._name
        lost = bus._transport._redis.xreadgroup("group", name, {f"esper:{LIFECYCLE}": ">"})
        assert len(lost[0][1]) == 1
        subscription.ack(first)
        delivery = subscription.get(9.0)  # before its lease is over, when anybody might claim it
        assert delivery is not None
        assert delivery.envelope.payload == {"k": 1}


def test_gaps_and_lag_are_in_the_counters(redis_server: RedisServer, bus_to: Callable[..., Oona]) -> None:
    bus = bus_to(redis_server, telemetry_bound=5)
    with bus.subscribe(LIFECYCLE, "group", window=2) as subscription:
        for k in range(10):
            bus.publish(LIFECYCLE, {"k": k})
        subscription.get(10.0)
        eventually(lambda: bus.stats()["transport"]["groups"]["group"] == {"lag": 8, "held": 2})
    sent = 0
    while not bus.stats()["sent"][HEALTH]["dropped"]:
        for _ in range(1000):
            bus.publish(HEALTH, {"k": sent})
            sent += 1
    bus.publish(HEALTH, {})
    assert bus.flush()
    assert bus.stats()["transport"]["gaps"] == {HEALTH: bus.stats()["sent"][HEALTH]["dropped"]}


class _Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "redis":
            raise ModuleNotFoundError("No module named 'redis'")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "redis" or name.startswith("redis.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "esper_triton.oona.redis_streams", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install 'esper-triton\[redis\]'"):
        Oona("redis://127.0.0.1:1/0")
