"""What garbage collection removes, in which order, and what it never does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esper_triton.contracts.errors import ArtifactNotFound, ArtifactRefused
from esper_triton.contracts.lineage import Lineage, LineageEntry
from esper_triton.contracts.manifest import sha256
from esper_triton.urza import Event, Urza
from esper_triton.urza.collecting import all_objects
from esper_triton.urza.incoming import Incoming
from esper_triton.urza.leases import gate, leased

BLOB_BYTES = 10_000


def artifact_id(number: int) -> str:
    return f"0123456789ab-cpu-standard-{number:012x}"


def put(urza: Urza, make_artifact, number: int, *, idle_s: float = 0.0, compile_seconds: float = 0.0) -> str:
    """Commits an artifact with a binary of its own, last used `idle_s` ago."""
    binary = bytes([number]) * BLOB_BYTES
    manifest, blobs = make_artifact(artifact_id(number), binary=binary, compile_seconds=compile_seconds)
    urza.commit(manifest, blobs)
    when = time.time() - idle_s
    os.utime(urza.root / "refs" / manifest.id, (when, when))
    return manifest.id


def lineage_of(urza: Urza, *ids: str) -> Lineage:
    entries = (
        LineageEntry(
            layer="fc", seed=0, artifact_id=one, manifest_digest=urza.get(one).digest, parameters=(), alpha=1.0
        )
        for one in ids
    )
    return Lineage(
        esper_triton="0.1.0",
        saved_at="2025-01-01T00:00:00+00:00",
        weights=f"weights-{'0' * 16}.pt",
        weights_sha256="0" * 64,
        seeds=tuple(entries),
    )


def size_of(urza: Urza) -> int:
    return sum(path.stat().st_size for path in (urza.root / "objects").rglob("*") if path.is_file())


def test_what_no_artifact_needs_goes_and_the_rest_stays(urza, make_artifact):
    manifest, blobs = make_artifact()
    first = urza.commit(manifest, blobs)
    second = urza.promote(manifest.id, b"a report")
    stray = b"blob of a commit that was cut short"
    urza._directory.write_object(stray, limit_bytes=1000)
    before = size_of(urza)
    done = urza.gc()
    assert done.removed == ()
    assert done.objects == 2
    assert done.freed_bytes == before - size_of(urza) == len(stray) + len(manifest.canonical_bytes())
    assert done.kept_bytes == size_of(urza)
    assert set(all_objects(urza._directory)) == {*blobs, sha256(b"a report"), second.digest}
    assert not urza.object_path(first.digest).exists()
    assert urza.load(manifest.id)[0] == second
    assert urza.gc().objects == 0


def test_the_longest_unused_goes_first_and_what_took_long_to_compile_later(urza, make_artifact):
    ids = [
        put(urza, make_artifact, 1, idle_s=1000),
        put(urza, make_artifact, 2, idle_s=100),
        put(urza, make_artifact, 3, idle_s=1000, compile_seconds=19),  # worth as one that was used 50 s ago
        put(urza, make_artifact, 4, idle_s=10),
    ]
    total = size_of(urza)
    expected = [ids[0], ids[1], ids[2], ids[3]]
    for gone in range(5):
        left = total - gone * BLOB_BYTES
        assert list(urza.gc(left, dry_run=True).removed) == expected[:gone]
    done = urza.gc(total - 2 * BLOB_BYTES)
    assert list(done.removed) == expected[:2]
    assert urza.ids() == sorted(expected[2:])
    assert (done.kept_bytes, done.over_bytes) == (size_of(urza), 0)
    assert [change.what for change in urza.history(ids[0])] == ["committed", "removed"]
    assert urza.verify().faults == ()


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(urza, make_artifact):
    for number in range(4):
        put(urza, make_artifact, number, idle_s=10 * number)
    before = {path: path.stat().st_mtime_ns for path in urza.root.rglob("*") if path.is_file()}
    said = urza.gc(2 * BLOB_BYTES, dry_run=True)
    before.setdefault(urza.root / "leases" / "gate", (urza.root / "leases" / "gate").stat().st_mtime_ns)
    assert {path: path.stat().st_mtime_ns for path in urza.root.rglob("*") if path.is_file()} == before
    done = urza.gc(2 * BLOB_BYTES)
    assert said.dry_run
    assert (said.removed, said.objects, said.freed_bytes) == (done.removed, done.objects, done.freed_bytes)
    assert len(done.removed) == 3


def test_a_load_counts_as_a_use(urza, make_artifact):
    old, new = put(urza, make_artifact, 1, idle_s=1000), put(urza, make_artifact, 2, idle_s=100)
    reader = Urza(urza.root)
    reader.load(old)
    reader.close()
    assert urza.gc(size_of(urza) - 1).removed == (new,)


def test_what_is_pinned_in_use_or_named_by_a_lineage_stays(urza, make_artifact):
    pinned, used, named, pending, free = (put(urza, make_artifact, number, idle_s=1000) for number in range(5))
    urza.pin(pinned)
    user = Urza(urza.root)
    user.load(used)
    for one in (named, free):
        urza.promote(one)
    urza.name_lineage("model-a", lineage_of(urza, named, pending))
    assert urza.match(named).lineages == ("model-a",)
    done = urza.gc(0)
    assert set(done.removed) == {pending, free}, "a lineage keeps what is VALIDATED only"
    assert done.kept == {"pinned": (pinned,), "in use": (used,), "named by a lineage": (named,)}
    assert done.over_bytes == done.kept_bytes == size_of(urza)

    assert urza.unpin(pinned)
    assert not urza.unpin(pinned)
    assert urza.forget_lineage("model-a")
    assert not urza.forget_lineage("model-a")
    user.release()
    assert set(urza.gc(0).removed) == {pinned, used, named}
    assert urza.ids() == []
    assert size_of(urza) == 0


def test_pinning_asks_for_an_artifact_that_is_there(urza, make_artifact):
    pinned = put(urza, make_artifact, 1)
    with pytest.raises(ArtifactNotFound, match=f"did you mean '{pinned}'"):
        urza.pin(artifact_id(2))
    with pytest.raises(ArtifactNotFound, match="is not an artifact id"):
        urza.pin("../../escape")
    assert not urza.unpin("../../escape")
    urza.pin(pinned)
    urza.pin(pinned)
    assert urza.pins() == [pinned]
    for name in ("../up", "", ".hidden", "a" * 101):
        with pytest.raises(ValueError, match="cannot name a lineage"):
            urza.name_lineage(name, lineage_of(urza, pinned))


LOADS_AND_WAITS = """
import sys
from esper_triton.urza import Urza
urza = Urza(sys.argv[1])
urza.load(sys.argv[2])
print("loaded", flush=True)
sys.stdin.read()
"""


def test_what_another_process_uses_stays_until_that_process_dies(urza, make_artifact):
    used = put(urza, make_artifact, 1, idle_s=1000)
    user = subprocess.Popen(
        [sys.executable, "-c", LOADS_AND_WAITS, str(urza.root), used], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with user:
        assert user.stdout.readline() == b"loaded\n"
        assert urza.gc(0).kept == {"in use": (used,)}
        user.send_signal(signal.SIGKILL)
    assert urza.gc(0).removed == (used,)
    assert [path.name for path in (urza.root / "leases").iterdir()] == ["gate"]


def test_a_process_that_ends_takes_its_lease_with_it_and_a_child_leaves_its_parents(urza, make_artifact):
    used = put(urza, make_artifact, 1, idle_s=1000)
    code = (
        "import os, sys\nfrom esper_triton.urza import Urza\nurza = Urza(sys.argv[1])\nurza.load(sys.argv[2])\n"
        "child = os.fork()\n"
        "if child:\n    assert os.waitpid(child, 0)[1] == 0\n    assert Urza(sys.argv[1]).gc(0).removed == ()\n"
        "sys.exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(urza.root), used], check=True)
    assert [path.name for path in (urza.root / "leases").iterdir()] == ["gate"]
    assert urza.gc(0).removed == (used,)


def test_a_child_does_not_keep_its_dead_parents_lease(urza, make_artifact):
    used = put(urza, make_artifact, 1, idle_s=1000)
    code = (
        "import os, sys\nfrom esper_triton.urza import Urza\n"
        "Urza.kept = Urza(sys.argv[1])\nUrza.kept.load(sys.argv[2])\n"
        "read, write = os.pipe()\n"
        "if os.fork():\n    os.read(read, 1)\n    os._exit(0)\n"
        "os.write(write, b'x')\nprint('child', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(urza.root), used], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout.readline() == b"child\n"
        assert user.wait(timeout=30) == 0  # the parent; the child waits for the end of its input
        assert urza.gc(0).removed == (used,)


def test_what_is_taken_into_use_while_garbage_is_looked_for_stays(urza, make_artifact, monkeypatch):
    used, changed, free = (put(urza, make_artifact, number, idle_s=1000) for number in range(3))
    urza._directory.write_object(b"new", limit_bytes=1000)  # garbage, until a commit below needs it
    user, lock = Urza(urza.root), urza._directory.lock

    def used_meanwhile():
        monkeypatch.setattr(urza._directory, "lock", lock)
        user.load(used)
        user.promote(changed)
        user.commit(*make_artifact(artifact_id(9), binary=b"new"))
        return lock()

    monkeypatch.setattr(urza._directory, "lock", used_meanwhile)
    done = urza.gc(0)
    assert done.removed == (free,)
    assert done.kept == {"taken into use meanwhile": (used, changed)}
    for one in (used, changed, artifact_id(9)):
        urza.load(one)
    assert urza.verify().faults == ()
    user.close()


def test_a_commit_that_makes_the_store_too_large_makes_room(tmp_path, make_artifact):
    urza = Urza(tmp_path / "urza", max_bytes=5 * BLOB_BYTES)
    events: list[Event] = []
    urza.on_event(events.append)
    for number in range(12):
        put(urza, make_artifact, number, idle_s=1000 - number)
        assert size_of(urza) <= 5 * BLOB_BYTES
    assert urza.ids() == [artifact_id(number) for number in (8, 9, 10, 11)]
    removed = [event.artifact_id for event in events if event.kind == "removed"]
    assert removed == [artifact_id(number) for number in range(8)]


def test_where_an_artifact_is_of_a_newer_release_no_object_is_removed(urza, make_artifact):
    manifest, blobs = make_artifact(artifact_id(1))
    urza.commit(manifest, blobs)
    newer = manifest.canonical_bytes().replace(b'"schema_version": "1.', b'"schema_version": "7.')
    digest = urza._directory.write_object(newer, limit_bytes=1 << 20)
    (urza.root / "refs" / manifest.id).write_text(f"{digest}\n")
    before = all_objects(urza._directory)
    done = urza.gc(0)
    assert (done.removed, done.objects) == ((), 0)
    assert done.kept == {"of a newer release": (manifest.id,)}
    assert all_objects(urza._directory) == before
    with pytest.raises(ArtifactRefused, match="upgrade"):
        urza.load(manifest.id)


def test_old_evidence_goes_from_the_quarantine_and_new_stays(urza, make_artifact):
    manifest, blobs = make_artifact()
    for when in (time.time() - 40 * 86400, time.time()):
        urza.commit(manifest, blobs)
        urza.object_path(manifest.digest).write_bytes(b"changed")
        assert urza.commit(manifest, blobs).manifest == manifest
        for path in (urza.root / "quarantine").iterdir():
            if path.stat().st_mtime > time.time() - 60:
                os.utime(path, (when, when))
    quarantined = urza.root / "quarantine"
    assert len(list(quarantined.iterdir())) == 4
    size = sum(path.stat().st_size for path in quarantined.iterdir() if path.stat().st_mtime < time.time() - 86400)
    assert urza.gc().freed_bytes == size
    assert len(list(quarantined.iterdir())) == 2


def test_what_was_not_received_to_its_end_goes_after_a_week_and_what_is_being_received_stays(urza, make_artifact):
    urza.commit(*make_artifact())
    with Incoming(urza.directory, "a" * 64) as abandoned, Incoming(urza.directory, "b" * 64) as late:
        abandoned.append(b"some")
        late.append(b"more")
    incoming = urza.root / "incoming"
    then = time.time() - 8 * 86400
    os.utime(incoming / ("a" * 64), (then, then))
    with Incoming(urza.directory) as open_one:
        for path in incoming.iterdir():
            if path.name not in ("a" * 64, "b" * 64):
                os.utime(path, (then, then))
        assert urza.gc().freed_bytes == 4
        open_one.append(b"it goes on")
        assert sorted(path.stat().st_size for path in incoming.iterdir()) == [4, 10]


def test_a_link_among_the_objects_is_neither_followed_nor_counted(urza, make_artifact, tmp_path):
    urza.commit(*make_artifact())
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (urza.root / "objects" / "ab").mkdir(exist_ok=True)
    (urza.root / "objects" / "ab" / ("0" * 62)).symlink_to(outside)
    size = size_of(urza) - 4
    assert urza.gc(0).freed_bytes == size
    assert outside.read_bytes() == b"mine"


def test_a_store_that_is_not_there_has_no_garbage(tmp_path: Path):
    for dry_run in (True, False):
        assert Urza(tmp_path / "none").gc(0, dry_run=dry_run).removed == ()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_is_not_given_while_something_is_removed(urza, make_artifact):
    used = put(urza, make_artifact, 1)
    user = Urza(urza.root)
    loading = threading.Thread(target=user.load, args=(used,))
    with gate(urza._directory, shared=False):
        loading.start()
        loading.join(0.1)
        assert loading.is_alive()
        assert leased(urza._directory) == set()
    loading.join()
    with gate(urza._directory, shared=False):
        assert leased(urza._directory) == {used}
    user.close()
