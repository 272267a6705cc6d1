"""The blueprints that ship, by name."""

from __future__ import annotations

import os
from pathlib import Path

import esper_triton
from esper_triton.contracts.errors import BlueprintError, nearest

__all__ = ["find", "in_folder", "shipped"]

_SUFFIXES = (".toml", ".json")


def shipped() -> dict[str, Path]:
    """Where each blueprint of the library lies, by its name."""
    return {path.stem: path for path in in_folder(Path(esper_triton.__file__).parent / "kernels")}


def in_folder(folder: Path) -> list[Path]:
    """The blueprints of a folder, sorted; none where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file())


def find(name_or_path: str | Path) -> Path:
    """The path of a blueprint: of the library by its name (`bottleneck_adapter`), or the given one, which has a suffix
    or a folder and need not exist. Raises BlueprintError with the nearest names, and for a path where no file is and
    whose name is that of one in the library."""
    text = os.fspath(name_or_path)
    path = Path(text)
    known = shipped()
    if isinstance(name_or_path, Path) or path.suffix in _SUFFIXES or len(path.parts) > 1 or path.exists():
        if path.stem in known and not path.exists():
            ships = f"the one that ships is called {path.stem!r}, without a path"
            raise BlueprintError(f"blueprint {path}: no such file; {ships}")
        return path
    if text not in known:
        raise BlueprintError(f"no blueprint {text!r} in the library, nor such a file{nearest(text, known)}")
    return known[text]
