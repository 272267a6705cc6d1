"""The command line: verdicts that stream, reports for people and for programs, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused, ProofFailed
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.report import ValidationReport
from esper_triton.tezzeret.forge import forge
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import gauntlet, validate
from esper_triton.urabrask.__main__ import main
from esper_triton.urabrask.verdict import read_report

DIMS = {"d": 24, "r": 4}


def committed(store: esper.Urza, path: Path) -> str:
    """Compiled and stored, and not proven."""
    blueprint = esper.Blueprint.load(path)
    forged = forge(plan_build(blueprint, DIMS, "float32", parse_target("cpu"), "fast"))
    return store.commit(forged.manifest, forged.blobs).id


@pytest.fixture
def wrong_path(adapter_variant: Callable[..., Path]) -> Path:
    return adapter_variant(source={" + up_bias[None, :]": ""})


def test_what_is_pending_is_proven_and_each_verdict_is_a_line(
    store: esper.Urza, adapter_path: Path, wrong_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = committed(store, adapter_path), committed(store, wrong_path)
    arguments = ["--urza", str(store.root), "--level", "fast"]
    assert main(["validate", "--pending", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = [text for text in lines if not text.startswith(" ")]
    assert sorted(text.split(";")[0] for text in verdicts) == [f"REJECTED {wrong}", f"VALIDATED {right}"]
    assert any("equivalence: rows=" in text and "out is off by" in text for text in lines)
    assert any(text.strip().startswith("again with: --level fast --seed ") for text in lines)
    assert store.get(right).status is KernelStatus.VALIDATED
    assert store.get(wrong).status is KernelStatus.REJECTED
    assert main(["validate", "--pending", *arguments]) == 0
    assert capsys.readouterr().out == "nothing is pending\n"
    # Figures and tags are where a query finds them.
    (match,) = store.query(required=("numerically_stable",))
    assert match.id == right
    assert match.figures.latency_us is not None
    assert match.figures.latency_us > 0


def test_a_report_is_shown_as_a_table_as_json_and_as_a_page(
    adapter_store: esper.Urza, adapter_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--urza", str(adapter_store.root)]
    assert main(["report", adapter_id, *root]) == 0
    shown = capsys.readouterr().out
    assert f"VALIDATED: {adapter_id}" in shown
    assert "equivalence" in shown
    assert main(["report", adapter_id, "--json", *root]) == 0
    report = ValidationReport.model_validate_json(capsys.readouterr().out)
    assert report == read_report(adapter_id, adapter_store)
    page = tmp_path / "report.html"
    assert main(["report", adapter_id, "--html", str(page), *root]) == 0
    text = page.read_text()
    plots = [ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>") for part in text.split("<svg")[1:]]
    sides = sum(side is not None for b in report.benchmarks for side in (b.kernel, b.backward, b.eager, b.compiled))
    assert len(plots) == sides >= len(report.benchmarks) > 0
    bars = [len(plot.findall("rect")) for plot in plots]
    assert bars == [len(report.benchmarks[0].kernel.histogram)] * sides
    assert capsys.readouterr().out == ""


def test_the_same_seed_comes_to_the_same_verdict_and_counterexample(
    store: esper.Urza, wrong_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = committed(store, wrong_path)
    reports = []
    for _ in range(2):
        assert main(["validate", wrong, "--urza", str(store.root), "--level", "fast", "--seed", "7", "--json"]) == 1
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["counterexample"] == reports[1]["counterexample"] is not None
    assert reports[0]["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["validate"], 2, "error: name artifacts, or give --pending; see --help"),
        (["validate", "nope"], 1, "error: 'nope' is not an artifact id"),
        (["validate", "x", "--seconds", "-1"], 2, "error: --seconds -1.0: a positive number is expected"),
        (
            ["report", "0123456789ab-cpu-fast-0123456789ab"],
            1,
            "error: no artifact '0123456789ab-cpu-fast-0123456789ab'",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    store: esper.Urza, arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--urza", str(store.root)]) == code
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1


def test_an_artifact_that_was_not_proven_is_refused_with_the_way_to_prove_it(
    store: esper.Urza, adapter_path: Path
) -> None:
    from torch import nn

    pending = committed(store, adapter_path)
    model = esper.wrap(nn.Sequential(nn.Linear(24, 24)), target_layers=[nn.Linear], seeds_per_layer=1, urza=store)
    assert not model.load_kernel_sync("0", 0, pending)
    error = model.kasmina_layers["0"].last_error(0)
    assert isinstance(error, ArtifactRefused)
    assert f"`python -m esper_triton.urabrask validate {pending}` proves it" in str(error)


def test_one_that_was_proven_may_lose_its_status_and_not_win_it_back(
    store: esper.Urza, adapter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = esper.compile(adapter_path, dims=DIMS, urza=store, pipeline="fast").id
    with monkeypatch.context() as patch:
        patch.setattr(gauntlet, "static_faults", lambda *_: ["kernel 'k' is not what it was"])
        artifact, report = validate(artifact_id, store)
    assert (artifact.status, report.verdict) == (KernelStatus.REJECTED, "REJECTED")
    artifact, report = validate(artifact_id, store)
    assert (artifact.status, report.verdict) == (KernelStatus.REJECTED, "VALIDATED")
    with pytest.raises(ProofFailed, match="static: kernel 'k' is not what it was"):
        esper.compile(adapter_path, dims=DIMS, urza=store, pipeline="fast")
