"""A hub collects cycles when it has little to do, and not while it delivers."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from esper_triton.oona import __main__ as command


class Node:
    """One that refers to itself, so that counting references never frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    """Whatever a test leaves, the process goes on as it was."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


async def _for_a_while(busy: bool) -> tuple[bool, int]:
    """Whether an old cycle was still there after some looks, and what the collector's last threshold was meanwhile."""
    task = asyncio.create_task(command._collect_garbage())
    await asyncio.sleep(0)
    node = Node()
    there = weakref.ref(node)
    gc.collect(1)  # it is of the oldest generation now
    del node
    loop = asyncio.get_running_loop()
    until, meanwhile = loop.time() + 0.5, gc.get_threshold()[2]
    while loop.time() < until and (busy or there() is not None):
        if busy:
            sum(range(20_000))
        await asyncio.sleep(0 if busy else 0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return there() is not None, meanwhile


@pytest.mark.parametrize(
    ("busy", "at_last_s", "is_there"), [(False, 3600.0, False), (True, 3600.0, True), (True, 0.0, False)]
)
async def test_everything_is_collected_in_a_quiet_moment_or_at_last(
    monkeypatch: pytest.MonkeyPatch, busy: bool, at_last_s: float, is_there: bool
) -> None:
    before = gc.get_threshold()
    monkeypatch.setattr(command, "_LOOK_S", 0.05)
    monkeypatch.setattr(command, "_COLLECT_S", 0.0)
    monkeypatch.setattr(command, "_COLLECT_AT_LAST_S", at_last_s)
    found, meanwhile = await _for_a_while(busy)
    assert found is is_there
    assert meanwhile > 10**9  # nothing collects the oldest by itself
    assert gc.get_threshold() == before
