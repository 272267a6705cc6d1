"""The package's face: lazy, complete, and registered with Triton."""

import importlib.metadata
import subprocess
import sys

import esper_triton as esper


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
