"""The code of the README and of the pages runs as it stands."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run(block: str, folder: Path):
    """As a file, since Triton reads a kernel's source from one."""
    path = folder / "readme_block.py"
    path.write_text("import torch\nimport triton\nimport triton.language as tl\n" + block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("readme_block", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    monkeypatch.chdir(tmp_path)
    step = "optimizer.zero_grad(); model(torch.ones(4, 64)).square().sum().backward(); optimizer.step()"
    module = run(BLOCKS[0].replace("...  ", step, 1), tmp_path)
    assert "'forward_calls_active': 100" in capsys.readouterr().out
    assert type(module.model[0]) is torch.nn.Linear


def test_the_model_on_a_bus_of_the_page_on_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "oona.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    module = run("\n".join(blocks), tmp_path)
    assert module.model.kasmina_layers["0"].seed_state(0).name == "TRAINING"
    assert module.bus.publish("audit.lifecycle", {}) is False


def test_the_training_loop_of_the_page_on_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kasmina.md").read_text("utf-8"), re.DOTALL)
    module = run(block, tmp_path)
    assert module.model.kasmina_layers["0"].seed_state(0).name == "FOSSILIZED"
    assert (tmp_path / "grown" / "lineage.json").exists()


def test_the_kernel_of_the_readme(tmp_path: Path):
    module = run(BLOCKS[1], tmp_path)
    assert torch.equal(module.out, module.x * 2)
