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


def rows_of(page: str, section: str) -> list[dict[str, str]]:
    """The first table below a heading, as the page has it."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition(f"\n## {section}\n")[2]
    lines = re.search(r"^\|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)[0].splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in body]


def first_number(cell: str) -> float:
    return float(cell.split()[0])


def test_the_comparison_of_the_readme_says_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    kernels = rows_of("cpu-speed.md", "Kernels")
    interpreter = [first_number(row["interpreter"]) for row in kernels if row["interpreter"]]
    assert f"{min(interpreter):.0f} to {max(interpreter):.0f} times as fast" in text
    checked = [first_number(row["sanitizer"]) for row in kernels if row["sanitizer"]]
    assert f"at {min(checked)} to {max(checked)} times the time" in text
    inductor = sorted(first_number(row["over Inductor C++"]) for row in kernels if row["over Inductor C++"])
    assert f"1/{inductor[-1]:.1f} to 1/{inductor[0]:.2f} of the time" in text
    assert inductor[len(inductor) // 2] > 2.0
    dormant = rows_of("kasmina-speed.md", "dormant")
    for what, said in (("wrapped", "cost {} to {} times"), ("PEFT, disabled", "adapters cost {} to {}")):
        ratios = [first_number(row["ratio"]) for row in dormant if row["model"] == what]
        ends = (f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        assert said.format(*ends) in text, (what, ends)
    cache = {row["what"]: row["value"] for row in rows_of("kasmina-speed.md", "cache")}
    assert f"{float(cache['load from Urza on a miss, p50, us']) / 1000:.1f} ms in the median" in text
    costs = re.search(r"softmax_from_disk_ms \| ([\d.]+)", (ROOT / "docs" / "cpu-speed.md").read_text("utf-8"))
    assert f"on disk takes {float(costs[1]):.1f} ms" in text
    for host, name in {"mlp": "an MLP", "cnn": "a CNN", "transformer": "a transformer"}.items():
        found = {row["contestant"]: first_number(row["accuracy"]) for row in rows_of("growth.md", host)}
        assert f"{found['grown']:.3f} against {found['adapter']:.3f} for {name}" in text
