"""Disks that are full or read-only, users without permission, stores of other releases: what still works, and how the
rest is refused."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import pickle
import time
from pathlib import Path

import pytest

from esper_triton.contracts.errors import CorruptObject, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.urza import Event, Urza, directory
from esper_triton.urza.filesystem import on_network

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch):
    """`read_only()`: from then on the disk is; permissions would not do, since tests may be run by root."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def start() -> None:
        real = os.open

        def opened(path, flags, *args, **kwargs):
            if flags & WRITES and not str(path).startswith("/dev/"):
                refuse()
            return real(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        for name in ("mkdir", "rename", "replace", "unlink", "utime"):
            monkeypatch.setattr(os, name, refuse)

    return start


def test_a_read_only_store_is_read_and_asked_and_says_once_what_it_does_without(urza, make_artifact, read_only):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    validated = urza.promote(manifest.id)
    read_only()
    other = Urza(urza.root)
    events: list[Event] = []
    other.on_event(events.append)
    for _ in range(3):
        assert other.load(manifest.id) == (validated, blobs)
        assert [match.id for match in other.query()] == [manifest.id]
        assert len(other.history(manifest.id)) == 2
    with other.building(manifest.id) as existing:
        assert existing == validated
    assert other.verify().faults == ()
    assert [event.details["what"] for event in events if event.kind == "degraded"] == ["leases", "index"]
    for write in (
        lambda: other.commit(*make_artifact(OTHER_ID)),
        lambda: other.reject(manifest.id),
        lambda: other.pin(manifest.id),
        other.gc,
    ):
        with pytest.raises(StoreUnavailable, match="Read-only file system"):
            write()
    assert other.load(manifest.id) == (validated, blobs)


def test_damage_in_a_read_only_store_is_refused_and_told(urza, make_artifact, read_only):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.object_path(manifest.digest).write_bytes(b"changed")
    read_only()
    events: list[Event] = []
    urza.on_event(events.append)
    with pytest.raises(CorruptObject, match=r"could not be moved to quarantine: .*Read-only file system"):
        urza.load(manifest.id)
    assert "manifest is corrupt" in events[-1].message


def test_a_manifest_that_is_replaced_and_collected_while_it_is_read_is_read_anew(
    urza, make_artifact, read_only, monkeypatch
):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    reader = Urza(urza.root)
    record = reader._shelf.record

    def replaced_after(artifact_id, **options):
        found = record(artifact_id, **options)
        monkeypatch.setattr(reader._shelf, "record", record)
        urza.promote(manifest.id)
        urza.gc()
        read_only()  # so that the reader cannot take the writers' lock to look again
        return found

    monkeypatch.setattr(reader._shelf, "record", replaced_after)
    artifact, found = reader.load(manifest.id)
    assert (artifact.status, found) == (KernelStatus.VALIDATED, blobs)


def test_a_listener_is_told_what_happened_and_cannot_break_it(urza, make_artifact, caplog):
    events: list[Event] = []
    told_inside = []

    def listener(event: Event) -> None:
        events.append(event)
        told_inside.append(urza.ids())
        if event.kind == "committed":
            urza.promote(event.artifact_id)  # a listener may use the store: no lock is held
        raise ZeroDivisionError

    end = urza.on_event(listener)
    manifest, blobs = make_artifact()
    with caplog.at_level(logging.ERROR):
        urza.commit(manifest, blobs)
    assert len(caplog.records) == 2
    urza.object_path(manifest.kernels["forward"].binary).write_bytes(b"changed")
    with caplog.at_level(logging.CRITICAL), pytest.raises(CorruptObject):
        urza.load(manifest.id)
    assert [(event.kind, event.artifact_id) for event in events] == [
        ("committed", manifest.id),
        ("status", manifest.id),
        ("quarantined", manifest.id),
    ]
    assert events[1].details["status"] == KernelStatus.VALIDATED
    assert Path(events[2].details["file"]).read_bytes() == b"changed"
    end()
    end()
    urza.commit(manifest, blobs)
    urza.archive(manifest.id)
    assert len(events) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema_version": "3.0"}', r"has schema 3\.0, newer than 2\.0; upgrade esper_triton"),
        (b'{"schema_version": 2}', "urza.json is damaged"),
        (b"", "urza.json is damaged"),
        (b"[]", "urza.json is damaged"),
        (b"\xff" * 20, "urza.json is damaged"),
    ],
)
def test_a_store_of_a_newer_release_is_refused_and_left_as_it_is(urza, make_artifact, content, message):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    (urza.root / "urza.json").write_bytes(content)
    before = {path: path.read_bytes() for path in urza.root.rglob("*") if path.is_file()}
    other = Urza(urza.root)
    for attempt in (
        lambda: other.get(manifest.id),
        lambda: other.commit(*make_artifact(OTHER_ID)),
        lambda: other.reject(manifest.id),
    ):
        with pytest.raises(StoreUnavailable, match=message):
            attempt()
    assert {path: path.read_bytes() for path in urza.root.rglob("*") if path.is_file()} == before


def test_a_newer_minor_schema_of_the_store_is_read(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    (urza.root / "urza.json").write_text('{"schema_version": "2.7", "more": 1}')
    assert Urza(urza.root).load(manifest.id)[1] == blobs


def test_a_record_of_a_newer_release_is_left_to_it(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    path = urza.root / "refs" / manifest.id
    newer = json.dumps(json.loads(path.read_bytes()) | {"schema_version": "2.9", "colour": "red"}).encode()
    path.write_bytes(newer)
    for attempt in (lambda: urza.get(manifest.id), lambda: urza.commit(manifest, blobs)):
        with pytest.raises(Exception, match=r"its record has schema 2\.9, newer than 2\.0; upgrade esper_triton"):
            attempt()
    assert path.read_bytes() == newer


def test_copies_are_other_objects_on_the_same_store(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.load(manifest.id)
    urza.query()
    restricted = Urza(urza.root, trust="unsigned-ok", roles=["forge"], max_bytes=1 << 20)
    keys = {role.value: key for role, key in urza.public_keys.items()}
    naming = Urza(urza.root, trust=f"keys:forge={keys['forge']},prover={keys['prover']},prover={'0' * 64}")
    for one in (urza, restricted, naming):
        sent = json.loads(json.dumps(one.sent()))
        for other in (copy.deepcopy(one), copy.copy(one), pickle.loads(pickle.dumps(one)), Urza.received(sent)):
            assert other is not one
            assert (other.root, other.trust, other.max_bytes) == (one.root, one.trust, one.max_bytes)
            assert other.load(manifest.id)[1] == blobs
            assert other._keys.roles == one._keys.roles


def test_a_file_that_was_verified_is_not_hashed_again_until_it_changes(urza, make_artifact, monkeypatch):
    hashed: list[bytes] = []
    sha256 = directory.sha256

    def counted(content: bytes) -> str:
        hashed.append(content)
        return sha256(content)

    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    binary = blobs[manifest.kernels["forward"].binary]
    path = urza.object_path(manifest.kernels["forward"].binary)
    monkeypatch.setattr(directory, "sha256", counted)
    for _ in range(2):
        urza.load(manifest.id)
    assert hashed.count(binary) == 2, "it was written a moment ago: its times may not tell a change"

    monkeypatch.setattr(directory, "SETTLED_NS", 0)
    monkeypatch.setattr(directory, "on_network", lambda folder: False)  # whatever the tests are on
    time.sleep(0.02)
    for _ in range(3):
        urza.load(manifest.id)
    assert hashed.count(binary) == 3
    assert Urza(urza.root).load(manifest.id)[1] == blobs
    assert hashed.count(binary) == 4, "another object, and another process, hashes for itself"
    assert urza.verify().faults == ()
    assert hashed.count(binary) == 5, "verify reads every byte, whatever is remembered"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.02)
    path.write_bytes(binary[:-1] + b"?")
    os.utime(path, ns=times)  # the same size and time of modification: only the inode's own time tells
    with pytest.raises(CorruptObject, match="binary of kernel 'forward' is corrupt"):
        urza.load(manifest.id)
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


def test_on_a_network_file_system_every_load_hashes_again(urza, make_artifact, monkeypatch):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    monkeypatch.setattr(directory, "SETTLED_NS", 0)
    monkeypatch.setattr(directory, "on_network", lambda folder: True)
    time.sleep(0.02)
    hashed: list[bytes] = []
    sha256 = directory.sha256
    monkeypatch.setattr(directory, "sha256", lambda content: hashed.append(content) or sha256(content))
    for _ in range(2):
        hashed.clear()
        assert urza.load(manifest.id)[1] == blobs
        assert {*blobs.values(), manifest.canonical_bytes()} <= set(hashed)


def test_the_type_of_a_file_system_is_read_from_the_mounts(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:20 / / rw shared:1 - rootfs rootfs rw\n"
        "23 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw\n"
        "24 23 0:45 / /mnt/shared\\040data rw master:3 - nfs4 server:/export rw\n"
        "25 23 0:46 / /mnt/remote rw - fuse.sshfs host:/ rw\n"
        "26 25 0:47 / /mnt/remote/scratch rw shared:5 master:2 propagate_from:1 - tmpfs tmpfs rw\n"
        "27 23 0:48 / /over rw - nfs server:/old rw\n"
        "28 27 0:49 / /over rw - overlay overlay rw\n"
        "nonsense\n"
    )
    for folder, expected in (
        ("/home/urza", False),
        ("/", False),
        ("/mnt/shared data/urza", True),
        ("/mnt/shared data", True),
        ("/mnt/shared data too", False),
        ("/mnt/remote/urza", True),
        ("/mnt/remote/scratch/urza", False),
        ("/over/urza", False),
    ):
        assert on_network(Path(folder), mounts) is expected, folder
    assert on_network(Path("/"), tmp_path / "none")
    mounts.write_text("")
    assert on_network(Path("/"), mounts)
