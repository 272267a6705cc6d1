"""Compiles in processes of their own: what one of them does to itself costs its task alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError, CompileError, ProofFailed, StoreUnavailable, UnknownTarget
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.tezzeret.pool import CompileTask, Forge, TaskState

DIMS = {"d": 24, "r": 4}
IMPORTS = "import torch\n"


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge(jobs=1) as made:
        yield made


@pytest.fixture
def that_runs(adapter_variant: Callable[..., Path]) -> Callable[[str], Blueprint]:
    """`that_runs(code)`: the adapter whose source runs `code` when it is loaded, which is in the worker."""

    def variant(code: str) -> Blueprint:
        return Blueprint.load(adapter_variant(source={IMPORTS: f"{IMPORTS}{code}\n"}))

    return variant


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def workers_of(forge: Forge) -> list[int]:
    return [worker.pid for worker in forge._serving.values() if worker is not None]


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_submitted_compile_ends_as_a_proven_artifact_and_the_next_one_is_a_hit(
    forge: Forge, adapter_path: Path, store: esper.Urza
) -> None:
    blueprint = Blueprint.load(adapter_path)
    task = forge.submit(blueprint, DIMS, "float32", ["cpu", "cuda:90"], urza=store)
    assert isinstance(task, CompileTask)
    assert not task.done()
    artifacts = asyncio.run(_awaited(task))
    assert [artifact.status for artifact in artifacts] == [KernelStatus.VALIDATED, KernelStatus.PENDING_HARDWARE]
    assert (task.state, task.progress, task.error) == (TaskState.DONE, 1.0, None)
    assert [outcome.hit for outcome in task.outcomes] == [False, False]
    assert sorted(artifact.id for artifact in artifacts) == store.ids()
    again = forge.submit(blueprint, DIMS, "float32", ["cpu", "cuda:90"], urza=store)
    assert again.result() == artifacts
    assert [outcome.hit for outcome in again.outcomes] == [True, True]
    here = esper.compile(blueprint, DIMS, targets=["cpu", "cuda:90"], urza=store)
    assert here == artifacts


async def _awaited(task: CompileTask) -> esper.Artifact:
    return await task


def test_a_worker_signs_as_the_store_says(forge: Forge, adapter_path: Path, tmp_path: Path) -> None:
    store = esper.Urza(tmp_path / "urza", keys=tmp_path / "elsewhere", max_bytes=1 << 30)
    artifact = forge.submit(Blueprint.load(adapter_path), DIMS, urza=store).result()
    assert store.load(artifact.id)[0].status is KernelStatus.VALIDATED  # signed by keys that this store trusts
    assert (tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "urza" / "keys").exists()


def test_a_worker_has_the_token_of_a_store_elsewhere_from_the_store_alone(
    forge: Forge, adapter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESPER_URZA_TOKEN", raising=False)
    token = "a-token-that-stands-nowhere-else"
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"write,validate {token}\n")
    command = [sys.executable, "-m", "esper_triton.urza", "serve", "--json", "--port", "0", "--token-file", str(tokens)]
    server = subprocess.Popen([*command, "--urza", str(tmp_path / "urza")], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        store = esper.Urza(url, token=token, cache=tmp_path / "cache")
        artifact = forge.submit(Blueprint.load(adapter_path), DIMS, urza=store).result()
        for pid in workers_of(forge):
            for file in ("cmdline", "environ"):
                assert token.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
        store.close()
    finally:
        server.terminate()
        server.wait(20)
        server.stdout.close()
    assert esper.Urza(tmp_path / "urza").load(artifact.id)[0].status is KernelStatus.VALIDATED


def test_a_store_whose_options_cannot_be_sent_is_refused(forge: Forge, adapter_path: Path, tmp_path: Path) -> None:
    store = esper.Urza(f"file://{tmp_path}/there", cache=tmp_path / "cache", storage_options={"asked": object()})
    with pytest.raises(StoreUnavailable, match="cannot be opened by a worker: Object of type object is not JSON"):
        forge.submit(Blueprint.load(adapter_path), DIMS, urza=store)


def test_a_wait_that_is_cancelled_leaves_the_compile_alone(forge: Forge, adapter_path: Path, store: esper.Urza) -> None:
    task = forge.submit(Blueprint.load(adapter_path), DIMS, urza=store)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(task), 0.001)
        await task

    asyncio.run(impatient())
    assert store.ids() == [task.result().id]


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ({"dims": {"d": 24}}, BlueprintError, "dim 'r' is missing"),
        ({"dims": {"d": 24, "r": "4"}}, BlueprintError, "dim 'r' is '4', an integer is expected"),
        ({"dims": {"d": 24, "r": Path("4")}}, BlueprintError, "dim 'r' is .* an integer is expected"),
        ({"dims": DIMS, "dtype": "float23"}, BlueprintError, "unknown dtype 'float23'"),
        ({"dims": DIMS, "targets": "cuda:91"}, UnknownTarget, "target 'cuda:91' is not"),
        ({"dims": DIMS, "pipeline": "fats"}, BlueprintError, "unknown pipeline 'fats'"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_as_without_a_pool(
    forge: Forge, adapter_path: Path, store: esper.Urza, request_: dict[str, object], kind: type, message: str
) -> None:
    task = forge.submit(Blueprint.load(adapter_path), urza=store, **request_)
    with pytest.raises(kind, match=message):
        task.result()
    assert (task.state, type(task.error)) == (TaskState.FAILED, kind)
    assert not store.root.exists()


def test_a_compiler_error_and_a_failed_proof_keep_their_kind(
    forge: Forge, adapter_variant: Callable[..., Path], store: esper.Urza
) -> None:
    path = adapter_variant(source={"tl.erf(z": "tl.erff(z"})
    with pytest.raises(CompileError, match="kernel 'adapter_forward' for cpu does not compile"):
        forge.submit(Blueprint.load(path), DIMS, urza=store).result()
    assert store.ids() == []
    path = adapter_variant(source={" + up_bias[None, :]": ""})
    with pytest.raises(ProofFailed, match="was stored as REJECTED: equivalence: rows="):
        forge.submit(Blueprint.load(path), DIMS, urza=store).result()


def test_what_a_source_prints_does_not_come_between_the_answers(
    forge: Forge, that_runs: Callable[[str], Blueprint], store: esper.Urza
) -> None:
    blueprint = that_runs("import os\nprint('{\"built\": []}', flush=True)\nos.write(1, b'noise\\n')")
    assert forge.submit(blueprint, DIMS, urza=store).result().status is KernelStatus.VALIDATED


def test_a_worker_that_is_killed_costs_one_task_and_is_replaced(
    forge: Forge, that_runs: Callable[[str], Blueprint], adapter_path: Path, store: esper.Urza
) -> None:
    task = forge.submit(that_runs("import os\nos.kill(os.getpid(), 9)"), DIMS, urza=store)
    after = forge.submit(Blueprint.load(adapter_path), DIMS, urza=store)
    with pytest.raises(CompileError, match=r"'bottleneck_adapter': the process that compiled it died: .* by SIGKILL"):
        task.result()
    assert after.result().status is KernelStatus.VALIDATED


def test_the_last_words_of_a_worker_that_dies_are_passed_on(
    forge: Forge, that_runs: Callable[[str], Blueprint], store: esper.Urza
) -> None:
    task = forge.submit(that_runs("import os\nos.write(2, b'the cause\\n')\nos._exit(3)"), DIMS, urza=store)
    with pytest.raises(CompileError, match="ended with exit code 3, having said: the cause"):
        task.result()


def test_a_worker_that_hangs_is_ended_at_its_time_limit(
    that_runs: Callable[[str], Blueprint], store: esper.Urza
) -> None:
    with Forge(store, jobs=1, time_limit=1.0) as forge:
        task = forge.submit(that_runs("import time\ntime.sleep(3600)"), DIMS)
        with pytest.raises(CompileError, match=r"took longer than time_limit=1 s and was ended; nothing was stored"):
            task.result()
        wait_until(lambda: not any(map(is_alive, workers_of(forge))))
    assert store.ids() == []


def test_a_worker_that_computes_for_too_long_is_ended_at_its_cpu_limit(
    that_runs: Callable[[str], Blueprint], store: esper.Urza
) -> None:
    with Forge(store, jobs=1, cpu_limit=1.0) as forge:
        task = forge.submit(that_runs("while True: pass"), DIMS)
        with pytest.raises(CompileError, match=r"used more than cpu_limit=1 s of processor time"):
            task.result()


def test_a_compile_that_takes_too_much_memory_fails_and_says_so(
    that_runs: Callable[[str], Blueprint], adapter_path: Path, store: esper.Urza
) -> None:
    with Forge(store, jobs=1, memory_limit=2 << 30) as forge:
        greedy = forge.submit(that_runs("hoard = bytearray(4 << 30)"), DIMS)
        modest = forge.submit(Blueprint.load(adapter_path), DIMS)
        with pytest.raises(CompileError, match=r"needed more memory than memory_limit=2147483648 bytes"):
            greedy.result()
        assert modest.result().status is KernelStatus.VALIDATED


def test_a_task_can_be_cancelled_while_it_waits_and_while_it_runs(
    that_runs: Callable[[str], Blueprint], adapter_path: Path, store: esper.Urza
) -> None:
    with Forge(store, jobs=1) as forge:
        running = forge.submit(that_runs("import time\ntime.sleep(3600)"), DIMS)
        waiting = forge.submit(Blueprint.load(adapter_path), DIMS)
        wait_until(lambda: running.state is TaskState.RUNNING)
        assert waiting.cancel()
        assert running.cancel()
        assert not running.cancel()
        for task in (running, waiting):
            assert (task.state, task.stage) == (TaskState.CANCELLED, "cancelled")
            with pytest.raises(CompileError, match="compile of blueprint 'bottleneck_adapter' was cancelled"):
                task.result()


def test_closing_ends_the_workers_and_cancels_what_is_left(
    that_runs: Callable[[str], Blueprint], store: esper.Urza
) -> None:
    forge = Forge(store, jobs=1)
    task = forge.submit(that_runs("import time\ntime.sleep(3600)"), DIMS)
    wait_until(lambda: task.state is TaskState.RUNNING)
    pids = workers_of(forge)
    assert len(pids) == 1
    forge.close()
    assert task.state is TaskState.CANCELLED
    assert not any(map(is_alive, pids))
    with pytest.raises(RuntimeError, match="the forge is closed"):
        forge.submit(that_runs(""), DIMS)


def test_a_worker_ends_with_the_process_that_it_works_for(adapter_path: Path, tmp_path: Path) -> None:
    variant = tmp_path / "hangs.toml"
    variant.write_text(adapter_path.read_text())
    source = adapter_path.with_suffix(".py").read_text()
    (tmp_path / adapter_path.with_suffix(".py").name).write_text(f"{source}\nimport time\ntime.sleep(3600)\n")
    script = (
        "import os, sys, time\n"
        "import esper_triton as esper\n"
        "from esper_triton.tezzeret.pool import Forge\n"
        "forge = Forge(esper.Urza(sys.argv[2]), jobs=1)\n"
        "task = forge.submit(esper.Blueprint.load(sys.argv[1]), {'d': 24, 'r': 4})\n"
        "while task.state != 'RUNNING': time.sleep(0.02)\n"
        "print(*(worker.pid for worker in forge._serving.values()), flush=True)\n"
        "time.sleep(3600)\n"
    )
    command = [sys.executable, "-c", script, str(variant), str(tmp_path / "urza")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
        finally:
            parent.kill()
    wait_until(lambda: not is_alive(pid))


def test_a_forked_child_has_a_pool_of_its_own_and_the_parents_goes_on(
    forge: Forge, adapter_path: Path, store: esper.Urza
) -> None:
    task = forge.submit(Blueprint.load(adapter_path), DIMS, urza=store)
    wait_until(lambda: task.state is not TaskState.WAITING)
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run here
        left = isinstance(task.error, CompileError) and "stayed with the parent" in str(task.error)
        os._exit(0 if left and forge._serving == {} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert task.result().status is KernelStatus.VALIDATED


def test_the_same_request_from_eight_processes_is_compiled_once(adapter_path: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "import torch, triton, esper_triton as esper\n"
        "from esper_triton.tezzeret.builds import build_all\n"
        "from esper_triton.tezzeret.request import requests_for\n"
        "from esper_triton.tezzeret.targets import parse_target\n"
        "blueprint = esper.Blueprint.load(sys.argv[1])\n"
        "target = (parse_target('cpu'),)\n"
        "children = []\n"
        "for index in range(8):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.environ['TRITON_CACHE_DIR'] = os.path.join(sys.argv[3], str(index))\n"
        "        requests = requests_for(blueprint, {'d': 24, 'r': 4}, 'float32', target, 'standard', 0.0)\n"
        "        (built,) = build_all(requests, esper.Urza(sys.argv[2]), lambda *_: None)\n"
        "        sys.stdout.write(f'{built.artifact.id} {built.artifact.status} {built.hit}\\n')\n"
        "        sys.stdout.flush()\n"
        "        os._exit(0)\n"
        "    children.append(child)\n"
        "sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))\n"
    )
    command = [sys.executable, "-c", script, str(adapter_path), str(tmp_path / "urza"), str(tmp_path / "caches")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8
    assert {(artifact_id, status) for artifact_id, status, _ in lines} == {
        (esper.Urza(tmp_path / "urza").ids()[0], "VALIDATED")
    }
    assert [hit for _, _, hit in lines].count("False") == 1


@pytest.mark.parametrize("option", ["jobs", "memory_limit", "time_limit", "cpu_limit"])
def test_limits_have_to_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, found 0"):
        Forge(**{option: 0})


def test_a_forge_without_a_store_or_a_target_says_so(adapter_path: Path, store: esper.Urza) -> None:
    blueprint = Blueprint.load(adapter_path)
    with pytest.raises(ValueError, match="no Urza to store in"):
        Forge().submit(blueprint, DIMS)
    with pytest.raises(UnknownTarget, match="no target was given"):
        Forge(store).submit(blueprint, DIMS, targets=[])


def test_a_worker_lets_training_go_first(forge: Forge, adapter_path: Path, store: esper.Urza) -> None:
    forge.submit(Blueprint.load(adapter_path), DIMS, urza=store).result()
    (pid,) = workers_of(forge)
    expected = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 15)
    for one in (pid, *children_of(pid)):  # what proves is a child, in a session of its own
        assert os.getpriority(os.PRIO_PROCESS, one) == expected
        group = Path(f"/proc/{one}/autogroup")
        assert not group.exists() or group.read_text().split()[-1] == str(expected)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # and a worker that does nothing at all does not hold up a submit
        task = forge.submit(Blueprint.load(adapter_path), {"d": 25, "r": 4}, urza=store)
        assert not task.done()
        os.kill(pid, signal.SIGCONT)
        assert task.result().status is KernelStatus.VALIDATED
