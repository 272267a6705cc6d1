"""Whatever is changed on disk is refused, kept as evidence, and repaired by committing again."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from esper_triton.contracts.errors import ArtifactNotFound, ArtifactRefused, CorruptObject
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.urza import Artifact, Urza

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


def quarantined(urza: Urza) -> list[dict[str, object]]:
    """The reports, oldest first."""
    folder = urza.root / "quarantine"
    return [
        json.loads(path.read_bytes())
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    ]


def name_as_manifest(urza: Urza, artifact_id: str, content: bytes) -> None:
    """Puts `content` under its true digest and lets the ref name it."""
    path = urza.object_path(sha256(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (urza.root / "refs").mkdir(exist_ok=True)
    (urza.root / "refs" / artifact_id).write_text(sha256(content) + "\n")


def test_every_flipped_byte_of_a_blob_is_refused_on_load(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    digest = manifest.kernels["forward"].binary
    path, content = urza.object_path(digest), blobs[digest]
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        what = f"artifact '{manifest.id}': binary of kernel 'forward' is corrupt"
        with pytest.raises(CorruptObject, match=f"{what}: SHA-256 expected {digest}, found {sha256(flipped)}"):
            urza.load(manifest.id)
        assert not path.exists()
        assert urza.get(manifest.id).manifest == manifest, "get reads no blob"
        path.write_bytes(content)
    assert urza.load(manifest.id)[1] == blobs
    assert len(quarantined(urza)) == len(content)


def test_a_flipped_byte_of_a_manifest_is_refused_and_kept_as_evidence(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    path, content = urza.object_path(manifest.digest), manifest.canonical_bytes()
    for position in range(0, len(content), 29):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptObject, match=f"manifest is corrupt: SHA-256 expected {manifest.digest}, found"):
            urza.get(manifest.id)
        assert not path.exists()
        path.write_bytes(content)
    assert urza.load(manifest.id)[0].manifest == manifest


@pytest.mark.parametrize("role", ["source", "ttir", "binary", "report"])
def test_damage_is_named_by_its_role_and_kept_with_a_report(urza, make_artifact, role):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.set_status(manifest.id, KernelStatus.VALIDATED, b"the report")
    digest = sha256(b"the report") if role == "report" else getattr(manifest.kernels["forward"], role)
    urza.object_path(digest).write_bytes(b"changed")
    what = "report" if role == "report" else f"{role} of kernel 'forward'"
    with pytest.raises(
        CorruptObject, match=f"{what} is corrupt: SHA-256 expected {digest}, found {sha256(b'changed')}"
    ):
        urza.load(manifest.id)
    [report] = quarantined(urza)
    assert report.pop("when")
    assert "is corrupt" in str(report.pop("reason"))
    assert report == {
        "file": f"objects/{digest[:2]}/{digest[2:]}",
        "artifact": manifest.id,
        "what": what,
        "expected": digest,
        "found": sha256(b"changed"),
        "size_bytes": 7,
    }
    [evidence] = [path for path in (urza.root / "quarantine").iterdir() if path.suffix != ".json"]
    assert evidence.read_bytes() == b"changed"
    assert evidence.name.startswith(digest)


def test_committing_again_restores_what_was_damaged_and_keeps_the_verdict(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    validated = urza.set_status(manifest.id, KernelStatus.VALIDATED)
    for digest in blobs:  # all at once: one is found by load, the others by commit
        urza.object_path(digest).write_bytes(b"changed")
    with pytest.raises(CorruptObject):
        urza.load(manifest.id)
    with pytest.raises(CorruptObject, match="is missing: no object has the SHA-256"):
        urza.load(manifest.id)
    assert urza.commit(manifest, blobs) == validated
    assert urza.load(manifest.id) == (validated, blobs)
    assert len(quarantined(urza)) == len(blobs)


def test_an_artifact_whose_manifest_is_damaged_is_replaced_by_a_commit(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    validated = urza.set_status(manifest.id, KernelStatus.VALIDATED)
    urza.object_path(validated.digest).write_bytes(b"{}")
    again, _ = make_artifact(created_at="2026-01-01T00:00:00+00:00")
    assert urza.commit(again, blobs).manifest == again
    assert urza.get(manifest.id).status is KernelStatus.PENDING_BENCHMARKING


def test_a_truncated_object_is_refused(urza, make_artifact):
    manifest, blobs = make_artifact()
    for digest in (*blobs, manifest.digest):
        urza.commit(manifest, blobs)
        path = urza.object_path(digest)
        for size_bytes in (path.stat().st_size - 1, 0):
            os.truncate(path, size_bytes)
            with pytest.raises(CorruptObject, match=rf"found {sha256(path.read_bytes())} \({size_bytes} bytes\)"):
                urza.load(manifest.id)
            urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


def test_a_missing_object_is_named_and_a_commit_puts_it_back(urza, make_artifact):
    manifest, blobs = make_artifact()
    for digest in (*blobs, manifest.digest):
        urza.commit(manifest, blobs)
        urza.object_path(digest).unlink()
        for _ in range(2):
            with pytest.raises(CorruptObject, match=f"is missing: no object has the SHA-256 {digest}"):
                urza.load(manifest.id)
        assert quarantined(urza) == []
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


def test_an_object_that_is_too_large_is_not_read(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    os.truncate(urza.object_path(manifest.digest), 1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(CorruptObject, match="manifest is too large: 1099511627776 bytes, at most 1048576"):
        urza.get(manifest.id)


def test_a_symbolic_link_is_not_followed_even_to_the_right_bytes(urza, make_artifact, tmp_path):
    manifest, blobs = make_artifact()
    digest = manifest.kernels["forward"].binary
    outside = tmp_path / "outside"
    outside.write_bytes(blobs[digest])
    for path in (urza.object_path(digest), urza.root / "refs" / manifest.id):
        urza.commit(manifest, blobs)
        path.unlink()
        path.symlink_to(outside)
        with pytest.raises(CorruptObject, match="is a symbolic link, which is never followed"):
            urza.load(manifest.id)
        assert not path.is_symlink()
        assert outside.read_bytes() == blobs[digest]
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


def test_a_named_pipe_in_the_place_of_an_object_is_refused_without_waiting(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    path = urza.object_path(manifest.digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptObject, match="manifest is not a regular file"):
        urza.get(manifest.id)


def test_a_record_that_names_another_artifacts_manifest_is_refused_and_the_other_is_unharmed(urza, make_artifact):
    manifest, blobs = make_artifact()
    other, other_blobs = make_artifact(OTHER_ID, binary=b"other")
    urza.commit(manifest, blobs)
    urza.commit(other, other_blobs)
    ref = urza.root / "refs" / manifest.id
    ref.write_bytes((urza.root / "refs" / OTHER_ID).read_bytes())
    with pytest.raises(CorruptObject, match=f"it is of another artifact: expected '{manifest.id}', found '{OTHER_ID}'"):
        urza.load(manifest.id)
    urza.commit(manifest, blobs)
    ref.write_text(other.digest + "\n")
    with pytest.raises(
        CorruptObject, match=f"the manifest of another artifact: expected '{manifest.id}', found '{OTHER_ID}'"
    ):
        urza.load(manifest.id)
    assert urza.load(OTHER_ID)[1] == other_blobs
    with pytest.raises(ArtifactNotFound, match="its record is in quarantine"):
        urza.load(manifest.id)
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


def test_a_record_that_names_a_large_object_as_its_manifest_is_refused_and_the_object_stays(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    large = bytes(2 << 20)
    urza.commit(*make_artifact(OTHER_ID, binary=large))
    (urza.root / "refs" / manifest.id).write_text(sha256(large) + "\n")
    with pytest.raises(CorruptObject, match=f"record is corrupt: it names {sha256(large)}, which is too large"):
        urza.load(manifest.id)
    assert large in urza.load(OTHER_ID)[1].values()
    assert [report["what"] for report in quarantined(urza)] == ["record"]
    urza.commit(manifest, blobs)
    urza.object_path(manifest.digest).write_bytes(large)
    with pytest.raises(CorruptObject, match="manifest is too large"):
        urza.load(manifest.id)
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"../../etc/passwd\n",
        b"a" * 63 + b"\n",
        b"A" * 64 + b"\n",
        b"a" * 64,
        b"a" * 64 + b"\n\n",
        b"\xff\x00" * 30,
    ],
)
def test_a_record_with_garbage_is_refused(urza, make_artifact, line):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    (urza.root / "refs" / manifest.id).write_bytes(line)
    with pytest.raises(CorruptObject, match="record is corrupt: a signed record was expected, found b"):
        urza.get(manifest.id)
    assert urza.commit(manifest, blobs).manifest == manifest


def test_a_repair_between_finding_damage_and_setting_it_aside_is_not_undone(urza, make_artifact, monkeypatch):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    digest = manifest.kernels["forward"].binary
    urza.object_path(digest).write_bytes(b"changed")
    lock = urza._directory.lock

    @contextlib.contextmanager
    def repaired_meanwhile():
        Urza(urza.root).commit(manifest, blobs)
        with lock():
            yield

    monkeypatch.setattr(urza._directory, "lock", repaired_meanwhile)
    assert urza.load(manifest.id)[1] == blobs
    assert urza.object_path(digest).read_bytes() == blobs[digest]


def test_damage_is_refused_also_where_it_cannot_be_set_aside(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.object_path(manifest.digest).write_bytes(b"changed")
    (urza.root / "quarantine").write_text("a file where the folder should be")
    with pytest.raises(CorruptObject, match=r"manifest is corrupt.*could not be moved to quarantine"):
        urza.get(manifest.id)
    assert urza.object_path(manifest.digest).read_bytes() == b"changed"


def outcome_of(content: bytes, artifact_id: str) -> Artifact | Exception:
    """What a fresh store says of an artifact whose manifest object holds `content`, under the right digest."""
    with tempfile.TemporaryDirectory() as folder:
        urza = Urza(Path(folder) / "urza")
        name_as_manifest(urza, artifact_id, content)
        try:
            return Urza(urza.root, trust="unsigned-ok").get(artifact_id)
        except (CorruptObject, ArtifactRefused) as error:
            assert urza.object_path(sha256(content)).read_bytes() == content, "sound by its digest: it stays"
            return error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"schema_version": "1.0"}',
        b'{"schema_version": 1.0}',
        b'{"schema_version": "latest"}',
        b'{"schema_version": "1.0", "dims": {"d": ' + b"9" * 10_000 + b"}}",
        b'{"schema_version": "1.0", "compile_seconds": NaN}',
    ],
    ids=lambda content: content[:40].decode("ascii", "replace"),
)
def test_what_is_not_a_manifest_is_refused(make_artifact, content):
    manifest, _ = make_artifact()
    found = outcome_of(content, manifest.id)
    assert isinstance(found, CorruptObject)
    assert "which is not a valid manifest" in str(found)
    assert len(str(found)) < 2000


# An alphabet of its own: hypothesis's default one takes seconds to build once, and fails the health check by it.
text = st.text('abdikms019_./-"\\ \n\x00é€', max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(["VALIDATED", "cpu", "a" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_a_manifest_changed_anywhere_is_read_as_it_says_or_refused(make_artifact, data):
    manifest, _ = make_artifact()
    body = json.loads(manifest.canonical_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        node = body
        while True:  # walk down to where the change is made
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                break
            node = node[key]
        change = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "add" and isinstance(node, dict):
            node[data.draw(text)] = data.draw(json_values)
        elif change == "remove" and key is not None:
            del node[key]
        elif key is not None:
            node[key] = data.draw(json_values)
    found = outcome_of(json.dumps(body).encode(), manifest.id)
    if isinstance(found, Artifact):
        assert found.id == body["id"] == manifest.id
        assert found.status == body["status"]
        assert set(found.manifest.blobs) >= {kernel["binary"] for kernel in body["kernels"].values()}
    elif isinstance(found, ArtifactRefused):
        assert body["schema_version"] != "1.0"


@given(cut=st.integers(0, 3000), removed=st.integers(0, 30), inserted=st.binary(max_size=8))
@example(cut=0, removed=0, inserted=b"\xef\xbb\xbf")
def test_a_manifest_whose_bytes_are_edited_is_read_whole_or_refused(make_artifact, cut, removed, inserted):
    manifest, _ = make_artifact()
    content = manifest.canonical_bytes()
    edited = content[:cut] + inserted + content[cut + removed :]
    found = outcome_of(edited, manifest.id)
    if isinstance(found, Artifact):
        assert found.id == manifest.id
        assert found.digest == sha256(edited)
