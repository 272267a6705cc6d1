"""The design that an artifact was made from, out of the artifact alone."""

from __future__ import annotations

from collections.abc import Mapping

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactRefused, BlueprintError
from esper_triton.contracts.manifest import Manifest

__all__ = ["blueprint_of"]


def blueprint_of(manifest: Manifest, blobs: Mapping[str, bytes]) -> Blueprint:
    """The blueprint of an artifact, whose id is the one that the manifest names; of a hand-written one with the text of
    its source, which is not run here. `blobs`: the artifact's, by SHA-256, verified.

    Raises ArtifactRefused where there is none, or another one.
    """
    about = f"artifact {manifest.id!r}"
    if manifest.blueprint is None:
        raise ArtifactRefused(
            f"{about} was stored by a release (manifest schema {manifest.schema_version}) that did not keep the "
            "blueprint with it; compile the blueprint again, into a new store"
        )
    try:
        # The kernels of a hand-written source share its text; those of a graph were written for it.
        text = next((blobs[kernel.source].decode() for kernel in manifest.kernels.values()), "")
        blueprint = Blueprint.from_canonical_bytes(blobs[manifest.blueprint], source_text=text)
    except (BlueprintError, UnicodeDecodeError) as error:
        raise ArtifactRefused(f"{about}: what it keeps as its blueprint is none: {error}") from error
    if blueprint.id != manifest.blueprint_id:
        raise ArtifactRefused(
            f"{about} keeps another blueprint than it names: expected id {manifest.blueprint_id}, found {blueprint.id}"
        )
    return blueprint
