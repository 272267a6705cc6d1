"""Each kind of check finds what it is there for, and nothing in a kernel that is right."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from shipped import BLUEPRINTS, KERNELS, dims_of

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.manifest import TensorSpec
from esper_triton.contracts.record import Figures
from esper_triton.contracts.report import CaseRecord, Latency, RowsBenchmark
from esper_triton.kasmina.views import Extents
from esper_triton.tezzeret.forge import Forged, forge
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import examine
from esper_triton.urabrask.arena import Arena, TooLarge, changes
from esper_triton.urabrask.benchmark import latency_of, median_interval
from esper_triton.urabrask.draws import A_TURN, VALUES, cases, dirty_rows, tensors_of
from esper_triton.urabrask.equivalence import compare_with
from esper_triton.urabrask.gauntlet import LEVELS
from esper_triton.urabrask.judging import Miss
from esper_triton.urabrask.layers import module_reference
from esper_triton.urabrask.oracle import K, LocalOracle
from esper_triton.urabrask.static import static_faults
from esper_triton.urabrask.subject import Call, Outcome, Subject
from esper_triton.urabrask.tags import tags_of
from esper_triton.urabrask.trial import Trial

Variant = Callable[..., tuple[esper.Blueprint, Forged]]
DIMS = {"d": 24, "r": 4}
SEED = 20190615


@pytest.fixture
def forged(adapter_variant: Callable[..., Path]) -> Variant:
    """`forged({old: new})`: the hand-written adapter with texts of its source replaced, compiled and in no store."""

    def made(changed: dict[str, str], dims: dict[str, int] = DIMS) -> tuple[esper.Blueprint, Forged]:
        blueprint = esper.Blueprint.load(adapter_variant(source=changed))
        return blueprint, forge(plan_build(blueprint, dims, "float32", parse_target("cpu"), "fast"))

    return made


def shipped(name: str, dtype: str = "float32", target: str = "cpu") -> Forged:
    return forge(plan_build(BLUEPRINTS[name], dims_of(name), dtype, parse_target(target), "fast"))


def findings(forged: tuple[esper.Blueprint, Forged], level: str = "fast", **more: object) -> dict[str, tuple[str, ...]]:
    """By check, what it found."""
    blueprint, built = forged
    report = examine(built.manifest, built.blobs, blueprint, level=level, seed=SEED, **more)  # type: ignore[arg-type]
    return {check.name: check.failures for check in report.checks if check.failures}


def test_a_load_beyond_a_tensor_is_found_where_it_is_though_its_result_is_thrown_away(forged: Variant) -> None:
    # Row `rows` of h is read, and masked off before it counts.
    found = findings(
        forged({"    z = tl.zeros": "    tl.store(z_ptr, tl.load(h_ptr + rows * h_row_stride + 7))\n    z = tl.zeros"})
    )
    assert any("OutOfBounds" in text and "'h_ptr'" in text for text in found["accesses"])


def test_what_is_read_of_the_rows_that_are_not_there_shows_in_the_sanitizer(forged: Variant) -> None:
    found = findings(forged({"mask=row_ok[:, None] & d_ok[None, :], other": "mask=d_ok[None, :], other"}))
    assert any("OutOfBounds" in text for text in found["accesses"])


def test_two_programs_that_write_one_element_are_found_though_they_write_the_same(forged: Variant) -> None:
    found = findings(forged({"    z = tl.zeros": "    tl.store(z_ptr, 0.0)\n    z = tl.zeros"}))
    assert any("WriteRace" in text for text in found["accesses"])


def test_an_input_that_is_written_is_found_though_the_results_are_right(forged: Variant) -> None:
    line = "out = tl.where(alpha == 0.0, h, blended)"
    found = findings(forged({line: f"{line}\n        tl.store(alpha_ptr, alpha * 2)"}))
    assert any("in alpha, element 0" in text for text in found.get("equivalence", ()))


def test_a_kernel_that_is_only_wrong_for_strided_rows_is_found_and_shrunk_to_that(forged: Variant) -> None:
    blueprint, built = forged({"row[:, None] * h_row_stride": "row[:, None] * D"})
    report = examine(built.manifest, built.blobs, blueprint, seed=SEED)
    assert report.counterexample is not None
    assert set(report.counterexample.case.gaps) == {"h"}


def test_an_offset_of_32_bits_is_found_by_rows_that_are_far_apart(forged: Variant) -> None:
    text = "row[:, None].to(tl.int32) * out_row_stride.to(tl.int32)"
    variant = forged({"row[:, None] * out_row_stride": text})
    assert findings(variant) == {}
    plan = LEVELS["standard"]
    short = dataclasses.replace(plan, groups=4, relations=1, repeats=1, checked=1, benchmark_s=0.01, compiled_rows=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEVELS, "standard", short)
        found = findings(variant, "standard")
    assert set(found) == {"reach"}
    assert "gap(out)=" in found["reach"][0]


def test_an_artifact_in_no_store_is_compared_with_a_module_of_pytorch() -> None:
    built = shipped("linear")
    layer = torch.nn.Linear(built.manifest.dims["d_in"], built.manifest.dims["d"])
    record, shown = compare_with(
        module_reference(layer, tuple(built.manifest.parameters)), built.manifest, built.blobs, seed=SEED, groups=8
    )
    assert (record.failures, shown) == ((), None)
    assert record.cases > 25
    scaled = module_reference(layer, tuple(built.manifest.parameters), call=lambda layer, x, **_: layer(x) * (1 + 1e-4))
    record, shown = compare_with(scaled, built.manifest, built.blobs, seed=SEED, groups=8)
    assert record.failures
    assert shown is not None
    assert (shown.tensor, shown.case.alpha) == ("out", 1.0)


def test_a_module_without_the_parameters_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameter 'scale'; it has weight, bias: give names"):
        module_reference(torch.nn.Linear(2, 2), ("weight", "scale"))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("k = layernorm(", "k = 1.001 * layernorm(", "k of the layer that it is said to equal is off by"),
        ("torch.nn.LayerNorm", "torch.nn.RMSNorm", "RMSNorm has no parameter 'bias'"),
    ],
)
def test_a_layer_that_a_blueprint_is_not_equal_to_is_found(old: str, new: str, found: str) -> None:
    text = (KERNELS / "layernorm.toml").read_text()
    assert old in text
    blueprint = esper.Blueprint.from_text(text.replace(old, new))
    built = forge(plan_build(blueprint, {"d": 24}, "float32", parse_target("cpu"), "fast"))
    failures = findings((blueprint, built))
    assert set(failures) == {"layer"}
    assert found in failures["layer"][0]


# ---- binaries that are not run


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_an_artifact_for_a_gpu_that_is_not_here_is_judged_by_its_policy(target: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    built = shipped("channel_scale", target=target)
    assert static_faults(built.manifest, built.blobs) == []
    for policy, verdict in (("strict", "PENDING_HARDWARE"), ("static-ok", "VALIDATED")):
        report = examine(built.manifest, built.blobs, BLUEPRINTS["channel_scale"], seed=SEED, policy=policy)
        assert (report.verdict, report.failures, report.benchmarks) == (verdict, (), ())
        assert report.worst["out"] > 1e-4  # its Triton IR was run


def test_a_gpu_binary_of_another_architecture_or_beyond_its_limits_is_refused() -> None:
    built = shipped("channel_scale", target="cuda:90")

    def faults(**update: object) -> str:
        return "; ".join(static_faults(built.manifest.model_copy(update=update), built.blobs))

    other = built.manifest.target.model_copy(update={"arch": "80"})
    assert re.search(r"is for (\d+ or )?90, expected 80", faults(target=other))
    (name, record), *_ = built.manifest.kernels.items()
    assert "bytes of shared memory, a program on cuda90 can have 232448" in faults(
        kernels={name: record.model_copy(update={"shared_bytes": 300_000})}
    )
    assert "runs 2048 threads a program" in faults(kernels={name: record.model_copy(update={"num_warps": 64})})
    assert "has no function 'other'" in faults(kernels={name: record.model_copy(update={"symbol": "other"})})
    broken = {**built.blobs, record.binary: b"\x7fELF nothing"}
    assert "malformed" in "; ".join(static_faults(built.manifest, broken))


def test_scratch_memory_beyond_the_budget_is_refused_before_it_is_touched() -> None:
    built = shipped("bottleneck_adapter")
    huge = {"hoard": TensorSpec(shape=("25000000000",), dtype="float32")}
    manifest = built.manifest.model_copy(update={"saved": {**built.manifest.saved, **huge}})
    report = examine(manifest, built.blobs, BLUEPRINTS["bottleneck_adapter"], seed=SEED)
    assert report.verdict == "REJECTED"
    assert "hoard [25000000000] takes 100000000000 bytes" in report.reasons[0]


def test_a_plan_that_does_not_fit_its_kernels_is_refused() -> None:
    built = shipped("channel_scale")
    step = built.manifest.forward[0]
    wrong = step.model_copy(update={"arguments": step.arguments[:-1]})
    report = examine(
        built.manifest.model_copy(update={"forward": (wrong,)}), built.blobs, BLUEPRINTS["channel_scale"], seed=SEED
    )
    assert report.verdict == "REJECTED"
    assert "its launch plan is not consistent" in report.reasons[0]


def test_the_blueprint_has_to_be_the_artifacts() -> None:
    built = shipped("channel_scale")
    with pytest.raises(ArtifactRefused, match="was not made from blueprint 'lora'"):
        examine(built.manifest, built.blobs, BLUEPRINTS["lora"])


# ---- what is drawn, and where it lies


def test_the_same_seed_draws_the_same_cases_and_numbers_and_another_draws_others() -> None:
    built = shipped("channel_scale")
    subject = Subject(built.manifest)

    def first(seed: int) -> list[CaseRecord]:
        drawn: Iterator[list[CaseRecord]] = cases(subject, seed)
        return [case for _ in range(20) for case in next(drawn)]

    assert first(5) == first(5)
    assert first(5) != first(6)
    one = first(5)[0]
    for name, value in tensors_of(built.manifest, one, subject).items():
        assert torch.equal(value, tensors_of(built.manifest, one, subject)[name])
    assert {case.values for case in first(5)} >= {"normal", "huge", "tiny", "nan", "inf", "one row", "sorted", "zeros"}
    assert {0.0, 1.0} < {case.alpha for case in first(5)}
    assert any(case.gaps and min(case.gaps.values()) < 0 for case in first(5))


def test_a_wide_layer_is_called_as_often_with_fewer_numbers() -> None:
    dims = {"d_in": 256, "d": 260}
    built = forge(plan_build(BLUEPRINTS["linear"], dims, "float32", parse_target("cpu"), "fast"))
    drawn = list(itertools.islice(cases(Subject(built.manifest), 3), A_TURN + 1))
    assert sum(map(len, drawn)) >= 200
    assert {group[0].values for group in drawn} == set(VALUES)
    for group in drawn:
        assert len({(case.seed, case.rows, case.values, case.training) for case in group}) == 1
        calls = [case.model_dump_json() for case in group]
        assert len(set(calls)) > len(calls) - 3  # hardly any is drawn twice
    layer = torch.nn.Linear(256, 260)
    record, shown = compare_with(
        module_reference(layer, tuple(built.manifest.parameters)), built.manifest, built.blobs, seed=3, groups=49
    )
    assert (record.failures, shown) == ((), None)
    assert record.cases >= 200


def test_results_of_bits_that_were_judged_are_what_they_were_found_to_be_and_others_are_judged() -> None:
    built = shipped("channel_scale")
    subject = Subject(built.manifest)
    oracle = LocalOracle.of_blueprint(BLUEPRINTS["channel_scale"], built.manifest.dims, "float32")
    trial = Trial(subject, oracle, None)  # type: ignore[arg-type]  # nothing is launched
    case = next(group[0] for group in cases(subject, 3) if group[0].values == "normal" and group[0].rows > 3)
    tensors = trial.tensors(case)
    exact = trial.answer(case, tensors).exact
    right = {"out" if name == K else name: value.float() for name, value in exact.items()}

    def judged(results: dict[str, torch.Tensor], case: CaseRecord = case) -> list[Miss]:
        return trial.judge(case, tensors, Outcome(results, None))

    first = judged(right)
    assert all(miss.ratio < 1 for miss in first)
    assert judged({name: value.clone() for name, value in right.items()}) is first
    wrong = right["out"].clone()
    wrong[2, 1] *= 1.001
    again = judged(right | {"out": wrong})
    assert max(again, key=lambda miss: miss.ratio).index == (2, 1)
    assert max(miss.ratio for miss in again) > 1
    # The same bits are wrong for another alpha.
    assert max(miss.ratio for miss in judged(right, case.model_copy(update={"alpha": 0.5}))) > 1


def test_only_items_that_are_said_to_be_dirty_have_numbers_that_are_not_finite() -> None:
    built = shipped("squeeze_excite")
    subject = Subject(built.manifest)
    for group in (group for _, group in zip(range(40), cases(subject, 3), strict=False)):
        case = group[0]
        h = tensors_of(built.manifest, case, subject)["h"]
        dirty = dirty_rows(case)
        assert h[~dirty].isfinite().all()
        if case.values in ("inf", "nan"):
            assert not h[dirty].isfinite().all()
            assert dirty.any()


def test_what_is_written_beside_a_tensor_is_found_and_placed() -> None:
    arena = Arena(1 << 16)
    matrix = arena.place("out", (3, 4), torch.float32, row_stride=6)
    vector = arena.place("bias", (5,), torch.float32)
    arena.write(vector, torch.arange(5.0))
    before = arena.snapshot()
    regions = (matrix, vector)

    def after_writing(at: int) -> str | None:
        arena.memory[at] ^= 1
        found = changes(before, arena.snapshot(), regions, [matrix])
        arena.memory[at] ^= 1
        return found

    assert after_writing(matrix.offset) is None
    assert "between rows 0 and 1 of out" in str(after_writing(matrix.offset + 4 * 4))
    assert "in bias, element 2" in str(after_writing(vector.offset + 8))
    assert "3 bytes after the end of bias" in str(after_writing(vector.offset + 23))
    assert "4 bytes before out" in str(after_writing(matrix.offset - 4))
    with pytest.raises(TooLarge, match=r"more \[100000\] takes 400000 bytes"):
        arena.place("more", (100000,), torch.float32)
    arena.close()


def test_a_row_that_counts_for_all_lies_in_memory_once() -> None:
    built = shipped("channel_scale")
    subject = Subject(built.manifest)
    d = subject.width
    arena = Arena(1 << 20)
    row = torch.randn(1, d)
    call = Call(
        extents=Extents.of_rows(7),
        inputs={"h": row.expand(7, d)},
        parameters={name: torch.zeros(r.shape) for name, r in built.manifest.parameters.items()},
        grad_out=torch.zeros(7, d),
        alpha=1.0,
        gaps={"h": -1, "out": 3},
    )
    placed = subject.place(call, arena)
    assert placed.regions["h"].size_bytes == 4 * d
    assert torch.equal(placed.regions["h"].view(arena.memory), row.expand(7, d))
    assert placed.regions["out"].stride == (d + 3, 1)
    assert placed.regions["out"].view(arena.memory).isnan().all()
    arena.close()


# ---- figures and tags


def test_the_interval_of_a_median_is_that_of_the_binomial_order_statistics() -> None:
    ordered = list(range(1000, 1100))
    # Ranks 50 -+ 0.98 * 10 of 100 samples: the 41st and the 61st.
    assert median_interval(ordered) == pytest.approx((1060 - 1040) / 2 / 1049.5)
    assert median_interval([5, 5, 5]) == float("inf")
    assert median_interval([7] * 30) == 0.0


def test_latencies_are_summed_up_from_the_samples() -> None:
    found = latency_of([1000 * k for k in range(1, 101)])
    assert (found.mean_us, found.p50_us, found.p99_us, found.samples) == (50.5, 50.5, 99.0, 100)
    assert (found.low_us, found.high_us, sum(found.histogram)) == (1.0, 99.0, 99)


def measured(eager_us: float, kernel_us: float) -> RowsBenchmark:
    def latency(us: float) -> Latency:
        return latency_of([int(us * 1000)])

    return RowsBenchmark(
        rows=512,
        kernel=latency(kernel_us),
        eager=latency(eager_us),
        interval=0.0,
        converged=True,
        throughput_rows_per_s=1.0,
        tensor_bytes=100,
    )


def test_tags_are_percentiles_among_eight_and_thresholds_among_fewer() -> None:
    def figures(latency_us: float, memory_bytes: int = 100) -> Figures:
        return Figures(latency_us=latency_us, memory_bytes=memory_bytes)

    others = [figures(10.0 * k, 100 * k) for k in range(2, 11)]
    speeds = [tags_of(figures(latency), others)[0] for latency in (1, 25, 65, 85, 200)]
    assert speeds == ["high_speed", "high_speed", "medium_speed", "low_speed", "low_speed"]
    assert "high_memory" in tags_of(figures(1, 950), others)
    assert "high_memory" not in tags_of(figures(1, 500), others)
    few = others[:3]
    assert tags_of(figures(1.0), few, [measured(2.0, 1.0)])[0] == "high_speed"
    assert tags_of(figures(1.0), few, [measured(1.0, 1.0)])[0] == "medium_speed"
    assert tags_of(figures(1.0), few, [measured(0.5, 1.0)])[0] == "low_speed"
    assert tags_of(figures(1.0), few) == ()
    assert tags_of(Figures(drift=9e-7), []) == ("numerically_stable",)
    assert tags_of(Figures(drift=2e-6), []) == ()
    assert tags_of(figures(1.0, 500), few, io_bytes=100) == ("high_memory",)
