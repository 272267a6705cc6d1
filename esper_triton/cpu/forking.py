"""Notes whether this process is a forked child, whose libgomp waits for threads that stayed behind in the parent.

Its own module, so that it is imported, and takes note, as early as Triton is, and costs nothing.
"""

from __future__ import annotations

import os

__all__ = ["forked"]

_forked = False


def forked() -> bool:
    """True if this process was forked after `import triton`: kernels run on the thread that launches them."""
    return _forked


def _take_note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_take_note)
