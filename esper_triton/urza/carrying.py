"""Artifacts from one store to another, each as it is signed: at once, or by an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper_triton.contracts.errors import ArtifactNotFound, UntrustedArtifact
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.contracts.record import Record
from esper_triton.urza.archive import Admitted, ArchiveReader, write_archive

if TYPE_CHECKING:
    from esper_triton.urza.library import Urza

__all__ = ["Imported", "carry", "export_archive", "import_archive"]

_PENDING = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)


Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Ids of artifacts that were carried: those stored as they were signed, those taken as unproven, and those of which
    the store already had one, which it kept."""

    taken: tuple[str, ...]
    unproven: tuple[str, ...]
    kept: tuple[str, ...]


def import_archive(
    path: Path,
    check: Callable[[Record, Manifest], None],
    add: Callable[[Admitted, dict[str, bytes]], bool],
    *,
    resign: bool,
    progress: Progress | None,
) -> Imported:
    """Gives `add`, which says whether it was new, each artifact of an archive, after `check` has taken all of them. See
    `Urza.import_`."""
    taken, unproven, kept = list[str](), list[str](), list[str]()
    with ArchiveReader(path) as archive:
        admitted = archive.admitted(check, resign=resign)
        for count, one in enumerate(admitted, start=1):
            new = add(one, {digest: archive.object(digest) for digest in one.digests})
            (kept if not new else unproven if one.record is None else taken).append(one.manifest.id)
            if progress is not None:
                progress(count, len(admitted))
    return Imported(taken=tuple(taken), unproven=tuple(unproven), kept=tuple(kept))


def export_archive(
    store: Urza, path: Path, artifact_ids: Iterable[str] | None, progress: Progress | None
) -> tuple[int, int]:
    """How many artifacts were written, and the archive's size in bytes. See `Urza.export`."""
    ids = store.ids() if artifact_ids is None else list(dict.fromkeys(artifact_ids))
    exported = 0

    def parts() -> Iterator[tuple[bytes, bytes, dict[str, bytes]]]:
        nonlocal exported
        for artifact_id in ids:
            try:
                record, content, _, blobs = store.whole(artifact_id)
            except (ArtifactNotFound, UntrustedArtifact):
                if artifact_ids is not None:
                    raise
                continue
            yield record.canonical_bytes(), content, blobs
            exported += 1

    size_bytes = write_archive(path, parts(), len(ids), progress)
    return exported, size_bytes


def carry(
    source: Urza,
    target: Urza,
    artifact_ids: Iterable[str] | None = None,
    *,
    resign: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Stores artifacts of `source`, by default all that it trusts, in `target`, one after the other.

    One whose signer the target does not trust is refused; with `resign` it is stored as unproven and signed by the
    target: proving it runs its code, so its origin must be known. A later status, where it may follow that of the
    target's, replaces it; else what the target has is kept. Raises as `load` does of the source, and as `commit` does
    of the target: those before are stored then.
    """
    ids = source.ids() if artifact_ids is None else list(dict.fromkeys(artifact_ids))
    taken, unproven, kept = list[str](), list[str](), list[str]()
    for count, artifact_id in enumerate(ids, start=1):
        try:
            record, content, manifest, blobs = source.whole(artifact_id)
        except (ArtifactNotFound, UntrustedArtifact):
            if artifact_ids is not None:
                raise
            continue
        before = _digest(target, artifact_id)
        if before == record.manifest:
            kept.append(artifact_id)
        else:
            try:
                artifact = target.take_signed(manifest, content, blobs, record)
                (taken if artifact.digest == record.manifest else kept).append(artifact_id)
            except UntrustedArtifact:
                if not resign:
                    raise
                unsigned = _unproven(manifest)
                target.commit(unsigned, {digest: blobs[digest] for digest in unsigned.blobs})
                (unproven if before is None else kept).append(artifact_id)
        if progress is not None:
            progress(count, len(ids))
    return Imported(taken=tuple(taken), unproven=tuple(unproven), kept=tuple(kept))


def _digest(store: Urza, artifact_id: str) -> str | None:
    try:
        return store.get(artifact_id).digest
    except (ArtifactNotFound, UntrustedArtifact):
        return None


def _unproven(manifest: Manifest) -> Manifest:
    status = manifest.status if manifest.status in _PENDING else KernelStatus.PENDING_BENCHMARKING
    return manifest.with_status(status, None)
