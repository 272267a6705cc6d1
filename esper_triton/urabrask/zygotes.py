"""The process that sandboxes are forked from, as this process sees it: started once, and asked through a socket."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import esper_triton
from esper_triton.contracts.errors import ProofUnavailable

__all__ = ["START_S", "Zygote", "close_all", "shared_zygote", "warm_up"]

START_S = 120.0
"""In which it, or a cell, is ready."""


class Zygote:
    """The process that cells are forked from, and the socket to it. One request at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(esper_triton.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
        environment = os.environ | single | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
        environment |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
        for name in ("ESPER_TRITON_SANITIZE", "ESPER_TRITON_DEADLINE", "TRITON_INTERPRET"):
            environment.pop(name, None)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the zygote
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "esper_triton.urabrask.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._socket = ours
        self._unread = b""
        self._ready = False
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Raises ProofUnavailable where the zygote does not answer."""
        with self._lock:
            try:
                if not self._ready:
                    self._line()
                    self._ready = True
                socket.send_fds(self._socket, [json.dumps(request).encode()], list(descriptors))
                return self._line()
            except OSError as error:
                raise ProofUnavailable(
                    f"no sandbox can be started: {error.strerror or error}{self._words()}"
                ) from error

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def _line(self) -> dict[str, Any]:
        self._socket.settimeout(START_S)
        while b"\n" not in self._unread:
            content = self._socket.recv(1 << 16)
            if not content:
                raise ConnectionResetError("the process that starts them has ended")
            self._unread += content
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _words(self) -> str:
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").split("\n") if line.strip()]
        return f"; it said: {lines[-1].strip()[:300]}" if lines else ""

    def close(self) -> None:
        """Ends it, and its cells with it."""
        self._socket.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def abandon(self) -> None:
        """In a forked child: it is the parent's."""
        self._process.returncode = 0
        self._socket.close()
        self._said.close()


_zygote: Zygote | None = None
_starting = threading.Lock()


def shared_zygote() -> Zygote:
    global _zygote
    with _starting:
        if _zygote is None or not _zygote.is_alive:
            if _zygote is not None:
                _zygote.close()
            try:
                _zygote = Zygote()
            except OSError as error:
                raise ProofUnavailable(f"no sandbox can be started: {error.strerror or error}") from error
        return _zygote


def warm_up() -> None:
    """Starts what sandboxes are forked from, and does not wait for it."""
    with contextlib.suppress(ProofUnavailable):  # whoever needs one is told
        shared_zygote()


def close_all() -> None:
    """Ends what sandboxes are forked from, and every sandbox with it; the next one starts it anew."""
    global _zygote
    with _starting:
        if _zygote is not None:
            _zygote.close()
            _zygote = None


def _after_fork_in_child() -> None:
    global _zygote, _starting
    _starting = threading.Lock()
    if _zygote is not None:
        _zygote.abandon()
        _zygote = None


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(close_all)
