"""What the figures stand beside: the reference as torch's own operations, eager and compiled."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shipped import BLUEPRINTS, dims_of
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from esper_triton.kasmina.views import Extents
from esper_triton.tezzeret.forge import forge
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import examine
from esper_triton.urabrask.eager import graph_of
from esper_triton.urabrask.gauntlet import LEVELS
from esper_triton.urabrask.oracle import in_layout
from esper_triton.urabrask.references import reference_of

SEED = 20190615


@pytest.mark.parametrize("name", sorted(BLUEPRINTS))
def test_a_recorded_reference_gives_the_same_bits_for_other_numbers(name: str) -> None:
    blueprint, dims = BLUEPRINTS[name], dims_of(name)
    extents = Extents(6, 2, 3, 3, 1) if blueprint.layout == "image" else Extents(6, 2, 3)
    reference = reference_of(blueprint, dims)
    widths = {"h": dims["d"], "x": dims.get("d_in", dims["d"])}
    shapes = {n: (6, widths[n]) for n in blueprint.inputs}
    plan = plan_build(blueprint, dims, "float32", parse_target("cpu"), "fast")
    shapes |= {n: p.shape for n, p in plan.parameters.items()}

    def evaluate(*values: Tensor) -> Tensor:
        given = dict(zip(shapes, values, strict=True))
        return reference(
            **{n: in_layout(t, blueprint.layout, extents) if n in blueprint.inputs else t for n, t in given.items()}
        )

    def drawn() -> list[Tensor]:
        return [torch.randn(shape) for shape in shapes.values()]

    graph = graph_of(evaluate, *drawn())
    for _ in range(2):
        given = drawn()
        assert torch.equal(graph(*given), evaluate(*given))


def test_several_results_operations_in_place_and_constants_are_recorded() -> None:
    elsewhere = torch.randn(3)

    def evaluate(a: Tensor) -> Tensor:
        low, high = torch.aminmax(a, dim=0)
        made = torch.zeros(3)
        made += high
        return torch.cat([made, low, elsewhere * a.new_tensor(2.5)])

    graph = graph_of(evaluate, torch.randn(4, 3))
    other = torch.randn(4, 3)
    for _ in range(2):  # what is in place is so for one call
        assert torch.equal(graph(other), torch.cat([other.amax(0), other.amin(0), 2.5 * elsewhere]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
def test_a_thorough_proof_lasts_as_long_as_asked_and_stands_beside_torch_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = LEVELS["thorough"]
    assert plan.compiled_rows == (32, 512, 4096)
    monkeypatch.setitem(LEVELS, "thorough", dataclasses.replace(plan, compiled_rows=(32,), repeats=10, checked=20))
    blueprint = BLUEPRINTS["channel_scale"]
    made = forge(plan_build(blueprint, {"d": 24}, "float32", parse_target("cpu"), "fast"))
    with fresh_cache(), inductor.patch(compile_threads=1):
        report = examine(made.manifest, made.blobs, blueprint, level="thorough", seed=SEED, seconds=2.5)
    assert (report.verdict, report.level, report.reasons) == ("VALIDATED", "thorough", ("every check passed",))
    checks = {check.name: check for check in report.checks}
    # It draws until its time is over, of this thread or four times as much by the clock, and not until 200 calls.
    assert checks["equivalence"].cases > 200 or checks["equivalence"].seconds > 10
    assert {"reach", "determinism", "accesses"} <= checks.keys()
    assert [(one.rows, one.compiled is not None) for one in report.benchmarks] == [
        (32, True),
        (512, False),
        (4096, False),
    ]
    for one in report.benchmarks:
        sides = [side for side in (one.kernel, one.backward, one.eager, one.compiled) if side is not None]
        assert len(sides) == 3 + (one.rows == 32)
        for side in sides:
            assert 0 < side.low_us <= side.p50_us <= side.p99_us
            assert side.samples >= 5
