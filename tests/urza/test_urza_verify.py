"""`verify` and the audit log: every change that did not go through the store is found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.urza import Urza

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


@pytest.fixture
def kept(urza, make_artifact) -> Urza:
    """Two artifacts, of which the first has been validated and then rejected."""
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.promote(manifest.id)
    urza.commit(*make_artifact(OTHER_ID))
    urza.reject(manifest.id)
    return urza


def log_lines(urza: Urza) -> list[bytes]:
    return (urza.root / "audit.log").read_bytes().splitlines(keepends=True)


def write_log(urza: Urza, lines: list[bytes]) -> None:
    (urza.root / "audit.log").write_bytes(b"".join(lines))


def faults_of(urza: Urza) -> str:
    return "\n".join(f"{fault.subject}: {fault.message}" for fault in urza.verify().faults)


def test_each_line_has_the_hash_of_the_one_before_it_and_says_what_changed(kept):
    lines = log_lines(kept)
    entries = [json.loads(line) for line in lines]
    assert [entry["previous"] for entry in entries] == ["0" * 64] + [sha256(line[:-1]) for line in lines[:-1]]
    assert [entry["sequence"] for entry in entries] == [0, 1, 2, 3]
    assert [(entry["source"], entry["target"]) for entry in entries] == [
        (None, "PENDING_BENCHMARKING"),
        ("PENDING_BENCHMARKING", "VALIDATED"),
        (None, "PENDING_BENCHMARKING"),
        ("VALIDATED", "REJECTED"),
    ]
    assert [entry["signature"]["role"] for entry in entries] == ["forge", "prover", "forge", "prover"]
    last = (kept.root / "refs" / entries[3]["artifact"]).read_bytes()
    assert entries[3]["after"] == sha256(last)
    assert entries[3]["before"] == entries[1]["after"]
    verified = kept.verify()
    assert (verified.artifacts, verified.entries, verified.faults) == (2, 4, ())
    assert verified.objects == 8, "four blobs, two manifests and two that were replaced"


def test_a_record_that_was_put_back_is_found(kept, make_artifact):
    first = make_artifact()[0].id
    path = kept.root / "refs" / first
    rejected = path.read_bytes()
    kept.gc()
    kept.commit(*make_artifact("0123456789ab-cpu-standard-ba9876543212"))
    manifest, _ = make_artifact(status=KernelStatus.VALIDATED)
    # as it was when the artifact was VALIDATED: the signature is right, and it loads
    validated = json.loads(log_lines(kept)[1])
    kept._directory.write_object(manifest.canonical_bytes(), limit_bytes=1 << 20)
    from esper_triton.contracts.record import Record, Role
    from esper_triton.urza.trust import signed

    record = signed(Record(id=first, manifest=manifest.digest), kept._keys.signer([Role.PROVER]))
    assert sha256(record.canonical_bytes()) == validated["after"], "Ed25519 gives the same signature again"
    path.write_bytes(record.canonical_bytes())
    assert kept.load(first)[0].status is KernelStatus.VALIDATED
    assert "the record was put back to an older one, or the log was cut" in faults_of(kept)
    path.write_bytes(rejected)
    assert faults_of(kept) == ""


def changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"VALIDATED"', b'"REJECTED"'), *lines[2:]]


def without_the_second(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def in_another_order(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def without_the_last(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def without_any(lines: list[bytes]) -> list[bytes]:
    return []


def with_garbage(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"garbage\n", *lines[2:]]


def chained_again(lines: list[bytes]) -> list[bytes]:
    """Without the second, and every hash and number made right again, which the signatures are then not."""
    found: list[bytes] = []
    for line in without_the_second(lines):
        entry = json.loads(line)
        entry["sequence"] = len(found)
        entry["previous"] = sha256(found[-1][:-1]) if found else "0" * 64
        found.append(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return found


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (changed, "audit.log:2: is not signed by prover key"),
        (without_the_second, "audit.log:2: follows a line of SHA-256"),
        (in_another_order, "audit.log:2: follows a line of SHA-256"),
        (without_the_last, "the record was put back to an older one, or the log was cut"),
        (without_any, "has a record that the audit log does not have"),
        (with_garbage, "audit.log:3: is not an entry"),
        (chained_again, "audit.log:2: is not signed by forge key"),
    ],
)
def test_a_log_that_was_changed_is_found(kept, change: Callable[[list[bytes]], list[bytes]], fault):
    write_log(kept, change(log_lines(kept)))
    assert fault in faults_of(kept)


def test_an_entry_by_a_key_of_nobody_is_found(kept, make_artifact, tmp_path):
    stranger = Urza(tmp_path / "stranger")
    stranger.commit(*make_artifact(OTHER_ID))
    [line] = log_lines(stranger)
    entry = json.loads(line)
    write_log(kept, [*log_lines(kept), line])
    assert f"is signed by forge key {entry['signature']['key'][:16]}, which is not trusted" in faults_of(kept)


def test_what_nobody_signed_may_only_take_away(kept):
    lines = log_lines(kept)
    entry = json.loads(lines[1]) | {"signature": None}
    write_log(kept, [lines[0], json.dumps(entry).encode() + b"\n", *lines[2:]])
    assert "audit.log:2: is not signed, and says 'status'" in faults_of(kept)


def test_a_writer_that_died_between_log_and_record_is_no_fault_and_the_next_says_so(kept, make_artifact, monkeypatch):
    first = make_artifact()[0].id

    def dies(parts, content, **options):
        if parts[0] == "refs":
            raise KeyboardInterrupt
        write(parts, content, **options)

    write = kept._directory.write
    with monkeypatch.context() as patch:
        patch.setattr(kept._directory, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            kept.archive(first)
    assert kept.get(first).status is KernelStatus.REJECTED
    assert len(log_lines(kept)) == 5
    assert kept.verify().faults == ()
    kept.commit(*make_artifact("0123456789ab-cpu-standard-ba9876543212"))
    entries = [json.loads(line) for line in log_lines(kept)]
    assert [entry["what"] for entry in entries[4:]] == ["status", "void", "committed"]
    assert (entries[5]["source"], entries[5]["target"]) == ("ARCHIVED", "REJECTED")
    assert kept.verify().faults == ()
    assert kept.archive(first).status is KernelStatus.ARCHIVED
    assert kept.verify().faults == ()


def test_a_pin_that_was_logged_and_never_made_is_said_to_be_void(kept, make_artifact, monkeypatch):
    artifact_id = kept.ids()[0]

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept.directory, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            kept.pin(artifact_id)
    assert kept.pins() == []
    kept.promote(OTHER_ID)
    kept.pin(artifact_id)
    said = [change.what for change in kept.history(artifact_id)]
    assert said[-3:] == ["pinned", "void", "pinned"]
    assert kept.verify().faults == ()


@pytest.mark.parametrize("cut", [1, 100, 400])
def test_a_line_that_was_never_finished_counts_as_not_there(kept, make_artifact, cut):
    lines = log_lines(kept)
    write_log(kept, [*lines, lines[0][:cut]])
    assert kept.verify().faults == ()
    kept.commit(*make_artifact("0123456789ab-cpu-standard-ba9876543212"))
    assert log_lines(kept)[:4] == lines
    assert len(log_lines(kept)) == 5
    assert kept.verify().faults == ()


def test_damage_is_named_and_left_where_it_is(kept, make_artifact):
    manifest, _ = make_artifact(OTHER_ID)
    binary = manifest.kernels["forward"].binary
    kept.object_path(binary).write_bytes(b"changed")
    kept.object_path(manifest.kernels["forward"].source).unlink()
    found = faults_of(kept)
    assert f"objects/{binary[:2]}/{binary[2:]}: object {binary} is corrupt: SHA-256 expected {binary}" in found
    assert f"{OTHER_ID}: binary of kernel 'forward' is corrupt" in found
    assert f"{OTHER_ID}: source of kernel 'forward' is missing" in found
    assert kept.object_path(binary).read_bytes() == b"changed"
    assert not (kept.root / "quarantine").exists()


def test_pins_keys_and_lineages_are_looked_at(kept):
    kept.pin(OTHER_ID)
    (kept.root / "refs" / OTHER_ID).unlink()
    (kept.root / "lineages").mkdir()
    (kept.root / "lineages" / "model").write_text(f"{OTHER_ID}\n")
    (kept.root / "keys" / "prover.key").chmod(0o640)
    found = faults_of(kept)
    assert f"{OTHER_ID}: has no record; the audit log says" in found
    assert f"pins/{OTHER_ID}: pins an artifact that is not there" in found
    assert f"lineages/model: names artifact {OTHER_ID}, which is not there" in found
    assert "prover.key: can be read by others (mode 640" in found


def test_what_was_set_aside_is_in_the_log(kept, make_artifact):
    (kept.root / "refs" / OTHER_ID).write_bytes(b"changed")
    with pytest.raises(Exception, match="is corrupt"):
        kept.load(OTHER_ID)
    entry = json.loads(log_lines(kept)[-1])
    assert (entry["what"], entry["artifact"], entry["after"]) == ("quarantined", OTHER_ID, None)
    assert entry["before"] == sha256(b"changed")
    assert kept.verify().faults == ()
    kept.commit(*make_artifact(OTHER_ID))
    assert kept.verify().faults == ()


def test_a_link_in_the_place_of_the_log_is_not_followed(kept, make_artifact, tmp_path):
    outside = tmp_path / "outside"
    os.rename(kept.root / "audit.log", outside)
    (kept.root / "audit.log").symlink_to(outside)
    before = outside.read_bytes()
    assert f"audit.log: store {kept.root}: audit log is a symbolic link, which is never followed" in faults_of(kept)
    with pytest.raises(StoreUnavailable, match="audit log is a symbolic link"):
        kept.query()
    with pytest.raises(StoreUnavailable, match="audit log is a symbolic link"):
        kept.commit(*make_artifact("0123456789ab-cpu-standard-ba9876543212"))
    assert outside.read_bytes() == before
