"""`python -m esper_triton.compile`, and the call of the same name."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import esper_triton as esper
from esper_triton.compile import Artifacts, main
from esper_triton.contracts.errors import UnknownTarget

SIZES = ["--dim", "d=24", "--dim", "r=4"]


def test_the_command_compiles_for_two_targets_and_says_what_it_stored(
    adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = [str(adapter_path), *SIZES, "--target", "cpu", "--target", "cuda:90", "--urza", str(tmp_path / "urza")]
    assert main(request) == 0
    table, errors = capsys.readouterr()
    ids = esper.Urza(tmp_path / "urza").ids()
    assert [artifact_id.split("-")[1] for artifact_id in ids] == ["cpu", "cuda90"]
    assert all(artifact_id in table for artifact_id in ids)
    assert "VALIDATED" in table
    assert "PENDING_HARDWARE" in table
    assert (table.count("built"), table.count("hit"), errors) == (2, 0, "")

    assert main([*request, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["artifacts"]
    assert [one["id"] for one in report] == ids
    assert [one["status"] for one in report] == ["VALIDATED", "PENDING_HARDWARE"]
    assert all(one["hit"] and one["code_bytes"] > 0 and len(one["kernels"]) == 3 for one in report)


def test_the_source_can_be_printed(adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = [str(adapter_path), *SIZES, "--target", "cuda:90", "--urza", str(tmp_path / "urza"), "--emit-source"]
    assert main([*request, "--json"]) == 0
    text = adapter_path.with_suffix(".py").read_text()
    assert json.loads(capsys.readouterr().out)["source"] == text
    assert main(request) == 0
    assert capsys.readouterr().out.startswith(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim", "d=24"], "dim 'r' is missing"),
        (["--dim", "d=24", "--dim", "rr=4"], "unknown dim 'rr'; did you mean 'r'?"),
        (["--dim", "d=24", "--dim", "r"], "--dim 'r' is not of the form NAME=N"),
        (["--dim", "d=24", "--dim", "d=25"], "--dim 'd' is given twice"),
        ([*SIZES, "--dtype", "float23"], "unknown dtype 'float23'; did you mean 'float32'"),
        ([*SIZES, "--target", "cuda:91"], "target 'cuda:91' is not"),
        ([*SIZES, "--target", "cpu", "--target", "gpu"], "target 'gpu' is not"),
        ([*SIZES, "--pipeline", "fats"], "unknown pipeline 'fats'; did you mean 'fast'"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_store(
    adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(adapter_path), *arguments, "--urza", str(tmp_path / "urza")]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "urza").exists()


def test_a_blueprint_that_does_not_exist_or_has_an_unknown_key_is_one_clear_line(
    adapter_variant: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter_variant(toml={'input = "h"': 'input = "h"\ninputs = "h"'})
    assert main([str(path), *SIZES]) == 2
    assert "unknown key 'inputs'; did you mean 'input'" in capsys.readouterr().err
    assert main([str(path.with_name("bottleneck_adaptor.toml")), *SIZES]) == 2
    assert "no such file; did you mean 'bottleneck_adapter.toml'?" in capsys.readouterr().err


def test_an_unwritable_store_is_one_clear_line_and_exit_code_2(adapter_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    command = [sys.executable, "-m", "esper_triton.compile", str(adapter_path), *SIZES, "--target", "cuda:90"]
    done = subprocess.run(
        [*command, "--urza", str(tmp_path / "file" / "urza")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: store {tmp_path / 'file' / 'urza'} cannot be")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_option_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["blueprint.toml", "--targets", "cpu"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --targets cpu; see --help\n"


def test_a_kernel_that_fails_its_proof_is_exit_code_1(
    adapter_variant: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter_variant(source={" + up_bias[None, :]": ""})
    assert main([str(path), *SIZES, "--urza", str(tmp_path / "urza")]) == 1
    assert "was stored as REJECTED: rows=" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_is_exit_code_1_and_one_line(
    adapter_variant: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter_variant(source={"tl.erf(z": "tl.erff(z"})
    assert main([str(path), *SIZES, "--target", "cuda:90", "--urza", str(tmp_path / "urza")]) == 1
    errors = capsys.readouterr().err
    assert "kernel 'adapter_forward' for cuda90 does not compile" in errors
    assert errors.count("\n") == 1
    assert esper.Urza(tmp_path / "urza").ids() == []


def test_esper_compile_is_a_call_whichever_way_it_was_reached(adapter_path: Path, store: esper.Urza) -> None:
    module = importlib.import_module("esper_triton.compile")
    request = {"dims": {"d": 24, "r": 4}, "dtype": torch.bfloat16, "targets": "cuda:90", "urza": store}
    lazily = esper.compile(adapter_path, **request)
    as_module = module(esper.Blueprint.load(adapter_path), **request)
    assert lazily.id == as_module.id == store.ids()[0]
    assert lazily.manifest.dtype == "bfloat16"


def test_artifacts_are_found_by_position_and_by_target(adapter_path: Path, store: esper.Urza) -> None:
    both = esper.compile(adapter_path, dims={"d": 24, "r": 4}, targets=("cuda:90", "cuda:80"), urza=store)
    assert both["cuda90"] is both["cuda:90"] is both[0]
    assert [artifact.manifest.target.arch for artifact in both] == ["90", "80"]
    with pytest.raises(KeyError, match=r"nothing was compiled for target 'cuda89'.*'cuda80'"):
        both["cuda89"]
    with pytest.raises(AttributeError, match=r"compiled for 'cuda90', 'cuda80': \.id is that of one artifact"):
        _ = both.id
    alone = Artifacts(both[:1])
    assert (alone.id, alone.status, alone.digest) == (both[0].id, both[0].status, both[0].digest)


def test_no_target_at_all_is_refused(adapter_path: Path, store: esper.Urza) -> None:
    with pytest.raises(UnknownTarget, match="no target was given"):
        esper.compile(adapter_path, dims={"d": 24, "r": 4}, targets=[], urza=store)
