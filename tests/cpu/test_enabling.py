"""Which device Triton takes: the CPU where there is nothing else or where it is asked for, and never two at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends import Backend, backends

import esper_triton.cpu
from esper_triton.cpu.driver import CPUDriver, _triton_takes_wishes

NAME = "print(type(triton.runtime.driver.active).__name__)\n"


@pytest.fixture
def with_other(tmp_path):
    """Runs Python code where another backend is installed next to the CPU's, which says that it is active, or not."""

    def run_beside(code: str, active: bool, **environment: str) -> list[str]:
        package, info = tmp_path / "other", tmp_path / "other-1.0.dist-info"
        package.mkdir(exist_ok=True)
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[triton.backends]\nother = other\n")
        (package / "__init__.py").write_text("")
        (package / "compiler.py").write_text(
            "import triton.backends.compiler as c\n"
            "class OtherBackend(c.BaseBackend): pass\n"
            "OtherBackend.__abstractmethods__ = frozenset()\n"
        )
        (package / "driver.py").write_text(
            "import triton.backends.driver as d\n"
            "class OtherDriver(d.DriverBase):\n"
            "    def __init__(self): pass\n"
            f"    is_active = staticmethod(lambda: {active})\n"
            "OtherDriver.__abstractmethods__ = frozenset()\n"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        found = "import triton\nassert {'cpu', 'other'} <= set(triton.backends.backends)\n"
        return run(found + code, PYTHONPATH=path, **environment).split()

    return run_beside


def run(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("ESPER_TRITON_CPU", "TRITON_DEFAULT_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def registry():
    """Triton's registry of drivers with nothing chosen yet, put back afterwards."""
    registry = triton.runtime.driver
    before = registry._default, registry._active
    registry._default = registry._active = None
    yield registry
    registry._default, registry._active = before


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    monkeypatch.delenv("TRITON_DEFAULT_BACKEND", raising=False)
    monkeypatch.delenv("ESPER_TRITON_CPU", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device, as far as anyone can see who does not use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)


def test_without_a_gpu_the_cpu_is_active(registry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(registry.active, CPUDriver)


def test_with_a_gpu_the_cpu_keeps_out_of_the_way(gpu):
    assert CPUDriver.is_active() is False


@pytest.mark.parametrize(
    "wish",
    [
        {"ESPER_TRITON_CPU": "1"},
        {"TRITON_DEFAULT_BACKEND": "cpu"},
        {"ESPER_TRITON_CPU": "1", "TRITON_DEFAULT_BACKEND": "other"},
    ],
)
def test_beside_another_active_driver_the_environment_can_ask_for_the_cpu(with_other, wish):
    if _triton_takes_wishes():
        assert with_other(NAME, True, **wish) == ["CPUDriver"]
    else:
        raises = "try:\n triton.runtime.driver.active\nexcept RuntimeError as error:\n print(error)\n"
        enabled = f"import esper_triton.cpu as cpu\ncpu.enable()\n{NAME}"
        *message, name = with_other(raises + enabled, True, **wish)
        assert " ".join(message).endswith("to take the CPU instead of 'other': call esper_triton.cpu.enable()")
        assert name == "CPUDriver"


def test_beside_another_active_driver_the_cpu_keeps_out_of_the_way(with_other):
    assert with_other(NAME, True) == ["OtherDriver"]


def test_a_backend_that_is_not_active_does_not_keep_the_cpu_back(with_other):
    assert with_other(NAME, False) == ["CPUDriver"]


def test_the_cpu_can_be_switched_on_and_off_and_on_for_a_while(with_other):
    within = f"with cpu.active():\n {NAME} with cpu.active(): {NAME} {NAME}"
    enabled = f"cpu.enable()\n{NAME}first = triton.runtime.driver.active\ncpu.enable()\n"
    same = "print(triton.runtime.driver.active is first)\n"
    code = f"import esper_triton.cpu as cpu\n{enabled}{same}cpu.disable()\n{NAME}{within}{NAME}"
    expected = "CPUDriver True OtherDriver CPUDriver CPUDriver CPUDriver OtherDriver"
    assert with_other(code, True) == expected.split()


def test_a_driver_that_was_chosen_by_hand_comes_back_after_a_while_on_the_cpu(registry):
    chosen = object()
    registry.set_active(chosen)
    seen = []

    def fail():
        with esper_triton.cpu.active():
            seen.append(registry.active)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert isinstance(seen[0], CPUDriver)
    assert registry.active is chosen


def test_enabling_does_not_ask_any_other_driver(registry, gpu, monkeypatch):
    def never():
        raise AssertionError("asked")

    for name, backend in list(backends.items()):
        if name != "cpu":
            silent = type(backend.driver.__name__, (backend.driver,), {"is_active": staticmethod(never)})
            monkeypatch.setitem(backends, name, Backend(backend.compiler, silent))
    esper_triton.cpu.enable()
    assert isinstance(registry.active, CPUDriver)


def test_the_cpu_can_be_forbidden(registry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ESPER_TRITON_CPU", "0")
    assert CPUDriver.is_active() is False


def test_a_gpu_driver_that_raises_does_not_keep_the_cpu_from_running(registry, monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert CPUDriver.is_active() is True


def test_two_backends_that_both_ask_the_other_do_not_ask_for_ever(monkeypatch):
    class Polite(CPUDriver):
        @staticmethod
        def is_active():
            return not any(b.driver.is_active() for b in backends.values() if b.driver is not Polite)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(backends, "polite", Backend(backends["cpu"].compiler, Polite))
    assert [CPUDriver.is_active(), Polite.is_active()] == [False, True]


def test_triton_imports_without_torch_and_without_llvmlite():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['llvmlite'] = None;"
        "import triton; print(type(triton.runtime.driver.active).__name__)"
    )
    assert run(code) == "CPUDriver"


def test_importing_the_package_first_or_triton_first_makes_no_difference():
    for first, second in (("esper_triton.cpu", "triton"), ("triton", "esper_triton.cpu")):
        code = (
            f"import sys, {first}, {second}; import triton, esper_triton.cpu as cpu; cpu.enable();"
            "print(type(triton.runtime.driver.active).__name__, 'torch' in sys.modules, 'llvmlite' in sys.modules)"
        )
        assert run(code) == "CPUDriver False False"
