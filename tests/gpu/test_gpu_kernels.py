"""Kernels on a GPU against float64: their proof, their gradients, streams and several devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import adapter, grow, linear_with_seeds, own_parameters
from torch import Tensor

from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KasminaLayer, KernelProgram
from esper_triton.urabrask.verdict import read_report
from esper_triton.urza import Urza

D, R, IN = 48, 4, 6
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def drawn_parameters(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down_weight": (R, D), "down_bias": (R,), "up_weight": (D, R), "up_bias": (D,)}
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(device) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_shipped_adapter_is_proven_on_this_gpu(
    gpu_store: Urza, gpu_adapter: Callable[..., str], dtype: str
) -> None:
    artifact_id = gpu_adapter(D, R, dtype)
    assert gpu_store.get(artifact_id).status is KernelStatus.VALIDATED
    report = read_report(artifact_id, gpu_store)
    assert (report.verdict, report.failures) == ("VALIDATED", ())
    computed = {"out", "grad_h", "grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias"}
    assert all(1e-6 < report.worst[name] < 1 for name in computed)  # something was computed, and compared


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 300), gap=st.integers(0, 5), alpha=st.floats(0, 1, width=32))
def test_forward_and_backward_match_float64_torch_for_any_rows_and_row_stride(
    gpu_store: Urza, gpu_adapter: Callable[..., str], device: torch.device, rows: int, gap: int, alpha: float
) -> None:
    artifact, blobs = gpu_store.load(gpu_adapter(D, R))
    program = KernelProgram.load(artifact.manifest, blobs, device)
    parameters = drawn_parameters(device)
    h = torch.randn(rows, D + gap, device=device)[:, :D]
    a = torch.tensor(alpha, device=device)
    out = torch.full((rows, D + gap), 7.0, device=device)
    saved = program.forward({"h": h}, parameters, a, out[:, :D])
    g = torch.randn(rows, D + gap, device=device)[:, :D]
    to_inputs, to_parameters = program.backward(g, {"h": h}, parameters, a, saved)

    h64 = h.cpu().double().requires_grad_()
    p64 = {name: p.cpu().double().requires_grad_() for name, p in parameters.items()}
    wanted = h64 + alpha * (adapter(h64, p64) - h64)
    grads = torch.autograd.grad(wanted, [h64, *p64.values()], g.cpu().double())
    # Sums of at most 300 float32 products of values near 1: 300 * 2^-24 times a few.
    torch.testing.assert_close(out[:, :D].cpu().double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_inputs["h"].cpu().double(), grads[0], rtol=1e-4, atol=1e-4)
    for name, grad in zip(p64, grads[1:], strict=True):
        torch.testing.assert_close(to_parameters[name].cpu().double(), grad, rtol=1e-4, atol=1e-3)
    assert (out[:, D:] == 7.0).all()


def _step(layer: KasminaLayer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    parameters = [layer.weight, *(p for _, p in layer.seed_parameters())]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def test_calls_on_many_streams_at_once_give_what_one_after_the_other_gives(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, 2 * D, 2)
    for seed in range(2):
        grow(layer, seed, gpu_adapter(D, R), alpha=0.5, draw=seed)
    inputs = [torch.randn(257, IN, device=device) for _ in range(8)]
    wanted = [_step(layer, x) for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in inputs]
    results: list[list[Tensor]] = []
    for stream, x in zip(streams, inputs, strict=True):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            busy = torch.randn(1024, 1024, device=device)
            for _ in range(5):  # so that a launch on a wrong stream would be early
                busy = busy @ busy * 1e-3
            late = x + 0 * busy.sum()
            results.append(_step(layer, late))
    torch.cuda.synchronize(device)
    assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0, layer.last_error(0)
    for result, expected in zip(results, wanted, strict=True):
        for one, other in zip(result, expected, strict=True):
            # The host's products may be split otherwise there.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


async def test_a_kernel_that_is_loaded_on_another_thread_runs_on_this_one(
    layer_on: Callable[..., KasminaLayer], gpu_adapter: Callable[..., str], device: torch.device
) -> None:
    layer = layer_on(IN, D, 1)
    assert await layer.load_kernel(0, gpu_adapter(D, R)), layer.last_error(0)
    own_parameters(layer, 0)["up_bias"].data.fill_(1.0)  # which is all that a fresh adapter adds then
    layer.graft(0)
    layer.set_alpha(0, 0.5)
    x = torch.randn(5, IN, device=device)
    torch.testing.assert_close(layer(x), layer.default_transform(x) + 0.5, rtol=1e-6, atol=1e-6)


@several
def test_a_layer_on_another_gpu_than_the_current_one_runs_there(
    gpu_store: Urza, gpu_adapter: Callable[..., str]
) -> None:
    if torch.cuda.get_device_capability(0) != torch.cuda.get_device_capability(1):
        pytest.skip("two GPUs of different architectures")
    layers = [linear_with_seeds(gpu_store, IN, D, 1).to(f"cuda:{index}") for index in range(2)]
    x = torch.randn(9, IN)
    results = []
    for index, layer in enumerate(layers):
        grow(layer, 0, gpu_adapter(D, R), alpha=0.5)
        kernel = layer._kasmina.seeds[0].kernel
        assert kernel is not None
        assert kernel.program.device == torch.device("cuda", index)
        for current in range(2):
            with torch.cuda.device(current):
                results.append([t.cpu() for t in _step(layer, x.to(f"cuda:{index}"))])
                assert torch.cuda.current_device() == current
        assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0, layer.last_error(0)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            # The host's products may be split otherwise there.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
