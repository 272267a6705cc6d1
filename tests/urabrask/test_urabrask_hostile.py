"""Artifacts that mean harm: each is rejected for what it did, and nothing else comes of it."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import HOARD, LOOP, WILD_STORE, object_code, only_here, system_call
from shipped import BLUEPRINTS

from esper_triton.tezzeret.forge import Forged, forge
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import examine, seccomp
from esper_triton.urabrask.sandbox import Limits

pytestmark = [only_here, pytest.mark.skipif(seccomp.unavailable() is not None, reason="no seccomp here")]


@pytest.fixture(scope="module")
def sound() -> Forged:
    return forge(plan_build(BLUEPRINTS["channel_scale"], {"d": 24}, "float32", parse_target("cpu"), "fast"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (LOOP, "did not end within 1 s and was stopped"),
        (WILD_STORE, "touched memory that it has not (SIGSEGV)"),
        (lambda symbol: system_call("exit_group", 0, symbol=symbol), "ended its process by itself, with exit code 0"),
        (
            lambda symbol: system_call("socket", socket.AF_INET, socket.SOCK_STREAM, symbol=symbol),
            "made a forbidden system call (socket)",
        ),
        (
            lambda symbol: system_call("openat", -100, 0, os.O_WRONLY | os.O_CREAT, symbol=symbol),
            "made a forbidden system call (openat)",
        ),
        (lambda symbol: system_call("kill", os.getpid(), 9, symbol=symbol), "made a forbidden system call (kill)"),
        (
            lambda symbol: object_code("  call i32 @socket(i32 2, i32 1, i32 0)\n  ret void", _SOCKET, symbol),
            "refers to 'socket', which object code may not use",
        ),
        (
            lambda symbol: object_code("  call i32 @open(ptr null, i32 0)\n  ret void", _OPEN, symbol),
            "refers to 'open', which object code may not use",
        ),
        (lambda symbol: object_code(HOARD, "declare ptr @malloc(i64)", symbol), "memory"),
    ],
    ids=["loop", "wild store", "exit", "socket", "file", "kill", "libc socket", "libc open", "hoard"],
)
def test_a_hostile_artifact_is_rejected_for_what_it_does_and_harms_nobody(
    sound: Forged,
    body: str | Callable[[str], bytes],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (name, record), *rest = sound.manifest.kernels.items()
    binary = object_code(body, symbol=record.symbol) if isinstance(body, str) else body(record.symbol)
    digest = hashlib.sha256(binary).hexdigest()
    kernels = {name: record.model_copy(update={"binary": digest}), **dict(rest)}
    manifest = sound.manifest.model_copy(update={"kernels": kernels})
    limits = Limits(wall_s=1.0, memory_bytes=1 << 30)
    report = examine(manifest, {**sound.blobs, digest: binary}, BLUEPRINTS["channel_scale"], seed=1, limits=limits)
    assert report.verdict == "REJECTED"
    assert says in "; ".join(report.reasons)
    assert report.benchmarks == ()
    assert list(tmp_path.iterdir()) == []  # of its cells


def test_the_prover_that_has_met_them_proves_a_sound_one(sound: Forged) -> None:
    assert examine(sound.manifest, sound.blobs, BLUEPRINTS["channel_scale"], seed=1).verdict == "VALIDATED"


_SOCKET = "declare i32 @socket(i32, i32, i32)"
_OPEN = "declare i32 @open(ptr, i32)"
