"""`python -m esper_triton.cpu --check`: what it finds, and that the self-test tells right from wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
from triton.backends import backends

from esper_triton.cpu import check, selftest
from esper_triton.cpu.__main__ import main
from esper_triton.cpu.driver import CPUDriver


def report(capsys: pytest.CaptureFixture[str], *, code: int = 0) -> dict[str, Any]:
    assert main(["--check", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--check"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    return err


def test_json_tells_what_was_found_and_that_every_kernel_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert list(found) == ["processor", "threads", "versions", "triton", "self-test"]
    assert found["processor"]["architecture"] == platform.machine()
    assert found["processor"]["lanes of a chunk"] * 32 == 2 * found["processor"]["vector bits"]
    assert found["threads"]["of a launch (torch.get_num_threads)"] == torch.get_num_threads()
    assert found["threads"]["cores of this process"] == len(os.sched_getaffinity(0))
    assert (found["versions"]["torch"], found["versions"]["triton"]) == (torch.__version__, triton.__version__)
    assert found["triton"]["cache folder"] == triton.knobs.cache.dir
    assert [(one["name"], one["ok"], one["failure"]) for one in found["self-test"]] == [
        (name, True, "") for name in ("masked add", "softmax", "matmul (tl.dot)", "atomic add", "philox")
    ]


def test_features_are_those_that_the_system_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    features = report(capsys)["processor"]["features"]
    same = [name for name in ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw") if name in features]
    assert {name: features[name] for name in same} == {name: name in flags for name in same}


@pytest.mark.parametrize(
    ("version", "tested"), [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False)]
)
def test_whether_this_triton_was_tested_is_told(version: str, tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert check.findings()["versions"]["triton is a tested version"] is tested


def test_a_wrong_result_is_told_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matmul = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: matmul(x) * (1.01 if x.shape == (65, 97) else 1.0))
    monkeypatch.setattr(selftest, "_PHILOX", (((0, 0), (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 1)),))
    tests = {one["name"]: one for one in report(capsys, code=1)["self-test"]}
    assert [name for name, one in tests.items() if not one["ok"]] == ["matmul (tl.dot)", "philox"]
    assert tests["matmul (tl.dot)"]["failure"] == "relative error 1.0e-02, expected at most 1e-05"
    assert tests["philox"]["failure"] == (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8 instead of 6627e8d5 e169c58d bc57ac4c 00000001"
    )


def test_a_kernel_that_raises_fails_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(selftest, "TESTS", {"broken": (broken, ())})
    assert main(["--check"]) == 1
    out, err = capsys.readouterr()
    assert "failed: RuntimeError: two lines" in out
    assert err == ""


def test_the_self_test_compiles_afresh_and_leaves_the_cache_alone(tmp_path: Any) -> None:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        seen: list[str] = []
        compiled: list[bool] = []
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(cache_hit)
        try:
            outcomes = selftest.run(seen.append)
        finally:
            triton.knobs.compilation.listener = None
        assert triton.knobs.cache.dir == str(tmp_path)
    assert seen == [one.name for one in outcomes] == list(selftest.TESTS)
    assert compiled == [False] * len(compiled)
    assert len(compiled) >= len(outcomes)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    line = error(capsys)
    assert line.startswith("error: llvmlite cannot be imported (ModuleNotFoundError")
    assert line.endswith("install it with pip install llvmlite\n")


def test_an_unregistered_backend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(backends, "cpu")
    monkeypatch.delenv("TRITON_BACKENDS_IN_TREE", raising=False)
    found = ", ".join(repr(name) for name in sorted(backends))
    assert error(capsys) == (
        f"error: Triton did not find the entry point of this backend (found {found}): "
        "install esper-triton with pip, into this environment\n"
    )
    monkeypatch.setenv("TRITON_BACKENDS_IN_TREE", "1")
    assert error(capsys).endswith("unset TRITON_BACKENDS_IN_TREE\n")


def test_a_printer_that_does_not_give_the_generic_form_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton._C.libtriton import ir

    monkeypatch.setattr(ir.module, "set_attr", lambda *_: None)
    assert error(capsys) == (f"error: the MLIR printer of triton {triton.__version__} did not give the generic form\n")


def test_the_interpreter_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 is set" in error(capsys)


@pytest.mark.parametrize(
    ("active", "environment", "reason"),
    [
        (True, {}, "no other backend finds a device"),
        (True, {"ESPER_TRITON_CPU": "1", "TRITON_DEFAULT_BACKEND": "cpu"}, "ESPER_TRITON_CPU=1 is set"),
        (True, {"TRITON_DEFAULT_BACKEND": "cpu"}, "TRITON_DEFAULT_BACKEND=cpu is set"),
        (False, {}, "a device of another backend (amd or nvidia) was found; set ESPER_TRITON_CPU=1 or call"),
        (False, {"ESPER_TRITON_CPU": "0"}, "ESPER_TRITON_CPU=0 is set; set ESPER_TRITON_CPU=1 or call"),
    ],
)
def test_why_the_cpu_is_the_active_device_or_not_is_told(
    active: bool, environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ESPER_TRITON_CPU", "TRITON_DEFAULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(CPUDriver, "is_active", staticmethod(lambda: active))
    found = check.findings()["triton"]
    assert found["CPU is the active device"] is active
    assert found["because"].startswith(reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --check --explain is required"),
        (["--check", "--explain", "a.py:b"], "not allowed with argument --check"),
        (["--check", "--show", "asm"], "--arg, --constexpr and --show belong to --explain"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert (message in err, err.count("\n")) == (True, 1)


def test_the_command_runs_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "esper_triton.cpu", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert triton.__version__ in done.stdout
    assert done.stdout.count("│ ok") == len(selftest.TESTS)
