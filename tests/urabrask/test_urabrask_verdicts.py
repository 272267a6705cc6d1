"""Right kernels are validated with their report in the store, and wrong ones are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import triton

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused, ProofFailed
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.report import ValidationReport
from esper_triton.urabrask import validate
from esper_triton.urabrask.verdict import read_report

DIMS = {"d": 24, "r": 4}
OF_KASMINA = Path(__file__).resolve().parent.parent / "kasmina" / "blueprints"


def check(report: ValidationReport, name: str) -> tuple[str, ...]:
    """The failures of one kind."""
    return next(one.failures for one in report.checks if one.name == name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_shipped_adapter_is_validated_with_its_report_in_the_store(
    adapter_for: Callable[..., str], adapter_store: esper.Urza, dtype: str
) -> None:
    artifact_id = adapter_for(24, 4, dtype)
    assert adapter_store.get(artifact_id).status is KernelStatus.VALIDATED
    report = read_report(artifact_id, adapter_store)
    assert (report.artifact_id, report.verdict, report.failures) == (artifact_id, "VALIDATED", ())
    assert {one.name for one in report.checks} >= {"static", "accesses", "equivalence", "determinism", "gradients"}
    assert all(one.cases for one in report.checks)
    computed = {"out", "grad_h", "grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias"}
    assert computed <= set(report.worst)
    # Each was off by something: results were computed and compared, and no tolerance is so wide that it hides all.
    assert all(1e-4 < report.worst[name] < 1 for name in computed)
    assert report.risk_score == max(report.worst.values())
    assert report.environment.degraded is None


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("z += tl.load(down_bias_ptr + r, mask=r_ok, other=0.0).to(tl.float32)[None, :]", "", "out"),
        (" + up_bias[None, :]", "", "out"),
        ("+ alpha * step", "+ alpha * alpha * step", "out"),
        ("out = tl.where(alpha == 0.0, h, blended)", "out = blended", "out at alpha 0"),
        ("row[:, None] * out_row_stride", "row[:, None] * D", "memory that is no result's"),
        ("slope = phi + z * RSQRT_2PI", "slope = phi - z * RSQRT_2PI", "grad_h"),
        ("slope = phi + z * RSQRT_2PI * tl.exp(-0.5 * z * z)", "slope = phi", "grad_down_weight"),
        ("grad_h = tl.where(alpha == 0.0, grad_out, grad_h)", "", "grad_h at alpha 0"),
        ("0.0, alpha * grad_up)", "0.0, grad_up)", "grad_up_weight"),
        ("mask=row_ok[:, None] & d_ok[None, :], other", "mask=row_ok[:, None] & (d[None, :] <= D), other", "the call"),
        ("range(0, rows, BLOCK_ROWS)", "range(0, min(rows, BLOCK_ROWS), BLOCK_ROWS)", "grad_up_bias"),
    ],
)
def test_a_kernel_that_computes_something_else_is_rejected(
    adapter_variant: Callable[..., Path], store: esper.Urza, old: str, new: str, found: str
) -> None:
    with pytest.raises(ProofFailed, match="does not compute what 'bottleneck_adapter' says"):
        esper.compile(adapter_variant(source={old: new}), dims=DIMS, urza=store)
    (artifact_id,) = store.ids()
    assert store.get(artifact_id).status is KernelStatus.REJECTED
    report = read_report(artifact_id, store)
    assert report.verdict == "REJECTED"
    assert report.worst[found] > 1
    assert report.counterexample is not None
    assert report.benchmarks == ()


def test_what_is_wrong_is_shown_by_the_simplest_call_that_shows_it(
    adapter_variant: Callable[..., Path], store: esper.Urza
) -> None:
    with pytest.raises(ProofFailed, match=r"equivalence: rows=\d+ alpha=\d.*: out is off by"):
        esper.compile(adapter_variant(source={" + up_bias[None, :]": ""}), dims=DIMS, urza=store)
    (artifact_id,) = store.ids()
    counterexample = read_report(artifact_id, store).counterexample
    assert counterexample is not None
    case = counterexample.case
    assert (case.rows, case.alpha, case.values, case.gaps, case.shift, case.threads) == (1, 1.0, "normal", {}, 0, "one")
    assert counterexample.tensor == "out"
    assert counterexample.tolerance is not None
    assert abs(counterexample.found - counterexample.expected) > counterexample.tolerance


def test_a_rejected_artifact_stays_rejected_and_is_not_compiled_again(
    adapter_variant: Callable[..., Path], store: esper.Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter_variant(source={" + up_bias[None, :]": ""})
    with pytest.raises(ProofFailed):
        esper.compile(path, dims=DIMS, urza=store)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    with pytest.raises(ProofFailed, match=r"stored as REJECTED: equivalence: rows=\d+ alpha=\d.*: out is off by"):
        esper.compile(path, dims=DIMS, urza=store)


def test_an_artifact_is_not_proven_against_another_blueprint(
    adapter_variant: Callable[..., Path], adapter_for: Callable[..., str], adapter_store: esper.Urza
) -> None:
    other = esper.Blueprint.load(adapter_variant(toml={'BLOCK_ROWS = "32"': 'BLOCK_ROWS = "64"'}))
    with pytest.raises(ArtifactRefused, match="was not made from blueprint 'bottleneck_adapter'"):
        validate(adapter_for(24, 4), adapter_store, blueprint=other)


def written(folder: Path, name: str, old: str, new: str) -> Path:
    """A blueprint of the tests with one text of its source replaced."""
    text = (OF_KASMINA / f"{name}.py").read_text()
    assert old in text
    (folder / f"{name}.py").write_text(text.replace(old, new))
    shutil.copy(OF_KASMINA / f"{name}.toml", folder)
    return folder / f"{name}.toml"


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("depthwise_sequence", "row - 1, t > 0, d, D)\n    k +=", "row - 1, row > 0, d, D)\n    k +=", "out"),
        ("depthwise_sequence", "(at >= 0) & (at < length)", "(at >= 0) & (at <= length)", "grad_weight"),
        ("depthwise_sequence", "tl.program_id(1) * length + t", "t * tl.num_programs(1) + tl.program_id(1)", "out"),
        ("depthwise_image", "(x + dx >= 0)", "(x >= 0)", "grad_h"),
        ("depthwise_image", "row + dy * width + dx", "row + dy * height + dx", "out"),
        ("depthwise_image", "+ i - 1\n", "+ i - 1 - (i == 0)\n", "grad_weight"),
        ("dropout", "tl.where(training != 0,", "tl.where(training == 0,", "out"),
        ("dropout", "tl.rand(tl.load(dropout_seed_ptr),", "tl.rand(0,", "out"),
        ("dropout", "1.0 / (1.0 - P), 0.0)", "1.0, 0.0)", "out"),
        ("dropout", "P = tl.constexpr(0.25)", "P = tl.constexpr(0.2)", "out"),
        ("dropout", "drawn >= P", "drawn < P", "out"),
        (
            "dropout",
            "total += h * grad_out * factor(dropout_seed_ptr, training, row, d, D)",
            "total += h * grad_out * factor(dropout_seed_ptr, training, row + 1, d, D)",
            "grad_scale",
        ),
        (
            "dropout",
            "through = own * scale * factor(dropout_seed_ptr, training, row, d, D)",
            "through = own * scale",
            "grad_h",
        ),
        ("dropout", "tl.where(alpha == 0.0, h, blended)", "blended", "out at alpha 0"),
        ("dropout", "1.0 / (1.0 - P), 0.0)", "1.0 / (drawn - drawn), 0.0)", "out in training"),
    ],
)
def test_a_kernel_that_takes_another_place_for_its_neighbour_or_does_not_draw_is_rejected(
    tmp_path: Path, store: esper.Urza, name: str, old: str, new: str, found: str
) -> None:
    with pytest.raises(ProofFailed):
        esper.compile(written(tmp_path, name, old, new), dims={"d": 8}, urza=store)
    (artifact_id,) = store.ids()
    assert read_report(artifact_id, store).worst[found] > 1


@pytest.mark.parametrize("name", ["depthwise_sequence", "depthwise_image", "dropout"])
def test_a_kernel_of_every_layout_and_one_that_draws_are_validated(store: esper.Urza, name: str) -> None:
    artifact_id = esper.compile(OF_KASMINA / f"{name}.toml", dims={"d": 5}, urza=store).id
    report = read_report(artifact_id, store)
    assert (report.verdict, report.failures) == ("VALIDATED", ())
    computed = {key for key in report.worst if key == "out" or (key.startswith("grad_") and " " not in key)}
    assert len(computed) == 3
    assert all(1e-4 < report.worst[key] < 1 for key in computed)


def test_where_the_reference_does_not_know_what_is_dropped_training_mode_is_proven_to_repeat_itself(
    tmp_path: Path, store: esper.Urza
) -> None:
    path = written(tmp_path, "dropout", ", rand: Callable[[Tensor], Tensor] | None = None", "")
    path.with_suffix(".py").write_text(path.with_suffix(".py").read_text().replace("if rand is None:", "if True:"))
    report = read_report(esper.compile(path, dims={"d": 5}, urza=store).id, store)
    assert report.verdict == "VALIDATED"
    assert report.worst["out in training"] == report.worst["out of another dropout seed"] == 0.0


def test_a_kernel_that_draws_the_same_whatever_the_seed_is_rejected_where_the_reference_does_not_know(
    tmp_path: Path, store: esper.Urza
) -> None:
    path = written(tmp_path, "dropout", ", rand: Callable[[Tensor], Tensor] | None = None", "")
    source = path.with_suffix(".py")
    source.write_text(
        source.read_text()
        .replace("if rand is None:", "if True:")
        .replace("tl.rand(tl.load(dropout_seed_ptr),", "tl.rand(0,")
    )
    with pytest.raises(ProofFailed, match="out of another dropout seed has the same bits"):
        esper.compile(path, dims={"d": 8}, urza=store)


def test_a_reference_that_is_not_affine_over_the_items_is_found(tmp_path: Path, store: esper.Urza) -> None:
    # Of kernel and reference alike, so that all else is right.
    path = written(tmp_path, "depthwise_image", ".movedim(1, -1)\n", ".movedim(1, -1).square()\n")
    with pytest.raises(ProofFailed):
        esper.compile(path, dims={"d": 3}, urza=store)
