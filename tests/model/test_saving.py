from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seeding import copy_artifact, grow
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import CheckpointError, StoreUnavailable
from esper_triton.contracts.lineage import Lineage, LineageEntry
from esper_triton.kasmina import SeedLifecycleState
from esper_triton.model import saving
from esper_triton.urza import Urza

D, R = 16, 4
S = SeedLifecycleState


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


def net(store: Urza, draw: int = 0) -> esper.MorphableModel:
    torch.manual_seed(draw)
    return esper.wrap(nn.Sequential(nn.Linear(6, D), nn.Linear(D, D)), ["0", "1"], seeds_per_layer=1, urza=store)


def grown(store: Urza, artifact_id: str, draw: int = 0) -> esper.MorphableModel:
    """One FOSSILIZED seed and one in GRAFTING."""
    model = net(store, draw)
    first, second = model.kasmina_layers.values()
    grow(first, 0, artifact_id, alpha=0.75)
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        first.request_transition(0, state)
    grow(second, 0, artifact_id, alpha=0.5)
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_saved_model_is_loaded_with_its_seeds(adapter_store: Urza, small: str, tmp_path: Path) -> None:
    model = grown(adapter_store, small)
    path = esper.save_model(model, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "lineage.json"
    other = net(adapter_store, draw=1)
    assert esper.load_model(path.parent, other) is other
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))
    assert [layer.seed_state(0) for layer in other.kasmina_layers.values()] == [S.FOSSILIZED, S.GRAFTING]


def test_what_a_saved_model_has_grown_is_not_collected(
    adapter_store: Urza, small: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Urza(tmp_path / "urza")
    copy_artifact(adapter_store, store, small)
    model = grown(store, small)
    esper.save_model(model, tmp_path / "out")
    match = store.match(small)
    assert match is not None
    assert len(match.lineages) == 1
    assert match.lineages[0].startswith("out-")
    del model
    store.release()
    kept = store.gc(0, dry_run=True).kept
    assert any(small in ids for ids in kept.values())
    esper.save_model(net(store), tmp_path / "out")
    match = store.match(small)
    assert match is not None
    assert match.lineages == ()

    def full(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(store, "name_lineage", full)
    esper.save_model(grown(store, small), tmp_path / "out")
    assert "the disk is full" in caplog.text


def test_each_store_keeps_what_its_own_layers_have_grown(adapter_store: Urza, small: str, tmp_path: Path) -> None:
    store, other = Urza(tmp_path / "urza"), Urza(tmp_path / "other")
    copy_artifact(adapter_store, store, small)
    model = grown(store, small)
    fossilised, growing = model.kasmina_layers.values()
    growing._kasmina.urza = other
    esper.save_model(model, tmp_path / "out")
    assert [match.lineages[0][:4] for match in store.query()] == ["out-"]
    assert other.verify().faults == (), "it is asked to keep nothing that it does not have"
    fossilised._kasmina.urza = other
    esper.save_model(model, tmp_path / "out")
    assert [fault.message for fault in other.verify().faults] == [f"names artifact {small}, which is not there"]


def test_lineage_has_the_fossilised_seeds_alone_and_nothing_invented(
    adapter_store: Urza, small: str, tmp_path: Path
) -> None:
    model = net(adapter_store)
    first, second = model.kasmina_layers.values()
    for layer in (first, second):
        grow(layer, 0, small, alpha=0.75)
        model.step_boundary()
        for state in (S.STABILIZATION, S.EVALUATING):
            layer.request_transition(0, state)
    values = iter([4.0, 6.0, 3.0, 7.0])  # with the seed and without, twice
    model.evaluate_seed("0", 0, lambda _: next(values), repeats=2)
    for layer in (first, second):
        layer.request_transition(0, S.FOSSILIZED)
    esper.save_model(model, tmp_path)
    esper.save_model(esper.load_model(tmp_path, net(adapter_store)), tmp_path)  # it outlives a load
    path = tmp_path / "lineage.json"
    body = json.loads(path.read_text())
    assert body["seeds"] == [
        {
            "layer": layer,
            "seed": 0,
            "artifact_id": small,
            "manifest_digest": adapter_store.get(small).digest,
            "parameters": ["down_bias", "down_weight", "up_bias", "up_weight"],
            "alpha": 0.75,
            "metric_before": before,
            "metric_after": after,
            "step": 2,
        }
        for layer, before, after in (("0", 6.5, 3.5), ("1", None, None))
    ]
    weights = tmp_path / body["weights"]
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == body["weights_sha256"]
    assert {p.name for p in tmp_path.iterdir()} == {"lineage.json", body["weights"]}
    loaded = torch.load(weights, weights_only=True)
    assert list(loaded["model"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_lineage_survives_json_with_measurements_that_json_has_no_numbers_for() -> None:
    entry = LineageEntry(
        layer="fc",
        seed=1,
        artifact_id="b3d4f51c09aa-cuda90-standard-a1c3b2774e01",
        manifest_digest="0" * 64,
        parameters=("a",),
        alpha=1.0,
        metric_before=math.inf,
        metric_after=0.5,
        step=12,
    )
    lineage = Lineage(
        esper_triton="0.1.0",
        saved_at="2001-01-01T00:00:00+00:00",
        weights=f"weights-{'0' * 16}.pt",
        weights_sha256="0" * 64,
        seeds=(entry,),
    )
    assert Lineage.model_validate_json(lineage.model_dump_json()) == lineage


def test_saving_again_replaces_the_model_and_leaves_nothing_behind(
    adapter_store: Urza, small: str, tmp_path: Path
) -> None:
    model = grown(adapter_store, small)
    esper.save_model(model, tmp_path)
    first = files(tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / ".esper-0123").write_text("left by a save that died")
    model.set_alpha("1", 0, 1.0)
    esper.save_model(model, tmp_path)
    assert len(files(tmp_path)) == 3
    assert "notes.txt" in files(tmp_path)
    assert files(tmp_path).keys() & first.keys() == {"lineage.json"}
    x = torch.randn(3, 6)
    assert torch.equal(esper.load_model(tmp_path, net(adapter_store))(x), model(x))


@pytest.mark.parametrize("fails", ["save", "replace"])
def test_a_save_that_fails_leaves_what_was_saved_before(
    adapter_store: Urza, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    model = grown(adapter_store, small)
    esper.save_model(model, tmp_path)
    before, x = files(tmp_path), torch.randn(3, 6)
    expected = model(x)
    model.set_alpha("1", 0, 1.0)

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if fails == "save":
            patch.setattr(torch, "save", full)
        else:
            move = Path.replace
            patch.setattr(Path, "replace", lambda a, b: full() if b.name == "lineage.json" else move(a, b))
        with pytest.raises(OSError, match="no space left"):
            esper.save_model(model, tmp_path)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert not any(name.startswith(".") for name in after)
    assert torch.equal(esper.load_model(tmp_path, net(adapter_store))(x), expected)
    esper.save_model(model, tmp_path)
    assert len(files(tmp_path)) == 2


def test_a_reader_beside_writers_finds_one_whole_model_at_any_time(
    adapter_store: Urza, small: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 6)
    models = [grown(adapter_store, small, draw) for draw in (1, 2)]
    outputs = [model(x) for model in models]
    assert not torch.equal(*outputs)
    esper.save_model(models[0], tmp_path)
    done = threading.Event()

    def write(model: nn.Module) -> None:
        while not done.is_set():
            esper.save_model(model, tmp_path)

    writers = [threading.Thread(target=write, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    try:
        reader = net(adapter_store)
        found = [esper.load_model(tmp_path, reader)(x) for _ in range(30)]
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert all(any(torch.equal(out, expected) for expected in outputs) for out in found)


def _save_and_die(store: str, directory: str, artifact_id: str) -> None:
    torch.set_num_threads(1)
    model = grown(Urza(store), artifact_id, draw=3)
    move = Path.replace

    def die_before_the_commit(path: Path, target: Path) -> Path:
        if target.name == "lineage.json":
            os._exit(9)
        return move(path, target)

    Path.replace = die_before_the_commit  # type: ignore[method-assign]
    saving.save_model(model, directory)


def test_a_crash_before_the_commit_leaves_the_model_before_and_the_next_save_clears_up(
    adapter_store: Urza, small: str, tmp_path: Path
) -> None:
    model = grown(adapter_store, small)
    esper.save_model(model, tmp_path)
    process = multiprocessing.get_context("spawn").Process(
        target=_save_and_die, args=(str(adapter_store.root), str(tmp_path), small)
    )
    process.start()
    process.join(timeout=100)
    assert process.exitcode == 9
    assert len(files(tmp_path)) == 4
    x = torch.randn(3, 6)
    assert torch.equal(esper.load_model(tmp_path, net(adapter_store))(x), model(x))
    esper.save_model(model, tmp_path)
    assert len(files(tmp_path)) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip(next(d.glob("weights-*"))), r"weights-[0-9a-f]{16}\.pt is damaged: SHA-256 expected"),
        (lambda d: (d / "lineage.json").write_text("{"), r"lineage\.json is damaged"),
        (lambda d: (d / "lineage.json").write_text("[]"), "schema_version is None"),
        (
            lambda d: (d / "lineage.json").write_text('{"schema_version": "3.0"}'),
            "schema_version 3.0 is newer than 1.0; upgrade",
        ),
        (lambda d: (d / "lineage.json").write_text('{"schema_version": "1.0"}'), "weights"),
    ],
)
def test_a_damaged_directory_is_one_clear_error_and_nothing_is_changed(
    adapter_store: Urza, small: str, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    esper.save_model(grown(adapter_store, small), tmp_path)
    damage(tmp_path)
    model, x = net(adapter_store, draw=1), torch.randn(3, 6)
    before = model(x)
    with pytest.raises(CheckpointError, match=message):
        esper.load_model(tmp_path, model)
    assert torch.equal(model(x), before)


def test_what_does_not_fit_or_is_not_there_is_said_and_nothing_is_changed(
    store: Urza, adapter_store: Urza, small: str, tmp_path: Path
) -> None:
    copy_artifact(adapter_store, store, small)
    esper.save_model(grown(store, small), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no saved model in .*nowhere: it has no lineage\.json"):
        esper.load_model(tmp_path / "nowhere", net(store))
    bare = nn.Sequential(nn.Linear(6, D), nn.Linear(D, D))
    with pytest.raises(ValueError, match=r"wrap it first: esper_triton.wrap\(model, \['0', '1'\], seeds_per_layer=1\)"):
        esper.load_model(tmp_path, bare)
    other = esper.wrap(nn.Sequential(nn.Linear(5, D), nn.Linear(D, D)), ["0", "1"], seeds_per_layer=1, urza=store)
    x = torch.randn(2, 5)
    before = other(x)
    with pytest.raises(CheckpointError, match=r"'0.weight' is \(16, 6\), the model has \(16, 5\)"):
        esper.load_model(tmp_path, other)
    assert torch.equal(other(x), before)

    (store.root / "refs" / small).unlink()
    model, x = net(store, draw=1), torch.randn(2, 6)
    before = model(x)
    with pytest.raises(CheckpointError, match=f"seed 0 of layer '0': artifact '{small}' cannot be restored"):
        esper.load_model(tmp_path, model)
    assert torch.equal(model(x), before)
    esper.load_model(tmp_path, model, missing="recover")
    assert model.kasmina_layers["0"].seed_state(0) is S.ERROR_RECOVERY
    esper.load_model(tmp_path, model, urza=adapter_store)
    assert model.kasmina_layers["0"].seed_state(0) is S.FOSSILIZED
