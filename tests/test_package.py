"""The package's face: lazy, complete, and registered with Triton."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import esper_triton as esper

ROOT = Path(__file__).resolve().parent.parent


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert modules_after("import esper_triton").isdisjoint({"torch", "triton", "llvmlite", "numpy", "pydantic"})


def test_importing_triton_with_the_plugin_imports_neither_torch_nor_llvmlite():
    loaded = modules_after("import triton; assert 'cpu' in triton.backends.backends")
    assert "esper_triton" in loaded
    assert loaded.isdisjoint({"torch", "llvmlite", "pydantic"})


def test_the_plugin_may_be_imported_before_triton():
    for module in ("esper_triton.cpu.compiler", "esper_triton.cpu.driver"):
        assert "triton" in modules_after(f"import {module}, triton; assert 'cpu' in triton.backends.backends")


def test_every_public_name_can_be_had():
    for name in esper.__all__:
        assert getattr(esper, name) is not None, name
    assert set(esper.__all__) <= set(dir(esper))
    assert callable(esper.compile)


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("esper-triton") == esper.__version__


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel of this tree and, from this environment's folder, what it
    depends on: nothing of the tree itself."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kernels", "esper_triton"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    done = subprocess.run(built, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"esper_triton-{esper.__version__}-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    # The links that an editable install keeps there are not followed from here.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return python


def run_installed(python: Path, folder: Path, *arguments: str) -> str:
    """What `python arguments` prints in a folder, where nothing of this tree can be imported."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=folder, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_first_example_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (block, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    where = "print(esper.__file__)\n"
    (tmp_path / "example.py").write_text(block + where, encoding="utf-8")
    stats, path = run_installed(installed, tmp_path, "-W", "error", "example.py").splitlines()
    assert "'forward_calls_active': 100" in stats
    assert Path(path).is_relative_to(installed.parents[1])


def test_the_wheel_has_what_ships_and_its_commands(installed: Path, tmp_path: Path) -> None:
    code = "from esper_triton.tezzeret.library import shipped; print(*sorted(shipped()))"
    names = run_installed(installed, tmp_path, "-W", "error", "-c", code).split()
    assert names == sorted(path.stem for path in (ROOT / "kernels").glob("*.toml"))
    folder = installed.parents[1]
    for path in (ROOT / "esper_triton" / "nissa" / "static").iterdir():
        assert list(folder.glob(f"lib/python*/site-packages/esper_triton/nissa/static/{path.name}")), path.name
    plan = run_installed(
        installed, tmp_path, "-m", "esper_triton.compile", "lora", "--dim", "d=8", "--dim", "d_in=8", "--dry-run"
    )
    assert "to build" in plan
    for command in ("cpu", "demo", "nissa", "oona", "tezzeret", "urabrask", "urza"):
        assert f"usage: python -m esper_triton.{command}" in run_installed(
            installed, tmp_path, "-m", f"esper_triton.{command}", "--help"
        )
