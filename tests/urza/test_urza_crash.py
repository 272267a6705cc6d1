"""Writers that are killed, disks that fail, and many writers at once: an artifact is whole or not there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from crash_points import EVERY_STEP, every_call
from seeding import memory_folder

from esper_triton.contracts.errors import ArtifactNotFound, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.urza import Urza

# At least so many file operations has each, and it is killed in every one. Right before an operation is nearly the same
# as in the one before it, and is tried where most is at stake.
POINTS = {
    "commit": 115,
    "commit of what has arrived": 180,
    "commit into a new store": 190,
    "change of status": 115,
    "import": 120,
    "collection": 100,
    "pin": 45,
    "unpin": 25,
    "load": 30,
    "question": 35,
    "refusal": 60,
}
DEATHS = [(name, "in") for name in POINTS] + [("commit", "before"), ("change of status", "before")]
assert sum(POINTS[name] for name, _ in DEATHS) > 1000


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch, step: int, *, done: bool) -> Iterator[list[str]]:
    """Lets the `step`-th file operation raise OSError, after it has taken effect where `done`; yields the operations
    seen. Swallows the StoreUnavailable that a caller then sees."""
    seen: list[str] = []

    def call(name: str, real: Callable[..., object], args: tuple, kwargs: dict) -> object:
        seen.append(name)
        if len(seen) != step:
            return real(*args, **kwargs)
        if done:
            result = real(*args, **kwargs)
            if name == "open":
                os.close(result)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        for name, stand_in in every_call(call).items():
            patch.setattr(os, name, stand_in)
        with suppress(StoreUnavailable):
            yield seen


def test_data_is_on_the_disk_before_it_has_a_name_and_the_name_before_the_next_one(urza, make_artifact, monkeypatch):
    manifest, blobs = make_artifact()
    synced: list[str] = []  # since the last name was given
    named: list[str] = []
    before_the_last_name: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if named:
            assert os.path.dirname(named[-1]) in synced, "the folder of the last name"
        assert os.path.join(os.readlink(f"/proc/self/fd/{src_dir_fd}"), source) in synced, "the bytes of this one"
        before_the_last_name[:] = synced
        named.append(os.path.join(os.readlink(f"/proc/self/fd/{dst_dir_fd}"), target))
        synced.clear()
        real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    real = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    urza.commit(manifest, blobs)
    keys = [str(urza.root / "keys" / name) for name in ("forge.key", "prover.key", "public")]
    assert named == [str(urza.root / "urza.json"), *keys] + [
        str(urza.object_path(digest)) for digest in (*blobs, manifest.digest)
    ] + [str(urza.root / "refs" / manifest.id)]
    assert str(urza.root / "refs") in synced
    assert str(urza.root / "audit.log") in before_the_last_name, "the change was in the log before it was made"


@pytest.fixture
def memory_path(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there can be one."""
    with tempfile.TemporaryDirectory(dir=memory_folder() or tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("name", "when"), DEATHS)
def test_a_process_that_is_killed_at_any_file_operation_leaves_all_or_nothing(memory_path, name, when):
    script = Path(__file__).with_name("crash_points.py")
    command = [sys.executable, "-W", "error", str(script), str(memory_path), name, when]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["points"] >= POINTS[name]
    assert outcome["found"] == outcome["expected"]


@pytest.mark.parametrize("done", [False, True], ids=["before an operation", "after an operation"])
def test_a_disk_that_fails_at_any_step_of_a_commit_leaves_all_or_nothing(memory_path, make_artifact, monkeypatch, done):
    manifest, blobs = make_artifact()
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        root = memory_path / str(step) / "urza"
        with failing_disk(monkeypatch, step, done=done) as seen:
            Urza(root).commit(manifest, blobs)
        if len(seen) < step:
            break
        reopened = Urza(root)
        visible = manifest.id in reopened
        seen_outcomes.add(visible)
        if visible:
            assert reopened.load(manifest.id)[1] == blobs
        else:
            with pytest.raises(ArtifactNotFound):
                reopened.load(manifest.id)
        assert reopened.commit(manifest, blobs).manifest == manifest
        assert reopened.load(manifest.id)[1] == blobs
        assert reopened.verify().faults == ()
        assert os.listdir(root / "tmp") == []
    assert step > 100, "the operations of a commit were seen"
    assert seen_outcomes == {False, True}


def test_a_disk_that_fails_at_any_step_of_a_change_of_status_leaves_the_old_or_the_new_one(
    memory_path, make_artifact, monkeypatch
):
    manifest, blobs = make_artifact()
    report = b"a report"
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        urza = Urza(memory_path / str(step))
        urza.commit(manifest, blobs)
        with failing_disk(monkeypatch, step, done=False) as seen:
            urza.set_status(manifest.id, KernelStatus.VALIDATED, report)
        if len(seen) < step:
            break
        artifact, found = urza.load(manifest.id)
        seen_outcomes.add(artifact.status)
        validated = artifact.status is KernelStatus.VALIDATED
        assert found == (blobs | {sha256(report): report} if validated else blobs)
        assert urza.set_status(manifest.id, KernelStatus.VALIDATED, report).manifest.report == sha256(report)
        assert urza.verify().faults == ()
    assert seen_outcomes == {KernelStatus.PENDING_BENCHMARKING, KernelStatus.VALIDATED}


def commit_and_validate(root: Path, manifest: Manifest, blobs: dict[str, bytes], barrier, answers) -> None:
    """One of several processes; its last answer is what it saw at the end."""
    urza = Urza(root)
    barrier.wait(timeout=60)
    committed = urza.commit(manifest, blobs)
    validated = urza.set_status(manifest.id, KernelStatus.VALIDATED, manifest.created_at.encode())
    answers.put((committed.manifest.created_at, validated.digest))


def test_processes_that_commit_one_artifact_at_once_agree_on_one_of_them(tmp_path, make_artifact):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(5), context.Queue()
    offered = [make_artifact(created_at=f"2025-01-0{day}") for day in range(1, 5)]
    artifact_id = offered[0][0].id
    root = tmp_path / "urza"
    workers = [
        context.Process(target=commit_and_validate, args=(root, manifest, blobs, barrier, answers), daemon=True)
        for manifest, blobs in offered
    ]
    for worker in workers:
        worker.start()
    barrier.wait(timeout=60)
    reader, whole = Urza(root), offered[0][1]
    while any(worker.is_alive() for worker in workers):
        try:
            artifact, blobs = reader.load(artifact_id)
        except ArtifactNotFound:
            continue
        assert set(blobs) == set(artifact.manifest.blobs)
        assert blobs.items() >= whole.items()
    results = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    answers.close()
    answers.join_thread()

    artifact, blobs = reader.load(artifact_id)
    assert artifact.status is KernelStatus.VALIDATED
    assert {created_at for created_at, _ in results} == {artifact.manifest.created_at}, "all were given the first"
    assert {digest for _, digest in results} == {artifact.digest}, "no change of status was lost or made twice"
    assert blobs[artifact.manifest.report].decode() in {manifest.created_at for manifest, _ in offered}
    assert os.listdir(root / "tmp") == []
    assert not (root / "quarantine").exists()
