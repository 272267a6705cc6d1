"""Objects and records in a place that fsspec knows, here a folder; tests/s3 has a real bucket."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from handmade import ARTIFACT_ID, BINARY, make_artifact

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject, InvalidCommit, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.urza import Urza
from esper_triton.urza.cached import Unreachable
from esper_triton.urza.carrying import carry
from esper_triton.urza.shared import SharedUrza

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


@pytest.fixture
def shared(tmp_path: Path) -> Any:
    """`shared("name")`: the store that lies in `there`, with a cache of this name; all have the same keys."""

    def opened(name: str, **options: Any) -> SharedUrza:
        settings = {"cache": tmp_path / name, "keys": tmp_path / "keys", "fresh_s": 0.0, **options}
        store = Urza(f"file://{tmp_path}/there", **settings)
        assert isinstance(store, SharedUrza)
        return store

    return opened


def test_what_one_commits_another_loads(shared, tmp_path: Path):
    first, second = shared("first"), shared("second")
    assert first.ids() == []
    manifest, blobs = make_artifact()
    first.commit(manifest, blobs)
    assert second.load(ARTIFACT_ID) == first.load(ARTIFACT_ID)
    second.promote(ARTIFACT_ID, b"a report")
    assert first.get(ARTIFACT_ID).status is KernelStatus.VALIDATED
    assert first.query() == second.query()
    assert [match.id for match in first.query()] == [ARTIFACT_ID]
    assert ARTIFACT_ID in first
    assert OTHER_ID not in first
    assert pickle.loads(pickle.dumps(first)).ids() == [ARTIFACT_ID]
    there = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert f"refs/{ARTIFACT_ID}" in there
    assert {name.split("/")[0] for name in there} == {"objects", "refs"}
    for store in (first, second):
        assert store.verify().faults == ()


def test_a_pickle_has_no_secrets(shared):
    options = {"auto_mkdir": True, "secret": "hidden", "client_kwargs": {"aws_access_key_id": "hidden", "region": "x"}}
    store = shared("cache", storage_options=options)
    assert b"hidden" not in pickle.dumps(store)
    opened = pickle.loads(pickle.dumps(store))
    assert opened.sent()["storage_options"] == {"auto_mkdir": True, "client_kwargs": {"region": "x"}}
    assert copy.deepcopy(store).sent() == store.sent()


def test_no_collection_is_made_where_there_is_no_lock(shared):
    store = shared("cache")
    store.commit(*make_artifact())
    with pytest.raises(InvalidCommit, match=rf"has no lock.*push it from there.*--urza {store.root}"):
        store.gc(0)
    assert store.ids() == [ARTIFACT_ID]
    assert Urza(store.root).gc(0).removed == (ARTIFACT_ID,)
    assert store.pin(ARTIFACT_ID), "it is fetched again, and stays"
    assert Urza(store.root).gc(0).kept == {"pinned": (ARTIFACT_ID,)}
    assert store.unpin(ARTIFACT_ID)
    assert Urza(store.root).gc(0).removed == (ARTIFACT_ID,)
    assert store.load(ARTIFACT_ID)[0].id == ARTIFACT_ID, "from there"


def test_a_record_is_written_last(shared, monkeypatch: pytest.MonkeyPatch):
    store = shared("cache")
    put = SharedUrza._put
    written = []

    def counted(self: SharedUrza, path: str, content: bytes) -> None:
        written.append(path)
        put(self, path, content)

    monkeypatch.setattr(SharedUrza, "_put", counted)
    store.commit(*make_artifact())
    assert [f"refs/{ARTIFACT_ID}" in path for path in written] == [False] * 5 + [True]

    def breaks(self: SharedUrza, path: str, content: bytes) -> None:
        if "refs/" in path:
            raise OSError("the network is down")
        put(self, path, content)

    monkeypatch.setattr(SharedUrza, "_put", breaks)
    with pytest.raises(Unreachable, match="the network is down"):
        store.commit(*make_artifact(OTHER_ID, binary=b"other"))
    assert store.ids() == shared("fresh").ids() == [ARTIFACT_ID]
    assert OTHER_ID not in Urza(store.root).ids()


def test_a_record_that_changed_meanwhile_is_not_overwritten(shared, monkeypatch: pytest.MonkeyPatch):
    first, second = shared("first"), shared("second")
    first.commit(*make_artifact())
    heads = iter([None, "0" * 64])
    monkeypatch.setattr(first, "_head", lambda artifact_id: next(heads))
    with pytest.raises(InvalidCommit, match=r"was changed at .* meanwhile"):
        first.promote(ARTIFACT_ID)
    assert second.get(ARTIFACT_ID).status is KernelStatus.PENDING_BENCHMARKING
    assert first.get(ARTIFACT_ID).status is KernelStatus.PENDING_BENCHMARKING


def test_what_is_damaged_there_is_refused(shared, tmp_path: Path):
    shared("first").commit(*make_artifact())
    lying = tmp_path / "there" / "objects" / sha256(BINARY)[:2] / sha256(BINARY)[2:]
    lying.write_bytes(b"evil")
    with pytest.raises(CorruptObject, match="SHA-256 expected"):
        shared("second").load(ARTIFACT_ID)
    lying.unlink()
    with pytest.raises(CorruptObject, match="no object has"):
        shared("third").load(ARTIFACT_ID)
    (tmp_path / "there" / "refs" / ARTIFACT_ID).write_bytes(b"nonsense")
    with pytest.raises(CorruptObject, match="its record is corrupt"):
        shared("fourth").load(ARTIFACT_ID)
    assert shared("fifth").query(statuses=tuple(KernelStatus)) == []


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"evil"), Path.unlink], ids=["changed", "removed"])
@pytest.mark.parametrize("file", [f"objects/{sha256(BINARY)[:2]}/{sha256(BINARY)[2:]}", f"refs/{ARTIFACT_ID}"])
def test_what_is_damaged_there_is_put_again_by_whoever_was_refused_it(shared, tmp_path: Path, file: str, damage: Any):
    manifest, blobs = make_artifact()
    shared("first").commit(manifest, blobs)
    damage(tmp_path / "there" / file)
    refused = shared("second")
    with pytest.raises((CorruptObject, ArtifactNotFound)):
        refused.load(ARTIFACT_ID)
    refused.commit(manifest, blobs)
    for name in ("second", "third"):
        assert shared(name).load(ARTIFACT_ID)[1] == blobs


def test_what_was_removed_there_is_gone(shared, tmp_path: Path):
    store = shared("cache")
    store.commit(*make_artifact())
    assert len(store.query(statuses=tuple(KernelStatus))) == 1
    shutil.rmtree(tmp_path / "there")
    assert store.query(statuses=tuple(KernelStatus)) == []
    assert store.ids() == []


def test_artifacts_are_carried_to_it_and_from_it(shared, urza: Urza, tmp_path: Path):
    urza.commit(*make_artifact())
    urza.promote(ARTIFACT_ID)
    keys = ",".join(f"{role}={key}" for role, key in urza.public_keys.items())
    store = shared("cache", trust=f"keys:{keys}")
    assert carry(urza, store).taken == (ARTIFACT_ID,)
    assert carry(urza, store).kept == (ARTIFACT_ID,)
    target = Urza(tmp_path / "target", trust=f"keys:{keys}")
    assert carry(shared("other", trust=f"keys:{keys}"), target).taken == (ARTIFACT_ID,)
    assert target.load(ARTIFACT_ID) == urza.load(ARTIFACT_ID)


def test_a_protocol_that_nothing_knows_is_refused(tmp_path: Path):
    with pytest.raises(StoreUnavailable, match="'gopher://there' cannot be opened"):
        Urza("gopher://there", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
