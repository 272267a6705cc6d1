from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeding import linear_with_seeds, own_parameters
from torch import nn

from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.kasmina.schedules import (
    Schedule,
    Signals,
    cosine,
    describe_schedule,
    drift_controlled,
    grad_norm_gated,
    linear,
    schedule_from,
)
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState

steps = st.integers(1, 50)
schedules = st.one_of(
    st.builds(linear, steps),
    st.builds(cosine, steps),
    st.builds(drift_controlled, steps, max_drift=st.floats(0, 2)),
    st.builds(grad_norm_gated, steps, low=st.floats(0, 1), high=st.floats(1, 10)),
)
measured = st.builds(Signals, drift=st.none() | st.floats(0, 2), grad_norm=st.none() | st.floats(0, 20))


@pytest.fixture
def layer(adapter_store: Urza, adapter_for: Callable[..., str]) -> KasminaLayer:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, adapter_for(D, R))
    return layer


@given(schedules, st.lists(measured, max_size=80))
def test_a_ramp_starts_at_zero_never_falls_and_is_complete_exactly_at_one(
    schedule: Schedule, run: list[Signals]
) -> None:
    progress, alphas = 0, [schedule.alpha(0)]
    for signals in run:
        progress = schedule.advance(progress, signals)
        alphas.append(schedule.alpha(progress))
        assert schedule.is_complete(progress) == (alphas[-1] == 1.0)
    assert alphas[0] == 0.0
    assert alphas == sorted(alphas)
    assert alphas[-1] <= 1.0


@given(schedules, st.lists(measured, max_size=40), st.integers(0, 40))
def test_a_resumed_ramp_goes_on_as_the_one_that_was_interrupted(
    schedule: Schedule, run: list[Signals], cut: int
) -> None:
    whole = 0
    for signals in run:
        whole = schedule.advance(whole, signals)
    resumed = 0
    for signals in run[:cut]:
        resumed = schedule.advance(resumed, signals)
    again = schedule_from(describe_schedule(schedule))
    for signals in run[cut:]:
        resumed = again.advance(resumed, signals)
    assert again == schedule
    assert resumed == whole


def test_the_curves_are_what_their_names_say() -> None:
    assert [linear(4).alpha(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    wanted = [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1.0]
    assert [cosine(4).alpha(step) for step in range(5)] == pytest.approx(wanted)


def test_a_drift_controlled_ramp_pauses_while_the_output_turns_too_fast() -> None:
    schedule, progress, path = drift_controlled(3, max_drift=0.1), 0, []
    for drift in (None, 0.05, 0.2, 0.1, math.nan, 0.0, 0.0):
        progress = schedule.advance(progress, Signals(drift=drift))
        path.append(progress)
    assert path == [0, 1, 1, 2, 2, 3, 3]


def test_a_gated_ramp_advances_only_while_the_gradient_norm_is_in_its_band() -> None:
    schedule, progress, path = grad_norm_gated(3, low=0.5, high=2.0), 0, []
    for norm in (None, 0.4, 0.5, 2.1, 2.0, math.nan, 1.0):
        progress = schedule.advance(progress, Signals(grad_norm=norm))
        path.append(progress)
    assert path == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0), "linear: steps must be a whole number of at least 1, found 0"),
        (lambda: cosine(2.5), "cosine: steps must be a whole number"),  # type: ignore[arg-type]
        (lambda: drift_controlled(3, max_drift=-0.1), "max_drift must be from 0 to 2"),
        (lambda: grad_norm_gated(3, low=2.0, high=1.0), "0 <= low <= high is needed"),
        (lambda: schedule_from({"schedule": "liner", "steps": 3}), "unknown schedule 'liner'; did you mean 'linear'"),
        (lambda: schedule_from({"schedule": "linear", "stops": 3}), "'steps' is missing; there is no option 'stops'"),
        (lambda: schedule_from({"schedule": ["linear"]}), r"unknown schedule \['linear'\]"),
    ],
)
def test_what_makes_no_schedule_is_refused_with_the_reason(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_grafted_seed_ramps_at_step_boundaries_with_no_new_plan(layer: KasminaLayer) -> None:
    layer.graft(0, linear(4))
    dispatch = vars(layer)["forward"]
    alphas, ready = [], []
    for _ in range(5):
        layer.step_boundary()
        alphas.append(float(layer.state.alpha(0)))
        ready.append(layer.is_ready_for_transition(0))
    assert alphas == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert ready == [False, False, False, True, True]
    assert vars(layer)["forward"] is dispatch


def test_setting_alpha_by_hand_ends_the_ramp(layer: KasminaLayer) -> None:
    layer.graft(0, linear(4))
    layer.set_alpha(0, 0.6)
    layer.step_boundary()
    assert layer.state.alpha(0) == torch.tensor(0.6)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_ramps_on_from_where_the_original_was(
    layer: KasminaLayer, way: Callable[[KasminaLayer], KasminaLayer]
) -> None:
    layer.graft(0, cosine(5))
    layer.step_boundary()
    layer.step_boundary()
    other = way(layer)
    for one in (layer, other):
        one.step_boundary()
    assert other.state.alpha(0) == layer.state.alpha(0) == torch.tensor(cosine(5).alpha(3))


def test_the_gradient_norm_of_a_seeds_parameters_gates_its_ramp(layer: KasminaLayer) -> None:
    x = torch.randn(3, IN)
    layer.graft(0, linear(2))
    layer.step_boundary()
    layer(x).square().sum().backward()
    grads = [p.grad for p in own_parameters(layer, 0).values()]
    norm = torch.cat([g.double().flatten() for g in grads if g is not None]).norm().item()
    for low, high, wanted in ((0.0, norm * 0.999, 0.0), (norm * 0.999, norm * 1.001, 0.5), (norm * 1.001, 1e9, 0.5)):
        own = layer._kasmina.seeds[0]
        own.schedule = grad_norm_gated(2, low=low, high=high)
        own.progress = 0 if wanted == 0.0 else own.progress
        layer.step_boundary()
        assert layer.state.alpha(0) == wanted


def test_drift_is_one_minus_the_cosine_of_the_mean_outputs_of_two_steps(layer: KasminaLayer) -> None:
    layer.graft(0, drift_controlled(100, max_drift=2.0))
    inputs = [torch.randn(5, IN) for _ in range(2)]
    with torch.no_grad():
        means = [layer.default_transform(x).mean(0).double() for x in inputs]  # a fresh adapter equals the host
    drift = float(1 - nn.functional.cosine_similarity(*means, dim=0))
    own = layer._kasmina.seeds[0]
    for bound, wanted in ((drift - 1e-5, 0), (drift + 1e-5, 1)):
        own.schedule, own.progress = drift_controlled(100, max_drift=bound), 0
        layer._kasmina.output_mean = None
        for x in inputs:
            layer(x)
            layer.step_boundary()
        assert own.progress == wanted
    layer.eval()
    layer(inputs[0])
    layer.step_boundary()
    assert own.progress == 1  # a step without a training call says nothing of the drift
