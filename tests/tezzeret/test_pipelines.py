"""What a pipeline decides, that it is remembered, and that what is remembered is not trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import triton

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import CompileError
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.tezzeret import builds, forge, pipelines
from esper_triton.tezzeret.forge import Forged
from esper_triton.tezzeret.pipelines import BuildRecord, neighbours, plan_of
from esper_triton.tezzeret.request import Request
from esper_triton.tezzeret.targets import parse_target
from esper_triton.tezzeret.tuning import ROWS, Measured, figures_of, measure, static_cost
from esper_triton.tezzeret.writing import Choice, tiles_for
from esper_triton.urza import Urza

ADAPTER = """
name = "adapter"
input = "h"
graph = \"\"\"
z = linear(h, down)
a = gelu(z)
k = linear(a, up)
\"\"\"
[dims]
d = {}
r = { max = 256, default = 8 }
[parameters]
down = { shape = ["r", "d"], init = "kaiming_uniform" }
up = { shape = ["d", "r"] }
"""
DIMS = {"d": 320, "r": 24}


@pytest.fixture(scope="module")
def graph() -> Blueprint:
    return Blueprint.from_text(ADAPTER)


def request_of(blueprint: Blueprint, target: str = "cpu", pipeline: str = "fast", budget_s: float = 0.0) -> Request:
    return Request(
        blueprint=blueprint,
        dims=DIMS,
        dtype="float32",
        target=parse_target(target),
        pipeline=pipeline,
        budget_s=budget_s,
    )


def record_of(request: Request, store: Urza) -> BuildRecord:
    record = BuildRecord.read(store.recall(request.digest), request)
    assert record is not None
    return record


def forget_artifact(store: Urza, artifact_id: str) -> None:
    (store.root / "refs" / artifact_id).unlink()


def prefer(wanted: Callable[[Manifest], bool]) -> Callable[..., list[Measured]]:
    """A measurement by which the candidates that are wanted are twice as fast."""

    def measured(candidates: Sequence[Forged], device: torch.device, seconds: float) -> list[Measured]:
        return [Measured({32: 1.0}, 0.5 if wanted(one.manifest) else 1.0) for one in candidates]

    return measured


@pytest.mark.parametrize("pipeline", ["fast", "standard", "aggressive"])
def test_every_pipeline_gives_a_proven_artifact_of_its_name_and_gives_it_again(
    graph: Blueprint, store: Urza, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dims": DIMS, "pipeline": pipeline, "urza": store, "budget_s": 2.0}
    first = esper.compile(graph, **options)
    assert first.status is KernelStatus.VALIDATED
    assert (first.manifest.pipeline, first.id.split("-")[2]) == (pipeline, pipeline)
    monkeypatch.setattr(pipelines, "plan_build", lambda *_, **__: pytest.fail("a hit was planned"))
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("a hit was compiled"))
    assert esper.compile(graph, **options).digest == first.digest


def test_a_pipeline_leaves_the_artifacts_of_the_others_alone_when_it_fails(
    graph: Blueprint, store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = esper.compile(graph, dims=DIMS, targets="cuda:90", pipeline="fast", urza=store)
    monkeypatch.setattr(forge, "shared_memory_limit", lambda _: 16)
    for pipeline in ("standard", "aggressive"):
        with pytest.raises(CompileError, match="one program can have 16"):
            esper.compile(graph, dims=DIMS, targets="cuda:90", pipeline=pipeline, urza=store, budget_s=1.0)
    assert store.ids() == [fast.id]
    assert store.load(fast.id)[0] == fast[0]


@pytest.mark.parametrize("pipeline", ["fast", "standard"])
def test_blocks_are_as_small_as_a_target_needs_them(
    graph: Blueprint, store: Urza, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = esper.compile(graph, dims=DIMS, targets="cuda:90", pipeline=pipeline, urza=store)
    needed = max(kernel.shared_bytes for kernel in alone.manifest.kernels.values())
    another = Urza(store.root.parent / "another")
    monkeypatch.setattr(forge, "shared_memory_limit", lambda _: needed - 1)
    smaller = esper.compile(graph, dims=DIMS, targets="cuda:90", pipeline=pipeline, urza=another)
    assert max(kernel.shared_bytes for kernel in smaller.manifest.kernels.values()) < needed
    assert smaller.id != alone.id
    first, then = (record_of(request_of(graph, "cuda:90", pipeline), urza).chosen.tiles for urza in (store, another))
    assert then.cols < first.cols


def test_standard_takes_what_is_faster_and_the_same_again_after_its_artifact_is_lost(
    graph: Blueprint, store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_smaller_blocks(manifest: Manifest) -> bool:
        return any(k.constexprs.get("BLOCK_ROWS") == 32 for k in manifest.kernels.values())

    monkeypatch.setattr(pipelines, "measure", prefer(has_smaller_blocks))
    chosen = esper.compile(graph, dims=DIMS, urza=store)
    assert has_smaller_blocks(chosen.manifest)
    record = record_of(request_of(graph, pipeline="standard"), store)
    assert (record.artifact_id, record.chosen.tiles.rows, record.chosen.cost) == (chosen.id, 32, 0.5)
    assert {candidate.tiles.rows for candidate in record.tried} >= {32, 64}

    forget_artifact(store, chosen.id)
    monkeypatch.setattr(pipelines, "measure", lambda *_: pytest.fail("measured again"))
    again = esper.compile(graph, dims=DIMS, urza=store)
    assert again.id == chosen.id
    assert again.manifest.kernels == chosen.manifest.kernels


def test_another_process_builds_again_what_was_chosen_here(
    graph: Blueprint, store: Urza, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "measure", prefer(lambda manifest: len(manifest.kernels) > 3))
    chosen = esper.compile(graph, dims=DIMS, urza=store)
    forget_artifact(store, chosen.id)
    path = tmp_path / "adapter.toml"
    path.write_text(ADAPTER)
    script = (
        "import sys, esper_triton as esper\n"
        f"made = esper.compile(sys.argv[1], dims={DIMS}, urza=sys.argv[2])\n"
        "sys.stdout.write(made.id + ' ' + ' '.join(k.binary for k in made.manifest.kernels.values()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(store.root)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [chosen.id, *(k.binary for k in chosen.manifest.kernels.values())]


def test_what_is_not_much_faster_is_not_taken(graph: Blueprint, store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(candidates: Sequence[Forged], device: torch.device, seconds: float) -> list[Measured]:
        return [Measured({32: 1.0}, 1.0 - 0.004 * place) for place in range(len(candidates))]

    monkeypatch.setattr(pipelines, "measure", noise)
    esper.compile(graph, dims=DIMS, urza=store)
    record = record_of(request_of(graph, pipeline="standard"), store)
    assert record.chosen.tiles == tiles_for(parse_target("cpu"))
    assert len(record.tried) > 2


def test_standard_compiles_one_configuration_for_a_target_that_is_not_here(graph: Blueprint, store: Urza) -> None:
    esper.compile(graph, dims=DIMS, targets="cuda:90", urza=store)
    record = record_of(request_of(graph, "cuda:90", "standard"), store)
    assert (record.tried, record.chosen.cost) == ((), None)


def test_aggressive_judges_binaries_for_a_target_that_is_not_here(graph: Blueprint, store: Urza) -> None:
    esper.compile(graph, dims=DIMS, targets="cuda:90", pipeline="aggressive", urza=store, budget_s=4.0)
    record = record_of(request_of(graph, "cuda:90", "aggressive", 4.0), store)
    costs = [candidate.cost for candidate in record.tried]
    assert len(costs) > 1
    assert all(cost is not None and cost > 0 for cost in costs)
    assert record.chosen.cost is not None
    assert record.chosen.cost <= costs[0]


def test_a_hand_written_source_has_its_own_blocks_and_nothing_is_tried(adapter_path: Path, store: Urza) -> None:
    blueprint = Blueprint.load(adapter_path)
    esper.compile(blueprint, dims=DIMS, urza=store)
    assert record_of(request_of(blueprint, pipeline="standard"), store).tried == ()
    choice = Choice(tiles=tiles_for(parse_target("cuda:90")))
    tried = list(neighbours(choice, parse_target("cuda:90"), blueprint))
    assert {(one.num_warps, one.num_stages) for one in tried} == {(2, 2), (8, 2), (4, 1), (4, 3)}
    assert {one.tiles for one in tried} == {choice.tiles}


def test_neighbours_differ_in_one_knob_each_and_have_powers_of_two(graph: Blueprint) -> None:
    choice = Choice(tiles=tiles_for(parse_target("cpu")))
    own = dataclasses.asdict(choice.tiles)
    for other in neighbours(choice, parse_target("cpu"), graph):
        changed = {name: value for name, value in dataclasses.asdict(other.tiles).items() if value != own[name]}
        assert len(changed) == 1
        ((name, value),) = changed.items()
        assert name == "separate" or math.log2(value).is_integer()


def test_a_record_that_names_another_artifact_is_not_followed(graph: Blueprint, store: Urza) -> None:
    wanted = esper.compile(graph, dims=DIMS, pipeline="fast", urza=store)
    other = esper.compile(graph, dims=DIMS | {"r": 25}, pipeline="fast", urza=store)
    request = request_of(graph)
    record = record_of(request, store)
    store.remember(request.digest, record.model_copy(update={"artifact_id": other.id}).model_dump_json().encode())
    assert esper.compile(graph, dims=DIMS, pipeline="fast", urza=store).digest == wanted.digest
    assert record_of(request, store).artifact_id == wanted.id


@pytest.mark.parametrize("damage", ["", "{}", "not JSON", '{"tiles": {"rows": 33}}'])
def test_a_record_that_is_damaged_is_made_again(graph: Blueprint, store: Urza, damage: str) -> None:
    wanted = esper.compile(graph, dims=DIMS, pipeline="fast", urza=store)
    request = request_of(graph)
    record = json.loads(store.recall(request.digest) or b"")
    text = damage
    if damage.startswith('{"'):
        record["chosen"]["tiles"] |= json.loads(damage)["tiles"]
        text = json.dumps(record)
    store.remember(request.digest, text.encode())
    assert BuildRecord.read(store.recall(request.digest), request) is None
    assert esper.compile(graph, dims=DIMS, pipeline="fast", urza=store).digest == wanted.digest
    assert record_of(request, store).artifact_id == wanted.id


def test_the_digest_of_a_request_changes_with_whatever_changes_what_is_built(
    graph: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_ENABLE_LLVM_DEBUG", raising=False)
    base = request_of(graph)
    others = [
        dataclasses.replace(base, dims=DIMS | {"r": 25}),
        dataclasses.replace(base, dims={name: str(size) for name, size in DIMS.items()}),
        dataclasses.replace(base, dtype="float16"),
        dataclasses.replace(base, pipeline="standard"),
        dataclasses.replace(base, pipeline="aggressive", budget_s=1.0),
        dataclasses.replace(base, pipeline="aggressive", budget_s=2.0),
        dataclasses.replace(base, target=parse_target("cuda:90")),
        dataclasses.replace(base, blueprint=Blueprint.from_text(ADAPTER.replace("gelu", "silu"))),
    ]
    digests = {one.digest for one in (base, *others)}
    monkeypatch.setenv("TRITON_ENABLE_LLVM_DEBUG", "1")
    digests.add(dataclasses.replace(base).digest)
    assert len(digests) == len(others) + 2
    renamed = Blueprint.from_text(ADAPTER.replace('"adapter"', '"other"').replace("z", "zz"))
    monkeypatch.delenv("TRITON_ENABLE_LLVM_DEBUG")
    assert dataclasses.replace(base, blueprint=renamed, budget_s=9.0).digest == base.digest


def test_candidates_are_measured_forward_and_backward_at_few_and_at_many_rows(graph: Blueprint) -> None:
    request = request_of(graph)
    first = plan_of(request)
    other = plan_of(request, Choice(tiles=dataclasses.replace(tiles_for(request.target), rows=16)))
    measured = measure([forge.forge(first), forge.forge(other)], torch.device("cpu"), 0.01)
    assert [tuple(one.rows_us) for one in measured] == [ROWS, ROWS]
    assert all(us > 0 for one in measured for us in one.rows_us.values())
    assert measured[0].ratio == 1.0
    assert measured[1].ratio > 0


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_registers_and_spills_are_read_from_binaries(graph: Blueprint, target: str) -> None:
    request = request_of(graph, target)
    choice = Choice(tiles=tiles_for(request.target))
    made = forge.forge(plan_of(request, choice))
    for record in made.manifest.kernels.values():
        found = figures_of(record, made.blobs[record.binary])
        assert found.registers is not None
        assert 8 <= found.registers <= 512
        assert (found.spilled_bytes or 0) >= 0
        assert found.shared_bytes == record.shared_bytes
    assert static_cost(made, choice) > 0


def test_no_neighbour_holds_more_than_a_threads_registers(graph: Blueprint) -> None:
    target = parse_target("cuda:90")
    choice = Choice(tiles=dataclasses.replace(tiles_for(target), rows=64, cols=256))
    for other in neighbours(choice, target, graph):
        assert other.tiles.rows * other.tiles.cols <= 128 * 32 * other.num_warps


def test_only_one_of_two_threads_builds(graph: Blueprint, store: Urza) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def build(_: int) -> bool:
        (built,) = builds.build_all([request_of(graph)], Urza(store.root), lambda *_: None)
        return built.hit

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(build, range(4))) == [False, True, True, True]
