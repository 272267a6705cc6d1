"""An artifact keeps the design that it was made from, and gives it back when it is the one that it names."""

from __future__ import annotations

import json

import pytest

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactRefused, CorruptObject
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import Record, Role
from esper_triton.urza import Urza
from esper_triton.urza.trust import signed

DESIGN = Blueprint.from_text('''
name = "scale"
input = "h"
graph = """
scaled = mul(h, w)
shifted = add(scaled, b)
"""
[dims]
d = {}
[parameters]
w = { shape = ["d"] }
b = { shape = ["d"] }
''')


def with_design(made: tuple[Manifest, dict[str, bytes]], text: bytes, of: str) -> tuple[Manifest, dict[str, bytes]]:
    manifest, blobs = made
    update = {"blueprint": sha256(text), "blueprint_id": of}
    others = {digest: blob for digest, blob in blobs.items() if digest != manifest.blueprint}
    return manifest.model_copy(update=update), others | {sha256(text): text}


def test_the_design_of_an_artifact_comes_out_of_the_store(urza: Urza, make_artifact):
    text = DESIGN.canonical_bytes()
    artifact = urza.commit(*with_design(make_artifact(), text, DESIGN.id))
    assert artifact.manifest.blueprint == sha256(text)
    found = Urza(urza.root).blueprint(artifact.id)
    assert (found.id, found.name) == (DESIGN.id, "scale")
    assert found.ops == DESIGN.canonical().ops
    assert found.dims == DESIGN.dims
    urza.promote(artifact.id, b"{}")
    assert urza.blueprint(artifact.id) == found


def test_the_design_of_a_hand_written_kernel_comes_with_its_source(urza: Urza, make_artifact, adapter_path):
    design = Blueprint.load(adapter_path)
    manifest, blobs = make_artifact()
    source = design.source_text.encode()
    kernel = manifest.kernels["forward"]
    blobs.pop(kernel.source)
    manifest = manifest.model_copy(
        update={"kernels": {"forward": kernel.model_copy(update={"source": sha256(source)})}}
    )
    made = with_design((manifest, blobs | {sha256(source): source}), design.canonical_bytes(), design.id)
    found = urza.blueprint(urza.commit(*made).id)
    assert found == design.model_copy(update={"path": None})
    assert "def reference(" in found.source_text


@pytest.mark.parametrize(
    ("text", "of", "fault"),
    [
        (b"import os", DESIGN.id, "what it keeps as its blueprint is none: blueprint: not valid JSON"),
        (b'{"name": "scale"}', DESIGN.id, "is none: blueprint: missing key 'input'"),
        (DESIGN.canonical_bytes(), "0" * 64, f"expected id {'0' * 64}, found {DESIGN.id}"),
    ],
)
def test_a_design_that_is_not_the_one_named_is_refused(urza: Urza, make_artifact, text: bytes, of: str, fault: str):
    artifact = urza.commit(*with_design(make_artifact(), text, of))
    with pytest.raises(ArtifactRefused, match=fault):
        urza.blueprint(artifact.id)
    assert urza.load(artifact.id)[0] == artifact  # its kernels are what they were


def test_a_damaged_design_is_set_aside_and_repaired_by_a_commit(urza: Urza, make_artifact):
    text = DESIGN.canonical_bytes()
    made = with_design(make_artifact(), text, DESIGN.id)
    artifact = urza.commit(*made)
    urza.object_path(sha256(text)).chmod(0o600)
    urza.object_path(sha256(text)).write_bytes(text.replace(b"mul", b"add"))
    with pytest.raises(CorruptObject, match="blueprint is corrupt"):
        Urza(urza.root).blueprint(artifact.id)
    urza.commit(*made)
    assert urza.blueprint(artifact.id).id == DESIGN.id


def test_an_artifact_of_the_schema_before_is_read_and_says_that_it_keeps_no_design(urza: Urza, make_artifact):
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    body = json.loads(manifest.canonical_bytes()) | {"schema_version": "1.2"}
    del body["blueprint"]
    old = json.dumps(body, sort_keys=True, indent=1).encode()
    urza.object_path(sha256(old)).parent.mkdir(exist_ok=True)
    urza.object_path(sha256(old)).write_bytes(old)
    record = signed(Record(id=manifest.id, manifest=sha256(old)), urza._keys.signer([Role.FORGE]))
    (urza.root / "refs" / manifest.id).write_bytes(record.canonical_bytes())
    artifact = urza.get(manifest.id)
    assert (artifact.manifest.schema_version, artifact.manifest.blueprint) == ("1.2", None)
    with pytest.raises(ArtifactRefused, match=r"manifest schema 1\.2.*compile the blueprint again, into a new store"):
        urza.blueprint(manifest.id)
    # What is written now has fields that its release did not know, and says so.
    proven = urza.promote(manifest.id)
    assert (proven.status, proven.manifest.schema_version) == (KernelStatus.VALIDATED, "1.3")
