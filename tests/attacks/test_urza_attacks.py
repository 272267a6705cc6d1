"""Malformed stores, records, manifests and archives, kept as files, and what each is refused with, to the letter."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from make_urza_corpus import ARTIFACT_ID, CORPUS, FORGE, OTHER_ID, PROVER, manifest, write

from esper_triton.contracts.errors import EsperError
from esper_triton.contracts.manifest import sha256
from esper_triton.urza import Urza

REFUSALS = json.loads((CORPUS / "refusals.json").read_text(encoding="utf-8"))
TRUST = f"keys:local,forge={FORGE.public},prover={PROVER.public}"


@pytest.fixture
def store(tmp_path: Path) -> Urza:
    """The sound store that attacks are laid over."""
    shutil.copytree(CORPUS / "base", tmp_path / "urza")
    outside = tmp_path / "outside"
    outside.mkdir()
    for name, path in (("public", "keys/public"), ("urza.json", "urza.json"), (ARTIFACT_ID, f"refs/{ARTIFACT_ID}")):
        shutil.copy(CORPUS / "base" / path, outside / name)
    (outside / "binary").write_bytes(b"\x7fELF forward")
    return Urza(tmp_path / "urza")


def names(kind: str) -> list[str]:
    return sorted(path.name for path in (CORPUS / kind).iterdir())


def refusal(store: Urza, error: EsperError) -> list[str]:
    """Its class, and its message without what differs from run to run, and from one schema to the next."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", str(error).replace(str(store.root.parent), ""))
    return [type(error).__name__, re.sub(r"\.\d{18,20}\b", ".TIME", text)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused_by(store: Urza, attempt: object) -> list[str]:
    """What `attempt` is refused with; nothing outside of the store, and no other artifact, is harmed by it."""
    outside = store.root.parent / "outside"
    before = contents(outside)
    with pytest.raises(EsperError) as caught:
        attempt()
    assert contents(outside) == before
    return refusal(store, caught.value)


def test_the_base_is_sound(store: Urza):
    assert store.load(ARTIFACT_ID)[0].manifest == manifest()
    assert store.verify().faults == ()


@pytest.mark.parametrize("name", names("records"))
def test_a_wrong_record_is_refused(store: Urza, name: str):
    shutil.copy(CORPUS / "records" / name, store.root / "refs" / ARTIFACT_ID)
    assert refused_by(store, lambda: store.load(ARTIFACT_ID)) == REFUSALS[f"records/{name}"]
    assert store.load(OTHER_ID)[0].id == OTHER_ID


@pytest.mark.parametrize("name", names("manifests"))
def test_a_wrong_manifest_is_refused(store: Urza, name: str):
    content = (CORPUS / "manifests" / name).read_bytes()
    store.object_path(sha256(content)).parent.mkdir(exist_ok=True)
    store.object_path(sha256(content)).write_bytes(content)
    (store.root / "refs" / ARTIFACT_ID).write_text(sha256(content) + "\n")
    lenient = Urza(store.root, trust="unsigned-ok")
    assert refused_by(lenient, lambda: lenient.load(ARTIFACT_ID)) == REFUSALS[f"manifests/{name}"]
    assert store.load(OTHER_ID)[0].id == OTHER_ID


@pytest.mark.parametrize("name", names("archives"))
def test_a_wrong_archive_is_refused_and_nothing_of_it_stored(tmp_path: Path, name: str):
    folder = tmp_path / "archives"
    folder.mkdir()
    shutil.copy(CORPUS / "archives" / name, folder)
    (tmp_path / "outside").mkdir()
    store = Urza(tmp_path / "urza", trust=TRUST)
    assert refused_by(store, lambda: store.import_(folder / name)) == REFUSALS[f"archives/{name}"]
    assert sorted(os.listdir(tmp_path)) == ["archives", "outside"]
    assert os.listdir(folder) == [name]


@pytest.mark.parametrize("name", names("stores"))
def test_a_wrong_store_is_refused(store: Urza, name: str):
    for path in sorted((CORPUS / "stores" / name).rglob("*")):
        target = store.root / path.relative_to(CORPUS / "stores" / name)
        if path.is_symlink() or path.is_file():
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.symlink_to(os.readlink(path)) if path.is_symlink() else shutil.copy(path, target)
        elif not target.is_dir():
            target.unlink(missing_ok=True)
            target.mkdir()
    assert refused_by(store, lambda: store.load(ARTIFACT_ID)) == REFUSALS[f"stores/{name}"]


def test_the_corpus_is_what_its_maker_makes(tmp_path: Path):
    write(tmp_path / "made")
    made, kept = (
        {
            str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in folder.rglob("*")
            if path.is_symlink() or path.is_file()
        }
        for folder in (tmp_path / "made", CORPUS)
    )
    kept.pop("refusals.json")
    kept.pop("request-refusals.json")
    assert made == kept
    attacks = [f"{kind}/{name}" for kind in ("records", "manifests", "archives", "stores") for name in names(kind)]
    assert sorted(REFUSALS) == sorted(attacks)
    assert len(attacks) >= 40
