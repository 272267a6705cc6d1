from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import build, train
from seeding import copy_artifact, flip_one_byte, grow, own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactNotFound, ArtifactRefused, CheckpointError, CorruptObject
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KernelCache, SeedLifecycleState
from esper_triton.kasmina.boundary import write_state
from esper_triton.urza import Urza

D, R = 16, 4
S = SeedLifecycleState


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


def net(store: Urza | None, seeds: int = 2) -> esper.MorphableModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, seeds * D), nn.Tanh(), nn.Linear(seeds * D, seeds * D))
    return esper.wrap(host, ["0", "2"], seeds_per_layer=seeds, urza=store)


def grown(store: Urza, artifact_id: str) -> esper.MorphableModel:
    """A seed in GRAFTING, one FOSSILIZED, one in TRAINING, and one DORMANT."""
    model = net(store)
    first, second = model.kasmina_layers.values()
    grow(first, 0, artifact_id, alpha=0.5, draw=1)
    assert first.load_kernel_sync(1, artifact_id)
    grow(second, 1, artifact_id, alpha=0.75, draw=2)
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        second.request_transition(1, state)
    return model


def through_a_file(section: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(section, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def picture(model: esper.MorphableModel) -> list[Any]:
    """Everything about a model's seeds that could have been changed."""
    layers = model.kasmina_layers.values()
    return [
        [(s.state, s.alpha, s.artifact_id, s.kernel, s.parameters, s.error_count, s.last_error) for s in seeds]
        + [layer.state.storage.tolist(), layer._kasmina.urza]
        for layer in layers
        for seeds in [layer._kasmina.seeds]
    ]


def test_a_checkpoint_of_the_bare_model_loads_into_the_wrapped_one_and_back(adapter_store: Urza, small: str) -> None:
    bare = nn.Sequential(nn.Linear(6, 2 * D), nn.Tanh(), nn.Linear(2 * D, 2 * D))
    model = grown(adapter_store, small)
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict(), strict=True)
    bare.load_state_dict(model.state_dict(), strict=True)


def test_a_section_restores_every_seed_into_a_freshly_wrapped_model(adapter_store: Urza, small: str) -> None:
    model = grown(adapter_store, small)
    x = torch.randn(3, 6)
    expected = model(x)
    saved = through_a_file({"model": model.state_dict(), "esper": esper.esper_state_dict(model)})
    other = net(adapter_store)
    other.load_state_dict(saved["model"], strict=True)
    esper.load_esper_state_dict(other, saved["esper"])
    for name, layer in model.kasmina_layers.items():
        restored = other.kasmina_layers[name]
        for seed, (before, after) in enumerate(
            zip(layer.get_layer_stats()["seeds"], restored.get_layer_stats()["seeds"], strict=True)
        ):
            loads = before.pop("kernel_load_latency_us"), after.pop("kernel_load_latency_us")  # two of the same kernel
            assert before == after
            assert (loads[0] is None) == (loads[1] is None)
            old, new = own_parameters(layer, seed), own_parameters(restored, seed)
            assert {n: p.requires_grad for n, p in old.items()} == {n: p.requires_grad for n, p in new.items()}
            assert all(torch.equal(old[n], new[n]) and old[n] is not new[n] for n in old)
        write_state(layer)  # the mean time since the last commit is counted in
        assert torch.equal(layer.state.storage, restored.state.storage)
    other.epoch_boundary(0)  # the arrays are those of the last commit
    assert torch.equal(other(x), expected)
    other.kasmina_layers["0"].unload_kernel(0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_resumed_in_a_new_process_goes_on_bit_for_bit(
    adapter_store: Urza, small: str, tmp_path: Path, optimizer: str
) -> None:
    straight = build(adapter_store, optimizer)
    outputs = train(*straight, range(20), small)
    halfway = build(adapter_store, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(train(*halfway, range(10), small), outputs, strict=False))
    model, optim, scheduler = halfway
    torch.save(
        {
            "model": model.state_dict(),
            "esper": esper.esper_state_dict(model, optim),
            "optimizer": optim.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        },
        tmp_path / "half.pt",
    )
    script = Path(__file__).with_name("resuming.py")
    command = [sys.executable, "-W", "error", str(script), str(adapter_store.root), str(tmp_path), optimizer, small]
    environment = os.environ | {"PYTHONPATH": str(Path(esper.__file__).parents[1])}  # the package that is tested here
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert len(resumed["outputs"]) == 10
    assert all(torch.equal(a, b) for a, b in zip(resumed["outputs"], outputs[10:], strict=True))
    for section in ("model", "seeds"):
        own = straight[0].state_dict() if section == "model" else seeds_of(straight[0])
        assert own.keys() == resumed[section].keys()
        assert all(torch.equal(own[name], resumed[section][name]) for name in own)
    assert len(resumed["seeds"]) == 8


def seeds_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.{p}": t for n, layer in model.kasmina_layers.items() for p, t in layer.seed_parameters()}


def test_a_model_goes_back_to_a_section_in_the_same_process_with_the_same_parameter_objects(
    adapter_store: Urza, small: str
) -> None:
    model = grown(adapter_store, small)
    layer = model.kasmina_layers["0"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    esper.attach(optimizer, model)
    x = torch.randn(3, 6)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        out: torch.Tensor = model(x)
        out.square().sum().backward()
        optimizer.step()
        return out.detach()

    step()
    host = copy.deepcopy(model.state_dict())
    state, section = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(esper.esper_state_dict(model, optimizer))
    parameters = own_parameters(layer, 0)
    ahead = [step(), step()]
    layer.unload_kernel(1)
    model.kasmina_layers["2"].load_kernel_sync(0, small)
    model.load_state_dict(host)
    esper.load_esper_state_dict(model, section, optimizer)
    optimizer.load_state_dict(state)
    assert all(own_parameters(layer, 0)[name] is p for name, p in parameters.items())
    assert [group.get("esper_seed") for group in optimizer.param_groups] == [None, "0:0", "0:1", "2:1"]
    assert all(torch.equal(step(), expected) for expected in ahead)


def test_groups_take_the_places_that_they_had(adapter_store: Urza, small: str) -> None:
    """A host's group that was added after a seed's, and groups of seeds in the order of their growth."""

    def start() -> tuple[esper.MorphableModel, torch.optim.Optimizer]:
        model = net(adapter_store)
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.5)
        return model, optimizer

    model, optimizer = start()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    esper.attach(optimizer, model, schedulers=[scheduler], lr=0.025)
    grow(model.kasmina_layers["2"], 1, small, alpha=0.5)
    grow(model.kasmina_layers["0"], 0, small, alpha=0.5)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[1]["momentum"] = 0.75
    section = through_a_file(esper.esper_state_dict(model, optimizer))
    state = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})

    other, theirs = start()
    again = torch.optim.lr_scheduler.LambdaLR(theirs, lambda epoch: 0.5**epoch)
    esper.attach(theirs, other, schedulers=[again], lr=0.025)
    esper.load_esper_state_dict(other, section, theirs)
    assert [g.get("esper_seed") for g in theirs.param_groups] == [None, "2:1", "0:0"]
    assert [g["momentum"] for g in theirs.param_groups] == [0.5, 0.75, 0.5]
    assert again.base_lrs == [0.1, 0.025, 0.025]
    before = own_parameters(model.kasmina_layers["2"], 1)
    for name, parameter in own_parameters(other.kasmina_layers["2"], 1).items():
        ours = optimizer.state[before[name]]["momentum_buffer"]
        assert torch.equal(theirs.state[parameter]["momentum_buffer"], ours)
    theirs.load_state_dict(state["optimizer"])
    again.load_state_dict(state["scheduler"])
    assert [g["lr"] for g in theirs.param_groups] == [0.05, 0.0125, 0.0125]


def test_a_group_that_the_host_got_after_a_seed_keeps_its_place_too(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.5)
    esper.attach(optimizer, model)
    grow(model.kasmina_layers["2"], 1, small, alpha=0.5)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.2})
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    section = through_a_file(esper.esper_state_dict(model, optimizer))
    state = through_a_file(optimizer.state_dict())

    other = net(adapter_store)
    groups = [{"params": list(other[0].parameters())}, {"params": list(other[2].parameters()), "lr": 0.2}]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    esper.attach(theirs, other)
    esper.load_esper_state_dict(other, section, theirs)
    assert [g.get("esper_seed") for g in theirs.param_groups] == [None, "2:1", None]
    theirs.load_state_dict(state)
    for ours, loaded in zip(optimizer.param_groups, theirs.param_groups, strict=True):
        for a, b in zip(ours["params"], loaded["params"], strict=True):
            assert torch.equal(optimizer.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"])


@pytest.fixture
def copied(store: Urza, adapter_store: Urza, small: str) -> tuple[dict[str, Any], str]:
    """A section of a model whose artifact is in `store`, which a test may damage; and the artifact's id."""
    copy_artifact(adapter_store, store, small)
    return through_a_file(esper.esper_state_dict(grown(store, small))), small


def rejected(store: Urza, artifact_id: str) -> None:
    store.set_status(artifact_id, KernelStatus.REJECTED)


def removed(store: Urza, artifact_id: str) -> None:
    (store.root / "refs" / artifact_id).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (removed, ArtifactNotFound, "no artifact"),
        (flip_one_byte, CorruptObject, "binary of kernel"),
        (rejected, ArtifactRefused, "is REJECTED and only VALIDATED ones run"),
    ],
)
def test_an_artifact_that_cannot_be_had_again_is_named_or_recovered_from(
    store: Urza,
    copied: tuple[dict[str, Any], str],
    damage: Callable[[Urza, str], None],
    error: type[Exception],
    message: str,
) -> None:
    section, artifact_id = copied
    damage(store, artifact_id)
    model = net(store)
    before = picture(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        esper.load_esper_state_dict(model, section)
    for seed in ("seed 0 of layer '0'", "seed 1 of layer '0'", "seed 1 of layer '2'"):
        assert f"{seed}: artifact {artifact_id!r} cannot be restored" in str(caught.value)
    assert picture(model) == before

    esper.load_esper_state_dict(model, section, missing="recover")
    layer = model.kasmina_layers["0"]
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    assert isinstance(layer.last_error(0), error)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.default_transform(x))
    learned = section["layers"]["0"]["seeds"][0]["parameters"]
    assert all(torch.equal(p, learned[name]) for name, p in own_parameters(layer, 0).items())


def test_a_manifest_that_is_not_the_recorded_one_does_not_run(
    store: Urza, adapter_store: Urza, copied: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    section, artifact_id = copied
    recorded = store.get(artifact_id).digest
    other = Urza(tmp_path / "other")
    copy_artifact(adapter_store, other, artifact_id, created_at="2001-01-01T00:00:00+00:00")
    model = net(other)
    with pytest.raises(CheckpointError) as caught:
        esper.load_esper_state_dict(model, section)
    for part in ("seed 0 of layer '0'", artifact_id, recorded, other.get(artifact_id).digest):
        assert part in str(caught.value)
    assert model.get_model_stats()["active_seeds"] == 0
    esper.load_esper_state_dict(model, section, urza=store)
    assert model.get_model_stats()["active_seeds"] == 2


def test_a_seed_in_recovery_and_a_culled_one_are_restored_as_they_were(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(adapter_store)
    layer = model.kasmina_layers["0"]
    grow(layer, 0, small, alpha=0.5)
    entry = layer._kasmina.seeds[0].kernel
    assert entry is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(entry.program), "forward", lambda *_: 1 / 0)
        model(torch.randn(2, 6))
    model.step_boundary()
    assert not layer.load_kernel_sync(1, "000000000000-cpu-standard-000000000000")
    other = net(None)
    esper.load_esper_state_dict(other, through_a_file(esper.esper_state_dict(model)), urza=adapter_store)
    restored = other.kasmina_layers["0"]
    assert [restored.seed_state(seed) for seed in (0, 1)] == [S.ERROR_RECOVERY, S.CULLED]
    assert restored.state.error_count.tolist() == [1, 0]
    grow(restored, 0, small, alpha=0.5, draw=None, force=True)  # from the store that the call gave
    x = torch.randn(3, 6)
    grow(layer, 0, small, alpha=0.5, draw=None, force=True)
    assert torch.equal(restored(x), layer(x))


def test_a_load_under_way_is_saved_as_dormant_and_a_retry_as_recovery(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store)
    layer = model.kasmina_layers["0"]
    layer._begin_load(0, small, False, None)
    grow(layer, 1, small, alpha=0.5)
    layer._kasmina.seeds[1].fault(RuntimeError("failed"))
    layer.commit()
    layer._begin_load(1, small, True, None)
    section = esper.esper_state_dict(model)["layers"]["0"]["seeds"]
    assert [(s["state"], s["artifact_id"], len(s["parameters"])) for s in section] == [
        ("DORMANT", None, 0),
        ("ERROR_RECOVERY", small, 4),
    ]


def at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(section: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        place: Any = section
        for folder in folders:
            place = place[int(folder) if isinstance(place, list) else folder]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


SEED = "layers/0/seeds/0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("schema_version", "2.0"), "schema_version 2.0 is newer than 1.0; upgrade"),
        (at("schema_version", "1.1"), "schema_version 1.1 is newer than 1.0; upgrade"),
        (at("schema_version", None), "schema_version is None, expected such as '1.0'"),
        (at(f"{SEED}/schema_version", "1.7"), "seed 0 of layer '0': schema_version 1.7 is newer"),
        (at("layer", {}), "unknown key 'layer'; did you mean 'layers'"),
        (at("layers", None), "it has no 'layers'"),
        (at("layers/0", None), "layer '0' is wrapped and not in the checkpoint"),
        (at("layers/1", {}), "the model has no wrapped layer '1'"),
        (at("layers/0", {}), "layer '0': width: Field required"),
        (at("layers/0/width", 5), "the checkpoint has features 5, the model has 32"),
        (at("layers/0/chunking", "whole"), "the checkpoint has chunking whole, the model has features"),
        (at("layers/0/seeds", []), "the checkpoint has seeds 0, the model has 2"),
        (at("layers/0/clock/steps", 1), "layer '0': unknown counter 'steps'; did you mean 'step'"),
        (at(f"{SEED}/stage/progress", -1), "stage.progress: Input should be greater"),
        (at(f"{SEED}/stage/schedule", {"schedule": "linaer"}), "unknown schedule 'linaer'; did you mean 'linear'"),
        (at(f"{SEED}/span", (0, 5)), r"columns \(0, 5\), the model has \(0, 16\)"),
        (at(f"{SEED}/seed", 1), "the section is of seed 1"),
        (at(f"{SEED}/state", "GRAFTED"), "state 'GRAFTED' cannot be restored; did you mean .*'GRAFTING'"),
        (at(f"{SEED}/state", "LOADING"), "state 'LOADING' cannot be restored"),
        (at(f"{SEED}/state", "DORMANT"), "it is DORMANT and has an artifact or parameters"),
        (at(f"{SEED}/artifact_id", None), "artifact_id: Field required"),
        (at(f"{SEED}/alpha", 1.5), "alpha: Input should be less than or equal to 1"),
        (at(f"{SEED}/alpha", float("nan")), "alpha: Input should be"),
        (at(f"{SEED}/counters/error_count", -1), "error_count: Input should be greater"),
        (at(f"{SEED}/counters/errors", 1), "unknown counter 'errors'; did you mean 'error_count'"),
        (at(f"{SEED}/manifest_digest", "0" * 64), "and seed 0 of layer '0' was saved with 0000"),
        (at(f"{SEED}/parameters/up_bias", None), r"parameter 'up_bias' is none, its artifact expects \(16,\)"),
        (at(f"{SEED}/parameters/bias", torch.zeros(2)), r"'bias' is \(2,\) .* its artifact expects none"),
        (at(f"{SEED}/parameters/up_bias", torch.zeros(15)), r"'up_bias' is \(15,\) of torch.float32, .*\(16,\)"),
        (at(f"{SEED}/parameters/up_bias", torch.zeros(16).double()), "'up_bias' is .* of torch.float64"),
        (at(f"{SEED}/parameters/up_bias", "zero"), "up_bias: Input should be an instance of Tensor"),
        (at("optimizer", {}), "its optimizer is damaged: KeyError: 'class'"),
        (at("optimizer", None), "it has no optimizer"),
        (at("optimizer/class", "SGD"), "its optimizer is SGD, this one is Adam"),
        (at("optimizer/host_groups", 3), "3 groups besides those of seeds, this one has 1"),
        (at("optimizer/groups", []), "seed 0 of layer '0' has parameters and no group"),
        (at("optimizer/groups/0/seed", 5), "seed 5 of layer '0' has a group and no parameters"),
        (at("optimizer/groups/0/index", 9), r"its groups of seeds have positions \[2, 3, 9\]"),
        (at("optimizer/groups/0/state/bias", {}), "moments of seed 0 of layer '0' are not of its parameters"),
        (at("optimizer/groups/0/options/params", []), "a group cannot have option 'params'"),
    ],
)
def test_a_section_that_does_not_fit_is_one_clear_error_and_nothing_is_changed(
    adapter_store: Urza, small: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    model = grown(adapter_store, small)
    optimizer = torch.optim.Adam(model.parameters())
    esper.attach(optimizer, model)
    section = through_a_file(esper.esper_state_dict(model, optimizer))
    change(section)
    groups = copy.deepcopy(optimizer.state_dict())
    before, pinned = picture(model), KernelCache.process().stats().pinned
    with pytest.raises(CheckpointError, match=message):
        esper.load_esper_state_dict(model, section, optimizer)
    assert picture(model) == before
    assert optimizer.state_dict() == groups
    assert KernelCache.process().stats().pinned == pinned


def test_every_fault_is_in_the_one_message(adapter_store: Urza, small: str) -> None:
    model = grown(adapter_store, small)
    section = through_a_file(esper.esper_state_dict(model))
    at("layers/0/width", 5)(section)
    at("layers/2/seeds/1/alpha", 2.0)(section)
    with pytest.raises(CheckpointError, match=r"features 5.*; seed 1 of layer '2': alpha"):
        esper.load_esper_state_dict(model, section)


def test_what_was_not_set_up_first_is_said(adapter_store: Urza, small: str) -> None:
    model = grown(adapter_store, small)
    optimizer = torch.optim.Adam(model.parameters())
    section = esper.esper_state_dict(model)
    with pytest.raises(ValueError, match="this Adam is not attached to this model"):
        esper.esper_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="this Adam is not attached to this model"):
        esper.load_esper_state_dict(model, section, optimizer)
    with pytest.raises(ValueError, match="Linear has no seeds; wrap it first"):
        esper.load_esper_state_dict(nn.Linear(2, 2), section)
    with pytest.raises(ValueError, match="missing is 'ignore', expected 'error' or 'recover'"):
        esper.load_esper_state_dict(model, section, missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="there is no Urza to fetch it from"):
        esper.load_esper_state_dict(net(None), section)


def test_an_option_that_is_not_plain_cannot_be_saved(adapter_store: Urza, small: str) -> None:
    model = grown(adapter_store, small)
    optimizer = torch.optim.Adam(model.parameters())
    esper.attach(optimizer, model)
    optimizer.param_groups[1]["owner"] = object()
    with pytest.raises(TypeError, match="group of seed 0 of layer '0': option 'owner' is a object"):
        esper.esper_state_dict(model, optimizer)
