"""What a fork would break, kept whole.

A forked child has one thread. Its libgomp waits for ever for threads that stayed behind in the parent, so it is noted
that the process is a child. And llvmlite's lock would never be released if another thread held it at that moment, so
the thread that forks holds it itself.

A module of its own, so that it is imported as early as Triton is, and costs nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["begin_anew", "forked"]

_forked = False


def forked() -> bool:
    """True if this process was forked after `import triton`: kernels run on the thread that launches them."""
    return _forked


def begin_anew() -> None:
    """For a forked child whose parent has never run anything on more than one thread: its libgomp waits for nobody, so
    its kernels may run on threads again."""
    global _forked
    _forked = False


_held: Any = None


def _before() -> None:
    global _held
    ffi = sys.modules.get("llvmlite.binding.ffi")
    _held = getattr(getattr(ffi, "lib", None), "_lock", None)
    if _held is not None:
        _held.__enter__()  # waits for a call of LLVM in another thread to end


def _after() -> None:
    if _held is not None:
        _held.__exit__(None, None, None)


def _after_in_child() -> None:
    global _forked
    _forked = True
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
