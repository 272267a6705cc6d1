"""What a store remembers of requests: bytes by digest, or nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from handmade import make_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.urza import Urza

REQUEST = "5e" * 32


def test_a_store_that_is_not_there_remembers_nothing_and_is_not_made(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    assert store.recall(REQUEST) is None
    assert not store.root.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(contents=st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_what_was_remembered_last_is_recalled_by_every_object_on_the_directory(
    tmp_path: Path, contents: list[bytes]
) -> None:
    for content in contents:
        Urza(tmp_path / "urza").remember(REQUEST, content)
        assert Urza(tmp_path / "urza").recall(REQUEST) == content
    assert Urza(tmp_path / "urza").recall("00" * 32) is None


def test_a_link_or_a_file_that_is_far_too_large_is_nothing(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    store.remember(REQUEST, b"kept")
    path = store.root / "requests" / REQUEST
    path.unlink()
    (tmp_path / "outside").write_bytes(b"of somebody else")
    path.symlink_to(tmp_path / "outside")
    assert store.recall(REQUEST) is None
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2 << 20)
    assert store.recall(REQUEST) is None


@pytest.mark.parametrize("request_", ["", "../../escape", "5E" * 32, "5e" * 31])
def test_only_a_digest_is_a_request(tmp_path: Path, request_: str) -> None:
    store = Urza(tmp_path / "urza")
    with pytest.raises(ValueError, match="is not a SHA-256 of 64 hex digits"):
        store.recall(request_)
    with pytest.raises(ValueError, match="is not a SHA-256 of 64 hex digits"):
        store.remember(request_, b"")
    assert not (tmp_path / "escape").exists()


def test_what_is_too_large_to_be_recalled_is_not_remembered(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    store.remember(REQUEST, b"before")
    with pytest.raises(ValueError, match="1048577 bytes to remember; at most 1048576 are allowed"):
        store.remember(REQUEST, bytes((1 << 20) + 1))
    assert store.recall(REQUEST) == b"before"


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreUnavailable, match="cannot be"):
        Urza(tmp_path / "file" / "urza").remember(REQUEST, b"")


def age(store: Urza, request: str, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(store.root / "requests" / request, (then, then))


def test_a_collection_forgets_what_nobody_asked_for_and_no_artifact_here_is(urza: Urza) -> None:
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    gone = manifest.id[:-1] + "f"
    asked, recent, named, old, damaged = (f"{number:02x}" * 32 for number in range(5))
    for request, artifact_id in ((asked, gone), (recent, gone), (named, manifest.id), (old, gone)):
        urza.remember(request, json.dumps({"artifact_id": artifact_id}).encode())
    (urza.root / "requests" / damaged).mkdir()
    (urza.root / "requests" / "of somebody else").write_bytes(b"")
    for request, days in ((asked, 31), (recent, 29), (named, 400), (old, 31)):
        age(urza, request, days)
    assert urza.recall(asked) is not None
    kept = (urza.root / "requests" / old).stat().st_size
    assert (urza.gc(dry_run=True).requests, urza.recall(named) is not None) == (1, True)
    age(urza, named, 400)
    done = urza.gc()
    assert (done.requests, done.freed_bytes, done.removed) == (1, kept, ())
    assert urza.recall(old) is None
    assert all(urza.recall(one) is not None for one in (asked, recent, named))
    assert (urza.root / "requests" / "of somebody else").exists()
    age(urza, named, 400)
    assert urza.gc(0).requests == 1, "with the artifact goes what was kept for it"
    assert urza.recall(named) is None


def test_a_builder_whose_request_is_forgotten_meanwhile_has_it_remembered(urza: Urza) -> None:
    manifest, blobs = make_artifact()
    urza.remember(REQUEST, manifest.id.encode())
    age(urza, REQUEST, 31)
    with urza.building(manifest.id) as existing:
        assert existing is None
        recalled = urza.recall(REQUEST)
        assert recalled == manifest.id.encode()
        age(urza, REQUEST, 31)  # where times of use cannot be set, as by a reader of another's files
        assert urza.gc().requests == 1
        urza.commit(manifest, blobs)
        urza.remember(REQUEST, recalled)
    assert urza.gc().requests == 0
    assert urza.recall(REQUEST) == recalled
