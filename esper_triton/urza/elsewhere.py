"""Which kind of store a root is: a directory, or one of those that are on other machines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper_triton.urza.library import Urza

__all__ = ["elsewhere"]


def elsewhere(root: str | Path) -> type[Urza] | None:
    """The class for a URL; None for a directory."""
    found = re.match(r"([a-z][a-z0-9+.-]*)://", root) if isinstance(root, str) else None
    if found is None:
        return None
    if found[1] in ("http", "https"):
        from esper_triton.urza.client import RemoteUrza

        return RemoteUrza
    from esper_triton.urza.shared import SharedUrza

    return SharedUrza
