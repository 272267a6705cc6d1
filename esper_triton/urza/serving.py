"""What a server does with a store, request by request, without HTTP: each is one call in a thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.errors import InvalidCommit, NotAuthorized
from esper_triton.contracts.manifest import ArtifactId, Digest, KernelStatus, Manifest, sha256
from esper_triton.contracts.record import SCHEMA_VERSION as RECORD_SCHEMA
from esper_triton.contracts.record import Figures, Record, Role, Tag
from esper_triton.urza.directory import Damage
from esper_triton.urza.keeping import check_lineage_name
from esper_triton.urza.library import Urza
from esper_triton.urza.parsing import OtherSchema, parse_manifest, parse_record
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, MANIFEST_LIMIT_BYTES
from esper_triton.urza.tokens import Access

__all__ = ["Commit", "Missing", "Named", "Pin", "Verdict", "answer_of", "commit", "name_lineage", "pin", "set_status"]

SCHEMA_VERSION = "1.0"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Commit(_Value):
    """What is asked with `POST /v1/artifacts`: that an artifact whose objects are there become visible. Without a
    record, this store signs it, as its forge; with one, which this store must trust, it is stored as it is signed."""

    schema_version: Annotated[str, Field(pattern=r"^1\.[0-9]{1,6}$")] = SCHEMA_VERSION
    manifest: Digest
    record: Record | None = None


class Verdict(_Value):
    """What is asked with `POST /v1/artifacts/{id}/status`; see `Urza.set_status`. `report` is an object that is
    there."""

    schema_version: Annotated[str, Field(pattern=r"^1\.[0-9]{1,6}$")] = SCHEMA_VERSION
    status: KernelStatus
    report: Digest | None = None
    tags: Annotated[tuple[Tag, ...], Field(max_length=32)] | None = None
    figures: Figures | None = None


class Pin(_Value):
    """What is asked with `POST /v1/artifacts/{id}/pin`: that no collection removes it, or that one may again."""

    schema_version: Annotated[str, Field(pattern=r"^1\.[0-9]{1,6}$")] = SCHEMA_VERSION
    pinned: bool


class Named(_Value):
    """What is asked with `POST /v1/lineages/{name}`: that no collection removes those of these that are VALIDATED; with
    none, that the name be forgotten."""

    schema_version: Annotated[str, Field(pattern=r"^1\.[0-9]{1,6}$")] = SCHEMA_VERSION
    artifacts: tuple[ArtifactId, ...]


class Missing(InvalidCommit):
    """A commit names objects that are not there (any more). `digests` are theirs."""

    def __init__(self, digests: Iterable[str]) -> None:
        self.digests = tuple(digests)
        super().__init__(f"these objects are not in the store: {', '.join(self.digests)}; put them first")


def answer_of(store: Urza, artifact_id: str) -> tuple[str, dict[str, Any]]:
    """The SHA-256 of an artifact's record, and what is answered of it. Raises as `Urza.get` does."""
    while True:
        record, artifact = store.record(artifact_id), store.get(artifact_id)
        if artifact.digest == record.manifest:  # else its status has changed in between
            break
    record = record.model_copy(update={"schema_version": RECORD_SCHEMA})  # an old form has the same content
    body = {
        "schema_version": SCHEMA_VERSION,
        "id": artifact_id,
        "record": record.model_dump(mode="json"),
        "manifest": artifact.manifest.model_dump(mode="json"),
    }
    return sha256(record.canonical_bytes()), body


def commit(store: Urza, asked: Commit, access: frozenset[Access]) -> str:
    """The id of what was committed. Raises Missing, InvalidCommit, NotAuthorized, UntrustedArtifact, and as
    `Urza.commit` does."""
    content = _object(store, asked.manifest, "manifest", MANIFEST_LIMIT_BYTES)
    try:
        manifest = parse_manifest(content)
    except OtherSchema as error:
        raise InvalidCommit(f"object {asked.manifest}: {error}") from None
    except ValueError as error:
        raise InvalidCommit(f"object {asked.manifest} is not a manifest: {error}") from None
    if asked.record is None:
        _require(access, Access.WRITE, f"committing {manifest.id!r}")
        if manifest.report is not None or manifest.status not in (
            KernelStatus.PENDING_BENCHMARKING,
            KernelStatus.PENDING_HARDWARE,
        ):
            raise InvalidCommit(
                f"artifact {manifest.id!r} is {manifest.status}; without a signed record only unproven ones are taken: "
                "commit it as PENDING_BENCHMARKING, then post its status"
            )
    else:
        _check_record(asked, manifest, access)
    blobs, missing, size = {}, [], 0
    for digest in manifest.blobs:
        try:
            blobs[digest] = _object(store, digest, "blob", BLOB_LIMIT_BYTES)
        except Missing:
            missing.append(digest)
            continue
        size += len(blobs[digest])
        if size > BLOB_LIMIT_BYTES:
            raise InvalidCommit(
                f"artifact {manifest.id!r}: its blobs have more than {BLOB_LIMIT_BYTES} bytes together, which is the "
                "most that a server takes"
            )
    if missing:
        raise Missing(missing)
    if asked.record is None:
        return store.commit(manifest, blobs).id
    return store.take_signed(manifest, content, blobs, asked.record).id


def set_status(store: Urza, artifact_id: str, asked: Verdict, access: frozenset[Access]) -> str:
    """Gives an artifact a status, signed by this store; returns its id. Raises as `Urza.set_status` does, Missing."""
    archives = asked.status is KernelStatus.ARCHIVED and asked.tags is None and asked.figures is None
    if not (archives and Access.WRITE in access):
        _require(access, Access.VALIDATE, f"setting the status of {artifact_id!r}")
    store.get(artifact_id)
    report = None if asked.report is None else _object(store, asked.report, "report", BLOB_LIMIT_BYTES)
    return store.set_status(artifact_id, asked.status, report, tags=asked.tags, figures=asked.figures).id


def pin(store: Urza, artifact_id: str, asked: Pin) -> bool:
    """Whether that changed anything. Raises as `Urza.pin` does."""
    return store.pin(artifact_id) if asked.pinned else store.unpin(artifact_id)


def name_lineage(store: Urza, name: str, asked: Named) -> bool:
    """Whether there is a lineage of this name then. Raises ValueError where it can be none, StoreUnavailable."""
    check_lineage_name(name)
    if asked.artifacts:
        store.keep_named(name, asked.artifacts)
    else:
        store.forget_lineage(name)
    return bool(asked.artifacts)


def _check_record(asked: Commit, manifest: Manifest, access: frozenset[Access]) -> None:
    assert asked.record is not None
    try:
        record = parse_record(asked.record.canonical_bytes(), manifest.id)
    except (ValueError, OtherSchema) as error:
        raise InvalidCommit(f"artifact {manifest.id!r}: its record is not right: {error}") from None
    if record.manifest != asked.manifest:
        raise InvalidCommit(
            f"artifact {manifest.id!r}: its record names manifest {record.manifest}, and {asked.manifest} was sent"
        )
    signature = record.signature
    proves = signature is None or signature.role is Role.PROVER  # without one, it may say anything
    _require(access, Access.VALIDATE if proves else Access.WRITE, f"committing {manifest.id!r} as it is signed")


def _require(access: frozenset[Access], needed: Access, doing: str) -> None:
    if needed not in access:
        raise NotAuthorized(
            f"{doing} needs a token with the role {needed.value!r}; this one allows {' and '.join(sorted(access))}"
        )


def _object(store: Urza, digest: str, what: str, limit_bytes: int) -> bytes:
    try:
        return store.directory.read_object(digest, what, limit_bytes=limit_bytes)
    except Damage as damage:
        if damage.missing:
            raise Missing([digest]) from None
        raise InvalidCommit(f"{damage}; put it again") from None
