"""`python -m esper_triton.tezzeret worker`, in processes of their own, over both kinds of bus."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bus_servers import HubServer, Server, eventually

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.envelope import COMPILE_FAILED, KERNEL_READY, SUBMITTED
from esper_triton.contracts.errors import ArtifactNotFound, BlueprintError, UnknownTarget
from esper_triton.contracts.events import CompileFailed, KernelReady
from esper_triton.contracts.manifest import KernelStatus, TargetSpec
from esper_triton.oona import Oona
from esper_triton.tezzeret.jobs import request_of, submit_over, target_name_of
from esper_triton.tezzeret.targets import parse_target

DIMS = {"d": 24}
SCALE = Blueprint.from_text("""
name = "scale"
input = "h"
graph = "scaled = mul(h, w)"
[dims]
d = {}
[parameters]
w = { shape = ["d"] }
""")
# Says who runs it, and the first one never comes to an end. Where it is proven it may write nothing, and says nothing.
STUCK = """
import contextlib, os, time, torch
with contextlib.suppress(PermissionError), open({ledger!r}, "a", encoding="ascii") as _file:
    _file.write(f"{{os.getppid()}}\\n")
if len(open({ledger!r}, encoding="ascii").read().split()) == 1:
    time.sleep(600)
"""


class Worker:
    """A worker's process; `stop` after it was ended sees that the process is gone."""

    def __init__(self, server: Server, folder: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.log = folder / f"worker-{time.monotonic_ns()}.log"
        # As on a machine of its own: at low priority the tests beside it would come before what it has seconds for.
        command = [sys.executable, "-m", "esper_triton.tezzeret", "worker", "--bus", server.address, "--nice", "0"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--store", str(folder / "urza"), *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"ESPER_OONA": str(folder / "journal")} | (environment or {}),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving compilation.blueprint.submitted of "), self.log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def start_worker(scratch: Path) -> Iterator[Callable[..., Worker]]:
    """`start_worker(server, *arguments)`: ready, and gone at the end."""
    made: list[Worker] = []

    def start(server: Server, *arguments: str) -> Worker:
        worker = Worker(server, scratch, *arguments)
        made.append(worker)
        worker.wait_until_ready()
        return worker

    yield start
    for worker in made:
        if worker.process.poll() is None:
            worker.end(signal.SIGKILL)


def test_workers_compile_what_is_asked_for_and_say_what_is_wrong_with_the_rest(
    server: Server, scratch: Path, bus_to: Callable[..., Oona], start_worker: Callable[..., Worker], adapter_path: Path
) -> None:
    bus = bus_to(server)
    watcher = bus.subscribe((KERNEL_READY, COMPILE_FAILED))
    workers = [start_worker(server), start_worker(server)]
    store = esper.Urza(scratch / "urza")

    async def ask() -> None:
        # Two of one kind at once, and one of two targets: each is answered, and each artifact is there once.
        one, other, two = await asyncio.gather(
            submit_over(bus, SCALE, DIMS, trace_id="trace"),
            submit_over(bus, SCALE, DIMS),
            submit_over(bus, SCALE, DIMS, targets=["cuda:90", "cpu"], pipeline="fast"),
        )
        (ready,), (again,) = one, other
        assert (ready.artifact_id, ready.status) == (again.artifact_id, KernelStatus.VALIDATED)
        assert [store.get(r.artifact_id).manifest.target.label for r in two] == ["cuda90", "cpu"]
        assert [r.status for r in two] == [KernelStatus.PENDING_HARDWARE, KernelStatus.VALIDATED]
        assert store.get(ready.artifact_id).digest == ready.manifest_digest
        assert sorted(store.ids()) == sorted({r.artifact_id for r in (ready, *two)})
        assert store.blueprint(ready.artifact_id).id == SCALE.id
        # Of an artifact's own design, for another dtype.
        (half,) = await submit_over(bus, like=ready.artifact_id, dtype="float16")
        manifest = store.get(half.artifact_id).manifest
        assert (manifest.dtype, manifest.dims, manifest.blueprint_id) == ("float16", DIMS, SCALE.id)
        (hit,) = await submit_over(bus, SCALE, DIMS)
        assert (hit.artifact_id, hit.hit) == (ready.artifact_id, True)
        refusals = {
            "dim 'd' is missing": (BlueprintError, {"blueprint": SCALE}),
            "unknown pipeline 'quick'": (BlueprintError, {"blueprint": SCALE, "dims": DIMS, "pipeline": "quick"}),
            "unknown dtype 'float64'": (BlueprintError, {"like": ready.artifact_id, "dtype": "float64"}),
            "no artifact '0123456789ab-cpu": (ArtifactNotFound, {"like": "0123456789ab-cpu-fast-ba9876543210"}),
            "hand-written source, which is code": (BlueprintError, {"blueprint": Blueprint.load(adapter_path)}),
            "target 'cuda:77' is not": (
                UnknownTarget,
                {"blueprint": SCALE, "dims": DIMS, "targets": [TargetSpec(backend="cuda", arch="77")]},
            ),
        }
        for message, (kind, asked) in refusals.items():
            with pytest.raises(kind, match=message):
                await submit_over(bus, **asked)

    asyncio.run(ask())
    # What nobody here would send.
    good = request_of(SCALE, DIMS, "float32", "cpu", "fast").model_dump(mode="json")
    strange = SCALE.canonical_bytes().decode().replace('"mul"', '"mull"')
    wrong = {
        "malformed": ({"dtype": "float32"}, "MalformedMessage", "targets: Field required"),
        "both": (good | {"like_artifact_id": "0123456789ab-cpu-fast-ba9876543210"}, "MalformedMessage", "exactly one"),
        "op": (good | {"blueprint": strange}, "BlueprintError", "unknown operation 'mull'"),
        "json": (good | {"blueprint": "[" * 100_000}, "BlueprintError", "not valid JSON"),
        "large": (good | {"blueprint": " " * (2 << 20)}, "MalformedMessage", "at most 1048576 characters"),
    }
    while watcher.poll() is not None:
        pass
    for name, (payload, _, _) in wrong.items():
        bus.publish(SUBMITTED, payload, event_id=name)
    told = {}
    while len(told) < len(wrong):
        delivery = watcher.get(30.0)
        assert delivery is not None
        told[delivery.envelope.in_reply_to] = delivery.parse()
    for name, (_, kind, message) in wrong.items():
        assert isinstance(told[name], CompileFailed)
        assert (told[name].error, message in told[name].message) == (kind, True), told[name]
    assert [worker.end() for worker in workers] == [0, 0]


def test_the_job_of_a_worker_that_is_killed_is_done_by_another_within_30_seconds(
    server: Server,
    scratch: Path,
    bus_to: Callable[..., Oona],
    start_worker: Callable[..., Worker],
    adapter_variant: Callable[..., Path],
) -> None:
    ledger = scratch / "ledger"
    path = adapter_variant(source={"import torch\n": STUCK.format(ledger=str(ledger))})
    bus = bus_to(server)
    workers = {worker.pid: worker for worker in (start_worker(server, "--allow-sources") for _ in range(2))}
    answers = bus.subscribe((KERNEL_READY, COMPILE_FAILED))
    bus.publish(SUBMITTED, request_of(Blueprint.load(path), {"d": 24, "r": 4}, "float32", "cpu", "fast"))
    eventually(lambda: ledger.exists() and ledger.read_text().endswith("\n"), 60.0)
    first = int(ledger.read_text())
    started = time.monotonic()
    assert workers.pop(first).end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: len(ledger.read_text().split()) > 1, 30.0)
    assert time.monotonic() - started < 30.0
    (second,) = workers
    delivery = answers.get(60.0)
    assert delivery is not None
    ready = delivery.parse()
    assert isinstance(ready, KernelReady), ready
    assert set(map(int, ledger.read_text().split())) == {first, second}
    store = esper.Urza(scratch / "urza")
    assert store.ids() == [ready.artifact_id]
    assert [change.what for change in store.history(ready.artifact_id)].count("committed") == 1
    assert answers.get(0.5) is None


def test_a_worker_that_is_told_to_end_gives_its_job_back(
    hub: HubServer,
    scratch: Path,
    bus_to: Callable[..., Oona],
    start_worker: Callable[..., Worker],
    adapter_variant: Callable[..., Path],
) -> None:
    ledger = scratch / "ledger"
    path = adapter_variant(source={"import torch\n": STUCK.format(ledger=str(ledger))})
    bus = bus_to(hub)
    worker = start_worker(hub, "--allow-sources", "--grace", "0.2")
    answers = bus.subscribe((KERNEL_READY, COMPILE_FAILED))
    bus.publish(SUBMITTED, request_of(Blueprint.load(path), {"d": 24, "r": 4}, "float32", "cpu", "fast"))
    eventually(lambda: ledger.exists() and ledger.read_text().endswith("\n"), 60.0)
    assert worker.end(signal.SIGTERM) == 0
    assert esper.Urza(scratch / "urza").ids() == []
    start_worker(hub, "--allow-sources")
    delivery = answers.get(60.0)
    assert delivery is not None
    assert isinstance(delivery.parse(), KernelReady)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bus", "http://nowhere"], "the address of a bus begins with ws://, wss:// or redis://"),
        (["--bus", "ws://127.0.0.1:1", "--jobs", "0"], "jobs must be at least 1, found 0"),
        (["--bus", "ws://127.0.0.1:1", "--token-file", "/nowhere/token"], "No such file or directory"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_line(scratch: Path, arguments: list[str], message: str) -> None:
    assert message in refused_start(scratch, *arguments)


def test_a_worker_whose_token_may_not_read_the_queue_does_not_start(scratch: Path) -> None:
    (scratch / "tokens.toml").write_text('[[token]]\nname = "a"\ntoken = "0123456789abcdef"\nsubscribe = ["audit.*"]\n')
    (scratch / "token").write_text("0123456789abcdef\n")
    guarded = HubServer(scratch, "--token-file", str(scratch / "tokens.toml")).start()
    try:
        told = refused_start(scratch, "--bus", guarded.address, "--token-file", str(scratch / "token"))
    finally:
        guarded.stop()
    assert "a may not subscribe to compilation.blueprint.submitted" in told


def refused_start(scratch: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "esper_triton.tezzeret", "worker", "--store", str(scratch / "urza"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[:7]) == (1, "error: ")
    assert "Traceback" not in done.stderr
    return last


def test_a_processor_that_is_not_the_workers_gets_the_best_baseline_that_it_has() -> None:
    here = parse_target("cpu")
    assert target_name_of(here) == "cpu"
    assert target_name_of(parse_target("cuda:90")) == "cuda:90"
    if "sse2" not in here.features:
        pytest.skip("this machine is no x86-64")
    v3 = parse_target("cpu:x86-64-v3")
    assert target_name_of(v3) == "cpu:x86-64-v3"
    other = TargetSpec(backend="cpu", arch="znver9", features=tuple(sorted((*v3.features, "sse2", "adx"))))
    assert target_name_of(other) == "cpu:x86-64-v3"
    assert target_name_of(other.model_copy(update={"features": ("sse2",)})) == "cpu:x86-64"
    with pytest.raises(UnknownTarget, match=r"'neoverse-v2' with features neon cannot be compiled for on this x86_64"):
        target_name_of(TargetSpec(backend="cpu", arch="neoverse-v2", features=("neon",)))
    with pytest.raises(UnknownTarget, match="target 'hip:gfx1' is not"):
        target_name_of(TargetSpec(backend="hip", arch="gfx1"))


def test_a_request_that_nobody_answers_says_so(hub: HubServer, bus_to: Callable[..., Oona]) -> None:
    with pytest.raises(TimeoutError, match=r"no worker has answered .* within 0\.3 s; is there one on this bus\?"):
        asyncio.run(submit_over(bus_to(hub), SCALE, DIMS, timeout_s=0.3))
