from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from growing import QUICK, STEPS, Run, build, command, grown
from seeding import break_launches, copy_artifact
from torch import nn

import esper_triton as esper
from esper_triton.contracts.envelope import COMMANDS
from esper_triton.contracts.errors import CheckpointError, TrainingDiverged
from esper_triton.kasmina import KernelCache, SeedLifecycleState
from esper_triton.model.checkpoints import checkpoints_in
from esper_triton.urza import Urza

S = SeedLifecycleState


@pytest.fixture
def adapter(adapter_for: Callable[..., str]) -> str:
    return adapter_for(16, 4)


def states_of(run: Run, layer: str = "0") -> list[SeedLifecycleState]:
    """Every state that seed 0 of a layer enters from now on."""
    entered: list[SeedLifecycleState] = []
    run.model.kasmina_layers[layer].on_transition(lambda event: entered.append(event.target))
    return entered


def same(a: Run, b: Run) -> bool:
    first, second = a.everything(), b.everything()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_seed_goes_all_the_way_by_the_hook_alone(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store)
    entered = states_of(run)
    run.model.load_kernel_sync("0", 0, adapter)
    fresh = {n: p.detach().clone() for n, p in run.model.kasmina_layers["0"].seed_parameters()}
    for _ in range(3):
        run.step()
    learned = dict(run.model.kasmina_layers["0"].seed_parameters())
    assert any(not torch.equal(fresh[name], learned[name]) for name in fresh)  # in TRAINING, on its own loss
    for epoch in range(6):
        run.epoch(epoch)
    assert entered == [
        S.GERMINATED,
        S.LOADING,
        S.TRAINING,
        S.GRAFTING,
        S.STABILIZATION,
        S.EVALUATING,
        S.FINE_TUNING,
        S.FOSSILIZED,
    ]
    permanent = run.model.kasmina_layers["0"]._kasmina.seeds[0].permanent_evaluation
    assert permanent is not None
    assert permanent.improvement > 0
    assert len(run.hook.metrics) == 6
    assert run.hook.steps == 3 + 6 * STEPS


def test_in_stabilization_a_seeds_parameters_stay_as_they_are(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store)
    run.model.load_kernel_sync("0", 0, adapter)
    layer = run.model.kasmina_layers["0"]
    while layer.seed_state(0) is not S.STABILIZATION:
        run.step()
    before = {n: p.detach().clone() for n, p in layer.seed_parameters()}
    host = layer.weight.detach().clone()
    run.step()
    assert layer.seed_state(0) is S.STABILIZATION
    assert all(torch.equal(before[name], p) for name, p in layer.seed_parameters())
    assert not torch.equal(host, layer.weight)


def test_a_seed_that_does_harm_is_culled(adapter_store: Urza, adapter: str) -> None:
    x = torch.randn(32, 6)

    def difference(model: nn.Module) -> float:
        layer = model[0]
        return float((layer(x) - layer.default_transform(x)).square().mean())

    run = build(adapter_store, validate=difference)
    entered = states_of(run)
    run.model.load_kernel_sync("0", 0, adapter)
    for _ in range(20):
        run.step()
    assert entered[-2:] == [S.EVALUATING, S.CULLED]


def test_a_seed_that_is_undecided_three_times_is_culled(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store, validate=lambda model: 1.0)
    run.model.load_kernel_sync("0", 0, adapter)
    layer = run.model.kasmina_layers["0"]
    run.epoch(0)
    run.epoch(1)  # it comes to EVALUATING in this one
    assert layer.seed_state(0) is S.EVALUATING
    run.epoch(2)
    assert layer.seed_state(0) is S.CULLED


def test_without_validation_a_seed_waits_for_the_user_to_measure_it(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store, validate=None)
    run.model.load_kernel_sync("0", 0, adapter)
    for epoch in range(4):
        run.epoch(epoch)
    assert run.model.kasmina_layers["0"].seed_state(0) is S.EVALUATING
    assert run.hook.metrics == [None] * 4
    layer = run.model.kasmina_layers["0"]
    run.model.evaluate_seed("0", 0, lambda model: 1.0 - float(layer.state.alpha_blend[0]))
    run.step()
    assert run.model.kasmina_layers["0"].seed_state(0) is S.FINE_TUNING


def test_two_runs_are_the_same_and_one_that_was_interrupted_goes_on_as_they_do(
    store: Urza, adapter_store: Urza, adapter: str, tmp_path: Path
) -> None:
    copy_artifact(adapter_store, store, adapter)  # the only one that there is

    def again(directory: Path | None, epochs: int) -> Run:
        KernelCache.process().reset()
        return grown(store, directory, epochs)

    first, second = again(None, 9), again(tmp_path / "second", 9)
    assert same(first, second)
    assert first.losses == second.losses
    assert [layer.seed_state(0) for layer in first.model.kasmina_layers.values()] == [S.FOSSILIZED, S.CULLED]
    half = again(tmp_path / "half", 4)
    half.step()  # after the checkpoint, and lost
    torch.manual_seed(99)
    resumed = again(tmp_path / "half", 9)
    assert resumed.losses == first.losses[4 * STEPS :]
    assert same(first, resumed)
    assert resumed.hook.metrics == first.hook.metrics
    assert resumed.hook.controller.state_dict() == first.hook.controller.state_dict()
    lineages = []
    for run in (first, second, resumed):
        path = esper.save_model(run.model, tmp_path / "grown")
        lineages.append(esper.contracts.lineage.Lineage.model_validate_json(path.read_text()).seeds)
    assert lineages[0] == lineages[1] == lineages[2]
    assert [entry.layer for entry in lineages[0]] == ["0"]


def test_a_process_that_was_killed_is_gone_on_with_in_another_bit_for_bit(
    store: Urza, adapter_store: Urza, adapter: str, tmp_path: Path
) -> None:
    copy_artifact(adapter_store, store, adapter)
    directory = tmp_path / "run"
    script = Path(__file__).with_name("growing.py")
    environment = os.environ | {"PYTHONPATH": str(Path(esper.__file__).parents[1])}  # the package that is tested here
    for dies_in, status in (("4", -signal.SIGKILL), ("", 0)):
        command = [sys.executable, "-W", "error", str(script), str(store.root), str(directory), "9", dies_in]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    finished = torch.load(directory / "finished.pt", weights_only=True)
    straight = grown(store, None, 9)
    assert finished["losses"] == straight.losses[4 * STEPS :]
    mine, others = straight.everything(), finished["everything"]
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_a_seed_whose_kernel_fails_is_culled_by_the_heuristic_and_training_goes_on(
    store: Urza, adapter_store: Urza, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_artifact(adapter_store, store, adapter)
    run = grown(store, None, 1)
    while not (contributing := list(esper.seed_parameters(run.model, S.GRAFTING))):
        run.step()
    assert contributing
    (name,) = [n for n, layer in run.model.kasmina_layers.items() if layer.seed_state(0) is S.GRAFTING]
    break_launches(monkeypatch, run.model.kasmina_layers[name], 0)
    entered = states_of(run, name)
    for _ in range(20):
        assert run.step() is None
    assert entered[:2] == [S.ERROR_RECOVERY, S.CULLED]
    assert all(torch.isfinite(torch.tensor(run.losses)))


def test_a_loop_with_checkpoints_of_its_own_resumes_by_the_hooks_state(
    adapter_store: Urza, adapter: str, tmp_path: Path
) -> None:
    run = build(adapter_store)
    run.model.load_kernel_sync("0", 0, adapter)
    run.epoch(0)
    run.epoch(1)
    saved = {
        "model": run.model.state_dict(),
        "hook": run.hook.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "batches": run.batches.get_state(),
    }
    torch.save(saved, tmp_path / "half.pt")
    other = build(adapter_store)
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other.model.load_state_dict(saved["model"])
    other.hook.load_state_dict(saved["hook"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other.scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
    other.batches.set_state(saved["batches"])
    assert other.hook.epoch == 2
    other.epoch(2)
    torch.set_rng_state(saved["rng"])
    run.epoch(2)
    assert run.losses[-STEPS:] == other.losses
    moved = dict(run.everything()), dict(other.everything())
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in moved[0] if n not in ("python", "numpy"))


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_a_loss_that_is_not_finite_takes_everything_back_and_locks_the_youngest_seed(
    adapter_store: Urza, adapter: str, tmp_path: Path, where: str
) -> None:
    run = build(adapter_store, checkpoints=tmp_path / "run" if where == "directory" else None)
    run.model.load_kernel_sync("3", 0, adapter)
    run.epoch(0)
    before = run.everything()
    run.model.load_kernel_sync("0", 0, adapter)
    run.model.graft("0", 0)
    run.step()
    assert run.model.kasmina_layers["3"].seed_state(0).is_active  # the elder one
    rollback = run.step(factor=float("inf"))
    assert (rollback.layer, rollback.seed, rollback.checkpoint_step) == ("0", 0, STEPS)
    assert rollback.reason == "the loss is inf"
    assert run.hook.rollbacks == [rollback]
    assert run.model.kasmina_layers["0"].seed_state(0) is S.ROLLED_BACK
    after = run.everything()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.0"}  # the state of the seed that was locked
    run.epoch(1)
    assert run.model.kasmina_layers["0"].seed_state(0) is S.ROLLED_BACK
    assert run.hook.epoch == 2


def test_a_loss_far_above_its_median_diverges_after_some_steps(adapter_store: Urza) -> None:
    run = build(adapter_store, divergence=esper.LossWatch(factor=5.0, patience=3))
    run.epoch(0)
    run.epoch(1)
    assert run.step(factor=50.0) is None
    assert run.step() is None  # it was a single one
    assert [run.step(factor=50.0) for _ in range(2)] == [None, None]
    rollback = run.step(factor=50.0)
    assert rollback.checkpoint_step == 2 * STEPS
    assert "for 3 steps above" in rollback.reason
    assert rollback.layer is None


def test_a_run_that_diverges_again_and_again_ends(adapter_store: Urza) -> None:
    run = build(adapter_store, max_rollbacks=2)
    run.epoch(0)
    for _ in range(2):
        assert run.step(factor=float("nan")) is not None
    with pytest.raises(TrainingDiverged, match=r"the loss is nan; .* step 6 2 times already"):
        run.step(factor=float("nan"))


def test_damaged_state_arrays_take_everything_back(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store)
    run.epoch(0)
    run.model.load_kernel_sync("0", 0, adapter)
    run.model.graft("0", 0)
    for _ in range(2):
        run.step()
    run.model.kasmina_layers["0"].state.storage[3] += 1
    rollback = run.hook.epoch_end(1)
    assert (rollback.layer, rollback.seed, rollback.checkpoint_step) == ("0", 0, STEPS)
    assert "state arrays differ" in rollback.reason
    run.epoch(2)  # and they are whole again


def test_an_infinite_validation_metric_takes_everything_back(adapter_store: Urza) -> None:
    run = build(adapter_store)
    run.epoch(0)
    assert run.hook.epoch_end(1, metric=float("inf")).reason == "the validation metric is inf"


@pytest.mark.parametrize("by", ["a call", "a command", "the bus"])
def test_a_seed_that_is_rolled_back_takes_the_whole_run_back(adapter_store: Urza, adapter: str, by: str) -> None:
    manual = esper.Manual()
    run = build(adapter_store, controller=manual, control_every=1)
    run.epoch(0)
    weight = run.model.state_dict()["0.weight"].clone()
    manual.submit(command("request_germination", artifact_id=adapter))
    run.step()
    assert run.model.kasmina_layers["0"].seed_state(0) is S.TRAINING
    run.model.graft("0", 0)
    run.step()
    if by == "a call":
        run.model.rollback("0", 0)
    elif by == "the bus":
        with esper.Oona() as bus:
            remote = esper.connect(run.model, bus)
            bus.publish(COMMANDS, command("rollback"))
            assert bus.flush()
            rollback = None
            for _ in range(5):
                rollback = rollback or run.step()
            remote.close()
    else:
        manual.submit(command("rollback"))
        assert run.step() is None  # the command comes between two steps
    if by != "the bus":
        assert not torch.equal(run.model.state_dict()["0.weight"], weight)
        rollback = run.step()
        assert torch.equal(run.model.state_dict()["0.weight"], weight)
    assert (rollback.layer, rollback.seed, rollback.reason) == ("0", 0, "it was asked for")
    assert run.model.kasmina_layers["0"].seed_state(0) is S.ROLLED_BACK
    run.step()
    assert manual.results["request_germination-0-0"].status == "applied"


def test_going_back_tells_only_of_the_seeds_that_it_moves(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store)
    run.model.load_kernel_sync("3", 0, adapter)
    for epoch in range(4):
        run.epoch(epoch)
    assert run.model.kasmina_layers["3"].seed_state(0) is S.FOSSILIZED
    run.model.load_kernel_sync("0", 0, adapter)
    run.model.graft("0", 0)
    permanent, young = states_of(run, "3"), states_of(run, "0")
    assert run.step(factor=float("nan")) is not None
    assert permanent == []
    assert young == [S.DORMANT, S.ROLLED_BACK]


def test_commands_that_cannot_be_carried_out_are_answered_with_the_reason(
    adapter_store: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    manual = esper.Manual()
    run = build(adapter_store, controller=manual, control_every=1)
    manual.submit(command("cull", layer="4", reason="it is in the way"))
    manual.submit(command("cull", layer="3"))
    manual.submit(command("reset", layer="0", seed=9))
    manual.submit(command("request_germination", layer="0", artifact_id="0" * 12 + "-cpu-standard-" + "0" * 12))
    manual.submit(command("set_alpha", layer="0", alpha=0.5, deadline=1.0))
    with caplog.at_level(logging.INFO, logger="esper_triton.model"):
        run.step()
    assert "it is in the way" in caplog.text
    run.step()
    found = {name: (result.status.value, result.reason) for name, result in manual.results.items()}
    assert found["cull-4-0"][0] == "refused"
    assert "no wrapped layer '4'" in found["cull-4-0"][1]
    assert "cannot go from DORMANT to CULLED" in found["cull-3-0"][1]
    assert "has seeds 0 to 0" in found["reset-0-9"][1]
    assert found["request_germination-0-0"][0] == "failed"
    assert found["set_alpha-0-0"][0] == "expired"


def test_the_last_checkpoints_stay_and_a_damaged_one_is_passed_over(
    adapter_store: Urza, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build(adapter_store, checkpoints=tmp_path / "run", keep=2)
    for epoch in range(3):
        run.epoch(epoch)
    found = checkpoints_in(tmp_path / "run")
    assert [int(path.name[11:21]) for path in found] == [2 * STEPS, 3 * STEPS]
    assert sorted(tmp_path.joinpath("run").iterdir()) == found
    content = bytearray(found[1].read_bytes())
    content[len(content) // 2] ^= 1
    found[1].write_bytes(content)
    other = build(adapter_store, checkpoints=tmp_path / "run", keep=2)
    with caplog.at_level(logging.WARNING):
        assert other.hook.resume() == 2
    assert "checkpoint_passed_over" in caplog.text
    found[0].write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be read: .*checkpoint-0000000018.*; .*checkpoint-0000000012"
    ):
        other.hook.resume()


def test_a_directory_with_another_runs_checkpoints_is_not_written_to(adapter_store: Urza, tmp_path: Path) -> None:
    build(adapter_store, checkpoints=tmp_path / "run").hook.resume()
    other = build(adapter_store, checkpoints=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"has 1 checkpoints of another run.*hook\.resume\(\)"):
        other.step()


def test_a_checkpoint_that_does_not_fit_changes_nothing(adapter_store: Urza, tmp_path: Path) -> None:
    run = build(adapter_store, checkpoints=tmp_path / "run")
    run.epoch(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8)), ["0"], seeds_per_layer=1, urza=adapter_store)
    optimizer = torch.optim.AdamW(model.parameters())
    hook = esper.GrowthHook(model, optimizer, checkpoints=tmp_path / "run")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'0\.weight' is .*it has 1 schedulers, this run has 0; it carries"):
        hook.resume()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_checkpoint_is_taken_of_weights_that_are_not_finite(adapter_store: Urza) -> None:
    run = build(adapter_store)
    assert run.hook.checkpoint()
    with torch.no_grad():
        run.model.get_parameter("3.bias")[0] = float("nan")
    assert not run.hook.checkpoint()


def test_accumulated_gradients_make_one_step(adapter_store: Urza) -> None:
    run = build(adapter_store)
    for _ in range(3):
        x, y = run.batch()
        loss = (run.model(x) - y).square().mean()
        loss.backward()
        assert run.hook.step(loss) is None
    assert run.hook.steps == 0
    run.optimizer.step()
    run.hook.step()
    assert run.hook.steps == 1
    assert run.model.kasmina_layers["0"]._kasmina.step == 1


def test_a_closed_hook_leaves_nothing_behind(adapter_store: Urza, adapter: str) -> None:
    run = build(adapter_store)
    with run.hook:
        run.step()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    assert not run.model.kasmina_layers["0"]._kasmina.observers
    assert not run.model.kasmina_layers["0"]._forward_hooks


def test_what_cannot_be_hooked_is_refused_with_the_reason(adapter_store: Urza) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        esper.GrowthHook(model, optimizer)
    run = build(adapter_store)
    for options, message in (
        ({"repeats": 1}, "repeats must be at least 2, found 1"),
        ({"keep": 0, "checkpoints": "never"}, "keep must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(adapter_store, **options)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        run.hook.epoch_end(-1)


def test_the_policy_of_these_tests_has_every_stage(adapter_store: Urza) -> None:
    assert min(QUICK.stabilization_steps, QUICK.fine_tuning_steps, QUICK.to_grafting.max_steps) > 1
