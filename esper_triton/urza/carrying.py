"""`push` and `pull`: artifacts from one store to another, each as it is signed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from esper_triton.contracts.errors import ArtifactNotFound, UntrustedArtifact
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.urza.library import Imported, Urza

__all__ = ["carry"]

_PENDING = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)


def carry(
    source: Urza,
    target: Urza,
    artifact_ids: Iterable[str] | None = None,
    *,
    resign: bool = False,
    progress: Callable[[int, int], None] | None = None,
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
    return manifest.model_copy(update={"status": status, "report": None})
