"""The package's face: lazy, complete, and registered with Triton."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.mark.parametrize(
    ("name", "hint"), [("GrothHook", "; did you mean 'GrowthHook'?"), ("xyzzy", ""), ("_HOMES", "")]
)
def test_a_name_that_is_misspelt_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(esper, name)
    assert str(caught.value) == f"module 'esper_triton' has no attribute {name!r}{hint}"


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("esper-triton") == esper.__version__


SITE = Path(sysconfig.get_paths()["purelib"])


def distributions(site: Path) -> dict[str, Distribution]:
    return {canonicalize_name(found.name): found for found in importlib.metadata.distributions(path=[str(site)])}


def own_distribution(python: Path) -> Distribution:
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    return distributions(site)["esper-triton"]


def required(distribution: Distribution, extra: str = "") -> list[Requirement]:
    """What it needs here, with an extra or without one."""
    found = map(Requirement, distribution.requires or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]


def all_required(distribution: Distribution, known: Mapping[str, Distribution]) -> set[str]:
    """Names of what it needs, and of what that needs, and so on."""
    found: set[tuple[str, str]] = set()
    waiting = required(distribution)
    while waiting:
        one = waiting.pop()
        for key in ((canonicalize_name(one.name), extra) for extra in ("", *one.extras)):
            if key not in found:
                found.add(key)
                waiting += required(known[key[0]], key[1])
    return {name for name, _ in found}


def tops(distribution: Distribution) -> set[str]:
    """What it has in the folder of packages itself; its commands lie outside of that."""
    return {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}


def modules(names: Iterable[str]) -> set[str]:
    """Those that can be imported, of what lies in the folder of packages."""
    return {name.partition(".")[0] for name in names if not name.endswith((".dist-info", ".pth"))}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel of this tree and, by links to this environment's folder,
    what the wheel says that it depends on, and what that depends on: nothing else, and nothing of the tree itself."""
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

    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    known = distributions(SITE)
    wanted = all_required(own_distribution(python), known)
    mine = {top for name in wanted for top in tops(known[name])}
    shared = mine & {top for name in set(known) - wanted for top in tops(known[name])}
    for top in mine - shared:  # linked, since a copy of torch takes its time
        (site / top).symlink_to(SITE / top)
    for file in {file for name in wanted for file in known[name].files or () if file.parts[0] in shared}:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).symlink_to(SITE / file)
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


def test_the_wheel_is_tried_with_nothing_beside_what_it_declares(installed: Path, tmp_path: Path) -> None:
    known = distributions(SITE)
    wanted = all_required(own_distribution(installed), known)
    here = modules(top for name in wanted for top in tops(known[name]))
    elsewhere = modules(top for name in set(known) - wanted for top in tops(known[name])) - here - {"esper_triton"}
    assert {"torch", "triton", "pydantic", "numpy"} <= here
    assert {"pytest", "hypothesis", "pip", "redis", "sklearn"} <= elsewhere
    code = (
        "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))"
    )
    assert set(json.loads(run_installed(installed, tmp_path, "-c", code, *here, *elsewhere))) == here


def test_modules_that_need_more_than_the_wheel_declares_say_which_extra_has_it(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib, json, pkgutil, esper_triton
lacking = {}
for module in pkgutil.walk_packages(esper_triton.__path__, "esper_triton."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        lacking[module.name] = [error.name, str(error)]
print(json.dumps(lacking))
"""
    lacking = json.loads(run_installed(installed, tmp_path, "-W", "error", "-c", code))
    own = own_distribution(installed)
    extras = own.metadata.get_all("Provides-Extra")
    assert {"esper_triton.huggingface", "esper_triton.lightning", "esper_triton.oona.redis_streams"} < set(lacking)
    for module, (name, message) in lacking.items():
        if module.startswith("esper_triton.testing."):  # for tests, which say so by their extra
            assert name in {one.name for one in required(own, "test")}
        else:
            assert any(f"pip install 'esper-triton[{extra}]'" in message for extra in extras), message


def test_whatever_the_package_imports_anywhere_is_declared(installed: Path) -> None:
    own, known = own_distribution(installed), distributions(SITE)
    declared = {"esper_triton", *sys.stdlib_module_names}
    for extra in ("", *own.metadata.get_all("Provides-Extra")):
        for one in required(own, extra):
            name = canonicalize_name(one.name)
            declared |= modules(tops(known[name])) if name in known else {name.removeprefix("py")}  # as PyYAML
    imported = set()
    for path in (ROOT / "esper_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    assert {"torch", "yaml", "transformers"} <= imported
    assert imported <= declared
