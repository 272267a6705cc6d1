"""Commands whose reader goes away, as `head` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_triton.command_output import READER_GONE

COMMANDS = [
    ["esper_triton.compile", "lora", "--dim", "d=8", "--dim", "d_in=8", "--dry-run"],
    ["esper_triton.compile", "lora", "--dim", "d=8", "--dim", "d_in=8", "--dry-run", "--json"],
    ["esper_triton.config"],
    ["esper_triton.cpu", "--check", "--json"],
    ["esper_triton.nissa", "--help"],
    ["esper_triton.oona", "--help"],
    ["esper_triton.tezzeret", "--help"],
    ["esper_triton.urabrask", "--help"],
    ["esper_triton.urza", "ls"],
    ["esper_triton.urza", "ls", "--json"],
]


def with_nobody_reading(arguments: list[str], store: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    """What a process did whose standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        return subprocess.run(
            [sys.executable, *options, *arguments],
            stdout=gone,
            stderr=subprocess.PIPE,
            env=os.environ | {"ESPER_URZA": str(store)},
            check=False,
        )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_reader_has_gone_ends_without_a_word(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "urza").mkdir()
    done = with_nobody_reading(["-m", *command], tmp_path / "urza")
    assert (done.returncode, done.stderr.decode()) == (READER_GONE, "")
    done = with_nobody_reading(["-m", *command], tmp_path / "urza", "-u")
    assert (done.returncode, done.stderr.decode()) == (READER_GONE, "")


def test_a_pipe_that_is_not_the_output_is_a_fault_like_any_other(tmp_path: Path) -> None:
    code = """
from esper_triton.command_output import run_command
def main():
    raise BrokenPipeError("a socket's")
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: a socket's\n")


def test_what_is_printed_comes_through_with_its_exit_code() -> None:
    code = "from esper_triton.command_output import run_command; run_command(lambda: print('größer') or 3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (3, "größer\n", "")
