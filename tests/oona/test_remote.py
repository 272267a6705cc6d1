"""A model on the bus: commands at its boundaries, and what it tells."""

from __future__ import annotations

import copy
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bus_servers import HubServer, eventually
from torch import nn

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.envelope import COMMANDS, EPOCH, FIELD_REPORTS, HEALTH, LIFECYCLE, RESULTS, STORE, SUBMITTED
from esper_triton.contracts.errors import StateCorruption
from esper_triton.contracts.health import HealthFrame, health_score
from esper_triton.kasmina import KernelCache, Policy
from esper_triton.kasmina.lifecycle import SeedLifecycleState as S
from esper_triton.model import Remote
from esper_triton.oona import Oona
from esper_triton.urza import Urza

D, R = 16, 4
ACTIVATIONS = ("activation_variance", "dead_neuron_ratio", "avg_correlation")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture
def bus() -> Iterator[Oona]:
    with Oona() as bus:
        yield bus


def wrapped(store: Urza, policy: Policy | None = None) -> esper.MorphableModel:
    host = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, 2 * D))
    return esper.wrap(host, ["0", "2"], seeds_per_layer=2, urza=store, policy=policy)


@pytest.fixture
def remote(adapter_store: Urza, bus: Oona) -> Iterator[Remote]:
    remote = esper.connect(wrapped(adapter_store), bus)
    yield remote
    remote.close()


def command(kind: CommandKind, *, layer: str = "0", seed: int = 0, **fields: object) -> KasminaCommand:
    return KasminaCommand(command_id=uuid.uuid4().hex, layer=layer, seed=seed, command=kind, **fields)


def carried_out(remote: Remote, *commands: KasminaCommand | dict[str, object]) -> list[CommandResult]:
    """The answers to commands that are sent together and followed by as many boundaries as it takes."""
    with remote.bus.subscribe(RESULTS) as results:
        for one in commands:
            remote.bus.publish(COMMANDS, one)
        assert remote.bus.flush()
        found: list[CommandResult] = []
        until = time.monotonic() + 30.0
        while len(found) < len(commands):
            assert time.monotonic() < until, found
            remote.model.step_boundary()
            while (delivery := results.get(0.05)) is not None:
                found.append(delivery.parse())
        return found


def test_a_seed_is_grown_by_commands_alone(remote: Remote, adapter_for: Callable[..., str]) -> None:
    artifact, layer = adapter_for(D, R), remote.model.kasmina_layers["0"]
    (grown,) = carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=artifact))
    assert (grown.status, grown.state) == (CommandStatus.APPLIED, "TRAINING")
    assert layer.seed_state(0) is S.TRAINING
    (ramped,) = carried_out(remote, command(CommandKind.ADVANCE, strategy="linear:4"))
    assert (ramped.status, ramped.state) == (CommandStatus.APPLIED, "GRAFTING")
    remote.model.step_boundary()
    assert layer.get_layer_stats()["seeds"][0]["alpha"] > 0.0
    (alpha,) = carried_out(remote, command(CommandKind.SET_ALPHA, alpha=0.25))
    assert alpha.status is CommandStatus.APPLIED
    assert layer.get_layer_stats()["seeds"][0]["alpha"] == 0.25
    states = [carried_out(remote, command(CommandKind.ADVANCE))[0].state for _ in range(4)]
    assert states == ["STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]
    (too_far,) = carried_out(remote, command(CommandKind.ADVANCE))
    assert too_far.status is CommandStatus.REFUSED
    assert "nothing follows" in too_far.reason


def test_a_kernel_that_is_not_what_was_proven_is_refused_and_told_on_the_bus(
    adapter_store: Urza, adapter_for: Callable[..., str], bus: Oona, tmp_path: Path
) -> None:
    artifact = adapter_for(D, R)
    shutil.copytree(adapter_store.root, tmp_path / "urza")
    store = Urza(tmp_path / "urza")
    digest = next(iter(store.get(artifact).manifest.kernels.values())).binary
    with open(store.object_path(digest), "r+b") as file:
        file.write(b"changed")
    remote = esper.connect(wrapped(store), bus)
    with bus.subscribe(STORE) as events:
        (refused,) = carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=artifact))
        delivery = events.get(30.0)
        assert delivery is not None
        event = delivery.parse()
        remote.close()
        assert refused.status is CommandStatus.FAILED
        assert (event.kind, event.artifact_id, event.model) == ("quarantined", artifact, "model")
        assert event.store == str(store.root)
        assert f"SHA-256 expected {digest}" in event.message
        assert event.details["file"].startswith(str(store.root / "quarantine"))
        store.pin(artifact)
        store.drop(artifact)
        assert events.get(0.2) is None, "after it was closed, nothing more"


def test_a_seed_is_taken_out_and_its_slot_opened_by_commands(remote: Remote, adapter_for: Callable[..., str]) -> None:
    for kind, state in ((CommandKind.CANCEL, "CANCELLED"), (CommandKind.CULL, "CULLED")):
        carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R)))
        (gone,) = carried_out(remote, command(kind))
        assert (gone.status, gone.state) == (CommandStatus.APPLIED, state)
        (opened,) = carried_out(remote, command(CommandKind.RESET, force=True))
        assert (opened.status, opened.state) == (CommandStatus.APPLIED, "DORMANT")
    carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R)))
    (unloaded,) = carried_out(remote, command(CommandKind.UNLOAD))
    assert (unloaded.status, unloaded.state) == (CommandStatus.APPLIED, "DORMANT")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer": "00"}, "no layer '00'; did you mean '0'"),
        ({"seed": 2}, "has seeds 0 to 1, found 2"),
        ({"command": CommandKind.CULL}, "cannot go from DORMANT to CULLED; allowed: GERMINATED"),
        ({"command": CommandKind.SET_ALPHA, "alpha": 0.5}, "alpha is set from GRAFTING to FINE_TUNING"),
        ({"command": CommandKind.ADVANCE}, "is DORMANT: nothing follows it"),
        ({"command": CommandKind.ADVANCE, "target": "GRAFTIN"}, "no state 'GRAFTIN'; did you mean 'GRAFTING'"),
        ({"command": CommandKind.ADVANCE, "target": "GRAFTING", "strategy": "linear"}, "as linear:1000"),
        ({"command": CommandKind.ADVANCE, "target": "GRAFTING", "strategy": "lineal:9"}, "did you mean 'linear'"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_refused_with_the_reason_and_changes_nothing(
    remote: Remote, fields: dict[str, object], said: str
) -> None:
    asked = command(fields.pop("command", CommandKind.CULL), **fields)
    (result,) = carried_out(remote, asked)
    assert (result.command_id, result.status) == (asked.command_id, CommandStatus.REFUSED)
    assert said in result.reason
    for layer in remote.model.kasmina_layers.values():
        assert [layer.seed_state(seed) for seed in range(2)] == [S.DORMANT] * 2


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({}, "command_id: Field required"),
        ({"command_id": "c", "layer": "0", "seed": 0, "command": "explode"}, "command: Input should be 'request_germ"),
        ({"command_id": "c", "layer": "0", "seed": 0, "command": "cull", "colour": "red"}, "colour: Extra inputs"),
        ({"command_id": "c", "layer": "0", "seed": 0, "command": "set_alpha"}, "set_alpha needs alpha"),
        ({"command_id": "c", "layer": "0", "seed": 0, "command": "set_alpha", "alpha": 1.5}, "alpha: Input should be"),
        ({"command_id": "c", "layer": "0", "seed": 0, "command": "cull", "schema_version": "2.0"}, "newer than 1.0"),
        ({"command_id": 7, "layer": ["0"], "seed": "x", "command": None}, "layer: Input should be a valid string"),
    ],
)
def test_what_is_no_command_is_refused_by_its_id_with_every_fault(
    remote: Remote, payload: dict[str, object], said: str
) -> None:
    (result,) = carried_out(remote, payload)
    assert result.status is CommandStatus.REFUSED
    assert said in result.reason
    if payload.get("command_id") == "c":
        assert result.command_id == "c"


def test_a_command_is_carried_out_once_and_answered_each_time(remote: Remote, adapter_for: Callable[..., str]) -> None:
    layer, entered = remote.model.kasmina_layers["0"], []
    layer.on_transition(lambda event: entered.append(event.target))
    load = command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R))
    first, *_ = carried_out(remote, load)
    again, *_ = carried_out(remote, load)
    assert again == first
    graft = command(CommandKind.ADVANCE)
    results = carried_out(remote, graft) + carried_out(remote, graft)
    assert [r.state for r in results] == ["GRAFTING", "GRAFTING"]
    assert entered == [S.GERMINATED, S.LOADING, S.TRAINING, S.GRAFTING]


def test_a_command_whose_deadline_is_over_is_not_carried_out(remote: Remote, adapter_for: Callable[..., str]) -> None:
    late = command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R), deadline=time.time() - 1.0)
    (result,) = carried_out(remote, late)
    assert result.status is CommandStatus.EXPIRED
    assert remote.model.kasmina_layers["0"].seed_state(0) is S.DORMANT


def test_a_load_that_fails_is_answered_with_its_reason(remote: Remote) -> None:
    missing = "0" * 12 + "-cpu-standard-" + "0" * 12
    (result,) = carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=missing))
    assert (result.status, result.state) == (CommandStatus.FAILED, "CULLED")
    assert "ArtifactNotFound" in result.reason


def test_a_move_that_a_fault_has_caused_names_its_class_and_no_other_does(remote: Remote) -> None:
    with remote.bus.subscribe(LIFECYCLE) as audit:
        carried_out(
            remote, command(CommandKind.REQUEST_GERMINATION, artifact_id="0123456789ab-cpu-standard-0123456789ab")
        )
        events = [audit.get(10.0).parse() for _ in range(3)]
    assert [(event.target, event.error) for event in events] == [
        ("GERMINATED", None),
        ("LOADING", None),
        ("CULLED", "ArtifactNotFound"),
    ]


def test_nothing_happens_before_a_boundary_and_within_a_step_everything_waits_for_its_end(
    remote: Remote, adapter_for: Callable[..., str]
) -> None:
    carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R)))
    layer = remote.model.kasmina_layers["0"]
    with remote.bus.subscribe(RESULTS) as results:
        with remote.model.within_step():
            remote.bus.publish(COMMANDS, command(CommandKind.ADVANCE))
            remote.bus.flush()
            eventually(lambda: len(remote._commands) > 0)
            remote.model(torch.randn(2, D))
            assert layer.seed_state(0) is S.TRAINING
        assert layer.seed_state(0) is S.GRAFTING
        assert results.get(10.0).parse().state == "GRAFTING"


def test_a_request_that_a_fault_overtakes_is_answered_as_failed(
    remote: Remote, adapter_for: Callable[..., str]
) -> None:
    carried_out(remote, command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R)))
    carried_out(remote, command(CommandKind.ADVANCE))
    layer = remote.model.kasmina_layers["0"]
    remote.model.defer_transitions()
    layer._kasmina.seeds[0].fault(RuntimeError("in this step"))
    (result,) = carried_out(remote, command(CommandKind.SET_ALPHA, alpha=0.5))
    assert result.status is CommandStatus.FAILED
    assert layer.seed_state(0) in (S.ERROR_RECOVERY, S.CULLED)


def test_commands_to_another_model_are_left_alone(remote: Remote) -> None:
    with remote.bus.subscribe(RESULTS) as results:
        remote.bus.publish(COMMANDS, command(CommandKind.CULL, model="another"))
        remote.bus.flush()
        eventually(lambda: len(remote._commands) > 0)
        remote.model.step_boundary()
        assert results.get(0.1) is None
        assert not remote._commands.held()


def test_transitions_reports_and_traces_follow_an_artifact(remote: Remote, adapter_for: Callable[..., str]) -> None:
    artifact = adapter_for(D, R)
    with remote.bus.subscribe(LIFECYCLE) as audit, remote.bus.subscribe(FIELD_REPORTS) as reports:
        asked = command(CommandKind.REQUEST_GERMINATION, artifact_id=artifact, seed=1)
        remote.bus.publish(COMMANDS, asked, trace_id="trace-7")
        remote.bus.flush()
        eventually(lambda: len(remote._commands) > 0)
        eventually(lambda: remote.model.step_boundary() or remote.model.kasmina_layers["0"].seed_state(1) is S.TRAINING)
        carried_out(remote, command(CommandKind.CULL, seed=1))
        events = [audit.get(10.0) for _ in range(4)]
        assert [(e.parse().source, e.parse().target) for e in events] == [
            ("DORMANT", "GERMINATED"),
            ("GERMINATED", "LOADING"),
            ("LOADING", "TRAINING"),
            ("TRAINING", "CULLED"),
        ]
        assert {e.envelope.trace_id for e in events} == {"trace-7"}
        assert {(e.parse().layer, e.parse().seed) for e in events} == {("0", 1)}
        report = reports.get(10.0)
        assert (report.parse().outcome, report.parse().artifact_id) == ("CULLED", artifact)
        assert report.envelope.trace_id == "trace-7"


def test_a_missing_specialisation_goes_out_as_a_request_to_compile(
    remote: Remote, adapter_for: Callable[..., str], adapter_store: Urza
) -> None:
    artifact = adapter_for(D, R)
    for one in (
        command(CommandKind.REQUEST_GERMINATION, artifact_id=artifact),
        command(CommandKind.ADVANCE),
        command(CommandKind.SET_ALPHA, alpha=0.5),
    ):
        carried_out(remote, one)
    with remote.bus.subscribe(SUBMITTED, "forge") as jobs:
        layer = remote.model.kasmina_layers["0"]
        nn.Module.double(remote.model)
        layer(torch.randn(2, D, dtype=torch.float64))
        remote.model.step_boundary()
        request = jobs.get(10.0).parse()
    assert (request.reason, request.like_artifact_id) == ("specialisation_miss", artifact)
    assert (request.dtype, request.layer, request.seed) == ("float64", "0", 0)
    assert request.targets == (adapter_store.get(artifact).manifest.target,)


@pytest.mark.parametrize("sampled", [False, True])
def test_health_of_all_seeds_comes_in_one_message_and_what_was_not_measured_is_null(
    bus: Oona, adapter_store: Urza, adapter_for: Callable[..., str], sampled: bool
) -> None:
    remote = esper.connect(wrapped(adapter_store, Policy(statistics_every=int(sampled))), bus)
    for one in (
        command(CommandKind.REQUEST_GERMINATION, artifact_id=adapter_for(D, R)),
        command(CommandKind.ADVANCE),
        command(CommandKind.SET_ALPHA, alpha=0.5),
    ):
        carried_out(remote, one)
    with remote.bus.subscribe(HEALTH) as health:
        remote.model(torch.randn(3, D))
        remote.model.step_boundary()
        remote.publish_health()
        frame = health.get(10.0).parse()
    assert isinstance(frame, HealthFrame)
    signals = {(s.layer, s.seed): s for s in frame.signals()}
    assert sorted(signals) == [("0", 0), ("0", 1), ("2", 0), ("2", 1)]
    stats = remote.model.kasmina_layers["0"].get_layer_stats()
    grown, dormant = signals["0", 0], signals["2", 1]
    cache = stats["cache"]
    ratio = cache["hits"] / (cache["hits"] + cache["misses"])
    latency = stats["seeds"][0]["exec_latency_us"]
    assert (grown.state, grown.alpha, grown.chunk) == ("GRAFTING", 0.5, (0, D))
    assert grown.execution_latency_us == latency > 0
    assert grown.cache_hit_ratio == ratio
    assert grown.health_score == pytest.approx(health_score(latency, 0.0, ratio, budget_us=1000.0), abs=1e-12)
    measured = [stats["seeds"][0][name] for name in (*ACTIVATIONS, "kernel_load_latency_us")]
    assert [getattr(grown, name) for name in (*ACTIVATIONS, "kernel_load_latency_us")] == measured
    assert [value is not None for value in measured] == [sampled, sampled, sampled, True]
    assert (dormant.state, dormant.execution_latency_us, dormant.health_score) == ("DORMANT", None, None)
    assert {getattr(dormant, name) for name in (*ACTIVATIONS, "kernel_load_latency_us")} == {None}
    remote.close()


@pytest.mark.parametrize(
    ("latency", "errors", "hits", "score"),
    [
        (0.0, 0.0, 1.0, 1.0),
        (500.0, 0.1, 0.5, 0.5),
        (9e9, 1.0, 0.0, 0.0),
        (None, 0.0, 1.0, None),
        (1.0, None, 1.0, None),
    ],
)
def test_the_health_score_is_that_of_the_contract(
    latency: float | None, errors: float | None, hits: float, score: float | None
) -> None:
    assert health_score(latency, errors, hits, budget_us=1000.0) == (None if score is None else pytest.approx(score))


def test_an_epoch_is_announced_with_the_seeds_by_state_and_so_is_damage(remote: Remote) -> None:
    with remote.bus.subscribe(EPOCH) as epochs, remote.bus.subscribe(HEALTH) as health:
        remote.model.epoch_boundary(3)
        event = epochs.get(10.0).parse()
        assert (event.epoch, event.seeds_by_state, event.damaged) == (3, {"DORMANT": 4}, {})
        assert event.cache == KernelCache.process().stats()._asdict()
        assert set(health.get(10.0).parse().epochs) == {3}
        remote.model.kasmina_layers["2"].state.alpha_blend[0] = 0.5
        with pytest.raises(StateCorruption):
            remote.model.epoch_boundary(4)
        assert epochs.get(10.0).parse().damaged == {"2": ("alpha_blend",)}


def test_health_is_published_every_so_many_boundaries(adapter_store: Urza, bus: Oona) -> None:
    remote = esper.connect(wrapped(adapter_store), bus, health_every=3)
    with bus.subscribe(HEALTH) as health:
        for _ in range(7):
            remote.model.step_boundary()
        bus.flush()
        assert [health.get(10.0).parse().steps for _ in range(2)] == [(3, 3), (6, 6)]
        assert health.get(0.05) is None
    remote.close()


def test_a_model_that_is_off_the_bus_tells_nothing_and_takes_nothing(remote: Remote, adapter_store: Urza) -> None:
    with pytest.raises(ValueError, match="on a bus already"):
        esper.connect(remote.model, remote.bus)
    twin = copy.deepcopy(remote.model)
    with remote.bus.subscribe("*") as everything:
        twin.step_boundary()
        twin.epoch_boundary(1)
        remote.close()
        remote.model.epoch_boundary(1)
        remote.bus.publish(COMMANDS, command(CommandKind.CULL))
        remote.bus.flush()
        remote.model.step_boundary()
        assert everything.get(10.0).envelope.topic == COMMANDS
        assert everything.get(0.05) is None
    with pytest.raises(ValueError, match="not wrapped"):
        esper.connect(nn.Linear(2, 2), remote.bus)


def test_an_unwrapped_model_has_no_layer_to_command_and_its_health_is_empty(remote: Remote) -> None:
    layers = remote.model.kasmina_layers
    model = remote.model
    esper.unwrap(model)
    assert "_kasmina" not in vars(layers["0"])
    assert remote.publish_health()
    remote.bus.publish(COMMANDS, asked := command(CommandKind.CULL))
    with remote.bus.subscribe(RESULTS) as results:
        eventually(lambda: len(remote._commands) > 0)
        remote.before_boundary()
        answer = results.get(10.0).parse()
    assert (answer.command_id, answer.status) == (asked.command_id, CommandStatus.REFUSED)


def test_commands_over_a_hub_that_is_killed_are_each_applied_once_and_answered(
    hub: HubServer, bus_to: Callable[..., Oona], adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    count = 300
    trainer, operator = bus_to(hub, name="trainer"), bus_to(hub, name="operator")
    remote = esper.connect(wrapped(adapter_store), trainer)
    layer = remote.model.kasmina_layers["0"]
    assert layer.load_kernel_sync(0, adapter_for(D, R))
    layer.graft(0)
    applied: list[float] = []
    set_alpha = type(layer).set_alpha
    with pytest.MonkeyPatch.context() as patch, operator.subscribe(RESULTS) as results:

        def counted(own: esper.KasminaLayer, seed: int, value: float) -> None:
            applied.append(value)
            set_alpha(own, seed, value)

        patch.setattr(esper.KasminaLayer, "set_alpha", counted)
        asked = [command(CommandKind.SET_ALPHA, alpha=k / count) for k in range(count)]
        answers: dict[str, CommandStatus] = {}
        until = time.monotonic() + 60.0
        sent = 0
        while len(answers) < count:
            assert time.monotonic() < until, (sent, len(answers))
            if sent < count:
                assert operator.publish(COMMANDS, asked[sent])
                sent += 1
                if sent in (80, 200):
                    hub.kill()
                if sent in (120, 240):
                    hub.start()
            remote.model.step_boundary()
            while (delivery := results.poll()) is not None:
                result = delivery.parse()
                answers[result.command_id] = result.status
            time.sleep(0.001)
    assert applied == [k / count for k in range(count)]
    assert answers == {one.command_id: CommandStatus.APPLIED for one in asked}
    remote.close()


def test_the_token_of_a_trainer_in_the_page_is_enough_for_a_model(
    tmp_path: Path, bus_to: Callable[..., Oona], adapter_store: Urza
) -> None:
    page = (Path(esper.__file__).parents[1] / "docs" / "oona.md").read_text(encoding="utf-8")
    (block,) = [part.split("```")[0] for part in page.split("```toml\n")[1:] if part.startswith("[[token]]")]
    (tmp_path / "tokens.toml").write_text(block.replace("...", "0123456789abcdef", 1), encoding="utf-8")
    guarded = HubServer(tmp_path, "--token-file", str(tmp_path / "tokens.toml")).start()
    try:
        bus = bus_to(guarded, name="trainer", token="0123456789abcdef")
        remote = esper.connect(wrapped(adapter_store), bus)
        remote.model.epoch_boundary(1)
        remote.model.step_boundary()
        assert bus.flush()
        remote.close()
        sent = bus.stats()["sent"]
        assert {topic: counts["refused"] for topic, counts in sent.items() if counts["refused"]} == {}
        assert sent[EPOCH]["sent"] == sent[HEALTH]["sent"] == 1
    finally:
        guarded.stop()
