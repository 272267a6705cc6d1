"""The last good states of a run: in a directory, or one of them in memory."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from esper_triton.contracts.errors import CheckpointError
from esper_triton.model.saving import _locked, _sha256, _written

__all__ = ["Checkpoints", "DirectoryCheckpoints", "MemoryCheckpoint", "checkpoints_in"]

_NAME = re.compile(r"checkpoint-(\d{10})-[0-9a-f]{16}\.pt")
_log = logging.getLogger("esper_triton.model")


class Checkpoints(Protocol):
    """Where a run keeps its states. What is kept is what `torch.load(weights_only=True)` gives back: nothing of it
    shares memory with the run."""

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Keeps a state."""

    def newest(self, at_most: int | None = None) -> dict[str, Any] | None:
        """The last one that was kept, whole, of a step up to `at_most`; None where there is none."""


class MemoryCheckpoint:
    """One state, serialised in this process's memory: enough to go back, and gone with the process."""

    def __init__(self) -> None:
        self._content: bytes | None = None
        self._step = 0

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Replaces the state."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        if self._content is None:
            _read(io.BytesIO(content), "the first checkpoint")
        self._content, self._step = content, step

    def newest(self, at_most: int | None = None) -> dict[str, Any] | None:
        """The state."""
        if at_most is not None and self._step > at_most:
            return None
        return None if self._content is None else _read(io.BytesIO(self._content), "the checkpoint in memory")


class DirectoryCheckpoints:
    """The last `keep` states of one run, as `checkpoint-<step>-<sha256>.pt` in a directory.

    A file gets its name when it is on the disk, whole; the oldest are removed afterwards. So after a crash or a power
    cut each file is the state that was saved, and the newest is the last one whose `save` returned, or the one after
    it. One that has been damaged since does not have the SHA-256 of its name: it is passed over, with a line in the
    log. Two processes that save at once take turns.

    The first state of a process is read back after it was written, so that one that cannot be is found then.
    """

    def __init__(self, directory: str | Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, found {keep}")
        self.directory, self._keep, self._tried = Path(directory), keep, False

    def __repr__(self) -> str:
        return f"<DirectoryCheckpoints {self.directory}, the last {self._keep}>"

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Writes a state of `step`, and removes the oldest. Raises OSError; what was there before is there still."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory) as folder:
            with _written(self.directory, lambda file: torch.save(dict(state), file)) as new:
                if not self._tried:
                    _read(new, "the first checkpoint")
                    self._tried = True
                name = f"checkpoint-{step:010d}-{_sha256(new)[:16]}.pt"
                new.replace(self.directory / name)
            os.fsync(folder)
            for old in checkpoints_in(self.directory)[: -self._keep]:
                old.unlink()

    def newest(self, at_most: int | None = None) -> dict[str, Any] | None:
        """The newest state that is whole, of a step up to `at_most`. Raises CheckpointError, which lists every file and
        its fault, where there are such states and none is."""
        faults = []
        for path in reversed(checkpoints_in(self.directory)):
            if at_most is not None and int(path.name.split("-")[1]) > at_most:
                continue
            try:
                found = _sha256(path)[:16]
                if found != path.stem.rpartition("-")[2]:
                    raise CheckpointError(f"{path} is damaged: its SHA-256 begins with {found}")
                return _read(path, str(path))
            except (CheckpointError, OSError) as error:
                faults.append(str(error))
                _log.warning(
                    "%s", json.dumps({"event": "checkpoint_passed_over", "path": str(path), "reason": str(error)})
                )
        if faults:
            raise CheckpointError("no checkpoint can be read: " + "; ".join(faults))
        return None


def checkpoints_in(directory: str | Path) -> list[Path]:
    """The checkpoints of a directory, the oldest first; none where it does not exist."""
    found = [path for path in Path(directory).glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name[:21], path.stat().st_mtime_ns))


def _read(source: Path | IO[bytes], what: str) -> dict[str, Any]:
    try:
        state = torch.load(source, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch raises of a file that it cannot or may not read
        raise CheckpointError(f"{what} cannot be read with torch.load(weights_only=True): {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{what} holds a {type(state).__name__}, a dict is expected")
    return state
