"""One worker process, as the pool sees it: started, given a job at a time, and killed with all that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import esper_triton

__all__ = ["WorkerGone", "WorkerProcess"]

_LIMIT_BYTES = 64 << 20  # of one answer
_SHOWN = 300  # characters of what a worker has said last


class WorkerGone(Exception):
    """A worker that gives no answer any more.

    Attributes:
        timed_out: it took too long, and lives. signal: the name of what killed it; empty where it ended by itself.
    """

    def __init__(self, message: str, *, timed_out: bool = False, signal: str = "") -> None:
        super().__init__(message)
        self.timed_out, self.signal = timed_out, signal


class WorkerProcess:
    """A worker and its pipes. For one thread at a time, but for `kill`. `jobs` counts what it was given."""

    def __init__(self, *, nice: int) -> None:
        """Starts it; it is not ready yet. Raises OSError."""
        package_root = str(Path(esper_triton.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {
            "PYTHONPATH": path,
            "ESPER_WORKER_NICE": str(nice),
            "MALLOC_ARENA_MAX": "2",  # each further one would map 64 MB that no job needs
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            # -P: a module that lies in the working directory must not take another's place.
            [sys.executable, "-P", "-m", "esper_triton.tezzeret.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            bufsize=0,  # a buffer has a lock, which a fork could leave taken
            start_new_session=True,  # a group of its own: it is killed with its compilers, and not by Ctrl-C
        )
        self._unread = b""
        self._ready = False
        self.jobs = 0

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait_until_ready(self, seconds: float) -> None:
        """Waits for its imports, the first time. Raises WorkerGone."""
        if not self._ready:
            self._answer(time.monotonic() + seconds)
            self._ready = True

    def run(self, job: bytes, tell: Callable[[str, float], None], deadline: float | None) -> dict[str, Any]:
        """Gives it a job, one line of JSON, and waits for `built` or `error`. `deadline` is on the monotonic clock.
        Raises WorkerGone."""
        self.jobs += 1
        assert self._process.stdin is not None
        left = memoryview(job)
        while left:
            try:
                left = left[self._process.stdin.write(left) :]
            except (OSError, ValueError):  # closed, at its end or at ours
                raise self._gone() from None
        while True:
            answer = self._answer(deadline)
            if "stage" not in answer:
                return answer
            tell(answer["stage"], answer["progress"])

    def kill(self) -> None:
        """Ends it and everything that it has started, at once. Any thread may call it, and again."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)

    def close(self) -> None:
        """As `kill`, and gives the pipes back. For the thread that has it."""
        self.kill()
        self._close_pipes()

    def abandon(self) -> None:
        """In a forked child: closes its ends of the pipes, so that the worker still ends with the parent."""
        self._process.returncode = 0  # it is no child of this process
        self._close_pipes()

    def _close_pipes(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._said):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()

    def _answer(self, deadline: float | None) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([pipe], [], [], left)
            if not readable:
                raise WorkerGone("no answer in time", timed_out=True)
            content = os.read(pipe, 1 << 16)
            if not content or len(self._unread) > _LIMIT_BYTES:
                raise self._gone()
            self._unread += content
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> WorkerGone:
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return WorkerGone("it closed its pipe")
        name = ""
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
        how = f"by {name or f'signal {-code}'}" if code < 0 else f"with exit code {code}"
        return WorkerGone(f"it ended {how}{self._last_words()}", signal=name)

    def _last_words(self) -> str:
        try:
            size = self._said.seek(0, os.SEEK_END)
            self._said.seek(max(0, size - 4096))
            lines = self._said.read().decode("utf-8", "replace").split("\n")
        except (OSError, ValueError):
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f", having said: {last[:_SHOWN]}" if last else ""
