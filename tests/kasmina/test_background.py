from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from esper_triton.contracts.errors import LoadDeadlineExceeded, LoadLost
from esper_triton.kasmina import SeedLifecycleState, background
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.urza import Urza

D, R = 16, 4
S = SeedLifecycleState
LONG_S = 60.0  # far beyond what anything here takes


class Probe:
    """A load that does what it is told and notes what happens to it."""

    who = "the probe"

    def __init__(self, work: Callable[[], object], seconds: float = LONG_S) -> None:
        self.work, self.seconds = work, seconds
        self.began = threading.Event()
        self.failed: list[BaseException] = []
        self.lost = False

    def attempt(self) -> None:
        self.began.set()
        self.work()

    def fail(self, error: BaseException) -> None:
        self.failed.append(error)

    def lose(self) -> None:
        self.lost = True


def test_loads_run_one_at_a_time_in_the_order_in_which_they_were_asked_for() -> None:
    order: list[int] = []
    at_once, running = [], threading.Semaphore(1)

    def work(k: int) -> None:
        at_once.append(not running.acquire(blocking=False))
        time.sleep(0.002)
        order.append(k)
        running.release()

    futures = [background.start(Probe(lambda k=k: work(k)))[0] for k in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(timeout=LONG_S)
    assert order == list(range(20))
    assert at_once == [False] * 20


def test_a_load_that_hangs_is_failed_at_its_deadline_and_the_next_goes_ahead() -> None:
    go = threading.Event()
    hangs, next_one = Probe(lambda: go.wait(LONG_S), seconds=0.05), Probe(lambda: None)
    first, second = background.start(hangs)[0], background.start(next_one)[0]
    second.result(timeout=LONG_S)
    assert first.done()
    assert not go.is_set()
    (error,) = hangs.failed
    assert isinstance(error, LoadDeadlineExceeded)
    assert "the probe: no kernel after 0.05 s" in str(error)
    assert next_one.failed == []
    go.set()


def test_a_deadline_counts_from_the_beginning_of_its_own_load() -> None:
    go = threading.Event()
    before, after = Probe(lambda: go.wait(LONG_S)), Probe(lambda: None, seconds=0.3)
    futures = [background.start(before)[0], background.start(after)[0]]
    assert before.began.wait(LONG_S)
    time.sleep(0.5)  # longer than the second may take
    assert not futures[1].done()
    go.set()
    for future in futures:
        future.result(timeout=LONG_S)
    assert after.began.is_set()
    assert after.failed == []


def test_a_load_that_is_given_up_makes_way_and_one_that_waits_never_begins() -> None:
    go = threading.Event()
    hangs, waits, last = Probe(lambda: go.wait(LONG_S)), Probe(lambda: None), Probe(lambda: None)
    future, give_up = background.start(hangs)
    waiting, give_up_waiting = background.start(waits)
    third, _ = background.start(last)
    assert hangs.began.wait(LONG_S)
    give_up_waiting()
    give_up()
    third.result(timeout=LONG_S)
    assert future.done()
    assert waiting.done()
    assert not waits.began.is_set()
    assert hangs.failed == waits.failed == []
    give_up()  # once more changes nothing
    go.set()


def test_what_a_load_raises_fails_it_and_goes_no_further() -> None:
    def leave() -> None:
        raise SystemExit(3)

    probe = Probe(leave)
    background.start(probe)[0].result(timeout=LONG_S)
    assert [type(error) for error in probe.failed] == [SystemExit]


def test_no_thread_is_left_when_nothing_is_to_be_loaded() -> None:
    background.start(Probe(lambda: None))[0].result(timeout=LONG_S)
    for thread in [t for t in threading.enumerate() if t.name.startswith("esper-load")]:
        thread.join(timeout=LONG_S)
    assert [t.name for t in threading.enumerate() if t.name.startswith("esper-load")] == []


# ---- forks


def in_a_fork(work: Callable[[], bool]) -> bool:
    """What `work` says in a child of this process."""
    child = os.fork()
    if not child:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def loads(store: Urza, artifact: str) -> bool:
    layer = KasminaLayer.adopt(nn.Linear(D, D), num_seeds=1, urza=store, name="in the child")
    return asyncio.run(layer.load_kernel(0, artifact))


def test_a_forked_process_can_load(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    artifact = adapter_for(D, R)
    assert loads(adapter_store, artifact)  # so that the parent has had a thread
    assert in_a_fork(lambda: loads(adapter_store, artifact))


def test_a_process_that_is_forked_while_loads_are_under_way_can_load(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_FORK_WAIT_S", 0.01)
    artifact, go = adapter_for(D, R), threading.Event()
    hangs, waits = Probe(lambda: go.wait(LONG_S)), Probe(lambda: None)
    futures = [background.start(hangs)[0], background.start(waits)[0]]
    assert hangs.began.wait(LONG_S)
    assert in_a_fork(lambda: loads(adapter_store, artifact) and hangs.lost and waits.lost)
    assert not hangs.lost
    assert not waits.lost
    go.set()
    for future in futures:
        future.result(timeout=LONG_S)


def test_a_seed_whose_load_stayed_with_the_parent_is_culled_at_the_childs_next_boundary(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_FORK_WAIT_S", 0.01)
    go = threading.Event()
    hangs = Probe(lambda: go.wait(LONG_S))
    background.start(hangs)
    assert hangs.began.wait(LONG_S)
    layer = KasminaLayer.adopt(nn.Linear(D, D), num_seeds=1, urza=adapter_store, name="layer")

    def culled() -> bool:
        layer.step_boundary()
        error = layer.last_error(0)
        return layer.seed_state(0) is S.CULLED and isinstance(error, LoadLost) and "seed 0 of layer" in str(error)

    async def fork_while_loading() -> bool:
        task = asyncio.create_task(layer.load_kernel(0, adapter_for(D, R)))
        await asyncio.sleep(0)
        seen = in_a_fork(culled)
        layer.step_boundary()
        assert layer.seed_state(0) is S.LOADING
        go.set()
        assert await task is True
        return seen

    assert asyncio.run(fork_while_loading())


# ---- the end of the process

LEAVING = """
import sys, threading
import torch
from esper_triton.kasmina import background

class Busy:
    who, seconds = "busy", 60.0
    began = threading.Event()

    def attempt(self):
        # Through torch's C++ with the interpreter released, over and over.
        values = torch.zeros(1000)
        for _ in range(10_000):
            self.began.set()
            values.uniform_(-1.0, 1.0)

    def fail(self, error):
        print(type(error).__name__, error)

for _ in range(3):
    background.start(Busy())
assert Busy.began.wait(60)
"""

HANGING = """
import threading
from esper_triton.kasmina import background

background._EXIT_WAIT_S = 0.1

class Hangs:
    who, seconds = "hangs", 600.0
    began = threading.Event()

    def attempt(self):
        self.began.set()
        threading.Event().wait(600)

background.start(Hangs())
assert Hangs.began.wait(60)
"""

LOADING = """
import sys
import esper_triton as esper
from esper_triton.kasmina.pending import PendingLoad
from torch import nn

store, artifact = sys.argv[1:]
model = esper.wrap(nn.Sequential(*(nn.Linear(16, 16) for _ in range(10))), [nn.Linear], seeds_per_layer=5,
                   chunking="whole", urza=esper.Urza(store))
for layer in model.kasmina_layers.values():
    for seed in range(5):
        PendingLoad.of(layer, seed, artifact, force=True, seconds=None).start()
"""


def left(script: str, *arguments: str) -> list[str]:
    """The lines that a process which runs `script` and ends prints. It must end well."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_process_that_ends_while_loads_are_under_way_ends_cleanly() -> None:
    for _ in range(4):
        assert left(LEAVING) == ["LoadLost busy: the process is ending, and no load begins any more"] * 2


def test_a_process_ends_although_a_load_hangs() -> None:
    assert left(HANGING) == []


def test_a_process_that_ends_while_fifty_kernels_load_ends_cleanly(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    for _ in range(5):
        assert left(LOADING, str(adapter_store.root), adapter_for(D, R)) == []
