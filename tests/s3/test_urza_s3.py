"""`Urza("s3://...")` on a real S3-compatible server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from handmade import ARTIFACT_ID, BINARY, make_artifact

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject, UntrustedArtifact
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.urza import Urza
from esper_triton.urza.cached import Unreachable
from esper_triton.urza.directory import object_parts
from esper_triton.urza.shared import SharedUrza

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")
BIG = os.urandom(6 << 20)


@pytest.fixture
def options(s3: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Storage options of a bucket of this test's own, `bucket`."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    options = {"endpoint_url": s3, "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2}}
    files = s3fs.S3FileSystem(**options)
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    return options


def opened(options: dict[str, Any], cache: Path, keys: Path, **more: Any) -> SharedUrza:
    store = Urza("s3://bucket/team", storage_options=options, cache=cache, keys=keys, fresh_s=0.0, **more)
    assert isinstance(store, SharedUrza)
    return store


def test_machines_share_artifacts_through_a_bucket(options: dict[str, Any], tmp_path: Path):
    first = opened(options, tmp_path / "first", tmp_path / "keys")
    manifest, blobs = make_artifact(binary=BIG)
    first.commit(manifest, blobs)
    first.promote(ARTIFACT_ID, b"a report")
    second = opened(options, tmp_path / "second", tmp_path / "keys")
    assert second.ids() == [ARTIFACT_ID]
    artifact, loaded = second.load(ARTIFACT_ID)
    assert artifact == first.get(ARTIFACT_ID)
    assert loaded == {**blobs, sha256(b"a report"): b"a report"}
    assert [match.id for match in second.query()] == [ARTIFACT_ID]
    second.reject(ARTIFACT_ID)
    assert first.get(ARTIFACT_ID).status is KernelStatus.REJECTED
    assert first.query() == []
    with pytest.raises(ArtifactNotFound):
        first.load(ARTIFACT_ID[:-1] + "f")
    stranger = opened(options, tmp_path / "third", tmp_path / "other keys")
    with pytest.raises(UntrustedArtifact):
        stranger.load(ARTIFACT_ID)


def test_an_object_that_was_changed_in_the_bucket_is_refused(options: dict[str, Any], tmp_path: Path):
    opened(options, tmp_path / "first", tmp_path / "keys").commit(*make_artifact())
    import s3fs

    s3fs.S3FileSystem(**options).pipe_file("bucket/team/" + "/".join(object_parts(sha256(BINARY))), b"evil")
    with pytest.raises(CorruptObject, match="SHA-256 expected"):
        opened(options, tmp_path / "second", tmp_path / "keys").load(ARTIFACT_ID)


def test_a_bucket_that_is_not_there_leaves_the_cache(options: dict[str, Any], tmp_path: Path):
    store = opened(options, tmp_path / "cache", tmp_path / "keys")
    store.commit(*make_artifact())
    loaded = store.load(ARTIFACT_ID)
    away = options | {"endpoint_url": "http://127.0.0.1:1"}
    offline = opened(away, tmp_path / "cache", tmp_path / "keys")
    assert offline.load(ARTIFACT_ID) == loaded
    with pytest.raises(Unreachable):
        offline.load(ARTIFACT_ID[:-1] + "f")
