"""One command runs every benchmark, and says which of them failed."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import run
from tables import table

PROGRAMS = {path.stem: path for path in run.HERE.glob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8")}


class Parsed(Exception):
    """What a program would go on with."""


def test_every_program_in_the_folder_is_run() -> None:
    assert {bench.name for bench in run.BENCHES} == PROGRAMS.keys() - {"run"}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("bench", run.BENCHES, ids=lambda bench: bench.name)
def test_a_program_takes_what_it_is_given(
    bench: run.Bench, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        raise Parsed(original(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [bench.name, *bench.arguments(tmp_path, quick=quick)])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(bench.name).main()
    places = [value for value in vars(parsed.value.args[0]).values() if isinstance(value, Path)]
    assert places == [tmp_path if bench.writes is None or "--output" in sys.argv else tmp_path / bench.writes]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_how_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert f"usage: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu_backend", "tezzeret", "kasmina", "growth"])
def test_ratios_are_read_from_the_figures_in_the_docs(name: str) -> None:
    (bench,) = (bench for bench in run.BENCHES if bench.name == name)
    docs = run.HERE.parent / "docs"
    figures = json.loads((docs / str(bench.writes)).read_text(encoding="utf-8"))
    ratios = bench.ratios(figures)
    assert ratios
    for ratio in ratios:
        assert ratio.ratio > 0
        assert ratio.low is None or ratio.high is None or ratio.low <= ratio.high
    if name == "cpu_backend":
        row = figures["kernels"][0]
        eager = next(ratio for ratio in ratios if ratio.rival == "eager")
        assert eager.ratio == pytest.approx(row["eager_us"] / row["triton_us"])
    if name == "kasmina":
        wrapped, peft = (
            next(row for row in figures["dormant"] if row["model"] == model) for model in ("wrapped", "PEFT, disabled")
        )
        found = next(ratio for ratio in ratios if ratio.rival == "PEFT, disabled")
        assert found.ratio == pytest.approx(peft["us"] / wrapped["us"])


PROGRAM = """
import sys
from pathlib import Path

folder = Path(sys.argv[1])
print("what there is to say")
{ending}
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three programs: one that ends well, one that fails, one that writes what cannot be read."""
    here, out = tmp_path / "here", tmp_path / "out put"
    here.mkdir()
    endings = {
        "fine": 'folder.joinpath("fine.json").write_text("[2.0, 8.0]")',
        "broken": 'sys.exit("error: no such kernel")',
        "odd": 'folder.joinpath("odd.json").write_text("{")',
    }
    for name, ending in endings.items():
        (here / f"{name}.py").write_text(PROGRAM.format(ending=ending), encoding="utf-8")

    def ratios(figures: Any) -> list[run.Ratio]:
        return [run.Ratio(what=str(k), rival="eager", ratio=ratio) for k, ratio in enumerate(figures)]

    made = (
        run.Bench(name="broken", quick="FOLDER", whole="FOLDER", writes="broken.json"),
        run.Bench(name="fine", quick="FOLDER", whole="FOLDER", writes="fine.json", ratios=ratios),
        run.Bench(name="odd", quick="FOLDER", whole="FOLDER", writes="odd.json"),
    )
    monkeypatch.setattr(run, "HERE", here)
    monkeypatch.setattr(run, "BENCHES", made)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return out


def test_one_that_fails_is_reported_and_the_others_go_on(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(programs)])
    assert run.main() == 1
    said = capsys.readouterr().out
    assert "exit status 1: error: no such kernel" in said
    assert "failed: broken, odd" in said
    figures = json.loads((programs / "run.json").read_text(encoding="utf-8"))
    assert [(one["bench"], one["status"]) for one in figures["benches"]] == [("broken", 1), ("fine", 0), ("odd", 0)]
    assert figures["benches"][2]["fault"].startswith("odd.json is not what")
    assert figures["machine"]["settings"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert {"python", "versions", "cores", "load"} <= figures["machine"].keys()
    assert (programs / "fine.log").read_text(encoding="utf-8") == "what there is to say\n"
    page = (programs / "run.md").read_text(encoding="utf-8")
    assert "| fine | eager | 2 | 4 | 2 (0) | 8 (1) |" in page  # the geometric mean of 2 and 8 is 4
    assert "OMP_WAIT_POLICY=PASSIVE" in page
    assert (programs / "run.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_an_earlier_run_do_not_pass_for_those_of_this_one(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.mkdir()
    (programs / "broken.json").write_text("[1.0]", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "broken", "--output", str(programs)])
    assert run.main() == 1
    assert not (programs / "broken.json").exists()
    assert "failed: broken" in capsys.readouterr().out


def test_when_all_end_well_so_does_it(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "fine", "--output", str(programs)])
    assert run.main() == 0
    assert "failed: none" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused_with_the_names_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--only", "kasmina,ursa"])
    said = capsys.readouterr().err
    assert "argument --only: no ursa; there are: cpu_backend, " in said
    assert "urza" in said


def test_a_table_has_the_columns_of_its_first_row() -> None:
    assert table([{"a": 1, "b": 2.34567}, {"a": "x", "b": 1e-9}], digits=3) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2.35 |",
        "| x | 1e-09 |",
    ]
