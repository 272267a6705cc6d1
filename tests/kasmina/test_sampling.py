"""Sampled steps: which they are, what is measured of a seed in them, and that a model computes the same without."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import adapter, grow, linear_with_seeds, own_parameters
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache, Policy, SeedLifecycleState, sampling
from esper_triton.kasmina.boundary import begin_epoch
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.prepared import Prepared
from esper_triton.kasmina.sampling import SamplingClock
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
EVERY = Policy(statistics_every=1)
NAMES = ("activation_variance", "dead_neuron_ratio", "avg_correlation")
DROPOUT = Path(__file__).resolve().parent / "blueprints" / "dropout.toml"
drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Time:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter_ns=lambda: self.now))


def measured(layer: KasminaLayer, seed: int = 0) -> tuple[float | None, ...]:
    stats = layer.get_layer_stats()["seeds"][seed]
    return tuple(stats[name] for name in NAMES)


def wanted(*calls: Tensor) -> tuple[object, ...]:
    """Of k, [rows, d], in float64: what torch.var and numpy.corrcoef give for all rows. The kernel's k is float32."""
    rows = torch.cat(calls).double()
    r = np.corrcoef(rows.numpy(), rowvar=False)
    pairs = np.abs(r[np.triu_indices(rows.shape[1], 1)])
    return (pytest.approx(float(rows.var(0).mean()), rel=1e-5), 0.0, pytest.approx(float(pairs.mean()), rel=1e-4))


def output(layer: KasminaLayer, seed: int, x: Tensor) -> Tensor:
    """k of a seed, in float64."""
    start, stop = layer.seed_span(seed)
    h = layer.default_transform(x).detach().double()[..., start:stop].reshape(-1, stop - start)
    return adapter(h, {n: p.detach().double() for n, p in own_parameters(layer, seed).items()})


def step(layer: KasminaLayer, *inputs: Tensor) -> None:
    for x in inputs:
        layer(x)
    layer.step_boundary()


# ---- which steps


@given(
    share=st.floats(0.001, 0.2),
    steps=st.lists(st.integers(1_000, 5_000_000), min_size=50, max_size=300),
    costs=st.lists(st.integers(100, 20_000_000), min_size=1, max_size=8),
)
def test_samples_take_no_more_than_their_share_of_the_time_and_one_sample(
    share: float, steps: list[int], costs: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        time, clock = Time(patch), SamplingClock(share=share, every=None)
        for number, took in enumerate(steps):
            if clock.chooses(number):
                cost = costs[clock.samples % len(costs)]
                clock.spend(cost)
                time.now += cost
            time.now += took
        clock.chooses(len(steps))
    assert clock.passed_ns <= time.now
    assert clock.spent_ns <= share * clock.passed_ns + max(costs)


@given(share=st.floats(0.002, 0.1), took=st.integers(10_000, 10_000_000), part=st.floats(0.01, 3.0))
def test_as_many_steps_are_sampled_as_the_share_allows(share: float, took: int, part: float) -> None:
    count, cost = 4000, max(1, int(part * took))
    with pytest.MonkeyPatch.context() as patch:
        time, clock = Time(patch), SamplingClock(share=share, every=None)
        for number in range(count):
            if clock.chooses(number):
                clock.spend(cost)
                time.now += cost
            time.now += took
    between = max(1.0, cost / (took * share))  # steps; a sample comes with the next whole one
    assert count / (math.ceil(between) + 1) - 2 <= clock.samples <= count / between + 2


@pytest.mark.parametrize("every", [7, 100])
def test_pauses_between_steps_buy_no_samples(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    chosen = {}
    for pause in (0, 3600 * 10**9):
        time, clock = Time(monkeypatch), SamplingClock(share=0.01, every=None)
        chosen[pause] = 0
        for number in range(2000):
            if number % every == every - 1:
                time.now += pause
            if clock.chooses(number):
                chosen[pause] += 1
                clock.spend(500_000)
                time.now += 500_000
            time.now += 1_000_000
    # Each counts for as much as two steps, and no more than a tenth of it moves what a step is taken to take.
    assert chosen[0] <= chosen[3600 * 10**9] <= chosen[0] * (1 + 2.5 / every) + 2


def test_steps_that_become_slower_for_good_earn_as_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    time, clock = Time(monkeypatch), SamplingClock(share=0.01, every=None)
    for number in range(4000):
        if clock.chooses(number):
            clock.spend(500_000)
            time.now += 500_000
        time.now += 1_000_000 if number < 2000 else 20_000_000
        if number == 2000:
            before = clock.samples
    # Two and a half of these steps pay for a sample, which comes with the third, from the thirtieth or so on.
    assert 1900 / 3 < clock.samples - before < 2100 / 3


def test_layers_of_one_model_are_sampled_in_the_same_steps_and_what_they_cost_counts_together(
    adapter_store: Urza,
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D)), [nn.Linear], urza=adapter_store)
    clocks = {id(layer._kasmina.clock) for layer in model.kasmina_layers.values()}
    assert len(clocks) == 1
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        own = {id(layer._kasmina.clock) for layer in other.kasmina_layers.values()}
        assert len(own) == 1
        assert own != clocks
        clock = other.kasmina_layers["0"]._kasmina.clock
        assert (clock.share, clock.every, clock.samples) == (0.005, None, 0)
    fixed = SamplingClock(share=0.5, every=3)
    assert [step for step in range(10) for _ in range(3) if fixed.chooses(step)] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert fixed.samples == 4


@pytest.mark.parametrize("policy", [Policy(statistics_share=0.0), Policy(statistics_every=0)])
def test_no_share_is_no_sample(adapter_store: Urza, adapter_for: Callable[..., str], policy: Policy) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=policy)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    for _ in range(100):
        step(layer, torch.randn(9, IN))
    assert layer._kasmina.clock.samples == 0
    assert measured(layer) == (None, None, None)


@pytest.mark.parametrize("options", [{"statistics_share": -0.1}, {"statistics_share": 1.5}, {"statistics_every": -1}])
def test_a_policy_that_cannot_be_is_an_error_that_says_so(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Policy(**options)


def test_without_telemetry_nothing_is_sampled(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY, telemetry_enabled=False)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    for _ in range(3):
        step(layer, torch.randn(9, IN))
    assert layer._kasmina.clock is None
    assert measured(layer) == (None, None, None)
    assert layer._kasmina.sampler._moments == {}


# ---- what is measured


@pytest.fixture(params=["prepared", "general"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that calls go."""
    if request.param == "general":
        monkeypatch.setattr(Prepared, "fits", lambda *_: False)
    return str(request.param)


@drawn
@given(
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=4).filter(lambda rows: sum(rows) > 1),
    num_seeds=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    chunking=st.sampled_from(["features", "whole"]),
)
def test_each_seed_of_a_layer_is_measured_by_its_own_output_whatever_its_alpha(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    way: str,
    rows: list[int],
    num_seeds: int,
    alpha: float,
    chunking: str,
) -> None:
    KernelCache.process().reset()
    width = D if chunking == "whole" else D * num_seeds
    layer = linear_with_seeds(adapter_store, IN, width, num_seeds, chunking=chunking, policy=EVERY)
    for seed in range(num_seeds):
        grow(layer, seed, adapter_for(D, R), alpha=alpha, draw=seed)
    step(layer)  # from here on every step is sampled
    inputs = [torch.randn(count, IN) for count in rows]
    for x in inputs:
        step(layer, x)
    for seed in range(num_seeds):
        assert measured(layer, seed) == wanted(*(output(layer, seed, x) for x in inputs))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_what_a_layer_of_half_precision_puts_out_is_measured_in_double_precision(
    adapter_store: Urza, adapter_for: Callable[..., str], dtype: str, error: float
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY).to(getattr(torch, dtype))
    grow(layer, 0, adapter_for(D, R, dtype), alpha=1.0)
    step(layer)
    x = torch.randn(3000, IN, dtype=getattr(torch, dtype))
    step(layer, x)
    # Against the layer's own output, which is k at alpha 1, the sums are exact; against float64 throughout, k is not.
    of_output, of_float64 = layer(x).detach().double(), output(layer, 0, x)
    variance, dead, correlation = measured(layer)
    assert variance == pytest.approx(float(of_output.var(0).mean()), rel=1e-9)
    assert variance == pytest.approx(float(of_float64.var(0).mean()), rel=error)
    assert dead == 0.0
    r = np.corrcoef(of_output.numpy(), rowvar=False)
    assert correlation == pytest.approx(float(np.abs(r[np.triu_indices(D, 1)]).mean()), rel=1e-9)


def test_a_convolution_has_a_row_for_each_place(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = KasminaLayer.adopt(nn.Conv2d(3, D, 3), num_seeds=1, urza=adapter_store, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    x = torch.randn(2, 3, 6, 5)
    step(layer, x)
    h = layer.default_transform(x).detach().double().movedim(1, -1).reshape(-1, D)
    k = adapter(h, {n: p.detach().double() for n, p in own_parameters(layer, 0).items()})
    assert measured(layer) == wanted(k)


def test_a_seed_in_training_is_measured_by_what_it_learns_with(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    assert layer.load_kernel_sync(0, adapter_for(D, R))
    step(layer)
    x = torch.randn(11, IN)
    layer(x)
    assert layer.seed_loss() is not None
    layer.step_boundary()
    assert layer.seed_state(0) is SeedLifecycleState.TRAINING
    assert measured(layer) == wanted(output(layer, 0, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, of its compiler
def test_a_compiled_layer_is_measured_too(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    torch._dynamo.reset()
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(11, IN)
    compiled(x)
    layer.step_boundary()
    assert measured(layer) == wanted(output(layer, 0, x))
    torch._dynamo.reset()


def test_one_call_of_a_step_counts_the_first_with_gradients_that_has_rows(
    adapter_store: Urza, adapter_for: Callable[..., str], way: str
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    unseen, first, second = torch.randn(5, IN), torch.randn(7, IN), torch.randn(6, IN)
    with torch.no_grad():
        layer(unseen)
    with torch.inference_mode():
        layer(unseen)
    step(layer, torch.randn(0, IN), first, second)
    assert measured(layer) == wanted(output(layer, 0, first))


def test_a_single_row_says_nothing_and_two_do(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    x = torch.randn(2, IN)
    step(layer, x[0])
    assert measured(layer) == (None, None, None)
    step(layer, x[1:])
    assert measured(layer) == wanted(output(layer, 0, x))


def test_features_that_the_seed_leaves_at_a_constant_of_the_host_are_dead(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    with torch.no_grad():
        layer.weight[:5] = 0.0  # the host gives its bias there
        own_parameters(layer, 0)["up_weight"][:5] = 0.0
    step(layer)
    step(layer, torch.randn(40, IN))
    assert measured(layer)[1] == 5 / D


def test_a_call_that_is_not_finite_leaves_what_was_measured_as_it_was(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    x = torch.randn(9, IN)
    step(layer, x)
    before = measured(layer)
    poisoned = x.clone()
    poisoned[3, 2] = float("nan")  # the host's own, which is no fault of the seed
    step(layer, poisoned)
    assert measured(layer) == before == wanted(output(layer, 0, x))


def test_an_epoch_begins_anew_and_the_last_ones_values_stay_until_there_are_others(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, D)), ["0"], seeds_per_layer=1, urza=adapter_store, policy=EVERY)
    layer = model.kasmina_layers["0"]
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    first, second = torch.randn(9, IN), 3 * torch.randn(8, IN)
    step(layer, first)
    model.epoch_boundary(1)
    assert measured(layer) == wanted(output(layer, 0, first))
    step(layer, second)
    assert measured(layer) == wanted(output(layer, 0, second))


def test_another_kernel_in_the_slot_has_nothing_of_the_one_before(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    step(layer, torch.randn(9, IN))
    load_us = layer.get_layer_stats()["seeds"][0]["kernel_load_latency_us"]
    assert load_us > 0.0
    layer.unload_kernel(0)
    assert measured(layer) == (None, None, None)
    assert layer.get_layer_stats()["seeds"][0]["kernel_load_latency_us"] is None
    grow(layer, 0, adapter_for(D, 2 * R), alpha=0.5)
    step(layer)
    x = torch.randn(9, IN)
    step(layer, x)
    assert measured(layer) == wanted(output(layer, 0, x))


def test_a_seed_that_failed_is_no_longer_measured(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    step(layer, torch.randn(9, IN))
    own_parameters(layer, 0)["up_bias"].data = torch.zeros(1)
    step(layer, torch.randn(9, IN))
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY
    assert measured(layer) == (None, None, None)


# ---- the model is the same


def train(store: Urza, artifact: str, *, samples: list[int] | None, compute: Callable[..., object]) -> list[Tensor]:
    """Outputs, parameters and random state of ten steps, with those of `samples` sampled; None for no telemetry."""
    KernelCache.process().reset()
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, D))
    options = {"telemetry_enabled": samples is not None, "policy": Policy(statistics_every=0)}
    model = esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=store, **options)
    for name in ("0", "2"):
        grow(model.kasmina_layers[name], 0, artifact, alpha=0.5)
    optimizer = torch.optim.SGD([*model.parameters(), *esper.model.seed_parameters(model)], lr=0.1)
    seen = []
    for number in range(1, 11):
        out = model(torch.randn(7, IN))
        compute(out)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(out.detach().clone())
        clock = model.kasmina_layers["0"]._kasmina.clock
        if clock is not None:
            clock.every = 1 if samples and number in samples else 0
        model.step_boundary()
    if samples:
        assert measured(model.kasmina_layers["2"])[0] is not None
    return [*seen, *(p.detach() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("blueprint", ["adapter", "dropout"])
def test_results_are_the_same_bits_whichever_steps_are_sampled(
    adapter_store: Urza, adapter_for: Callable[..., str], blueprint: str
) -> None:
    artifact = adapter_for(D, R)
    if blueprint == "dropout":
        artifact = esper.compile(DROPOUT, dims={"d": D}, urza=adapter_store).id

    def backward(out: Tensor) -> None:
        out.square().mean().backward()

    without = train(adapter_store, artifact, samples=None, compute=backward)
    for samples in ([], [3], list(range(1, 11))):
        for ours, plain in zip(train(adapter_store, artifact, samples=samples, compute=backward), without, strict=True):
            assert torch.equal(ours, plain)


def test_a_dropout_is_measured_with_what_it_dropped(adapter_store: Urza, way: str) -> None:
    artifact = esper.compile(DROPOUT, dims={"d": D}, urza=adapter_store).id
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, artifact, alpha=1.0, draw=None)
    step(layer)
    out = layer(torch.randn(50, IN))
    layer.step_boundary()
    assert (out == 0).any()
    assert measured(layer) == wanted(out.detach())


@pytest.mark.parametrize("where", ["chosen_features", "moments_of", "statistics_of"])
def test_a_sample_that_fails_is_no_fault_of_the_seed_and_leaves_one_line(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    x = torch.randn(9, IN)
    out = layer(x)

    def broken(*args: object, **options: object) -> None:
        raise MemoryError("there is no room for a sample")

    with monkeypatch.context() as patch:
        patch.setattr(sampling, where, broken)
        for _ in range(3):
            layer.step_boundary()
            assert torch.equal(layer(x), out)
        layer.step_boundary()
    assert measured(layer) == (None, None, None)
    assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0
    lines = [record.message for record in caplog.records if "sample_failed" in record.message]
    assert len(lines) == 1
    assert "there is no room for a sample" in lines[0]
    begin_epoch(layer, 1)  # what was taken in before counts no more
    step(layer)
    step(layer, x)
    assert measured(layer) == wanted(output(layer, 0, x))


def test_calls_of_many_threads_take_each_seed_once_a_step(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    step(layer)
    x = torch.randn(9, IN)
    threads = [threading.Thread(target=lambda: [layer(x) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (moments,) = [moments for _, moments in layer._kasmina.sampler._moments.values()]
    assert float(moments.rows) == 9.0
    layer.step_boundary()
    assert measured(layer) == wanted(output(layer, 0, x))


def test_a_sampled_call_touches_the_host_in_nothing_and_reads_nothing_back(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2, policy=EVERY)
    for seed in range(2):
        grow(layer, seed, adapter_for(D, R), alpha=0.5)
    step(layer)
    x = torch.randn(100, IN)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("forward reads a tensor back")

    class NoWaiting:
        def __enter__(self) -> None:
            raise AssertionError("forward waits for a lock")

        def __exit__(self, *error: object) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(KernelCache.process(), "_lock", NoWaiting())
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, forbidden)
        layer(x)
        assert layer._kasmina.sampler.due == set()
        assert not layer._kasmina.sampler._told
    layer.step_boundary()
    assert measured(layer, 1) == wanted(output(layer, 1, x))


class Event:
    """A place in the work of a device that has come to `reached`."""

    reached = 0
    made = 0

    def __init__(self, *_: object) -> None:
        Event.made += 1
        self.place = Event.made

    def query(self) -> bool:
        return self.place <= Event.reached

    def elapsed_time(self, end: Event) -> float:
        assert end.query()  # or the device would have to be waited for
        return float(end.place - self.place)  # milliseconds


def test_a_boundary_takes_in_what_a_device_has_done_and_waits_for_nothing_else(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a device that runs by itself only the events are needed; the values are computed here.
    monkeypatch.setattr(sampling, "_event", Event)
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(Event, "reached", 0)
    layer = linear_with_seeds(adapter_store, IN, D, 1, policy=EVERY)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    clock, seed = layer._kasmina.clock, layer._kasmina.seeds[0]
    step(layer)
    x = torch.randn(9, IN)
    step(layer, x)
    assert Event.made == 3
    step(layer)
    assert measured(layer) == (None, None, None)
    launches, before = (seed.timed_calls, seed.latency_ns), clock.spent_ns
    Event.reached = 3
    step(layer)
    assert measured(layer) == wanted(output(layer, 0, x))
    assert clock.spent_ns - before >= 2_000_000  # from the first event to the last
    assert (seed.timed_calls - launches[0], seed.latency_ns - launches[1]) == (1, 1_000_000)


def test_torchs_default_device_and_dtype_are_not_the_samples(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, 72, 1, policy=EVERY)
    grow(layer, 0, adapter_for(72, R), alpha=0.5)
    x = torch.randn(9, IN)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            step(layer)
            step(layer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    k = output(layer, 0, x)
    assert measured(layer)[0] == pytest.approx(float(k.var(0).mean()), rel=1e-5)
    assert measured(layer)[2] is not None


def test_a_dormant_layer_has_nothing_in_its_call_and_is_never_sampled(adapter_store: Urza) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, D)), ["0"], urza=adapter_store, policy=EVERY)
    layer = model.kasmina_layers["0"]
    for _ in range(3):
        model(torch.randn(3, IN))
        model.step_boundary()
        assert "forward" not in vars(layer)
        assert not layer._forward_hooks
    assert layer._kasmina.clock.samples == 0
    assert layer._kasmina.sampler.due == set()


@pytest.fixture(autouse=True)
def _launches_write_to_none_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample runs a kernel once more."""
    forward = KernelProgram.forward

    def checked(self: KernelProgram, inputs: dict[str, Tensor], *args: Tensor, **options: object) -> object:
        before = {name: value.clone() for name, value in inputs.items()}
        saved = forward(self, inputs, *args, **options)
        assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in inputs.items())
        return saved

    monkeypatch.setattr(KernelProgram, "forward", checked)
