"""Export and import: what comes out is what went in, and nothing else comes in."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.errors import (
    ArchiveRefused,
    ArtifactNotFound,
    EsperError,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.contracts.record import Figures
from esper_triton.urza import Urza, changes

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


@pytest.fixture
def source(tmp_path, make_artifact) -> Urza:
    """Two artifacts: one VALIDATED, with a report and tags, and one that is unproven and shares blobs with it."""
    urza = Urza(tmp_path / "source")
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.set_status(
        manifest.id, KernelStatus.VALIDATED, b"a report", tags=["high_speed"], figures=Figures(latency_us=2.5)
    )
    urza.commit(*make_artifact(OTHER_ID, binary=b"other"))
    return urza


@pytest.fixture
def trusting(source, tmp_path) -> Urza:
    """An empty store that trusts the source's keys and its own."""
    keys = dict(line.split() for line in (source.root / "keys" / "public").read_text().splitlines())
    return Urza(tmp_path / "trusting", trust=f"keys:local,forge={keys['forge']},prover={keys['prover']}")


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]


def written(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in entries:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return path


def test_what_is_exported_is_imported_with_its_signatures(source, trusting, tmp_path):
    path = tmp_path / "all.tar"
    count, size_bytes = source.export(path)
    assert (count, size_bytes) == (2, path.stat().st_size)
    done = trusting.import_(path)
    assert (set(done.taken), done.unproven, done.kept) == (set(source.ids()), (), ())
    for one in source.ids():
        assert trusting.load(one) == source.load(one)
        assert trusting.record(one) == source.record(one)
    assert trusting.verify().faults == ()
    assert trusting.import_(path).kept == done.taken, "what is there stays"
    [match] = trusting.query()
    assert (match.tags, match.figures.latency_us) == (("high_speed",), 2.5)


def test_the_same_artifacts_give_the_same_bytes_each_object_once_and_no_key(source, tmp_path):
    for name in ("one.tar", "two.tar"):
        source.export(tmp_path / name)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    names = [member.name for member, _ in members(tmp_path / "one.tar")]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"esper-urza.json", "objects", "records", "end.json"}
    private = (source.root / "keys" / "forge.key").read_bytes().strip()
    assert private not in (tmp_path / "one.tar").read_bytes()


@pytest.mark.parametrize("blocks", range(21))  # a record of tar has 20: each way in which its end may fall
def test_an_archive_of_every_length_is_taken_in(tmp_path, make_artifact, blocks):
    source = Urza(tmp_path / "source")
    manifest, blobs = make_artifact(binary=bytes(512 * blocks + 1))
    source.commit(manifest, blobs)
    source.export(tmp_path / "one.tar")
    target = Urza(tmp_path / "target", trust=f"keys:forge={source.public_keys['forge']}")
    assert target.import_(tmp_path / "one.tar").taken == (manifest.id,)
    with open(tmp_path / "one.tar", "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(ArchiveRefused, match="something comes after its end"):
        Urza(tmp_path / "other").import_(tmp_path / "one.tar")


def test_some_artifacts_are_exported_by_their_ids(source, trusting, tmp_path):
    path = tmp_path / "one.tar"
    assert source.export(path, [OTHER_ID, OTHER_ID])[0] == 1
    assert trusting.import_(path).taken == (OTHER_ID,)
    with pytest.raises(ArtifactNotFound):
        source.export(tmp_path / "none.tar", ["0123456789ab-cpu-standard-000000000000"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one.tar", "source", "trusting"]


def test_an_archive_of_strangers_is_refused_or_taken_as_unproven(source, tmp_path):
    path = tmp_path / "all.tar"
    source.export(path)
    ours = Urza(tmp_path / "ours")
    with pytest.raises(UntrustedArtifact, match="which the trust policy does not name"):
        ours.import_(path)
    assert not ours.root.exists()
    done = ours.import_(path, resign=True)
    assert (done.taken, set(done.unproven), done.kept) == ((), set(source.ids()), ())
    for one in source.ids():
        artifact, blobs = ours.load(one)
        assert artifact.status is KernelStatus.PENDING_BENCHMARKING
        assert artifact.manifest.report is None
        assert artifact.manifest.kernels == source.get(one).manifest.kernels
        assert blobs.items() <= source.load(one)[1].items()
        assert ours.record(one).signature.role == "forge"
        assert ours.record(one).tags == ()
    assert ours.query() == [], "nothing is proven here"


def test_an_archive_that_cannot_be_written_leaves_nothing(source, tmp_path):
    with pytest.raises(StoreUnavailable, match=r"archive .*cannot be written: No such file"):
        source.export(tmp_path / "nowhere" / "all.tar")
    digest = source.get(OTHER_ID).manifest.kernels["forward"].binary
    source.object_path(digest).write_bytes(b"changed")
    with pytest.raises(EsperError, match="is corrupt"):
        source.export(tmp_path / "all.tar")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_every_truncation_of_an_archive_is_refused(source, trusting, tmp_path):
    path = tmp_path / "all.tar"
    source.export(path)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in {*range(0, len(whole), 512), *range(0, end, 97)} - {len(whole)}:
        if size >= end + 1024:  # only padding is missing
            continue
        path.write_bytes(whole[:size])
        if size < end:
            with pytest.raises(ArchiveRefused, match="nothing of it was stored"):
                trusting.import_(path)
    assert not trusting.root.exists()


@given(data=st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_changed_archive_is_refused_or_gives_what_the_source_has(source, trusting, tmp_path, data):
    path = tmp_path / "all.tar"
    if not path.exists():
        source.export(path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        done = trusting.import_(path)
    except EsperError:
        return
    for one in (*done.taken, *done.kept):
        assert trusting.load(one) == source.load(one)


def stray(entries: list) -> None:
    entries.insert(2, (tarfile.TarInfo(f"objects/{sha256(b'stray')}"), b"stray"))


def swapped(entries: list) -> None:
    entries[1], entries[2] = (entries[1][0], entries[2][1]), (entries[2][0], entries[1][1])


def dropped(entries: list) -> None:
    del entries[1]


def recounted(entries: list) -> None:
    del entries[1]
    entries[-1] = (entries[-1][0], b'{"objects": 7, "records": 2}')


def twice(entries: list) -> None:
    entries.insert(2, entries[1])


def after_the_end(entries: list) -> None:
    entries.append(entries.pop(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stray, "its end says"),
        (swapped, "is corrupt: it has the SHA-256"),
        (dropped, "its end says"),
        (recounted, "is not in it"),
        (twice, "is there twice"),
        (after_the_end, "comes after its end"),
    ],
)
def test_an_archive_whose_parts_do_not_fit_is_refused(
    source, trusting, tmp_path, change: Callable[[list], None], message: str
):
    path = tmp_path / "all.tar"
    source.export(path)
    entries = members(path)
    change(entries)
    with pytest.raises(ArchiveRefused, match=message):
        trusting.import_(written(path, entries))
    assert not trusting.root.exists()


def test_more_than_the_limits_is_refused_before_it_is_read(source, trusting, tmp_path, monkeypatch):
    path = tmp_path / "all.tar"
    source.export(path)
    size = sum(member.size for member, _ in members(path))
    for name, limit, message in (
        ("_MOST_MEMBERS", 5, "more than 5 entries"),
        ("_MOST_BYTES", size - 1, f"more than {size - 1} bytes"),
        ("BLOB_LIMIT_BYTES", 10, "at most 10 are allowed"),
        ("RECORD_LIMIT_BYTES", 100, "at most 100 are allowed"),
        ("MANIFEST_LIMIT_BYTES", 100, "is larger than 100 bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"esper_triton.urza.archive.{name}", limit)
            with pytest.raises(ArchiveRefused, match=message):
                trusting.import_(path)
    assert not trusting.root.exists()


def test_an_archive_that_changes_while_it_is_read_is_refused(source, trusting, tmp_path, monkeypatch):
    path = tmp_path / "all.tar"
    source.export(path)
    commit = changes.commit

    def changed(*args: object) -> object:
        content = path.read_bytes()
        with open(path, "r+b") as file:
            file.seek(content.index(b"other"))
            file.write(b"OTHER")
        return commit(*args)

    monkeypatch.setattr(changes, "commit", changed)
    with pytest.raises(ArchiveRefused, match="has changed while it was read"):
        trusting.import_(path)
    assert os.listdir(trusting.root / "tmp") == []
    assert OTHER_ID not in trusting
