"""What changes an artifact, each in one step: a commit, a verdict, a signature, what comes signed from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from esper_triton.contracts.errors import ArtifactNotFound, InvalidCommit, UntrustedArtifact
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import Figures, Record
from esper_triton.urza.checks import check_commit, check_size
from esper_triton.urza.directory import Damage
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, Artifact, Shelf

__all__ = ["ALLOWED", "commit", "set_status", "sign", "take"]

ALLOWED: dict[KernelStatus, tuple[KernelStatus, ...]] = {
    KernelStatus.PENDING_BENCHMARKING: (KernelStatus.VALIDATED, KernelStatus.REJECTED),
    KernelStatus.PENDING_HARDWARE: (KernelStatus.VALIDATED, KernelStatus.REJECTED),
    KernelStatus.VALIDATED: (KernelStatus.REJECTED, KernelStatus.ARCHIVED),
    KernelStatus.REJECTED: (KernelStatus.ARCHIVED,),
    KernelStatus.ARCHIVED: (),
}
"""What each status may become."""


def commit(
    shelf: Shelf, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record | None
) -> tuple[Artifact, bool]:
    """Stores an artifact, as `record` if that is given, and says whether it is new. See `Urza.commit`."""
    check_commit(manifest, content, blobs)
    with shelf.lock():
        stored = _intact(shelf, manifest)
        if stored is not None:
            return stored, False
        if record is None:
            shelf.signer(Record(id=manifest.id, manifest=sha256(content)), manifest)  # or nothing is written
        for blob in blobs.values():
            shelf.directory.write_object(blob, limit_bytes=BLOB_LIMIT_BYTES)
        # If blobs were all that it lacked, the stored manifest stands: its verdict was on these very bytes.
        stored = _intact(shelf, manifest)
        if stored is not None:
            return stored, False
        what = "committed" if record is None else "imported"
        return shelf.publish(manifest, content, what=what, record=record), True


def take(
    shelf: Shelf,
    manifest: Manifest,
    content: bytes,
    blobs: Mapping[str, bytes],
    record: Record,
    allowed: Mapping[KernelStatus, Iterable[KernelStatus]] | None,
) -> Artifact:
    """Stores an artifact as it is signed elsewhere. See `Urza.take`."""
    check_commit(manifest, content, blobs)
    with shelf.lock():
        stored = _intact(shelf, manifest)
        before = None
        if stored is not None:
            before = stored.manifest
            same = shelf.head(manifest.id) == sha256(record.canonical_bytes())
            if same or (
                allowed is not None
                and manifest.status not in allowed[stored.status]
                and not (stored.digest == record.manifest and record.is_characterized)
            ):
                return stored
        for blob in blobs.values():
            shelf.directory.write_object(blob, limit_bytes=BLOB_LIMIT_BYTES)
        return shelf.publish(manifest, content, what="imported", before=before, record=record)


def set_status(
    shelf: Shelf,
    artifact_id: str,
    status: KernelStatus,
    report: bytes | None,
    tags: Iterable[str] | None,
    figures: Figures | None,
) -> Artifact:
    """Gives an artifact a status, a report, tags and figures. See `Urza.set_status`."""

    def read() -> tuple[Record, Artifact, bytes]:
        _, record = shelf.record(artifact_id)
        return record, shelf.artifact(artifact_id), shelf.manifest_bytes(record)

    with shelf.lock():
        record, artifact, content = shelf.read_or_set_aside(artifact_id, read)
        new_tags = record.tags if tags is None else tuple(dict.fromkeys(tags))
        new_figures = record.figures if figures is None else figures
        same = (new_tags, new_figures) == (record.tags, record.figures)
        if status == artifact.status and same:
            return artifact
        allowed = ALLOWED[artifact.status]
        if status != artifact.status and status not in allowed:
            moves = ", ".join(allowed) or "nothing; the status is final"
            raise InvalidCommit(
                f"artifact {artifact_id!r} cannot go from {artifact.status} to {status}; allowed: {moves}"
            )
        manifest = artifact.manifest
        if status != artifact.status:
            if report is not None:
                check_size("the report", report, BLOB_LIMIT_BYTES)
            manifest = manifest.with_status(KernelStatus(status), manifest.report if report is None else sha256(report))
            content = manifest.canonical_bytes()  # else it keeps its bytes: they may be of an older schema
        try:
            probe = Record(id=artifact_id, manifest=record.manifest, tags=new_tags, figures=new_figures)
        except ValidationError as error:
            raise InvalidCommit(f"artifact {artifact_id!r}: {error}") from error
        shelf.signer(probe, manifest)  # before anything is written
        if report is not None and manifest.report == sha256(report):
            shelf.directory.write_object(report, limit_bytes=BLOB_LIMIT_BYTES)
        return shelf.publish(
            manifest,
            content,
            what="status" if status != artifact.status else "characterized",
            before=artifact.manifest,
            tags=probe.tags,
            figures=probe.figures,
        )


def sign(shelf: Shelf, artifact_id: str) -> Artifact:
    """Signs an artifact that nobody has signed. See `Urza.sign`."""

    def read() -> tuple[Record, Manifest, bytes]:
        content, record = shelf.record(artifact_id)
        return record, shelf.manifest(artifact_id, content, record), shelf.manifest_bytes(record)

    shelf.repaired_or_refused(artifact_id, read)
    with shelf.lock():
        record, manifest, content = shelf.read_or_set_aside(artifact_id, read)
        if record.signature is not None:
            raise InvalidCommit(
                f"artifact {artifact_id!r} is signed, by {record.signature.role} key {record.signature.key[:16]}"
            )
        return shelf.publish(manifest, content, what="signed", before=manifest)


def _intact(shelf: Shelf, manifest: Manifest) -> Artifact | None:
    """The artifact stored under this id, None where there is none or it is damaged. Only under the lock."""
    if not shelf.contains(manifest.id):  # asking for it would look for the nearest that there are
        return None
    try:
        stored, _ = shelf.whole(manifest.id)
    except (ArtifactNotFound, UntrustedArtifact):
        return None
    except Damage as damage:
        shelf.set_aside(manifest.id, damage)
        return None
    for name in ("blueprint_id", "target", "pipeline", "toolchain", "dims", "dtype"):
        found, offered = getattr(stored.manifest, name), getattr(manifest, name)
        if found != offered:
            raise InvalidCommit(
                f"artifact id {manifest.id!r} is taken by another build: {name} is {found!r} in the store and "
                f"{offered!r} in the manifest offered"
            )
    return stored
