"""The adapter's CPU kernels against float64 torch, on shapes and strides that they were not tuned for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina.launcher import KernelProgram

PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")
# Small, so that few kernels are compiled: below, at and off the block sizes of 16 and 64.
DIMS = [(1, 1), (3, 2), (64, 16), (65, 17), (100, 20)]


@pytest.fixture(scope="session")
def program_for(adapter_store: esper.Urza, adapter_for: Callable[..., str]) -> Callable[..., KernelProgram]:
    @cache
    def loaded(d: int, r: int, dtype: str = "float32") -> KernelProgram:
        artifact, blobs = adapter_store.load(adapter_for(d, r, dtype))
        return KernelProgram.load(artifact.manifest, blobs)

    return loaded


def drawn(d: int, r: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down_weight": (r, d), "down_bias": (r,), "up_weight": (d, r), "up_bias": (d,)}
    scales = {"down_weight": d**-0.5, "up_weight": r**-0.5}
    return {
        name: (torch.randn(shape, generator=generator) * scales.get(name, 1.0)).to(dtype)
        for name, shape in shapes.items()
    }


def rows_of(rows: int, d: int, gap: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A view with a row stride of d + gap."""
    wide = torch.randn(rows, d + gap, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    return wide[:, gap // 2 : gap // 2 + d]


def run(
    program: KernelProgram, h: Tensor, parameters: dict[str, Tensor], alpha: float, grad_out: Tensor
) -> dict[str, Tensor]:
    out = torch.full_like(h, torch.nan)
    held = torch.tensor([alpha])
    saved = program.forward({"h": h}, parameters, held, out)
    input_grads, parameter_grads = program.backward(grad_out, {"h": h}, parameters, held, saved)
    return {"out": out, "h": input_grads["h"], **parameter_grads}


def in_float64(h: Tensor, parameters: dict[str, Tensor], alpha: float, grad_out: Tensor) -> dict[str, Tensor]:
    """Written out here, apart from the blueprint's own reference."""
    leaves = {"h": h, **parameters}
    leaves = {name: value.double().requires_grad_() for name, value in leaves.items()}
    hidden = F.linear(leaves["h"], leaves["down_weight"], leaves["down_bias"])
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    k = leaves["h"] + F.linear(hidden, leaves["up_weight"], leaves["up_bias"])
    out = (1 - alpha) * leaves["h"] + alpha * k
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def close(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, sizes: dict[str, Tensor] | None = None
) -> None:
    """`rtol` of each tensor's largest element, or of the largest of `sizes`, what the same computation makes of
    absolute values: elements that come out of cancellation have that error, too."""
    for name, value in expected.items():
        scale = (sizes or expected)[name].abs().max().item() if value.numel() else 0.0
        error = (found[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= rtol * max(scale, 1e-6), f"{name} is off by {error:.3g}, its largest element is {scale:.3g}"


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from(DIMS),
    rows=st.integers(0, 150),
    gap=st.integers(0, 9),
    alpha=st.sampled_from([0.0, 1e-3, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_forward_and_gradients_agree_with_float64(
    program_for: Callable[..., KernelProgram], dims: tuple[int, int], rows: int, gap: int, alpha: float, seed: int
) -> None:
    d, r = dims
    h, grad_out = rows_of(rows, d, gap, seed, torch.float32), rows_of(rows, d, gap + 1, seed + 7, torch.float32)
    parameters = drawn(d, r, seed, torch.float32)
    found = run(program_for(d, r), h, parameters, alpha, grad_out)
    # Sums of at most 150 float32 terms: 150 * 2^-24 is 9e-6, and drawn terms stay well below the worst case.
    exact_alpha = torch.tensor(alpha).item()
    sizes = in_float64(h.abs(), {n: p.abs() for n, p in parameters.items()}, exact_alpha, grad_out.abs())
    close(found, in_float64(h, parameters, exact_alpha, grad_out), rtol=1e-5, sizes=sizes)


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("dims", [(64, 16), (65, 17)])
def test_half_precision_agrees_with_float64_to_a_few_roundings(
    program_for: Callable[..., KernelProgram], dims: tuple[int, int], dtype: str, unit: float
) -> None:
    d, r = dims
    h, grad_out = (rows_of(77, d, 5, seed, getattr(torch, dtype)) for seed in (3, 4))
    parameters = drawn(d, r, 5, getattr(torch, dtype))
    found = run(program_for(d, r, dtype), h, parameters, 0.7, grad_out)
    # An operand of the second product and the result are rounded to the dtype, each to half a unit in the last place.
    close(found, in_float64(h, parameters, torch.tensor(0.7).item(), grad_out), rtol=4 * unit)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_at_alpha_zero_a_seed_that_has_run_away_changes_not_one_bit(
    program_for: Callable[..., KernelProgram], dtype: str
) -> None:
    h, grad_out = (rows_of(40, 64, 3, seed, getattr(torch, dtype)) for seed in (1, 2))
    h[0, :4] = torch.tensor([-0.0, 0.0, torch.inf, 65504.0])
    for poison in (torch.nan, torch.inf):
        parameters = {n: torch.full_like(p, poison) for n, p in drawn(64, 16, 0, getattr(torch, dtype)).items()}
        found = run(program_for(64, 16, dtype), h, parameters, 0.0, grad_out)
        assert torch.equal(found["out"], h)
        assert torch.equal(found["out"].signbit(), h.signbit())
        assert torch.equal(found["h"], grad_out)
        assert all(not found[name].count_nonzero() for name in PARAMETERS)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_fresh_adapter_equals_the_host_for_every_alpha(
    program_for: Callable[..., KernelProgram], alpha: float
) -> None:
    h = rows_of(40, 64, 0, 1, torch.float32)
    parameters = drawn(64, 16, 0, torch.float32)
    parameters |= {name: torch.zeros_like(parameters[name]) for name in ("up_weight", "up_bias")}
    assert torch.equal(run(program_for(64, 16), h, parameters, alpha, h)["out"], h)


def test_two_runs_and_any_stride_give_the_same_bits(program_for: Callable[..., KernelProgram]) -> None:
    h, grad_out = (rows_of(130, 100, 5, seed, torch.float32) for seed in (1, 2))
    parameters = drawn(100, 20, 0, torch.float32)
    results: list[dict[str, Any]] = [
        run(program_for(100, 20), h, parameters, 0.3, grad_out),
        run(program_for(100, 20), h, parameters, 0.3, grad_out),
        run(program_for(100, 20), h.contiguous(), parameters, 0.3, grad_out.contiguous()),
    ]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name
