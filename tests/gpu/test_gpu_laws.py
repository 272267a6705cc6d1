"""The laws of tests/test_laws*.py that a device could break in ways of its own: 1, 2, 3, 4, 8 and 9."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from seeding import adapter, break_launches, copy_artifact, grow, law_2, own_parameters
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina import KasminaLayer, KernelCache, Policy, SeedLifecycleState
from esper_triton.urza import Urza

D, R, IN = 48, 4, 6
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


def faults(layer: KasminaLayer) -> list[int]:
    return [seed["error_count"] for seed in layer.get_layer_stats()["seeds"]]


def float64(layer: KasminaLayer, x: Tensor, alphas: list[float]) -> tuple[Tensor, list[Tensor]]:
    """Law 2 on the CPU in float64: the output, and the gradients of the sum of its squares to x, to the host's weight
    and to the seeds' parameters."""
    x64 = x.detach().cpu().double().requires_grad_()
    weight, bias = (p.detach().cpu().double().requires_grad_() for p in (layer.weight, layer.bias))
    own = [
        {name: p.detach().cpu().double().requires_grad_() for name, p in own_parameters(layer, seed).items()}
        for seed in range(len(alphas))
    ]
    h = nn.functional.linear(x64, weight, bias)
    out = law_2(h, [(layer.seed_span(s), alpha, own[s]) for s, alpha in enumerate(alphas)])
    leaves = [x64, weight, *(p for parameters in own for p in parameters.values())]
    return out.detach(), list(torch.autograd.grad(out.square().sum(), leaves))


def close(found: Tensor, wanted: Tensor) -> None:
    # Sums of up to 300 float32 products near 1, after a host matrix product that may have been split otherwise.
    torch.testing.assert_close(found.detach().cpu().double(), wanted, rtol=1e-3, atol=1e-3)


@contextmanager
def no_waiting_for_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Law 1


@pytest.mark.parametrize("forward", [True, False])
def test_law_1_a_launch_that_fails_leaves_the_hosts_output_and_gradient(
    layer_on: Callable[..., KasminaLayer],
    gpu_adapter: Callable[..., str],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    forward: bool,
) -> None:
    layer = layer_on(IN, D, 1)
    grow(layer, 0, gpu_adapter(D, R), alpha=0.7)
    break_launches(monkeypatch, layer, 0, forward=forward)
    x = torch.randn(33, IN, device=device, requires_grad=True)
    for _ in range(2):  # the general way, and the prepared one
        out, host = layer(x), layer.default_transform(x)
        assert torch.equal(out, host) is forward
        # Not of a sum, whose gradient has stride 0: a library may add in another order for another stride.
        grad_out = torch.ones_like(host)
        mine, wanted = (torch.autograd.grad(y, [x, layer.weight], grad_out) for y in (out, host))
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    layer.commit()
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY
    assert layer.state.fallback_active.tolist() == [True]


@pytest.mark.skipif(torch.version.hip is not None, reason="HIP takes the grid that CUDA refuses")
def test_law_1_a_launch_that_the_driver_refuses_raises_and_the_device_goes_on(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, D, 1)
    grow(layer, 0, gpu_adapter(D, R), alpha=0.7)
    kernel = layer._kasmina.seeds[0].kernel
    assert kernel is not None
    first = kernel.program._forward[0]
    with pytest.raises(RuntimeError, match="Triton Error"):
        first.run(1, 2**20, 1, *(0 for _ in first.arguments))  # the second extent ends at 65535
    x = torch.randn(3, IN, device=device)
    close(layer(x), float64(layer, x, [0.7])[0])
    assert faults(layer) == [0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_law_1_guard_selects_away_a_non_finite_seed(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device, poison: float
) -> None:
    layer = layer_on(IN, 2 * D, 2, guard=True)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.5, draw=seed)
    x = torch.randn(3, IN, device=device)
    whole = layer(x)
    own_parameters(layer, 1)["up_bias"].data[0] = poison
    with no_waiting_for_the_device():
        out = layer(x)
    assert torch.equal(out[:, D:], layer.default_transform(x)[:, D:])
    assert torch.equal(out[:, :D], whole[:, :D])


# ---- Law 2


@pytest.mark.parametrize("chunking", ["features", "whole"])
@pytest.mark.parametrize("rows", [1, 31, 32, 257])
def test_law_2_outputs_and_gradients_are_those_of_float64(
    layer_on: Callable[..., KasminaLayer],
    gpu_adapter: Callable[..., str],
    device: torch.device,
    chunking: str,
    rows: int,
) -> None:
    alphas = [0.25, 1.0]
    layer = layer_on(IN, D if chunking == "whole" else 2 * D, 2, chunking=chunking)
    for seed, alpha in enumerate(alphas):
        grow(layer, seed, gpu_adapter(D, R), alpha=alpha, draw=seed)
    x = torch.randn(rows, IN, device=device, requires_grad=True)
    wanted, wanted_grads = float64(layer, x, alphas)
    for _ in range(2):  # the general way, and the prepared one where there is one
        out = layer(x)
        close(out, wanted)
        leaves = [x, layer.weight, *(p for seed in range(2) for p in own_parameters(layer, seed).values())]
        grads = torch.autograd.grad(out.square().sum(), leaves)
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            scale = wanted_grad.abs().max().clamp(min=1.0)
            close(grad.cpu().double() / scale, wanted_grad / scale)
    assert faults(layer) == [0, 0]


@pytest.mark.parametrize("poison", [None, float("nan")])
def test_law_2_alpha_zero_is_the_host_bit_by_bit(
    gpu_store: Urza, gpu_adapter: Callable[..., str], device: torch.device, poison: float | None
) -> None:
    layer = KasminaLayer.adopt(nn.Embedding(9, 2 * D).to(device), num_seeds=2, urza=gpu_store)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.0)
        if poison is not None:
            own_parameters(layer, seed)["up_weight"].data.fill_(poison)
    with torch.no_grad():
        layer.weight[:, ::3] = -0.0  # adding zero to it would lose the sign
    x = torch.randint(0, 9, (4, 5), device=device)
    for _ in range(2):
        assert torch.equal(layer(x).view(torch.int32), layer.default_transform(x).view(torch.int32))
    assert faults(layer) == [0, 0]


# ---- Law 3


@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_law_3_forward_and_backward_never_wait_for_the_device(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device, chunking: str
) -> None:
    layer = layer_on(IN, D if chunking == "whole" else 2 * D, 2, chunking=chunking)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.5, draw=seed)
    x = torch.randn(100, IN, device=device, requires_grad=True)
    layer(x).sum().backward()
    with no_waiting_for_the_device():
        for alpha in (0.25, 0.5):
            layer.set_alpha(0, alpha)
            layer(x).sum().backward()
            with torch.no_grad():
                layer(x)
    assert faults(layer) == [0, 0]


def test_law_3_a_captured_graph_follows_an_alpha_ramp_without_being_captured_again(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, D, 1)
    grow(layer, 0, gpu_adapter(D, R), alpha=0.0)
    x = torch.randn(37, IN, device=device)
    with torch.no_grad():
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
    for alpha in (0.0, 0.3, 1.0, 0.3):
        layer.set_alpha(0, alpha)
        with torch.no_grad():
            x.copy_(torch.randn(37, IN))
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
        close(out, float64(layer, x, [alpha])[0])
    # The kernel stays loaded for the graph, and reads from the layer's state that its alpha is 0 now.
    layer.unload_kernel(0)
    KernelCache.process().reset()
    graph.replay()
    torch.testing.assert_close(out, layer.default_transform(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch's, of steps on several streams
def test_law_3_a_captured_training_step_follows_an_alpha_ramp_too(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, 2 * D, 2)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.1, draw=seed)
    x = torch.randn(37, IN, device=device)
    trained = [layer.weight, *(p for _, p in layer.seed_parameters())]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        layer(x).square().sum().backward()

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = [parameter.grad for parameter in trained]
    assert all(grad is not None for grad in captured)
    for alphas in ([0.2, 0.9], [1.0, 0.0]):
        for seed, alpha in enumerate(alphas):
            layer.set_alpha(seed, alpha)
        graph.replay()
        eager = torch.autograd.grad(layer(x).square().sum(), trained)
        for grad, wanted in zip(captured, eager, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)
    assert faults(layer) == [0, 0]


# ---- Law 4


def test_law_4_code_for_another_architecture_is_refused_with_both_names(
    store: Urza, gpu_store: Urza, gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    original = gpu_store.get(gpu_adapter(D, R)).manifest
    other = "80" if original.target.arch != "80" else "90"
    if original.target.backend == "hip":
        other = "gfx90a" if original.target.arch != "gfx90a" else "gfx942"
    target = original.target.model_copy(update={"arch": other})
    artifact_id = copy_artifact(gpu_store, store, original.id, target=target)
    layer = KasminaLayer.adopt(nn.Linear(IN, D).to(device), num_seeds=1, urza=store)
    assert not layer.load_kernel_sync(0, artifact_id)
    error = layer.last_error(0)
    assert isinstance(error, ArtifactRefused)
    assert target.label in str(error)
    assert original.target.label in str(error)


def test_law_4_a_layer_that_is_moved_away_from_its_kernel_takes_the_hosts_path(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, D, 1)
    grow(layer, 0, gpu_adapter(D, R), alpha=1.0)
    x = torch.randn(5, IN)
    grown = layer(x.to(device))
    layer.cpu()
    assert torch.equal(layer(x), layer.default_transform(x))
    layer.to(device)
    assert torch.equal(layer(x.to(device)), grown)
    assert faults(layer) == [0]


# ---- Law 8


def test_law_8_a_dormant_wrap_is_invisible_bit_by_bit(gpu_store: Urza, device: torch.device) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 11)).to(device)
    x = torch.randn(6, 8, device=device)

    def run() -> list[Tensor]:
        torch.manual_seed(3)  # of the GPU too
        out = model(x)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    before = run()
    esper.wrap(model, [nn.Linear, nn.LayerNorm], seeds_per_layer=2, urza=gpu_store)
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
    assert {layer.state.storage.device for layer in model.kasmina_layers.values()} == {device}


def test_law_8_the_gpus_random_stream_is_untouched_by_wrapping_and_by_loading(
    gpu_store: Urza, gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    model = nn.Sequential(nn.Linear(IN, D)).to(device)
    before = torch.cuda.get_rng_state(device)
    esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=gpu_store)
    assert model.load_kernel_sync("0", 0, gpu_adapter(D, R))
    model.graft("0", 0)
    model(torch.zeros(2, IN, device=device))
    assert torch.equal(torch.cuda.get_rng_state(device), before)


# ---- Law 9


def test_law_9_activations_are_sampled_without_waiting_for_the_device(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    policy = Policy(sample_every=0, statistics_every=1)
    layer = layer_on(IN, 2 * D, 2, policy=policy)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.5, draw=seed)
    layer.step_boundary()
    x = torch.randn(200, IN, device=device)
    layer(x)
    layer.step_boundary()
    with no_waiting_for_the_device():
        layer(x)
        layer.step_boundary()
    torch.cuda.synchronize()
    layer.step_boundary()
    for seed, stats in enumerate(layer.get_layer_stats()["seeds"]):
        parameters = {n: p.detach().cpu().double() for n, p in own_parameters(layer, seed).items()}
        start, stop = layer.seed_span(seed)
        rows = adapter(layer.default_transform(x).detach().cpu().double()[:, start:stop], parameters).repeat(2, 1)
        # k is float32 there, and its products may be of TF32's precision in the host.
        assert stats["activation_variance"] == pytest.approx(float(rows.var(0).mean()), rel=1e-2)
        assert stats["dead_neuron_ratio"] == 0.0
        assert 0.0 < stats["avg_correlation"] < 1.0
        assert 0.0 < stats["exec_latency_us"] < 1e6
    assert layer._kasmina.clock.spent_ns > 0
