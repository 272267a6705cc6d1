"""docs/examples: every script runs, and what it says is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from package_folder import install

import esper_triton as esper
from esper_triton.contracts.manifest import KernelStatus

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"

Run = Callable[..., str]


def test_digits_grow_in_forty_lines(run_example: Run, tmp_path: Path) -> None:
    lines = run_example("digits.py").splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines]
    assert len(losses) == 20
    assert losses[-1] < losses[4]  # the last epoch before there was a seed
    assert lines[4].endswith("DORMANT")
    assert lines[-1].endswith("FOSSILIZED")
    assert (tmp_path / "grown" / "lineage.json").exists()
    code = [line for line in (EXAMPLES / "digits.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(code) <= 40


def test_a_convolution_gets_channel_attention(run_example: Run) -> None:
    lines = run_example("squeeze_excite.py").splitlines()
    assert lines[-2].endswith("alpha 1.00, GRAFTING")
    assert float(lines[-1].removeprefix("accuracy ")) > 2 / 6  # twice what guessing gives


def test_a_module_becomes_a_kernel_that_is_proven_to_be_the_module(run_example: Run, tmp_path: Path) -> None:
    said = run_example("module_blueprint.py")
    assert "equivalent, forward and backward" in said
    assert "with another activation: artifact" in said
    assert "is not equivalent to GatedBottleneck" in said
    store = esper.Urza(tmp_path / "urza")
    assert [store.get(one).status for one in store.ids()] == [KernelStatus.VALIDATED]


def test_a_kernel_written_by_hand_is_proven_and_learns(run_example: Run) -> None:
    lines = run_example("triton_blueprint.py").splitlines()
    assert re.search(r" VALIDATED after \d{2,} cases$", lines[0])
    worst = [float(re.search(r": ([\d.]+) of what", line)[1]) for line in lines[1:4]]
    assert 0 < max(worst) < 1
    before, *_, after = (float(line.partition("loss ")[2]) for line in lines[4:])
    assert after < before


def test_somebody_elses_kernel_runs_with_no_word_of_esper(run_example: Run) -> None:
    tree = ast.parse((EXAMPLES / "stock_triton.py").read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"torch", "triton", "triton.language"}
    lines = run_example("stock_triton.py").splitlines()
    assert lines[0] == "ran on: cpu"
    # A row's numbers are at most 1, and each is computed with a handful of roundings of 6e-8.
    assert float(lines[2].rpartition(" ")[2]) < 1e-6


def test_two_processes_grow_one_model(run_example: Run) -> None:
    lines = run_example("two_processes.py").splitlines()
    assert lines[0].startswith("GRAFTING, alpha 1.00, ")
    assert lines[1] == "the same to the bit in all processes: True"


def test_four_processes_over_redis(run_example: Run, redis_server: object) -> None:
    said = run_example("over_redis.py", redis_server.address)  # type: ignore[attr-defined]
    moments = [
        "serving compilation.blueprint.submitted",
        "serving compilation.kernel.ready",
        "page at http://127.0.0.1:",
        "is proven, and planted",
        "the seed is in TRAINING",
        "the seed is in GRAFTING",
        "1 grafting",
    ]
    found = [said.find(moment) for moment in moments]
    assert -1 not in found, said
    assert found == sorted(found)


def test_a_transformer_grows_under_its_own_trainer(run_example: Run, tmp_path: Path) -> None:
    company = install(ROOT / "tests" / "company" / "requirements.txt")
    said = run_example("transformer.py", packages=(company,), warnings="ignore")  # theirs, of what might be better
    states = dict(re.findall(r"^(bert\S+dense) ([A-Z_]+)$", said, re.MULTILINE))
    assert len(states) == 4
    assert set(states.values()) & {"FINE_TUNING", "FOSSILIZED"}, "nothing has become better by any seed"
    assert (tmp_path / "grown" / "lineage.json").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_is_in_the_list_and_runs_in_a_test(script: str) -> None:
    assert f"[{script}]({script})" in (EXAMPLES / "README.md").read_text("utf-8")
    tested = Path(__file__).read_text("utf-8")
    if script != "ripple.py":  # no script, but the source that triton_blueprint.py names
        assert f'run_example("{script}"' in tested
