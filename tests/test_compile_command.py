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
from esper_triton.contracts.errors import BlueprintError, UnknownTarget
from esper_triton.tezzeret.library import find, shipped

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


SCALE = """
name = "{name}"
input = "h"
graph = "k = {op}(mul(h, s))"
[dims]
d = {{}}
[parameters]
s = {{ shape = ["d"], init = "ones" }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two blueprints, and what is none."""
    made = tmp_path / "designs"
    made.mkdir()
    for name, op in (("first", "tanh"), ("second", "sigmoid")):
        (made / f"{name}.toml").write_text(SCALE.format(name=name, op=op))
    (made / "notes.txt").write_text("nothing to compile")
    return made


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_folder_is_compiled_blueprint_by_blueprint_here_or_in_processes_of_their_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    request = [str(folder), "linear", "--dim", "d=8", "--dim", "d_in=4", "--pipeline", "fast", "--jobs", jobs, "--json"]
    assert main([*request, "--urza", str(tmp_path / "urza")]) == 0
    output, errors = capsys.readouterr()
    report = json.loads(output)["artifacts"]
    assert [one["blueprint"] for one in report] == ["first", "second", "linear"]
    assert [(one["status"], one["hit"]) for one in report] == [("VALIDATED", False)] * 3
    assert sorted(one["id"] for one in report) == esper.Urza(tmp_path / "urza").ids()
    assert errors == ""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_of_several_blueprints_one_that_fails_does_not_keep_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    (folder / "wide.toml").write_text(SCALE.format(name="wide", op="tanh").replace("d = {}", "d = { min = 9 }"))
    request = [str(folder), "--dim", "d=8", "--pipeline", "fast", "--jobs", jobs, "--target", "cuda:90"]
    assert main([*request, "--urza", str(tmp_path / "urza")]) == 2
    output, errors = capsys.readouterr()
    assert len(esper.Urza(tmp_path / "urza").ids()) == 2
    assert output.count("built") == 2
    assert errors == "error: blueprint 'wide' cannot be compiled: dim 'd' is 8, expected 9 to 65536\n"


def test_a_dry_run_checks_and_plans_and_leaves_no_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = [str(folder), "--dim", "d=8", "--target", "cpu", "--target", "hip:gfx942", "--dry-run"]
    assert main([*request, "--urza", str(tmp_path / "urza"), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [(one["blueprint"], one["target"]) for one in plans] == [
        (name, target) for name in ("first", "second") for target in ("cpu", "hipgfx942")
    ]
    assert all(one["parameters"] == 8 and one["dims"] == {"d": 8} and not one["hit"] for one in plans)
    assert not (tmp_path / "urza").exists()
    assert main([*request, "--urza", str(tmp_path / "urza")]) == 0
    assert capsys.readouterr().out.count("to build") == 4
    assert main([str(folder), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("dim 'd' is missing") == 2


def test_a_module_is_compiled_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["--from-module", "torch.nn:Linear", "--module-args", "6, 10, bias=False", "--example-shape", "3x6"]
    request += ["--pipeline", "fast", "--urza", str(tmp_path / "urza"), "--emit-source", "--json"]
    assert main(request) == 0
    report = json.loads(capsys.readouterr().out)
    (artifact,) = report["artifacts"]
    assert (artifact["blueprint"], artifact["status"]) == ("linear", "VALIDATED")
    manifest = esper.Urza(tmp_path / "urza").get(artifact["id"]).manifest
    assert manifest.dims == {"d": 10, "d_in": 6}
    assert "@triton.jit" in report["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compile"),
        (["linnear"], "no blueprint 'linnear' in the library, nor such a file; did you mean 'linear'?"),
        (["blueprints/lora.toml"], "no such file; the one that ships is called 'lora', without a path"),
        (["linear", "lora", "--dim", "q=3"], "no blueprint has a dim 'q'"),
        (["linear", "--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["linear", "--budget", "0"], "--budget is 0, expected"),
        (["linear", "--example-shape", "3x4"], "are of --from-module, which is not given"),
        (["--from-module", "torch.nn"], "is not of the form PKG.MOD:CLASS"),
        (["--from-module", "torch.nn:Linear"], "needs --example-shape"),
        (["--from-module", "torch.nnn:Linear", "--example-shape", "3x4"], "'torch.nnn' cannot be imported"),
        (["--from-module", "torch.nn:Linearr", "--example-shape", "3x4"], "no class 'Linearr'; did you mean 'Linear'"),
        (["--from-module", "torch.nn:Linear", "--example-shape", "3,4"], "'3,4' is not of the form NxM"),
        (["--from-module", "torch.nn:Linear", "--example-shape", "3x4"], r"Linear() cannot be made: TypeError"),
        (
            ["--from-module", "torch.nn:Linear", "--module-args", "len('x'), 4", "--example-shape", "3x4"],
            "are no literals",
        ),
        (["--from-module", "torch:zeros", "--module-args", "3", "--example-shape", "3x4"], "is Tensor, no nn.Module"),
    ],
)
def test_bad_names_modules_and_numbers_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--urza", str(tmp_path / "urza")]) == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert message in errors
    assert not (tmp_path / "urza").exists()


def test_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "it holds no blueprint" in capsys.readouterr().err


def test_a_module_can_be_compiled_with_inputs_that_it_takes(store: esper.Urza) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU())
    artifact = esper.compile(module, example_inputs=torch.zeros(2, 6), dims={"d": 5}, pipeline="fast", urza=store)
    assert artifact.manifest.dims == {"d": 5, "d_in": 6}
    with pytest.raises(BlueprintError, match="Sequential is to be compiled as a module: give example_inputs"):
        esper.compile(module, urza=store)


def test_with_several_jobs_each_target_stands_alone(adapter_path: Path, store: esper.Urza) -> None:
    targets = ["cuda:90", "cuda:80"]
    both = esper.compile(adapter_path, dims={"d": 24, "r": 4}, targets=targets, urza=store, jobs=2)
    assert [artifact.manifest.target.label for artifact in both] == ["cuda90", "cuda80"]
    assert sorted(artifact.id for artifact in both) == store.ids()


def test_every_blueprint_that_ships_is_found_by_its_name() -> None:
    names = shipped()
    assert {"linear", "bottleneck_adapter", "lora", "multi_head_attention"} <= set(names)
    for name, path in names.items():
        assert find(name) == path
        assert esper.Blueprint.load(path).name == name
    assert find("kernels/linear.toml") == Path("kernels/linear.toml")


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
    assert "was stored as REJECTED: equivalence: rows=" in capsys.readouterr().err


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
