"""Kills a process at every file operation of something that is done to a store, and looks at what is left.

    python crash_points.py FOLDER NAME before|in

A process of its own, which has no threads and little memory, and can be forked a thousand times. Prints, as JSON, how
many operations there were and which statuses were found after a death.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from handmade import make_artifact

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.contracts.record import Figures
from esper_triton.urza import Urza
from esper_triton.urza import index as index_module
from esper_triton.urza.incoming import Incoming, sweep

CALLS = ("open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "replace", "rename", "unlink")
EVERY_STEP = 1000  # far above the number of file operations in anything
OLD_ID, NEW_ID = "0123456789ab-cpu-standard-ba9876543210", "0123456789ab-cpu-standard-ba9876543211"


def every_call(name_and_effect: Callable[[str, Callable[..., object], tuple, dict], object]) -> dict[str, Callable]:
    """Stand-ins for every file operation in `os`, each of which goes through `name_and_effect`."""

    def wrapped(name: str, real: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: name_and_effect(name, real, args, kwargs)

    return {name: wrapped(name, getattr(os, name)) for name in CALLS}


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
            if seen == step and name in ("write", "pwrite"):
                descriptor, content, *offset = args
                args = (descriptor, content[: len(content) // 2], *offset)
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


@dataclass(frozen=True)
class Act:
    """Something that is done to a store with the artifact OLD_ID, and what may be found if it is cut short.

    before, after: the status of `subject` without and with it, None where it is not there. prepare: what is done to the
    store before. damages: it leaves the store with something to repair.
    """

    run: Callable[[Urza], object]
    subject: str
    before: KernelStatus | None
    after: KernelStatus | None
    report: bytes | None = None
    prepare: Callable[[Urza], object] = lambda urza: None
    damages: bool = False


def acts(archive: Path) -> dict[str, Act]:
    new = make_artifact(NEW_ID, binary=b"new")
    old, _ = make_artifact(OLD_ID)
    pending, validated = KernelStatus.PENDING_BENCHMARKING, KernelStatus.VALIDATED
    report = b"a report"

    def receive(urza: Urza) -> None:
        """As a server does: its objects come one after the other in pieces, and then they are committed."""
        for content in (*new[1].values(), new[0].canonical_bytes()):
            with Incoming(urza.directory) as incoming:
                for begin in range(0, len(content), 1000):
                    incoming.append(content[begin : begin + 1000])
                incoming.finish()
        urza.commit(*new)

    def prove(urza: Urza) -> None:
        urza.set_status(OLD_ID, validated, report, tags=["high_speed"], figures=Figures(latency_us=1.0))

    def damage(urza: Urza) -> None:
        urza.object_path(old.kernels["forward"].binary).write_bytes(b"changed")
        (urza.root / "refs" / OLD_ID).write_bytes(b"changed")

    def let_a_request_go_stale(urza: Urza) -> None:
        urza.remember("5e" * 32, NEW_ID.encode())
        os.utime(urza.root / "requests" / ("5e" * 32), (0, 0))

    def collect(urza: Urza) -> None:
        urza.gc(0)
        assert urza.recall("5e" * 32) is None

    def refuse(urza: Urza) -> None:
        for _ in range(3):  # the record, and then neither that nor the binary is there
            with suppress(ArtifactNotFound, CorruptObject):
                urza.load(OLD_ID)
                raise AssertionError("damage was loaded")

    return {
        "commit": Act(lambda urza: urza.commit(*new), NEW_ID, None, pending),
        "commit of what has arrived": Act(receive, NEW_ID, None, pending),
        "commit into a new store": Act(lambda urza: Urza(urza.root / "inner").commit(*new), OLD_ID, pending, pending),
        "change of status": Act(prove, OLD_ID, pending, validated, report),
        "import": Act(lambda urza: urza.import_(archive, resign=True), NEW_ID, None, pending),
        "collection": Act(collect, OLD_ID, pending, None, prepare=let_a_request_go_stale),
        "pin": Act(lambda urza: urza.pin(OLD_ID), OLD_ID, pending, pending),
        "unpin": Act(lambda urza: urza.unpin(OLD_ID), OLD_ID, pending, pending, prepare=lambda urza: urza.pin(OLD_ID)),
        "load": Act(lambda urza: urza.load(OLD_ID), OLD_ID, pending, pending),
        "question": Act(lambda urza: urza.query(), OLD_ID, pending, pending),
        "refusal": Act(refuse, OLD_ID, None, None, prepare=damage, damages=True),
    }


def status_after_a_crash(urza: Urza, act: Act, kept: Manifest, kept_blobs: dict[str, bytes]) -> KernelStatus | None:
    """Checks everything that must hold; gives the status that is found."""
    found: KernelStatus | None = None
    try:
        artifact, blobs = urza.load(act.subject)
    except ArtifactNotFound:
        pass
    except CorruptObject:
        if not act.damages:
            raise
    else:
        found = artifact.status
        assert set(blobs) == set(artifact.manifest.blobs)
        assert (act.report in blobs.values()) is (act.report is not None and found is act.after)
    assert found in (act.before, act.after), found
    if act.before is not None and act.after is not None:
        stored, blobs = urza.load(OLD_ID)
        assert stored.manifest.kernels == kept.kernels, "what was committed before is not lost"
        assert blobs.items() >= kept_blobs.items()
    faults = [] if act.damages else urza.verify().faults
    assert not faults, faults
    return found


def main(folder: Path, name: str, *, done: bool) -> dict[str, object]:
    kept, kept_blobs = make_artifact(OLD_ID)
    archive = folder / "new.tar"
    source = Urza(folder / "source")
    source.commit(*make_artifact(NEW_ID, binary=b"new"))
    source.export(archive)
    act = acts(archive)[name]
    template = Urza(folder / "template")
    template.commit(kept, kept_blobs)
    act.prepare(template)
    seen = set()
    for step in range(1, EVERY_STEP):
        root = folder / "urza"
        shutil.copytree(template.root, root)
        if not killed(step, lambda: act.run(Urza(root)), done=done):  # noqa: B023 - called at once
            break
        urza = Urza(root)
        seen.add(status_after_a_crash(urza, act, kept, kept_blobs))
        urza.close()
        act.run(urza)  # again, as by another process
        if act.damages:
            assert urza.commit(kept, kept_blobs).manifest == kept
            assert urza.load(OLD_ID)[1] == kept_blobs
            assert urza.verify().faults == (), urza.verify().faults
        else:
            assert status_after_a_crash(urza, act, kept, kept_blobs) is act.after
            assert not (root / "quarantine").exists()
        said = [change.what for change in urza.history(OLD_ID) if change.what in ("pinned", "unpinned")]
        assert urza.pins() == ([OLD_ID] if name == "pin" else []) == [OLD_ID] * (said[-1:] == ["pinned"])
        assert {match.id for match in urza.query(statuses=list(KernelStatus))} == set(urza.ids())
        assert os.listdir(root / "tmp") == []
        sweep(urza.directory, 0.0)
        assert not (root / "incoming").exists() or os.listdir(root / "incoming") == []
        urza.close()
        shutil.rmtree(root)
    return {"points": step - 1, "found": sorted(map(str, seen)), "expected": sorted({str(act.before), str(act.after)})}


if __name__ == "__main__":
    # No power is cut here, and waiting for the disk would take most of the time.
    os.fsync = lambda descriptor: None
    index_module.SYNCHRONOUS = "OFF"
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], done=sys.argv[3] == "in")))  # noqa: T201
