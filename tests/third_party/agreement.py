"""What a package computes in float32 or less, against a reference in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the largest value: some dozens of roundings to float32, as they add up in sums of a few hundred terms.
FLOAT32 = 2e-5
# Intermediate results and the result itself are rounded to 8 bits.
BFLOAT16 = 2e-2


def assert_agrees(
    compute: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    tolerance: float = FLOAT32,
    gradients: bool = True,
) -> None:
    """`compute(*inputs)` is `reference(*inputs)` in float64, up to `tolerance` times the largest value of each tensor.

    So are the gradients, by all inputs of floating type, of a random linear function of all results.
    """
    given = [_leaf(value, gradients) for value in inputs]
    exact = [_leaf(value.double() if _is_float(value) else value, gradients) for value in inputs]
    results, expected = list(_tensors(compute(*given))), list(_tensors(reference(*exact)))
    assert expected
    assert len(results) == len(expected)
    for number, (result, value) in enumerate(zip(results, expected, strict=True)):
        _assert_close(f"result {number}", result, value, tolerance)
    if not gradients:
        return
    rng = torch.Generator().manual_seed(7)
    weights = [torch.randn(value.shape, generator=rng, dtype=torch.float64) for value in expected]
    leaves = [[value for value in values if _is_float(value)] for values in (given, exact)]
    found, wanted = (
        torch.autograd.grad(sum((r.double() * w).sum() for r, w in zip(rs, weights, strict=True)), by)
        for rs, by in zip((results, expected), leaves, strict=True)
    )
    for number, (gradient, value) in enumerate(zip(found, wanted, strict=True)):
        _assert_close(f"gradient {number}", gradient, value, tolerance)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Any, gradients: bool) -> Any:
    return value.detach().clone().requires_grad_(gradients) if _is_float(value) else value


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def _assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, what
    assert torch.isfinite(expected).all(), what
    error = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    assert error <= tolerance * largest, f"{what}: off by {error}, of {largest}"
