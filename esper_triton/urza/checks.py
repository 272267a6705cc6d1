"""What is asked of a commit before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from esper_triton.contracts.errors import InvalidCommit
from esper_triton.contracts.manifest import Manifest, sha256
from esper_triton.urza.parsing import OtherSchema, parse_manifest
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, roles_of_blobs

__all__ = ["check_commit", "check_size"]


def check_size(what: str, content: bytes, limit_bytes: int) -> None:
    """Raises InvalidCommit."""
    if len(content) > limit_bytes:
        raise InvalidCommit(f"{what} has {len(content)} bytes; at most {limit_bytes} are allowed")


def check_commit(manifest: Manifest, content: bytes, blobs: Mapping[str, bytes]) -> None:
    """Raises InvalidCommit where `content`, the bytes of `manifest`, or the blobs by digest do not fit together."""
    about = f"artifact {manifest.id!r}"
    check_size(f"{about}: the manifest", content, MANIFEST_LIMIT_BYTES)
    try:
        parse_manifest(content)  # what this release could not read again must not be written
    except (ValidationError, OtherSchema) as error:
        raise InvalidCommit(f"{about}: the manifest is not valid: {error}") from error
    roles = roles_of_blobs(manifest)
    faults = [f"missing {roles[digest]} ({digest})" for digest in manifest.blobs if digest not in blobs]
    faults += [f"unexpected blob {digest}" for digest in blobs if digest not in roles]
    for digest in manifest.blobs:
        if digest in blobs:
            check_size(f"{about}: {roles[digest]}", blobs[digest], BLOB_LIMIT_BYTES)
            found = sha256(blobs[digest])
            if found != digest:
                faults.append(f"{roles[digest]}: SHA-256 expected {digest}, found {found}")
    if faults:
        raise InvalidCommit(f"{about}: the blobs do not fit the manifest: " + "; ".join(faults))
