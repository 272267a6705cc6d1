"""Who may say what: roles, policies, signatures, and the log of what was said."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.errors import (
    ArtifactRefused,
    CorruptObject,
    InvalidCommit,
    NotAuthorized,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus, sha256
from esper_triton.contracts.record import Figures, Record, Role
from esper_triton.urza import Trust, Urza
from esper_triton.urza.directory import Damage

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


def public_keys(urza: Urza) -> dict[str, str]:
    lines = (urza.root / "keys" / "public").read_text().splitlines()
    return dict(line.split() for line in lines)


def record_of(urza: Urza, artifact_id: str) -> dict:
    return json.loads((urza.root / "refs" / artifact_id).read_bytes())


def test_a_signature_is_ed25519_over_the_record_without_it(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    body = record_of(urza, manifest.id)
    value = bytes.fromhex(body["signature"].pop("value"))
    message = b"esper-urza record\0" + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    key = public_keys(urza)["forge"]
    assert body["signature"] == {"role": "forge", "key": key}
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(value, message)  # raises where it is not


def test_keys_are_made_once_and_the_private_ones_are_their_owners_alone(urza, make_artifact):
    urza.commit(*make_artifact())
    before = {path.name: path.read_bytes() for path in (urza.root / "keys").iterdir()}
    for role in Role:
        path = urza.root / "keys" / f"{role}.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text()))
        assert private.public_key().public_bytes_raw().hex() == public_keys(urza)[role]
    assert before["forge.key"] != before["prover.key"]
    Urza(urza.root).commit(*make_artifact(OTHER_ID))
    assert {path.name: path.read_bytes() for path in (urza.root / "keys").iterdir()} == before


def test_keys_may_lie_outside_of_the_store(tmp_path, make_artifact):
    manifest, blobs = make_artifact()
    urza = Urza(tmp_path / "urza", keys=tmp_path / "keys")
    urza.commit(manifest, blobs)
    assert not (urza.root / "keys").exists()
    assert (tmp_path / "keys" / "forge.key").exists()
    assert Urza(tmp_path / "urza", keys=tmp_path / "keys").load(manifest.id)[1] == blobs
    with pytest.raises(UntrustedArtifact, match=r"which the trust policy does not name \(it names none\)"):
        Urza(tmp_path / "urza").load(manifest.id)


def test_the_forge_signs_what_is_unproven_and_only_the_prover_a_verdict(urza, make_artifact):
    manifest, blobs = make_artifact()
    forge = Urza(urza.root, roles=["forge"])
    prover = Urza(urza.root, roles=["prover"])
    with pytest.raises(NotAuthorized, match="must be signed by the forge: this store was opened to sign as prover"):
        prover.commit(manifest, blobs)
    assert manifest.id not in urza
    forge.commit(manifest, blobs)
    for status in (KernelStatus.VALIDATED, KernelStatus.REJECTED):
        with pytest.raises(NotAuthorized, match="must be signed by the prover: this store was opened to sign as forge"):
            forge.set_status(manifest.id, status, b"a report")
        with pytest.raises(NotAuthorized, match="must be signed by the prover"):
            forge.commit(*make_artifact(OTHER_ID, status=status))
    assert urza.get(manifest.id).status is KernelStatus.PENDING_BENCHMARKING
    assert not urza.object_path(sha256(b"a report")).exists()
    prover.set_status(manifest.id, KernelStatus.VALIDATED)
    assert record_of(urza, manifest.id)["signature"]["role"] == "prover"
    assert forge.load(manifest.id)[0].status is KernelStatus.VALIDATED
    assert forge.archive(manifest.id).status is KernelStatus.ARCHIVED, "it only takes away"
    assert OTHER_ID not in urza


def test_tags_and_figures_are_the_provers_and_leave_the_manifest_as_it_is(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    with pytest.raises(NotAuthorized, match="tags and figures come from a proof, which it lacks"):
        urza.characterize(manifest.id, tags=["high_speed"], figures=Figures())
    digest = urza.promote(manifest.id).digest
    with pytest.raises(NotAuthorized, match="must be signed by the prover"):
        Urza(urza.root, roles=["forge"]).characterize(manifest.id, figures=Figures(latency_us=1.0))
    figures = Figures(latency_us=12.5, memory_bytes=4096, drift=1e-7)
    assert urza.characterize(manifest.id, tags=["high_speed"], figures=figures).digest == digest
    record = urza.record(manifest.id)
    assert (record.tags, record.figures) == (("high_speed",), figures)
    assert urza.reject(manifest.id).status is KernelStatus.REJECTED
    assert urza.record(manifest.id).tags == ("high_speed",), "they stay with the next status"
    with pytest.raises(InvalidCommit, match="String should match pattern"):
        urza.set_status(manifest.id, KernelStatus.REJECTED, tags=["not a tag"])


@pytest.mark.parametrize("status", [KernelStatus.VALIDATED, KernelStatus.REJECTED])
def test_a_verdict_under_the_forges_signature_is_refused(urza, make_artifact, status):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    claimed = manifest.model_copy(update={"status": status})
    content = claimed.canonical_bytes()
    urza.object_path(sha256(content)).parent.mkdir(exist_ok=True)
    urza.object_path(sha256(content)).write_bytes(content)
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex((urza.root / "keys" / "forge.key").read_text()))
    record = Record(id=manifest.id, manifest=sha256(content))
    public = key.public_key().public_bytes_raw().hex()
    body = record.model_dump(mode="json") | {
        "signature": {
            "role": "forge",
            "key": public,
            "value": key.sign(record.signed_bytes(Role.FORGE, public)).hex(),
        }
    }
    path = urza.root / "refs" / manifest.id
    path.write_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(
        UntrustedArtifact, match="is signed by the forge, and what it says may be signed by the prover only"
    ):
        urza.load(manifest.id)
    body["signature"]["role"] = "prover"  # the same key cannot take another role
    path.write_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(CorruptObject, match="record is corrupt: its signature is not by prover key"):
        urza.load(manifest.id)


def test_another_stores_signature_counts_only_where_its_key_is_named(tmp_path, make_artifact):
    manifest, blobs = make_artifact()
    theirs, ours = Urza(tmp_path / "theirs"), Urza(tmp_path / "ours")
    theirs.commit(manifest, blobs)
    theirs.promote(manifest.id)
    ours.commit(*make_artifact(OTHER_ID))
    for source in theirs.root.rglob("*"):
        target = ours.root / source.relative_to(theirs.root)
        if source.is_file() and source.parts[-2] not in ("keys", "leases", "index") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    key = public_keys(theirs)["prover"]
    with pytest.raises(
        UntrustedArtifact, match=f"prover key {key[:16]}, which the trust policy does not name"
    ) as caught:
        ours.load(manifest.id)
    assert isinstance(caught.value, ArtifactRefused)
    assert f"'keys:prover={key}'" in str(caught.value)
    named = Urza(ours.root, trust=f"keys:prover={key}")
    assert named.load(manifest.id)[1] == blobs
    with pytest.raises(UntrustedArtifact, match="forge key"):
        named.load(OTHER_ID)
    both = Urza(ours.root, trust=f"keys:prover={key},local")
    assert both.load(manifest.id)[1] == both.load(OTHER_ID)[1] == blobs
    with pytest.raises(UntrustedArtifact):
        Urza(ours.root, trust=f"keys:forge={key}").load(manifest.id)  # the right key for another role


def test_a_store_that_could_not_load_what_it_signs_does_not_sign_it(tmp_path, make_artifact):
    urza = Urza(tmp_path / "urza")
    urza.commit(*make_artifact())
    other = Urza(urza.root, trust=f"keys:forge={'ab' * 32}")
    with pytest.raises(NotAuthorized, match="is none that the trust policy names"):
        other.commit(*make_artifact(OTHER_ID))
    with pytest.raises(NotAuthorized, match=r"there is no .*forge\.key"):
        Urza(tmp_path / "new", trust=f"keys:forge={'ab' * 32}").commit(*make_artifact())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is none of 'local', 'unsigned-ok'"),
        ("locale", "did you mean 'local'"),
        ("keys:", "is neither 'local' nor a role"),
        ("keys:forge", "is neither 'local' nor a role"),
        ("keys:forge=abc", "public key of 64 hex digits"),
        ("keys:smith=" + "ab" * 32, "is neither 'local' nor a role"),
        ("keys:forge=" + "AB" * 32, "public key of 64 hex digits"),
    ],
)
def test_a_policy_that_is_none_is_refused_with_what_there_is(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Urza(tmp_path, trust=text)


def test_a_policy_is_what_its_text_says():
    assert Trust.parse("local") == Trust(local=True)
    assert Trust.parse("unsigned-ok") == Trust(local=True, unsigned=True)
    one, two, three = (digit * 64 for digit in "123")
    assert Trust.parse(f"keys:forge={one},forge={two}, prover={three}") == Trust(
        keys={Role.FORGE: frozenset({one, two}), Role.PROVER: frozenset({three})}
    )


def without_signature(urza: Urza, artifact_id: str) -> None:
    """As the release before this one stored it: the record is the manifest's digest."""
    (urza.root / "refs" / artifact_id).write_text(record_of(urza, artifact_id)["manifest"] + "\n")


def test_what_an_older_release_stored_is_refused_until_it_is_signed(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    validated = urza.promote(manifest.id)
    without_signature(urza, manifest.id)
    assert urza.is_unsigned(manifest.id)
    with pytest.raises(UntrustedArtifact, match=r"is not signed; compile it again, or sign .*esper_triton\.urza sign"):
        urza.load(manifest.id)
    assert Urza(urza.root, trust="unsigned-ok").load(manifest.id) == (validated, blobs)
    assert urza.sign(manifest.id) == validated
    assert urza.load(manifest.id) == (validated, blobs)
    with pytest.raises(InvalidCommit, match="is signed, by prover key"):
        urza.sign(manifest.id)


def test_a_whole_store_of_an_older_release_is_read_signed_and_carried(urza, make_artifact, tmp_path):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.promote(manifest.id)
    urza.commit(*make_artifact(OTHER_ID))
    for one in urza.ids():
        without_signature(urza, one)
    for name in ("audit.log", "urza.json"):
        (urza.root / name).unlink()
    shutil.rmtree(urza.root / "keys")
    old = Urza(urza.root, trust="unsigned-ok")
    assert [match.id for match in old.query()] == [manifest.id]
    old.export(tmp_path / "old.tar")
    carried = Urza(tmp_path / "carried", trust="unsigned-ok")
    assert set(carried.import_(tmp_path / "old.tar").taken) == set(old.ids())
    assert carried.load(manifest.id) == old.load(manifest.id)
    assert carried.verify().faults == old.verify().faults == ()
    assert len(urza.verify().faults) == 4, "two that are not signed and that no log has"
    for one in urza.ids():
        urza.sign(one)
    assert urza.load(manifest.id) == carried.load(manifest.id)
    assert urza.verify().faults == ()
    assert json.loads((urza.root / "urza.json").read_bytes()) == {"schema_version": "2.0"}


def test_a_commit_replaces_what_nobody_has_signed(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.promote(manifest.id)
    without_signature(urza, manifest.id)
    assert urza.commit(manifest, blobs).status is KernelStatus.PENDING_BENCHMARKING, "the verdict was nobody's"
    assert urza.load(manifest.id)[1] == blobs


@pytest.mark.parametrize("content", ["", "00" * 32, "zz" * 32 + "\n", "00" * 31 + "\n"])
def test_a_private_key_that_is_none_is_refused_and_nothing_is_written(urza, make_artifact, content):
    urza.commit(*make_artifact())
    (urza.root / "keys" / "forge.key").write_text(content)
    with pytest.raises(NotAuthorized, match="does not hold 64 hex digits"):
        Urza(urza.root).commit(*make_artifact(OTHER_ID))
    assert OTHER_ID not in urza


def test_a_private_key_that_others_can_read_is_not_used(urza, make_artifact):
    urza.commit(*make_artifact())
    (urza.root / "keys" / "forge.key").chmod(0o644)
    with pytest.raises(NotAuthorized, match=r"can be read by others \(mode 644, 600 was expected\)"):
        Urza(urza.root).commit(*make_artifact(OTHER_ID))


def test_a_private_key_that_is_not_the_public_ones_is_not_used(urza, make_artifact):
    urza.commit(*make_artifact())
    (urza.root / "keys" / "forge.key").write_text("11" * 32 + "\n")
    with pytest.raises(NotAuthorized, match=r"does not name the public key of forge\.key"):
        Urza(urza.root).commit(*make_artifact(OTHER_ID))


def test_new_keys_end_the_trust_in_what_the_old_ones_signed(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.load(manifest.id)  # remembered, for these keys
    for path in (urza.root / "keys").iterdir():
        path.unlink()
    with pytest.raises(UntrustedArtifact):
        urza.load(manifest.id)
    urza.commit(*make_artifact(OTHER_ID))
    with pytest.raises(UntrustedArtifact, match="forge key"):
        urza.load(manifest.id)
    urza.commit(manifest, blobs)
    assert urza.load(manifest.id)[1] == blobs


@given(cut=st.integers(0, 600), removed=st.integers(0, 40), inserted=st.binary(max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_record_whose_bytes_are_edited_is_read_as_it_was_or_refused(urza, make_artifact, cut, removed, inserted):
    manifest, blobs = make_artifact()
    committed = urza.commit(manifest, blobs)
    path = urza.root / "refs" / manifest.id
    content = path.read_bytes()
    edited = content[:cut] + inserted + content[cut + removed :]
    path.write_bytes(edited)
    if edited == content:
        assert urza.load(manifest.id) == (committed, blobs)
    else:
        with pytest.raises((CorruptObject, ArtifactRefused)):
            urza.load(manifest.id)
    path.unlink(missing_ok=True)


def test_every_single_bit_flip_of_an_artifact_is_refused(urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.promote(manifest.id, b"report")
    artifact, whole = urza.load(manifest.id)
    paths = [urza.object_path(digest) for digest in (artifact.digest, *whole)] + [urza.root / "refs" / manifest.id]
    shelf = urza._shelf  # what load asks, without moving to quarantine what it refuses ten thousand times
    flips = 0
    for path in paths:
        content = path.read_bytes()
        descriptor = os.open(path, os.O_WRONLY)
        for position in range(len(content)):
            for bit in range(8):
                os.pwrite(descriptor, bytes([content[position] ^ 1 << bit]), position)
                with pytest.raises((Damage, ArtifactRefused), match=r"is corrupt|has schema"):
                    shelf.whole(manifest.id)
                flips += 1
            os.pwrite(descriptor, content[position : position + 1], position)
        os.close(descriptor)
        assert path.read_bytes() == content
    assert flips == 8 * sum(path.stat().st_size for path in paths)
    assert urza.load(manifest.id) == (artifact, whole)
