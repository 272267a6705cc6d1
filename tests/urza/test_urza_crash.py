"""Writers that are killed, disks that fail, and many writers at once: an artifact is whole or not there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import Figures
from esper_triton.urza import Urza

CALLS = ("open", "mkdir", "write", "ftruncate", "fsync", "replace", "rename", "unlink")
EVERY_STEP = 1000  # far above the number of file operations in anything
NEW_ID = "0123456789ab-cpu-standard-ba9876543211"
OLD_ID = "0123456789ab-cpu-standard-ba9876543210"


def every_call(name_and_effect: Callable[[str, Callable[..., object], tuple, dict], object]) -> dict[str, Callable]:
    """Stand-ins for every file operation in `os`, each of which goes through `name_and_effect`."""

    def wrapped(name: str, real: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: name_and_effect(name, real, args, kwargs)

    return {name: wrapped(name, getattr(os, name)) for name in CALLS}


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


def killed(step: int, action: Callable[[], object], *, done: bool) -> bool:
    """Runs `action` in a child that is killed at its `step`-th file operation; False where it ended before that.

    done: it is killed right after the operation, a write being half done; otherwise right before it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, "the action itself failed"
        return False
    try:
        seen = 0

        def call(name: str, real: Callable[..., object], args: tuple, kwargs: dict) -> object:
            nonlocal seen
            seen += 1
            if seen == step and not done:
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == step and name == "write":
                descriptor, content = args
                args = (descriptor, content[: len(content) // 2])
            try:
                return real(*args, **kwargs)
            finally:  # some fail in the course of things: a folder that is still to be made
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        for name, stand_in in every_call(call).items():
            setattr(os, name, stand_in)
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


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


@dataclass(frozen=True)
class Act:
    """Something that is done to a store with the artifact OLD_ID, and what may be found if it is cut short.

    before, after: the status of `subject` without and with it, None where it is not there.
    """

    run: Callable[[Urza], object]
    subject: str
    before: KernelStatus | None
    after: KernelStatus | None
    report: bytes | None = None


def acts(make_artifact: Callable[..., tuple[Manifest, dict[str, bytes]]], archive: Path) -> dict[str, Act]:
    new = make_artifact(NEW_ID, binary=b"new")
    pending, validated = KernelStatus.PENDING_BENCHMARKING, KernelStatus.VALIDATED
    report = b"a report"

    def prove(urza: Urza) -> None:
        urza.set_status(OLD_ID, validated, report, tags=["high_speed"], figures=Figures(latency_us=1.0))

    return {
        "commit": Act(lambda urza: urza.commit(*new), NEW_ID, None, pending),
        "commit into a new store": Act(lambda urza: Urza(urza.root / "inner").commit(*new), OLD_ID, pending, pending),
        "change of status": Act(prove, OLD_ID, pending, validated, report),
        "import": Act(lambda urza: urza.import_(archive, resign=True), NEW_ID, None, pending),
        "collection": Act(lambda urza: urza.gc(0), OLD_ID, pending, None),
        "pin": Act(lambda urza: urza.pin(OLD_ID), OLD_ID, pending, pending),
        "load": Act(lambda urza: urza.load(OLD_ID), OLD_ID, pending, pending),
        "question": Act(lambda urza: urza.query(), OLD_ID, pending, pending),
    }


# At least so many file operations has each, and it is killed in every one. Right before an operation is nearly the same
# as in the one before it, and is tried where most is at stake.
POINTS = {
    "commit": 120,
    "commit into a new store": 190,
    "change of status": 115,
    "import": 125,
    "collection": 105,
    "pin": 25,
    "load": 30,
    "question": 35,
}
DEATHS = [(name, True) for name in POINTS] + [("commit", False), ("change of status", False), ("pin", False)]
assert sum(POINTS[name] for name, _ in DEATHS) > 1000


@pytest.fixture
def memory_path(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there can be one: a thousand stores on a disk take minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def check_after_a_crash(urza: Urza, act: Act, kept: Manifest, kept_blobs: dict[str, bytes]) -> KernelStatus | None:
    """Everything that must hold; gives the status that is found."""
    found: KernelStatus | None = None
    try:
        artifact, blobs = urza.load(act.subject)
    except ArtifactNotFound:
        pass
    else:
        found = artifact.status
        assert set(blobs) == set(artifact.manifest.blobs)
        assert (act.report in blobs.values()) is (act.report is not None and found is act.after)
    assert found in (act.before, act.after)
    if act.before is not None and act.after is not None:
        stored, blobs = urza.load(OLD_ID)
        assert stored.manifest.kernels == kept.kernels, "what was committed before is not lost"
        assert blobs.items() >= kept_blobs.items()
    assert urza.verify().faults == ()
    return found


@pytest.mark.parametrize(("name", "done"), DEATHS, ids=lambda one: {True: "in", False: "before"}.get(one, one))
def test_a_process_that_is_killed_at_any_file_operation_leaves_all_or_nothing(memory_path, make_artifact, name, done):
    tmp_path = memory_path
    kept, kept_blobs = make_artifact(OLD_ID)
    archive = tmp_path / "new.tar"
    source = Urza(tmp_path / "source")
    source.commit(*make_artifact(NEW_ID, binary=b"new"))
    source.export(archive)
    template = tmp_path / "template"
    Urza(template).commit(kept, kept_blobs)
    act = acts(make_artifact, archive)[name]
    seen = set()
    for step in range(1, EVERY_STEP):
        root = tmp_path / "urza"
        shutil.copytree(template, root)
        if not killed(step, lambda: act.run(Urza(root)), done=done):  # noqa: B023 - called at once
            break
        urza = Urza(root)
        seen.add(check_after_a_crash(urza, act, kept, kept_blobs))
        urza.close()
        act.run(urza)  # again, by another process
        assert check_after_a_crash(urza, act, kept, kept_blobs) is act.after
        assert {match.id for match in urza.query(statuses=list(KernelStatus))} == set(urza.ids())
        assert os.listdir(root / "tmp") == []
        assert not (root / "quarantine").exists()
        urza.close()
        shutil.rmtree(root)
    assert step - 1 >= POINTS[name]
    assert seen == {act.before, act.after}


@pytest.mark.parametrize("done", [False, True], ids=["before an operation", "after an operation"])
def test_a_disk_that_fails_at_any_step_of_a_commit_leaves_all_or_nothing(tmp_path, make_artifact, monkeypatch, done):
    manifest, blobs = make_artifact()
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        root = tmp_path / str(step) / "urza"
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
    tmp_path, make_artifact, monkeypatch
):
    manifest, blobs = make_artifact()
    report = b"a report"
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        urza = Urza(tmp_path / str(step))
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


def test_setting_damage_aside_cut_short_still_refuses_it_and_is_repaired(tmp_path, make_artifact):
    manifest, blobs = make_artifact()
    digest = manifest.kernels["forward"].binary

    def refused(urza: Urza) -> None:
        with pytest.raises(CorruptObject):
            urza.load(manifest.id)

    for step in range(1, EVERY_STEP):
        urza = Urza(tmp_path / str(step))
        urza.commit(manifest, blobs)
        urza.object_path(digest).write_bytes(b"changed")
        if not killed(step, lambda: refused(urza), done=False):  # noqa: B023 - called at once
            break
        refused(urza)
        assert urza.commit(manifest, blobs).manifest == manifest
        assert urza.load(manifest.id)[1] == blobs
    assert step > 20


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
