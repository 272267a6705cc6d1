"""A process for code that nobody vouches for: started in some milliseconds, watched, and killed when it is over.

A `Sandbox` is one such process, the cell. It is forked from a zygote, which has imported torch and has run nothing; it
has a group, a folder and a memory of its own, limits of CPU time, memory and file size, no new privileges, and a
seccomp filter (`seccomp`). What it says is parsed and not believed: results are read from the memory that it shares
with this process, after it has answered, and are judged here.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from esper_triton.contracts.errors import ProofUnavailable
from esper_triton.contracts.manifest import Manifest
from esper_triton.urabrask import seccomp, wire
from esper_triton.urabrask.arena import Arena
from esper_triton.urabrask.subject import Launch
from esper_triton.urabrask.zygotes import START_S, Zygote, shared_zygote

__all__ = ["Died", "Failed", "Limits", "Runner", "Sandbox", "Threads"]

Threads = Literal["one", "two", "usual"]
_SIGSYS_EXIT = 159


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cell may use: seconds for one answer, seconds of CPU in all, bytes of memory that it maps beyond what it
    is started with, and bytes of the tensors of one call."""

    wall_s: float = 20.0
    cpu_s: float = 120.0
    memory_bytes: int = 2 << 30
    tensor_bytes: int = 1 << 30


class Died(Exception):
    """The cell has ended, or had to be. The message says how."""


class Failed(Exception):
    """The cell lives, and could not do what it was told: a launch was refused, or a check in a kernel failed."""


class Runner(Protocol):
    """What runs the launches of a call on the memory of its arena."""

    arena: Arena

    def run(self, launches: Sequence[Launch], threads: Threads = "one") -> None:
        """Raises Died and Failed."""

    def time(self, launches: Sequence[Launch], samples: int, inner: int) -> list[int]:
        """Nanoseconds of the launches, `samples` times the mean of `inner`. Raises Died and Failed."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Answer(_Message):
    """All that a cell may say."""

    ready: bool = False
    degraded: str = ""
    done: bool = False
    draws: bool = False
    ns: list[int] | None = None
    failed: str = ""
    message: str = ""
    memory: bool = False
    trap: bool = False


class Sandbox:
    """One cell. A context; it is started by the first thing that it is asked to do, and again after its death.

    Attributes:
        arena: the memory that it shares. degraded: why it has no seccomp filter; empty where it has.
        peak_bytes: of memory that a cell had at its end.
    """

    def __init__(self, told: Mapping[str, Any], files: Mapping[str, bytes], limits: Limits | None = None) -> None:
        """`told`: what the cell is (see `cell`); `files` lie in its folder."""
        self.limits = limits or Limits()
        self.degraded = ""
        self.peak_bytes = 0
        self._told, self._files = dict(told), dict(files)
        self._reason = seccomp.unavailable()
        self._pid: int | None = None
        self._is_ready = False
        self._commands = self._answers = -1
        self._folder: str | None = None
        self._zygote: Zygote | None = None
        self.arena = Arena(self.limits.tensor_bytes)

    @classmethod
    def of_kernels(cls, manifest: Manifest, blobs: Mapping[str, bytes], limits: Limits | None = None) -> Sandbox:
        """For an artifact's object code as it is stored."""
        told, files = {}, {}
        for index, (name, record) in enumerate(manifest.kernels.items()):
            files[f"{index}.o"] = blobs[record.binary]
            told[name] = {"file": f"{index}.o", "symbol": record.symbol, "signature": list(record.signature)}
        return cls({"kind": "kernels", "kernels": told}, files, limits)

    @classmethod
    def of_checked(
        cls,
        manifest: Manifest,
        blobs: Mapping[str, bytes],
        limits: Limits | None = None,
        *,
        sanitize: Literal["bounds", "race"] = "race",
    ) -> Sandbox:
        """For an artifact's Triton IR, compiled in the cell so that every access is checked."""
        told, files = {}, {}
        for index, (name, record) in enumerate(manifest.kernels.items()):
            files[f"{index}.ttir"] = blobs[record.ttir]
            told[name] = {"file": f"{index}.ttir", "symbol": record.symbol, "signature": list(record.signature)}
        # For this machine's processor, whatever the artifact is for: it is the accesses that are looked at.
        return cls({"kind": "checked", "kernels": told, "arch": "native", "sanitize": sanitize}, files, limits)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the cell, where it does not run, and waits until it has loaded what it was given. Raises Died, Failed
        and ProofUnavailable."""
        self.begin()
        if self._is_ready:
            return
        ready = self._receive("start")
        if ready.failed:
            self.stop()
            raise Failed(_failure(ready))
        self._is_ready = True
        self.degraded = self._reason or ready.degraded

    def begin(self) -> None:
        """Starts the cell, where it does not run, and does not wait for it. Raises ProofUnavailable."""
        if self._pid is not None:
            return
        self._folder = tempfile.mkdtemp(prefix="esper-urabrask-")
        for name, content in self._files.items():
            Path(self._folder, name).write_bytes(content)
        self.arena.memory[:4] = 0
        told = self._told | {
            "folder": self._folder,
            "memory_bytes": self.arena.size_bytes,
            "cpu_s": self.limits.cpu_s,
            "limit_bytes": self.limits.memory_bytes,
            "confined": self._reason is None,
        }
        commands_out, self._commands = os.pipe()
        self._answers, answers_in = os.pipe()
        try:
            self._zygote = shared_zygote()
            answer = self._zygote.ask({"start": told}, (commands_out, answers_in, self.arena.descriptor))
        except BaseException:
            self._tidy()
            raise
        finally:
            os.close(commands_out)
            os.close(answers_in)
        if "pid" not in answer:
            self._tidy()
            raise ProofUnavailable(f"no sandbox can be started: {answer.get('error')}")
        self._pid = answer["pid"]

    def tell(self, message: dict[str, Any], doing: str) -> _Answer:
        """Gives the cell a command and waits for what comes. Raises Died and Failed."""
        self.start()
        try:
            wire.send(self._commands, message)
        except OSError:
            raise self._death(f"ended by itself before {doing}") from None
        answer = self._receive(doing)
        if answer.failed:
            raise Failed(_failure(answer))
        return answer

    def run(self, launches: Sequence[Launch], threads: Threads = "one") -> None:
        """Launches kernels one after the other. Raises Died and Failed."""
        if launches and not self.tell({"launches": list(launches), "threads": threads}, "the launch").done:
            raise self._death("gave an answer to a launch that is none", kill=True)

    def time(self, launches: Sequence[Launch], samples: int, inner: int) -> list[int]:
        """Nanoseconds of the launches: `samples` means of `inner`. Raises Died and Failed."""
        message = {"launches": list(launches), "threads": "usual", "samples": samples, "inner": inner}
        began = time.perf_counter_ns()
        found = self.tell(message, "the measurement").ns
        took = time.perf_counter_ns() - began
        if found is None or len(found) != samples or min(found) < 0 or sum(found) * inner > took:
            raise self._death(f"gave times that are none: {found}, of {took} ns in all", kill=True)
        return found

    def stop(self) -> None:
        """Ends the cell, where it runs. The next command starts another."""
        if self._pid is not None:
            self._end(kill=True)

    def close(self) -> None:
        """Ends the cell and gives its memory back."""
        self.stop()
        self.arena.close()

    def _receive(self, doing: str) -> _Answer:
        wall_s = START_S if doing == "start" else self.limits.wall_s
        try:
            return _Answer.model_validate(wire.receive(self._answers, time.monotonic() + wall_s))
        except wire.Silence:
            raise self._death("") from None
        except wire.TooLate:
            raise self._death(f"did not end within {wall_s:g} s and was stopped", kill=True) from None
        except (wire.Garbage, ValidationError) as error:
            text = str(error).split("\n")[0]
            raise self._death(f"answered what is no answer ({text})", kill=True) from None

    def _death(self, reason: str, *, kill: bool = False) -> Died:
        ended = self._end(kill=kill)
        if reason and kill:
            return Died(reason)
        return Died(self._how(ended) or reason)

    def _end(self, *, kill: bool) -> dict[str, Any]:
        assert self._pid is not None
        assert self._zygote is not None
        try:
            ended = self._zygote.ask({"end": self._pid, "kill": kill})
        finally:
            self._tidy()
        self.peak_bytes = max(self.peak_bytes, ended["peak_bytes"])
        return ended

    def _tidy(self) -> None:
        self._pid, self._is_ready = None, False
        for descriptor in (self._commands, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._commands = self._answers = -1
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _how(self, ended: Mapping[str, Any]) -> str:
        status = ended["status"]
        if os.WIFEXITED(status):
            code, number = os.WEXITSTATUS(status), self.arena.forbidden_call()
            if code == _SIGSYS_EXIT and number is not None:
                return f"made a forbidden system call ({seccomp.name_of(number)})"
            return f"ended its process by itself, with exit code {code}"
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if ended["killed"]:
            return "closed its pipe and went on"
        return _SIGNALS.get(name, "was killed by {}").format(name)


_SIGNALS = {
    "SIGXCPU": "used up its CPU time ({})",
    "SIGSYS": "made a forbidden system call ({})",
    "SIGKILL": "was killed by {}, as by a system that is out of memory",
    "SIGXFSZ": "wrote to a file ({})",
    "SIGSEGV": "touched memory that it has not ({})",
    "SIGBUS": "touched memory that it has not ({})",
    "SIGILL": "ran an instruction that there is not ({})",
    "SIGFPE": "divided an integer by zero ({})",
}


def _failure(answer: _Answer) -> str:
    if answer.memory or "out of memory" in answer.message:
        return f"ran out of memory: {answer.message}" if answer.message else "ran out of memory"
    return f"{answer.failed}: {answer.message}"
