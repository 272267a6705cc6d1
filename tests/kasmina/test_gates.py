from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeding import own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import InvalidTransition
from esper_triton.kasmina import SeedLifecycleState
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.gates import ErrorRateGate, Evaluation, MetricGate, Policy, ReconstructionGate
from esper_triton.kasmina.schedules import linear
from esper_triton.model import MorphableModel
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState

QUICK = Policy(
    to_grafting=ReconstructionGate(max_steps=2), schedule=linear(3), stabilization_steps=2, fine_tuning_steps=2
)


@pytest.fixture
def model(adapter_store: Urza, adapter_for: Callable[..., str]) -> MorphableModel:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, D), nn.BatchNorm1d(D), nn.Dropout(0.5), nn.Linear(D, 1))
    model = esper.wrap(plain, ["0"], seeds_per_layer=1, urza=adapter_store, policy=QUICK, auto_advance=True)
    assert model.load_kernel_sync("0", 0, adapter_for(D, R))
    return model


def grown(model: MorphableModel, state: S) -> MorphableModel:
    generator = torch.Generator().manual_seed(5)
    for parameter in own_parameters(model.kasmina_layers["0"], 0).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.graft("0", 0)
    model.set_alpha("0", 0, 0.5)
    for target in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        if model.kasmina_layers["0"].seed_state(0) is not state:
            model.request_transition("0", 0, target)
    return model


# ---- the gates themselves


def test_the_defaults_are_those_of_the_lifecycle() -> None:
    policy = Policy()
    assert policy.to_grafting.max_error == 0.01
    assert (policy.error_rate.max_rate, policy.embargo_epochs, policy.load_deadline_s) == (0.10, 5, 10.0)


@pytest.mark.parametrize(
    ("error", "steps", "opens"),
    [(None, 0, False), (0.011, 99, False), (0.01, 0, True), (None, 100, True), (0.5, 100, True), (math.nan, 0, False)],
)
def test_grafting_needs_a_small_error_or_spent_steps(error: float | None, steps: int, opens: bool) -> None:
    assert ReconstructionGate(max_error=0.01, max_steps=100).opens(error, steps) is opens


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=9), st.booleans())
def test_an_evaluation_is_the_mean_gain_and_its_standard_error(pairs: list[tuple[float, float]], lower: bool) -> None:
    on, off = zip(*pairs, strict=True)
    evaluation = Evaluation(on=on, off=off, lower_is_better=lower)
    gains = torch.tensor(off, dtype=torch.float64) - torch.tensor(on, dtype=torch.float64)
    gains = gains if lower else -gains
    assert evaluation.improvement == pytest.approx(gains.mean().item(), abs=1e-12)
    assert evaluation.noise == pytest.approx(gains.std().item() / len(pairs) ** 0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("on", "off", "lower_is_better", "verdict"),
    [
        ((1.0, 1.0), (1.5, 1.5), True, "better"),
        ((1.0, 1.0), (1.5, 1.5), False, "worse"),
        ((1.0, 1.0), (1.0, 1.0), True, "undecided"),
        ((1.0, 2.0), (2.0, 1.2), True, "undecided"),
        ((1.0, math.nan), (1.0, 1.0), True, "worse"),
        ((1.0, 1.0), (math.inf, math.inf), True, "better"),
    ],
)
def test_the_metric_must_change_by_more_than_its_noise(
    on: tuple[float, ...], off: tuple[float, ...], lower_is_better: bool, verdict: str
) -> None:
    assert MetricGate().verdict(Evaluation(on=on, off=off, lower_is_better=lower_is_better)) == verdict


@pytest.mark.parametrize(
    ("errors", "calls", "culls"), [(1, 1, False), (2, 2, False), (3, 3, True), (10, 100, False), (11, 100, True)]
)
def test_more_than_a_tenth_of_failures_is_too_much_and_few_calls_count_as_twenty(
    errors: int, calls: int, culls: bool
) -> None:
    assert ErrorRateGate().culls(errors, calls) is culls


# ---- what is measured


def test_an_evaluation_measures_with_and_without_the_seed_and_leaves_everything_as_it_was(
    model: MorphableModel,
) -> None:
    grown(model, S.EVALUATING)
    layer = model.kasmina_layers["0"]
    model.train()
    model[1].eval()  # type: ignore[index]
    x = torch.randn(8, IN)
    with torch.no_grad():
        layer(x)
    model.eval()
    with_seed = model(x).sum().item()  # type: ignore[operator]
    without = model[3](model[1](layer.default_transform(x))).sum().item()  # type: ignore[index]
    model.train()
    model[1].eval()  # type: ignore[index]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state, random_state = layer.state.storage.clone(), torch.get_rng_state()

    def metric(m: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in m.modules())
        torch.rand(3)
        return float(m(x).sum())

    evaluation = model.evaluate_seed("0", 0, metric, repeats=2, lower_is_better=False)
    assert evaluation.on == (with_seed, with_seed)
    assert evaluation.off == (without, without)
    assert evaluation.noise == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(layer.state.storage, state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes


def test_a_pair_draws_the_same_random_numbers_and_the_next_pair_others(model: MorphableModel) -> None:
    grown(model, S.EVALUATING)
    evaluation = model.evaluate_seed("0", 0, lambda m: float(torch.rand(())), repeats=3)
    assert evaluation.on == evaluation.off
    assert len(set(evaluation.on)) == 3
    assert statistics.stdev(evaluation.on) > 0
    assert (evaluation.improvement, evaluation.noise) == (0.0, 0.0)


def test_a_metric_that_raises_leaves_alpha_and_modes(model: MorphableModel) -> None:
    grown(model, S.EVALUATING)
    layer = model.kasmina_layers["0"]
    state = layer.state.storage.clone()

    def broken(m: nn.Module) -> float:
        if layer.state.alpha(0) == 0:
            raise RuntimeError("no metric without a seed")
        return 1.0

    with pytest.raises(RuntimeError, match="no metric without a seed"):
        model.evaluate_seed("0", 0, broken)
    assert torch.equal(layer.state.storage, state)
    assert model.training
    assert not layer.is_ready_for_transition(0)


def test_what_cannot_be_evaluated_is_refused(model: MorphableModel) -> None:
    with pytest.raises(ValueError, match="seed 0 of layer '0' is TRAINING: a seed is evaluated in STABILIZATION"):
        model.evaluate_seed("0", 0, lambda m: 1.0)
    grown(model, S.EVALUATING)
    with pytest.raises(ValueError, match=r"repeats must be at least 2.*found 1"):
        model.evaluate_seed("0", 0, lambda m: 1.0, repeats=1)


# ---- from one stage to the next


def test_a_seed_goes_by_itself_from_training_to_fossilized(model: MorphableModel) -> None:
    layer = model.kasmina_layers["0"]
    told: list[Transition] = []
    layer.on_transition(told.append)
    alphas = []
    for _ in range(20):
        model(torch.randn(4, IN))  # type: ignore[operator]
        model.train_seeds()
        if layer.seed_state(0) in (S.EVALUATING, S.FINE_TUNING):
            values = iter((1.0, 2.0) * 3)  # with the seed, without
            model.evaluate_seed("0", 0, lambda m, values=values: next(values))  # type: ignore[misc]
        model.step_boundary()
        alphas.append(float(layer.state.alpha(0)))
    assert [event.target for event in told] == [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
    # Reconstructed at once; three steps of ramp.
    assert alphas[:4] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert set(alphas[3:]) == {1.0}


def test_a_seed_that_does_harm_is_culled(model: MorphableModel) -> None:
    grown(model, S.EVALUATING)
    values = iter((2.0, 1.0) * 3)
    model.evaluate_seed("0", 0, lambda m: next(values))
    model.step_boundary()
    assert model.kasmina_layers["0"].seed_state(0) is S.CULLED


def test_an_undecided_seed_stays_and_is_measured_again(model: MorphableModel) -> None:
    grown(model, S.EVALUATING)
    layer = model.kasmina_layers["0"]
    for values, wanted in (((1.0, 1.0), S.EVALUATING), ((1.0, 2.0), S.FINE_TUNING)):
        metric = iter(values * 3)
        model.evaluate_seed("0", 0, lambda m, metric=metric: next(metric))  # type: ignore[misc]
        model.step_boundary()
        assert layer.seed_state(0) is wanted


def test_without_auto_advance_a_seed_that_is_ready_waits_for_the_order(model: MorphableModel) -> None:
    layer = model.kasmina_layers["0"]
    for _ in range(3):
        model.step_boundary(auto_advance=False)
    assert layer.seed_state(0) is S.TRAINING
    assert model.is_ready_for_transition("0", 0)
    with pytest.raises(InvalidTransition):
        model.request_transition("0", 0, S.EVALUATING)
    model.step_boundary()
    assert layer.seed_state(0) is S.GRAFTING
    assert not model.is_ready_for_transition("0", 0)
