"""How many threads torch evaluates references on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["one_thread", "usual_threads"]

_lock = threading.Lock()
_users = 0
_usual = 0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: what is evaluated here is small, and loses more to threads than it gains. The last of those
    who are inside at the same time gives back what the first has found."""
    global _users, _usual
    with _lock:
        if not _users:
            _usual = torch.get_num_threads()
        _users += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_num_threads(_usual)


@contextlib.contextmanager
def usual_threads() -> Iterator[None]:
    """Inside of `one_thread`: as many as there were before it, as a layer has. Elsewhere it changes nothing."""
    if not _users:
        yield
        return
    torch.set_num_threads(_usual)
    try:
        yield
    finally:
        torch.set_num_threads(1)
