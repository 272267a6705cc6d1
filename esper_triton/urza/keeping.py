"""What a collection of garbage has to leave: artifacts that are pinned, and those that lineages name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from esper_triton.urza.directory import Directory
from esper_triton.urza.parsing import is_id
from esper_triton.urza.shelf import Shelf

__all__ = ["check_lineage_name", "forget_lineage", "name_lineage", "named_by_lineages", "pin", "pins", "unpin"]

_LINEAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def pin(shelf: Shelf, artifact_id: str) -> bool:
    """See `Urza.pin`."""
    shelf.record_exists(artifact_id)
    with shelf.lock():
        shelf.record_exists(artifact_id)
        if shelf.is_pinned(artifact_id):
            return False
        shelf.note("pinned", artifact_id)
        shelf.directory.write(("pins", artifact_id), b"")
        return True


def unpin(shelf: Shelf, artifact_id: str) -> bool:
    """See `Urza.unpin`."""
    if not is_id(artifact_id) or not shelf.is_pinned(artifact_id):
        return False
    with shelf.lock():
        if not shelf.is_pinned(artifact_id):
            return False
        shelf.note("unpinned", artifact_id)
        return shelf.directory.remove(("pins", artifact_id))


def pins(directory: Directory) -> list[str]:
    """The ids that are pinned, sorted. Raises StoreUnavailable."""
    return [name for name in directory.names("pins") if is_id(name)]


def check_lineage_name(name: str) -> None:
    """Raises ValueError."""
    if not _LINEAGE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a lineage: letters, digits, '_', '.' and '-' can, 100 of them")


def name_lineage(shelf: Shelf, name: str, artifact_ids: Iterable[str]) -> None:
    """See `Urza.name_lineage`."""
    check_lineage_name(name)
    ids = sorted(set(artifact_ids))
    with shelf.lock():
        shelf.directory.write(("lineages", name), "".join(f"{one}\n" for one in ids).encode())


def forget_lineage(shelf: Shelf, name: str) -> bool:
    """See `Urza.forget_lineage`."""
    if not _LINEAGE_NAME.fullmatch(name) or shelf.directory.stat(("lineages", name)) is None:
        return False
    with shelf.lock():
        return shelf.directory.remove(("lineages", name))


def named_by_lineages(directory: Directory) -> dict[str, list[str]]:
    """By the id of each artifact that a lineage names, the names of these lineages. Raises StoreUnavailable."""
    found: dict[str, list[str]] = {}
    for name in directory.names("lineages"):
        content = directory.read_from(("lineages", name), 0, "lineage")
        for artifact_id in content.decode("ascii", "replace").split():
            found.setdefault(artifact_id, []).append(name)
    return found
