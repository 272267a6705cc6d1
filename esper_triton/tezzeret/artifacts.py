"""What one compile gives: an artifact for each of its targets."""

from __future__ import annotations

from typing import SupportsIndex, overload

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.urza import Artifact

__all__ = ["Artifacts"]


class Artifacts(tuple[Artifact, ...]):
    """What one compile gave, in the order of its targets: by position, or by target as in `artifacts["cuda90"]`.

    Compiled for one target, it has that artifact's attributes: `esper.compile(...).id`.
    """

    __slots__ = ()

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Artifact: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Artifact, ...]: ...

    def __getitem__(self, key: SupportsIndex | slice | str) -> Artifact | tuple[Artifact, ...]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = {artifact.manifest.target.label: artifact for artifact in self}
        label = key.replace(":", "")  # as the target was asked for: `cuda:90`
        if label not in found:
            raise KeyError(f"nothing was compiled for target {key!r}{nearest(label, found)}")
        return found[label]

    @property
    def id(self) -> str:
        """The only artifact's id. Raises AttributeError where there are several, as the other attributes do."""
        return self._only("id").id

    @property
    def status(self) -> KernelStatus:
        """The only artifact's status."""
        return self._only("status").status

    @property
    def manifest(self) -> Manifest:
        """The only artifact's manifest."""
        return self._only("manifest").manifest

    @property
    def digest(self) -> str:
        """The only artifact's digest: the SHA-256 of its manifest."""
        return self._only("digest").digest

    def _only(self, name: str) -> Artifact:
        if len(self) != 1:
            labels = ", ".join(repr(artifact.manifest.target.label) for artifact in self) or "nothing"
            raise AttributeError(f"compiled for {labels}: .{name} is that of one artifact; pick it by its target")
        return self[0]
