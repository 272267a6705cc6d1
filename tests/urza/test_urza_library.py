"""Commit, read, change of status, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    EsperError,
    InvalidCommit,
    StoreUnavailable,
)
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.urza import Urza, default_root
from esper_triton.urza.changes import ALLOWED

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_was_committed_is_loaded_again_by_another_instance(urza, make_artifact):
    manifest, blobs = make_artifact()
    committed = urza.commit(manifest, blobs)
    loaded, found = Urza(urza.root).load(manifest.id)
    assert found == blobs
    assert loaded == committed
    assert loaded.manifest == manifest
    assert (loaded.id, loaded.status, loaded.digest) == (
        manifest.id,
        KernelStatus.PENDING_BENCHMARKING,
        manifest.digest,
    )
    assert urza.get(manifest.id) == committed


def test_objects_lie_under_their_own_sha256(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    objects = [path for path in (urza.root / "objects").rglob("*") if path.is_file()]
    assert {path.parent.name + path.name for path in objects} == {*blobs, manifest.digest}
    assert all(sha256(path.read_bytes()) == path.parent.name + path.name for path in objects)
    assert urza.object_path(manifest.digest).read_bytes() == manifest.canonical_bytes()
    record = json.loads((urza.root / "refs" / manifest.id).read_bytes())
    assert (record["id"], record["manifest"]) == (manifest.id, manifest.digest)
    assert record["signature"]["role"] == "forge"
    assert list((urza.root / "tmp").iterdir()) == []


def test_constructing_and_asking_touches_nothing_on_disk(tmp_path):
    urza = Urza(tmp_path / "a" / "urza")
    assert urza.ids() == []
    assert OTHER_ID not in urza
    with pytest.raises(ArtifactNotFound):
        urza.get(OTHER_ID)
    with pytest.raises(ArtifactNotFound):
        urza.set_status(OTHER_ID, KernelStatus.VALIDATED)
    assert list(tmp_path.iterdir()) == []


def test_the_home_directory_is_expanded_and_a_relative_root_stays_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Urza("~/store").root == tmp_path / "store"
    monkeypatch.chdir(tmp_path)
    relative = Urza("store")
    monkeypatch.chdir("/")
    assert relative.root == tmp_path / "store"


def test_the_default_root_is_in_the_cache_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ESPER_URZA", raising=False)
    assert default_root() == tmp_path / ".cache" / "esper" / "urza"
    monkeypatch.setenv("ESPER_URZA", "~/elsewhere")
    assert default_root() == tmp_path / "elsewhere"
    monkeypatch.setenv("ESPER_URZA", "https://build:8443/team")
    assert default_root() == "https://build:8443/team", "which a Path would make a folder"


def test_ids_are_sorted_and_strangers_among_the_refs_are_not_listed(urza, make_artifact):
    first, _ = make_artifact()
    for artifact_id in (OTHER_ID, first.id):
        urza.commit(*make_artifact(artifact_id))
    (urza.root / "refs" / "notes.txt").write_text("hello")
    assert urza.ids() == [first.id, OTHER_ID]
    assert OTHER_ID in urza
    assert "notes.txt" not in urza
    assert 7 not in urza


def test_a_second_commit_keeps_the_first(urza, make_artifact):
    manifest, blobs = make_artifact(created_at="2025-01-01T00:00:00+00:00")
    first = urza.commit(manifest, blobs)
    before = files_below(urza.root)
    assert urza.commit(*make_artifact(created_at="2026-01-01T00:00:00+00:00")) == first
    assert files_below(urza.root) == before


def test_a_second_commit_keeps_the_verdict_on_the_first(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.set_status(manifest.id, KernelStatus.REJECTED)
    assert urza.commit(manifest, blobs).status is KernelStatus.REJECTED


def test_another_build_under_a_taken_id_is_refused(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    before = files_below(urza.root)
    with pytest.raises(InvalidCommit, match=r"taken by another build: dims is \{'d': 8\} in the store and \{'d': 16\}"):
        urza.commit(*make_artifact(dims={"d": 16}))
    assert files_below(urza.root) == before


def test_blobs_that_do_not_fit_the_manifest_are_refused_before_anything_is_written(urza, make_artifact):
    manifest, blobs = make_artifact()
    binary = manifest.kernels["forward"].binary
    without = {digest: blob for digest, blob in blobs.items() if digest != binary}
    for offered, message in (
        (without, f"missing binary of kernel 'forward' \\({binary}\\)"),
        (blobs | {sha256(b"more"): b"more"}, f"unexpected blob {sha256(b'more')}"),
        (
            blobs | {binary: b"other"},
            f"binary of kernel 'forward': SHA-256 expected {binary}, found {sha256(b'other')}",
        ),
    ):
        with pytest.raises(InvalidCommit, match=message) as caught:
            urza.commit(manifest, offered)
        assert isinstance(caught.value, EsperError)
        assert isinstance(caught.value, ValueError)
    assert not urza.root.exists()


@pytest.mark.parametrize(
    "artifact_id", ["../../escape", "a/b", "", "..", "x" * 300, "0123456789ab-cpu-standard-ba987654321\n"]
)
def test_an_id_that_does_not_have_the_form_of_one_never_becomes_a_file_name(urza, make_artifact, artifact_id):
    manifest, blobs = make_artifact()
    with pytest.raises(InvalidCommit, match="the manifest is not valid"):
        urza.commit(manifest.model_copy(update={"id": artifact_id}), blobs)
    assert not urza.root.exists()
    for read in (urza.get, urza.load, lambda name: urza.set_status(name, KernelStatus.VALIDATED)):
        with pytest.raises(ArtifactNotFound, match="is not an artifact id"):
            read(artifact_id)
    assert artifact_id not in urza
    assert not urza.root.exists()


def test_an_unknown_id_names_the_nearest_ones(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    with pytest.raises(ArtifactNotFound, match=f"no artifact '{OTHER_ID}' in .*; did you mean '{manifest.id}'"):
        urza.get(OTHER_ID)


def test_of_many_ids_only_those_that_begin_alike_are_compared(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    for number in range(300):
        (urza.root / "refs" / f"{number:012x}-cpu-standard-{number:012x}").touch()
    with pytest.raises(ArtifactNotFound, match=f"did you mean '{manifest.id}'"):
        urza.get(OTHER_ID)
    with pytest.raises(ArtifactNotFound, match="urza ls` lists what there is"):
        urza.get("f" + OTHER_ID[1:])


@pytest.mark.parametrize("source", list(KernelStatus))
@pytest.mark.parametrize("target", list(KernelStatus))
def test_a_status_moves_only_along_the_table(urza, make_artifact, source, target):
    manifest, blobs = make_artifact(status=source)
    before = urza.commit(manifest, blobs)
    pending = {KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE}
    verdict = {KernelStatus.VALIDATED, KernelStatus.REJECTED}
    allowed = (
        (source in pending and target in verdict)
        or (source in verdict and target is KernelStatus.ARCHIVED)
        or (source is KernelStatus.VALIDATED and target is KernelStatus.REJECTED)
    )
    if source is target:
        assert urza.set_status(manifest.id, target) == before
    elif allowed:
        assert urza.set_status(manifest.id, target).status is target
        assert urza.get(manifest.id).status is target
        assert urza.object_path(before.digest).read_bytes() == manifest.canonical_bytes()
    else:
        choices = ", ".join(ALLOWED[source]) or "nothing"
        with pytest.raises(InvalidCommit, match=f"cannot go from {source} to {target}; allowed: {choices}"):
            urza.set_status(manifest.id, target)
        assert urza.get(manifest.id) == before


def test_a_report_comes_with_the_status_and_stays_with_the_next(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    report = b'{"worst_error": 1e-7}'
    urza.set_status(manifest.id, KernelStatus.VALIDATED, report)
    artifact, found = urza.load(manifest.id)
    assert artifact.manifest.report == sha256(report)
    assert found == blobs | {sha256(report): report}
    urza.set_status(manifest.id, KernelStatus.ARCHIVED)
    assert urza.get(manifest.id).manifest.report == sha256(report)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_root_that_cannot_be_made_is_named_with_the_reason(tmp_path, make_artifact, below):
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "file" / below, Path("/proc/nowhere") / below):
        with pytest.raises(
            StoreUnavailable, match=rf"store {root} cannot be .*: (Not a directory|No such file|File exists)"
        ):
            Urza(root).commit(*make_artifact())
    assert (tmp_path / "file").read_text() == "not a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", ["objects", "refs", "tmp"])
def test_a_folder_of_the_store_that_is_a_link_is_not_followed(urza, make_artifact, tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    urza.root.mkdir()
    (urza.root / folder).symlink_to(outside)
    with pytest.raises(StoreUnavailable, match="is a link or a file; a folder was expected"):
        urza.commit(*make_artifact())
    assert list(outside.iterdir()) == []


def put_manifest(urza: Urza, artifact_id: str, content: bytes) -> str:
    """As another release would have: an object and a ref, by hand."""
    digest = sha256(content)
    path = urza.object_path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (urza.root / "refs").mkdir(exist_ok=True)
    (urza.root / "refs" / artifact_id).write_text(digest + "\n")
    return digest


@pytest.mark.parametrize(
    ("version", "advice"),
    [("2.0", "upgrade esper_triton"), ("1.7", "upgrade esper_triton"), ("0.9", "compile it again")],
)
def test_a_manifest_of_another_release_is_refused_and_left_as_it_is(urza, make_artifact, version, advice):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    body = json.loads(manifest.canonical_bytes()) | {"schema_version": version, "field_of_that_release": 1}
    put_manifest(urza, manifest.id, json.dumps(body).encode())
    before = files_below(urza.root / "objects") | files_below(urza.root / "refs")
    for attempt in (urza.get, urza.load, lambda _: urza.commit(manifest, blobs)):
        with pytest.raises(ArtifactRefused, match=f"schema {version}.*{advice}"):
            attempt(manifest.id)
    assert files_below(urza.root / "objects") | files_below(urza.root / "refs") == before


def test_a_newer_minor_schema_that_still_fits_is_read(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    newer = manifest.model_copy(update={"schema_version": "1.7"})
    put_manifest(urza, manifest.id, newer.canonical_bytes())
    assert Urza(urza.root, trust="unsigned-ok").load(manifest.id)[0].manifest == newer


def test_unfinished_files_of_a_dead_writer_are_cleared_by_the_next(urza, make_artifact):
    (urza.root / "tmp").mkdir(parents=True)
    (urza.root / "tmp" / "deadbeef").write_bytes(b"half")
    urza.commit(*make_artifact())
    assert os.listdir(urza.root / "tmp") == []
