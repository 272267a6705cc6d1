"""From a name to a seed that trains, in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactNotFound, BlueprintError, CompileError
from esper_triton.kasmina import SeedLifecycleState
from esper_triton.model.germination import Germination, GerminationState, free_seed, place_of, target_name
from esper_triton.tezzeret.library import find
from esper_triton.tezzeret.pool import Forge, TaskState

S = SeedLifecycleState


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge(jobs=1) as made:
        yield made


@pytest.fixture(scope="module")
def germinated_store(tmp_path_factory: pytest.TempPathFactory) -> esper.Urza:
    return esper.Urza(tmp_path_factory.mktemp("germinated") / "urza")


def model_with(store: esper.Urza, seeds: int = 2) -> esper.MorphableModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64))
    return esper.wrap(model, ["0", "2"], seeds_per_layer=seeds, urza=store)


def state_of(model: esper.MorphableModel, name: str, seed: int) -> S:
    return model.kasmina_layers[name].seed_state(seed)


async def finished(germination: Germination) -> int:
    return await germination


def test_a_name_becomes_a_seed_that_trains_with_dims_and_dtype_of_the_layer(
    germinated_store: esper.Urza, forge: Forge
) -> None:
    model = model_with(germinated_store)

    async def grow() -> None:
        germination = model.germinate("2", "bottleneck_adapter", r=8, pipeline="fast", forge=forge)
        assert germination.state is GerminationState.COMPILING
        assert await germination == 0
        assert (germination.state, germination.progress, germination.error) == (GerminationState.DONE, 1.0, None)
        manifest = germinated_store.get(germination.artifact_id).manifest
        assert (manifest.dims, manifest.dtype, manifest.pipeline) == ({"d": 32, "r": 8}, "float32", "fast")

    asyncio.run(grow())
    assert [state_of(model, "2", seed) for seed in (0, 1)] == [S.TRAINING, S.DORMANT]
    model.train()
    model(torch.randn(8, 20))
    assert model.train_seeds() == 0.0  # a fresh adapter is the host


def test_without_a_loop_it_goes_on_by_itself_and_takes_effect_at_a_step_boundary(
    germinated_store: esper.Urza, forge: Forge
) -> None:
    model = model_with(germinated_store)
    germination = model.germinate("0", "linear", pipeline="fast", forge=forge)
    germination._over.result()  # what a training loop does meanwhile
    assert state_of(model, "0", 0) is S.DORMANT
    model.step_boundary()
    assert state_of(model, "0", 0) is S.TRAINING
    assert (germination.done(), germination.state) == (True, GerminationState.DONE)
    assert germinated_store.get(germination.artifact_id).manifest.dims == {"d": 32, "d_in": 20}


def test_code_with_no_loop_can_wait(germinated_store: esper.Urza, forge: Forge) -> None:
    model = model_with(germinated_store)
    design = Blueprint.from_text('name = "double"\ninput = "h"\ngraph = "k = mul(h, 2.0)"\n[dims]\nd = {}\n')
    assert model.germinate_sync("2", design, pipeline="fast", seed=1, forge=forge) == 1
    assert state_of(model, "2", 1) is S.GRAFTING  # nothing to train


def test_a_module_is_a_design(germinated_store: esper.Urza, forge: Forge) -> None:
    model = model_with(germinated_store)
    branch = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 32))
    assert model.germinate_sync("0", branch, pipeline="fast", forge=forge) == 0
    assert state_of(model, "0", 0) is S.TRAINING


def test_two_germinations_do_not_take_one_slot(germinated_store: esper.Urza, forge: Forge) -> None:
    model = model_with(germinated_store)
    both = [model.germinate("2", "bottleneck_adapter", r=8, pipeline="fast", forge=forge) for _ in range(2)]
    assert [germination.seed for germination in both] == [0, 1]
    with pytest.raises(ValueError, match=r"layer '2' has no free seed: 0 waits for a compile, 1 waits for a compile"):
        model.germinate("2", "linear", forge=forge)
    with pytest.raises(ValueError, match="seed 1 of layer '2' waits for a compile already"):
        model.germinate("2", "linear", seed=1, forge=forge)
    assert [germination.result() for germination in both] == [0, 1]
    with pytest.raises(ValueError, match="layer '2' has no free seed: 0 TRAINING, 1 TRAINING"):
        model.germinate("2", "linear", forge=forge)
    assert model.germinate("0", "linear", pipeline="fast", forge=forge).result() == 0


def test_a_design_that_does_not_fit_is_refused_at_once_and_keeps_no_slot(
    germinated_store: esper.Urza, forge: Forge
) -> None:
    model = model_with(germinated_store)
    for design, dims, message in [
        ("bottleneck_adaptor", {}, "no blueprint 'bottleneck_adaptor' .*; did you mean 'bottleneck_adapter'"),
        ("bottleneck_adapter", {"r": 0}, "layer '2': dim 'r' is 0, expected 1 to"),
        ("bottleneck_adapter", {"q": 3}, "unknown dim 'q'"),
        ("bottleneck_adapter", {"d": 64, "r": 8}, "d=64 was given, and layer '2' asks for 32"),
    ]:
        with pytest.raises(BlueprintError, match=message):
            model.germinate("2", design, forge=forge, **dims)
    with pytest.raises(ValueError, match="no wrapped layer '3'"):
        model.germinate("3", "linear", forge=forge)
    assert free_seed(model.kasmina_layers["2"]) == 0
    assert model.germinate("2", "linear", pipeline="fast", forge=forge).result() == 0


def test_a_compile_that_fails_leaves_the_seed_dormant_and_its_slot_free(
    germinated_store: esper.Urza, forge: Forge, tmp_path: Path, adapter_path: Path
) -> None:
    for suffix, text in ((".toml", ""), (".py", "\nimport os\nos._exit(7)\n")):
        path = tmp_path / f"bottleneck_adapter{suffix}"
        path.write_text(adapter_path.with_suffix(suffix).read_text() + text)
    model = model_with(germinated_store)
    germination = model.germinate("2", tmp_path / "bottleneck_adapter.toml", r=4, forge=forge)
    with pytest.raises(CompileError, match="ended with exit code 7"):
        asyncio.run(finished(germination))
    assert germination.state is GerminationState.FAILED
    assert isinstance(germination.error, CompileError)
    assert state_of(model, "2", 0) is S.DORMANT
    assert free_seed(model.kasmina_layers["2"]) == 0


def test_an_artifact_that_is_lost_before_the_load_is_told_as_the_reason(
    germinated_store: esper.Urza, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(germinated_store)

    def lost(artifact_id: str) -> None:
        raise ArtifactNotFound(f"no artifact {artifact_id!r}")

    monkeypatch.setattr(model.kasmina_layers["2"]._kasmina.urza, "load", lost)
    germination = model.germinate("2", "linear", pipeline="fast", forge=forge)
    with pytest.raises(ArtifactNotFound):
        germination.result()
    assert (germination.state, state_of(model, "2", 0)) == (GerminationState.FAILED, S.CULLED)
    assert free_seed(model.kasmina_layers["2"]) == 1  # the slot of the other is embargoed


def test_it_can_be_cancelled_while_it_compiles(germinated_store: esper.Urza) -> None:
    model = model_with(germinated_store)
    with Forge(jobs=1) as forge:
        first = forge.submit(Blueprint.load(find("linear")), {"d": 9, "d_in": 9}, urza=germinated_store)
        germination = model.germinate("2", "linear", forge=forge)
        assert germination.cancel()
        assert germination.state is GerminationState.CANCELLED
        with pytest.raises(CompileError, match="was cancelled"):
            germination.result()
        assert free_seed(model.kasmina_layers["2"]) == 0
        first.cancel()
    assert first.state is TaskState.CANCELLED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compile_for_a_layer_takes_its_widths_dtype_and_device(
    germinated_store: esper.Urza, dtype: torch.dtype
) -> None:
    bare = nn.Linear(24, 40, dtype=dtype)
    artifact = esper.compile("lora", dims={"r": 4}, for_layer=bare, pipeline="fast", urza=germinated_store)
    manifest = artifact.manifest
    assert (manifest.dims, manifest.target.backend) == ({"d": 40, "d_in": 24, "r": 4}, "cpu")
    assert manifest.dtype == str(dtype).removeprefix("torch.")


def test_what_a_layer_asks_for_is_that_of_its_first_free_seed(germinated_store: esper.Urza) -> None:
    model = model_with(germinated_store, seeds=3)
    place = place_of(model.kasmina_layers["0"])
    assert (place.width, place.x_width, place.dtype, place.target) == (22, 20, "float32", "cpu")
    assert place_of(model.kasmina_layers["0"], 2).width == 21
    embedding = place_of(nn.Embedding(10, 16))
    assert (embedding.width, embedding.x_width) == (16, None)
    with pytest.raises(BlueprintError, match="'linear' reads the layer's input, which Embedding has not row by row"):
        embedding.dims(Blueprint.load(find("linear")), {})
    with pytest.raises(ValueError, match=r"Linear is torch.float64; kernels exist for float32, float16, bfloat16"):
        place_of(nn.Linear(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no kernel is for a device of type 'meta'"):
        target_name(torch.device("meta"))
