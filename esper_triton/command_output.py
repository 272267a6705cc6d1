"""How every command of the package ends: `python -m esper_triton.urza ls | head` too."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["READER_GONE", "run_command"]

READER_GONE = 141
"""The exit code where whoever read the output has gone: what a shell has for a process that SIGPIPE ended."""


class _Output(io.FileIO):
    """Standard output. A reader that is gone ends the process; as an OSError it could be taken for one of a socket or a
    file, and be told as a fault."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what is still to be flushed
            os.close(nowhere)
            raise SystemExit(READER_GONE) from None


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its exit code. Where the reader of its output goes away in the midst, it
    ends there, without a word."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and not stdout.isatty():
        raw = _Output(stdout.fileno(), "wb", closefd=False)
        output: Any = raw if stdout.write_through else io.BufferedWriter(raw)  # as `python -u` has it
        sys.stdout = io.TextIOWrapper(
            output, encoding=stdout.encoding, errors=stdout.errors, write_through=stdout.write_through
        )
    try:
        code = main()
    finally:
        sys.stdout.flush()
    sys.exit(code)
