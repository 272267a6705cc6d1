"""Writers that die, disks that fail, and many writers at once: an artifact is whole or not there."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.urza import Urza

CALLS = ("open", "mkdir", "fsync", "replace", "rename", "unlink")
EVERY_STEP = 1000  # far above the number of file operations in a commit


class Died(BaseException):
    """The process is gone: not an Exception, so nothing may handle it."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, step: int, *, dies: bool, done: bool) -> Iterator[list[str]]:
    """Lets the `step`-th file operation fail; yields the operations seen. Swallows the error, if it is the right one.

    dies: this operation and all later ones raise Died, as nothing runs in a dead process. Otherwise this one alone
        raises OSError, which a caller sees as StoreUnavailable.
    done: the operation has taken effect when it fails.
    """
    seen: list[str] = []

    def wrapped(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen.append(name)
            if len(seen) < step or (len(seen) > step and not dies):
                return real(*args, **kwargs)
            if done and len(seen) == step:
                result = real(*args, **kwargs)
                if name == "open":
                    os.close(result)  # as the end of a process would
            if dies:
                raise Died
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        with suppress(Died if dies else StoreUnavailable):
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


@pytest.mark.parametrize("done", [False, True], ids=["before the operation", "after the operation"])
@pytest.mark.parametrize("dies", [False, True], ids=["the disk fails", "the process dies"])
def test_a_commit_cut_short_at_any_step_is_whole_or_invisible_and_can_be_repeated(
    tmp_path, make_artifact, monkeypatch, dies, done
):
    manifest, blobs = make_artifact()
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        root = tmp_path / str(step) / "urza"
        with failing(monkeypatch, step, dies=dies, done=done) as seen:
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
        assert os.listdir(root / "tmp") == []
    assert step > 30, "the operations of a commit were seen"
    assert seen_outcomes == {False, True}


@pytest.mark.parametrize("dies", [False, True], ids=["the disk fails", "the process dies"])
def test_a_change_of_status_cut_short_leaves_the_old_or_the_new_one(tmp_path, make_artifact, monkeypatch, dies):
    manifest, blobs = make_artifact()
    report = b"a report"
    seen_outcomes = set()
    for step in range(1, EVERY_STEP):
        urza = Urza(tmp_path / str(step))
        urza.commit(manifest, blobs)
        with failing(monkeypatch, step, dies=dies, done=False) as seen:
            urza.set_status(manifest.id, KernelStatus.VALIDATED, report)
        if len(seen) < step:
            break
        artifact, found = urza.load(manifest.id)
        seen_outcomes.add(artifact.status)
        validated = artifact.status is KernelStatus.VALIDATED
        assert found == (blobs | {sha256(report): report} if validated else blobs)
        assert urza.set_status(manifest.id, KernelStatus.VALIDATED, report).manifest.report == sha256(report)
    assert seen_outcomes == {KernelStatus.PENDING_BENCHMARKING, KernelStatus.VALIDATED}


def test_setting_damage_aside_cut_short_still_refuses_it_and_is_repaired(tmp_path, make_artifact, monkeypatch):
    manifest, blobs = make_artifact()
    digest = manifest.kernels["forward"].binary
    for step in range(1, EVERY_STEP):
        urza = Urza(tmp_path / str(step))
        urza.commit(manifest, blobs)
        urza.object_path(digest).write_bytes(b"changed")
        with failing(monkeypatch, step, dies=True, done=False) as seen, suppress(CorruptObject):
            urza.load(manifest.id)
            pytest.fail("damage was loaded")
        if len(seen) < step:
            break
        assert urza.commit(manifest, blobs).manifest == manifest
        assert urza.load(manifest.id)[1] == blobs
    assert "quarantine" in os.listdir(urza.root)


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
