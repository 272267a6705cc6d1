from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seeding import copy_artifact
from systems import form, gradients, system

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.urza import Urza

D = 16


@pytest.fixture
def adapter(adapter_for: Callable[..., str], adapter_store: Urza, kernels: Urza) -> str:
    """The only kernel in `kernels`."""
    return copy_artifact(adapter_store, kernels, adapter_for(D, 4))


@pytest.fixture
def kernels(tmp_path: Path) -> Urza:
    return esper.Urza(tmp_path / "kernels")


@pytest.fixture
def controller(kernels: Urza, adapter: str) -> esper.Heuristic:
    return esper.Heuristic(kernels, plateau_epochs=0)


def free(*, at: int = 100, **bottlenecks: float | None) -> list[Any]:
    """Layers with a free seed and these bottlenecks."""
    return [(form(n), None if b is None else gradients(b, step=at), ["DORMANT"]) for n, b in bottlenecks.items()]


def test_the_layer_with_the_largest_bottleneck_is_tried_and_the_reason_is_said_in_words(
    controller: esper.Heuristic, adapter: str
) -> None:
    (command,) = controller.step(system(free(a=0.5, b=2.0, c=1.0, d=None)))
    assert (command.command, command.layer, command.seed) == (CommandKind.REQUEST_GERMINATION, "b", 0)
    assert command.artifact_id == adapter
    assert command.reason == controller.explanation
    assert command.reason.startswith(
        "layer 'b' has the largest bottleneck, 2 (then 'c', 1): 25% of what the loss asks of its output its weights "
        "cannot give. bottleneck_adapter (d=16, r=4) fits its 16 features"
    )


def test_gradients_are_asked_for_when_they_decide_something_and_not_before(kernels: Urza, adapter: str) -> None:
    controller = esper.Heuristic(kernels, plateau_epochs=1)
    improving, flat = {"metrics": (2.0, 1.0)}, {"metrics": (1.0, 1.0)}
    assert controller.step(system(free(a=None, b=None), step=10, **improving)) == []
    assert not controller.needs_gradients
    assert controller.step(system(free(a=None, b=None), step=20, **flat)) == []
    assert controller.needs_gradients
    assert controller.explanation == "waits for what the loss asks of 2 layers to be measured"
    (command,) = controller.step(system(free(a=1.0, b=2.0, at=25), step=30, **flat))
    assert command.layer == "b"
    assert not controller.needs_gradients
    layers = free(a=1.0, b=2.0, at=25)
    layers[1] = (form("b"), gradients(2.0, step=25), ["FOSSILIZED"])
    assert controller.step(system(layers, step=500, artifacts={("b", 0): adapter}, **flat)) == []
    assert controller.needs_gradients  # those are of the model as it was before
    assert controller.step(system([(form("a", x_width=3), None, ["DORMANT"])], step=510, width=15, **flat)) == []
    assert not controller.needs_gradients  # no kernel fits, whatever they say


def test_what_cannot_be_measured_is_not_measured_for_ever(kernels: Urza, adapter: str) -> None:
    controller = esper.Heuristic(kernels, plateau_epochs=0, embargo_epochs=3)
    no_kernel_fits = (form("wide", x_width=3), gradients(1.0, step=95), ["FOSSILIZED"])
    layers = [no_kernel_fits, (form("norm"), None, ["DORMANT"])]
    assert controller.step(system(layers, step=90, epoch=5)) == []
    assert controller.needs_gradients
    assert controller.step(system(layers, step=100, epoch=5)) == []  # a round has ended, without that layer
    assert not controller.needs_gradients
    assert controller.explanation.startswith("what the loss asks of layer 'norm' that a kernel fits could not be")
    assert controller.step(system(layers, step=150, epoch=7)) == []
    assert not controller.needs_gradients
    assert controller.step(system(layers, step=200, epoch=8)) == []
    assert controller.needs_gradients
    for epoch, needs in ((9, True), (10, False), (12, False), (13, True)):  # no round ends at all
        assert controller.step(system(layers[1:], step=100 * epoch, epoch=epoch)) == []
        assert controller.needs_gradients is needs


def test_what_a_kernel_cannot_reach_because_it_sees_too_little_does_not_count(
    controller: esper.Heuristic, adapter: str
) -> None:
    layers = [
        (form("behind one unit"), gradients(3.0, rank=1), ["DORMANT"]),  # 3 sqrt(1 / 16)
        (form("wide enough"), gradients(1.0, rank=16), ["DORMANT"]),
        (form("wider"), gradients(0.5, rank=64), ["DORMANT"]),
    ]
    (command,) = controller.step(system(layers))
    assert command.layer == "wide enough"
    assert command.reason.startswith(
        "layer 'wide enough' has the largest bottleneck, 1 (then 'behind one unit', 0.75 of 3, as a kernel sees "
        "1 number for 16 features): "
    )
    layers[0] = (form("behind one unit"), gradients(5.0, rank=1), ["DORMANT"])
    (command,) = esper.Heuristic(controller._urza, plateau_epochs=0).step(system(layers))
    assert command.layer == "behind one unit"


def test_one_seed_at_a_time_and_none_before_the_warmup(controller: esper.Heuristic, adapter: str) -> None:
    assert controller.step(system(free(a=1.0), epoch=0)) == []
    assert controller.explanation == "waits for epoch 1 (warmup_epochs); it is 0"
    (command,) = controller.step(system(free(a=1.0, b=0.5)))
    layers = free(a=1.0, b=0.5)
    for state in ("LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING"):
        layers[0] = (form("a"), gradients(1.0), [state])
        assert controller.step(system(layers, artifacts={("a", 0): command.artifact_id})) == []
        assert controller.explanation == f"waits for seed 0 of layer 'a', which is in {state}: one at a time"


def test_while_the_metric_still_gets_better_the_host_is_left_to_itself(kernels: Urza, adapter: str) -> None:
    for metrics, better_is_lower, acts in (
        ((3.0, 2.0, 1.9, 1.8), True, False),
        ((3.0, 2.0, 2.1, 2.0), True, True),
        ((0.7, 0.8, 0.8, 0.7), False, True),
        ((0.7, 0.8, 0.8, 0.9), False, False),
        ((3.0, 2.0), True, False),
        ((None, None, None, None), True, True),
        ((), True, True),
    ):
        controller = esper.Heuristic(kernels, plateau_epochs=2)
        commands = controller.step(system(free(a=1.0), metrics=metrics, lower_is_better=better_is_lower))
        assert bool(commands) is acts, (metrics, controller.explanation)


@pytest.mark.parametrize("gone", ["CULLED", "ROLLED_BACK", "CANCELLED", "DORMANT", "refused"])
def test_after_a_failure_the_layer_is_left_alone_and_the_kernel_not_tried_there_again(
    controller: esper.Heuristic, adapter: str, gone: str
) -> None:
    (command,) = controller.step(system(free(a=2.0, b=1.0), epoch=10))
    layers = free(a=2.0, b=1.0)
    results: tuple[CommandResult, ...] = ()
    if gone == "refused":
        results = (
            CommandResult(command_id=command.command_id, model="model", status=CommandStatus.REFUSED, reason="why"),
        )
    else:
        layers[0] = (form("a"), gradients(2.0), [gone])
    (second,) = controller.step(system(layers, epoch=11, results=results))
    assert second.layer == "b"
    layers[1] = (form("b"), gradients(1.0), ["FOSSILIZED"])
    layers[0] = (form("a"), gradients(2.0), ["DORMANT"])
    assert controller.step(system(layers, epoch=15, artifacts={("b", 0): adapter})) == []
    assert controller.explanation == "no layer has a free slot that is not embargoed"
    assert controller.step(system(layers, epoch=16, artifacts={("b", 0): adapter})) == []
    assert "and all of these have failed here" in controller.explanation


def test_a_seed_of_its_own_whose_kernel_fails_is_culled_and_another_one_is_left_alone(
    controller: esper.Heuristic, adapter: str
) -> None:
    (begun,) = controller.step(system(free(a=2.0, b=1.0)))
    layers = free(a=2.0, b=1.0)
    layers[0] = (form("a"), gradients(2.0), ["ERROR_RECOVERY"])
    (command,) = controller.step(system(layers, artifacts={("a", 0): adapter}))
    assert (command.command, command.layer, command.seed) == (CommandKind.CULL, "a", 0)
    assert command.command_id != begun.command_id
    assert command.reason == controller.explanation
    assert command.reason.startswith("the kernel of seed 0 of layer 'a' has failed while it ran (errors: 0)")
    (other,) = controller.step(system(layers, artifacts={("a", 0): adapter}))  # as if somebody else's
    assert (other.command, other.layer) == (CommandKind.REQUEST_GERMINATION, "b")


def test_designs_that_have_failed_come_after_those_that_have_not(library_store: Urza, library_artifact: Any) -> None:
    wide = {"width": 24}
    ids = {name: library_artifact(name) for name in ("bottleneck_adapter", "residual_mlp")}
    controller = esper.Heuristic(library_store, plateau_epochs=0, embargo_epochs=0, blueprints=list(ids))
    layers = free(a=2.0, b=1.0)
    (first,) = controller.step(system(layers, **wide))
    (other,) = set(ids.values()) - {first.artifact_id}
    layers[0] = (form("a"), gradients(2.0), ["CULLED"])
    (second,) = controller.step(system(layers, **wide))
    assert second.artifact_id == other  # of no tries: one half; the first of one failed: a third


def test_what_does_not_fit_is_not_tried(kernels: Urza, adapter: str) -> None:
    controller = esper.Heuristic(kernels, plateau_epochs=0)
    for layer, options in (
        (form("a", dtype="bfloat16"), {}),
        (form("a", target="cuda90"), {}),
        (form("a", target=None), {}),
        (form("a"), {"width": 15}),
    ):
        assert controller.step(system([(layer, gradients(1.0), ["DORMANT"])], **options)) == []
        assert controller.explanation.startswith("no kernel fits: 'a': ")
    assert esper.Heuristic(kernels, plateau_epochs=0, blueprints=["lora"]).step(system(free(a=1.0))) == []
    assert esper.Heuristic(kernels, plateau_epochs=0, required=["unheard_of"]).step(system(free(a=1.0))) == []


def test_affine_kernels_and_those_with_nothing_to_learn_are_left_out(
    library_store: Urza, library_artifact: Any
) -> None:
    for name in ("linear", "lora", "channel_scale"):
        library_artifact(name)
    controller = esper.Heuristic(library_store, plateau_epochs=0, blueprints=["linear", "lora", "channel_scale"])
    assert controller.step(system([(form("a", x_width=20), gradients(1.0), ["DORMANT"])], width=24)) == []
    assert "none fit 24 features" in controller.explanation


def test_slots_that_are_not_open_are_passed_over(controller: esper.Heuristic) -> None:
    layers = [
        (form("a"), gradients(3.0), ["FOSSILIZED", "ROLLED_BACK"]),
        (form("b"), gradients(2.0), ["FOSSILIZED", "CULLED"]),
        (form("c"), gradients(1.0), ["ROLLED_BACK", "CANCELLED"]),
    ]
    (command,) = controller.step(system(layers, epoch=10, opens_at=12))
    assert (command.layer, command.seed) == ("c", 1)
    fresh = esper.Heuristic(controller._urza, plateau_epochs=0)
    (command,) = fresh.step(system(layers, epoch=12, opens_at=12))
    assert (command.layer, command.seed) == ("b", 1)
    limited = esper.Heuristic(controller._urza, plateau_epochs=0, max_seeds=2)
    assert limited.step(system(layers, epoch=12)) == []
    assert limited.explanation == "2 seeds are part of the model (max_seeds)"


def test_a_controller_goes_on_where_another_has_been(kernels: Urza, adapter: str) -> None:
    def controller() -> esper.Heuristic:
        return esper.Heuristic(kernels, plateau_epochs=0, embargo_epochs=3)

    first, second = controller(), controller()
    first.step(system(free(a=2.0, b=1.0)))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    layers = free(a=2.0, b=1.0)
    layers[0] = (form("a"), gradients(2.0), ["CULLED"])
    assert first.step(system(layers)) == second.step(system(layers))
    assert first.state_dict() == second.state_dict()


def test_kernels_that_are_not_validated_any_more_are_not_tried(kernels: Urza, adapter: str) -> None:
    assert esper.Heuristic(kernels, plateau_epochs=0).step(system(free(a=1.0)))
    kernels.set_status(adapter, KernelStatus.ARCHIVED)
    assert esper.Heuristic(kernels, plateau_epochs=0).step(system(free(a=1.0))) == []


def test_names_that_no_kernel_has_are_said_instead_of_that_none_fits(kernels: Urza, adapter: str) -> None:
    def explained(**options: Any) -> str:
        controller = esper.Heuristic(kernels, plateau_epochs=0, **options)
        assert controller.step(system(free(a=1.0))) == []
        return controller.explanation

    kernels.set_status(adapter, KernelStatus.VALIDATED, tags=["high_speed"])
    assert explained(blueprints=["bottleneck_adaptor"]) == (
        "no validated kernel for float32 on cpu is named 'bottleneck_adaptor' (blueprints); "
        "did you mean 'bottleneck_adapter'?"
    )
    assert explained(required=["hi_speed"]) == (
        "no validated kernel for float32 on cpu has the tag 'hi_speed' (required); did you mean 'high_speed'?"
    )
    assert explained(blueprints=["lora"]) == (
        "no validated kernel for float32 on cpu is named 'lora' (blueprints); known: 'bottleneck_adapter'"
    )
    both = esper.Heuristic(kernels, plateau_epochs=0, blueprints=["lora", "bottleneck_adapter"])
    assert both.step(system(free(a=1.0), width=15)) == []
    assert both.explanation == (
        "no kernel fits: 'a': of 1 validated kernels for float32 on cpu none fit 15 features; "
        "no validated kernel for float32 on cpu is named 'lora' (blueprints); known: 'bottleneck_adapter'"
    )


def test_a_tag_that_no_kernel_has_is_told_with_the_decision(kernels: Urza, adapter: str) -> None:
    kernels.set_status(adapter, KernelStatus.VALIDATED, tags=["high_speed"])
    controller = esper.Heuristic(kernels, plateau_epochs=0, preferred=["high_sped"])
    (command,) = controller.step(system(free(a=1.0)))
    assert command.reason.endswith(
        "; no validated kernel for float32 on cpu has the tag 'high_sped' (preferred); did you mean 'high_speed'?"
    )
    controller = esper.Heuristic(kernels, plateau_epochs=0, required=["high_speed"], blueprints=["bottleneck_adapter"])
    (command,) = controller.step(system(free(a=1.0)))
    assert "no validated kernel" not in command.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urza": "urza"}, r"urza is 'urza'; expected the store .* an esper\.Urza"),
        ({"urza": esper.Urza}, "urza is the class Urza; expected"),
        ({"blueprints": "lora"}, r"blueprints is 'lora'; expected a list of names, as \['lora'\]"),
        ({"required": "high_speed"}, r"required is 'high_speed'; expected a list of names, as \['high_speed'\]"),
        ({"excluded": 3}, "excluded is 3; expected a list of names"),
        ({"preferred": [3]}, "preferred has 3 in it; expected names"),
        ({"warmup_epochs": None}, "warmup_epochs is None; expected a whole number, at least 0"),
        ({"max_seeds": 1.5}, r"max_seeds is 1\.5; expected a whole number, at least 0"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(kernels: Urza, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        esper.Heuristic(**({"urza": kernels} | options))


def test_negative_numbers_are_refused(kernels: Urza) -> None:
    with pytest.raises(ValueError, match="embargo_epochs must be at least 0, found -1"):
        esper.Heuristic(kernels, embargo_epochs=-1)
