"""What runs in a sandbox can do nothing but compute, and its every way of ending is told apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import HOARD, LOOP, SYMBOL, WILD_STORE, object_code, only_here, system_call

from esper_triton.urabrask import seccomp, wire
from esper_triton.urabrask.sandbox import Died, Failed, Limits, Sandbox

pytestmark = [only_here, pytest.mark.skipif(seccomp.unavailable() is not None, reason="no seccomp here")]
LAUNCH = [("k", (1, 1, 1), [])]
QUICK = Limits(wall_s=20.0, cpu_s=30.0, memory_bytes=1 << 30, tensor_bytes=1 << 20)


def sandbox_of(binary: bytes, limits: Limits = QUICK) -> Sandbox:
    told = {"kind": "kernels", "kernels": {"k": {"file": "0.o", "symbol": SYMBOL, "signature": []}}}
    return Sandbox(told, {"0.o": binary}, limits)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes have their folders, of which none may be left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def fate_of(binary: bytes, limits: Limits = QUICK) -> str:
    with sandbox_of(binary, limits) as box:
        box.start()
        assert box.degraded == ""
        with pytest.raises((Died, Failed)) as raised:
            box.run(LAUNCH)
        return str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("openat", (-100, 0, os.O_WRONLY | os.O_CREAT)),
        ("openat", (-100, 0, os.O_RDONLY)),
        ("socket", (socket.AF_INET, socket.SOCK_STREAM)),
        ("fork", ()),
        ("execve", ()),
        ("ptrace", ()),
        ("kill", (os.getppid(), 0)),
    ],
)
def test_a_system_call_that_reaches_outside_ends_the_process_and_is_named(
    folders: Path, name: str, arguments: tuple[int, ...]
) -> None:
    assert fate_of(system_call(name, *arguments)) == f"made a forbidden system call ({name})"


@pytest.mark.parametrize(
    ("binary", "fate"),
    [
        (system_call("exit_group", 7), "ended its process by itself, with exit code 7"),
        (object_code(WILD_STORE), "touched memory that it has not (SIGSEGV)"),
        (
            object_code('  call void asm sideeffect "ud2", ""()\n  ret void'),
            "ran an instruction that there is not (SIGILL)",
        ),
        (object_code(HOARD, "declare ptr @malloc(i64)"), "ran out of memory"),
    ],
)
def test_each_way_of_ending_is_told_apart(folders: Path, binary: bytes, fate: str) -> None:
    assert fate_of(binary).startswith(fate)


def test_what_does_not_end_is_stopped_by_the_clock(folders: Path) -> None:
    limits = Limits(wall_s=0.5, tensor_bytes=1 << 20)
    assert fate_of(object_code(LOOP), limits) == "did not end within 0.5 s and was stopped"


def test_what_uses_more_cpu_time_than_it_may_is_stopped_by_the_kernel(folders: Path) -> None:
    assert fate_of(object_code(LOOP), Limits(cpu_s=0.5, wall_s=60.0, tensor_bytes=1 << 20)).startswith(
        "used up its CPU"
    )


@pytest.mark.parametrize(
    "written",
    [
        wire._LENGTH.pack(5) + b"hello",
        wire._LENGTH.pack(1 << 30),
        wire._LENGTH.pack(2) + b"{}",
        wire._LENGTH.pack(27) + b'{"done": true, "more": 1.5} ',
        wire._LENGTH.pack(13) + b'{"done": "1"}',
    ],
)
def test_an_answer_that_is_none_is_no_answer(folders: Path, written: bytes) -> None:
    text = "".join(f"\\{byte:02x}" for byte in written)
    write = (
        '  %n = call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},{rdx},~{rcx},~{r11},~{memory}"'
        f"(i64 1, i64 4, ptr @text, i64 {len(written)})"
    )
    binary = object_code(
        f"{write}\n  br label %again\nagain:\n  br label %again", f'@text = constant [{len(written)} x i8] c"{text}"'
    )
    fate = fate_of(binary)
    assert fate.startswith(("answered what is no answer", "gave an answer to a launch that is none"))


def test_a_sandbox_that_has_died_is_started_again_by_the_next_command(folders: Path) -> None:
    with sandbox_of(system_call("exit_group", 0)) as box:
        for _ in range(2):
            with pytest.raises(Died, match="ended its process by itself, with exit code 0"):
                box.run(LAUNCH)


def test_object_code_that_names_a_function_of_the_system_is_not_loaded(folders: Path) -> None:
    binary = object_code("  %n = call i32 @system(ptr null)\n  ret void", "declare i32 @system(ptr)")
    with sandbox_of(binary) as box, pytest.raises(Failed, match="refers to 'system', which it may not use"):
        box.start()


def test_the_memory_that_is_shared_cannot_be_made_smaller_under_its_reader(folders: Path) -> None:
    with sandbox_of(object_code("  ret void")) as box:
        box.run(LAUNCH)
        with pytest.raises(PermissionError):
            os.ftruncate(box.arena.descriptor, 0)


def test_nothing_is_left_of_a_process_whose_parent_dies(folders: Path) -> None:
    script = (
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_urabrask_sandbox import sandbox_of, LOOP, object_code\n"
        "box = sandbox_of(object_code(LOOP))\n"
        "box.start()\n"
        "print(box._pid, flush=True)\n"
        "os._exit(0)\n"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"TMPDIR": str(folders)}
    done = subprocess.run(
        [sys.executable, "-c", script, here], capture_output=True, text=True, check=True, env=environment
    )

    def is_gone() -> bool:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return not list(folders.iterdir())
        return False

    deadline = time.monotonic() + 20
    while not is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_there_is_no_filter_the_report_says_so(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    monkeypatch.setattr(seccomp, "unavailable", lambda: "this kernel has no seccomp filters")
    with sandbox_of(object_code("  ret void")) as box:
        box.run(LAUNCH)
        assert box.degraded == "this kernel has no seccomp filters"
