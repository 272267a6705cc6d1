"""One build of an artifact at a time, also where the builder dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from esper_triton.contracts.errors import ArtifactNotFound
from esper_triton.urza import Event, Urza

BUILDS_FOREVER = """
import sys
from esper_triton.urza import Urza
with Urza(sys.argv[1]).building(sys.argv[2]) as existing:
    print(existing, flush=True)
    sys.stdin.read()
"""


def test_whoever_comes_while_it_is_built_waits_and_is_given_it(urza, make_artifact):
    manifest, blobs = make_artifact()
    builds: list[int] = []
    given = []

    def build(number: int) -> None:
        own = Urza(urza.root)
        with own.building(manifest.id) as existing:
            if existing is None:
                builds.append(number)
                time.sleep(0.05)  # long enough for all others to have come
                existing = own.commit(manifest, blobs)
            given.append(existing)
        own.close()

    threads = [threading.Thread(target=build, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert given == [urza.get(manifest.id)] * 8
    assert os.listdir(urza.root / "building") == []


def test_a_builder_that_is_killed_leaves_its_turn_to_the_next(urza, make_artifact):
    manifest, blobs = make_artifact()
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDS_FOREVER, str(urza.root), manifest.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with builder:
        assert builder.stdout.readline() == b"None\n"
        with pytest.raises(BlockingIOError), urza.building(manifest.id, wait=False):
            pytest.fail("two build it at once")
        with urza.building("0123456789ab-cpu-standard-ba9876543211", wait=False) as other:
            assert other is None, "another key does not wait"
        threading.Timer(0.1, builder.send_signal, [signal.SIGKILL]).start()
        with urza.building(manifest.id) as existing:
            assert existing is None
            urza.commit(manifest, blobs)
    with urza.building(manifest.id, wait=False) as existing:
        assert existing == urza.get(manifest.id)


def test_a_builder_that_raises_leaves_its_turn_to_the_next(urza, make_artifact):
    manifest, _ = make_artifact()
    with pytest.raises(ZeroDivisionError), urza.building(manifest.id):
        raise ZeroDivisionError
    with urza.building(manifest.id, wait=False) as existing:
        assert existing is None


def test_what_is_damaged_or_not_trusted_is_to_be_built(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.object_path(manifest.kernels["forward"].binary).write_bytes(b"changed")
    with urza.building(manifest.id) as existing:
        assert existing is None
        urza.commit(manifest, blobs)
    with Urza(urza.root, trust=f"keys:forge={'ab' * 32}").building(manifest.id) as existing:
        assert existing is None


def test_an_id_that_is_none_is_refused(urza):
    with pytest.raises(ArtifactNotFound, match="is not an artifact id"), urza.building("../../escape"):
        pytest.fail("it was to be refused")
    assert not urza.root.exists()


def test_where_there_can_be_no_lock_nobody_waits(tmp_path, make_artifact):
    (tmp_path / "file").write_text("not a folder")
    urza = Urza(tmp_path / "file" / "urza")
    events: list[Event] = []
    urza.on_event(events.append)
    manifest, _ = make_artifact()
    with urza.building(manifest.id) as existing:
        assert existing is None
    [event] = events
    assert event.kind == "degraded"
    assert "others may build the same at this time" in event.message


def test_locks_that_dead_builders_left_are_cleared_away(urza, make_artifact):
    urza.commit(*make_artifact())
    (urza.root / "building").mkdir()
    (urza.root / "building" / "0123456789ab-cpu-standard-ba9876543211").touch()
    with urza.building("0123456789ab-cpu-standard-ba9876543212"):
        urza.gc()
        assert os.listdir(urza.root / "building") == ["0123456789ab-cpu-standard-ba9876543212"]
