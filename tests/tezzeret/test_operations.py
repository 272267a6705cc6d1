"""Every operation that a blueprint may have: its emitted kernels against torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from emitting import agreement, load, source_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operation_cases import CASES, Case

from esper_triton.contracts.graph import layout_of
from esper_triton.contracts.operations import OPERATIONS
from esper_triton.tezzeret.reference import reference

ITEM = {"rows": 1, "sequence": 7, "image": 15}
LEADING = {"rows": (3,), "sequence": (2, 5), "image": (2, 3, 4)}
Emitted = Callable[[Case, str], ModuleType]
ids = {"ids": lambda case: case.text.replace("\n", "; ")}


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    """`emitted(case, dtype)`: its source as a module, whose kernels are compiled when they are first called."""
    folder = tmp_path_factory.mktemp("emitted")

    @cache
    def module(text: str, dtype: str) -> ModuleType:
        (case,) = (case for case in CASES if repr(case) == text)
        return load(source_of(case.blueprint, case.dims(dtype), dtype), folder)

    return lambda case, dtype: module(repr(case), dtype)


def test_every_operation_has_a_case():
    assert {op.op for case in CASES for op in case.blueprint.ops} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("case", "dtype"),
    # Each in float32 and in one of the others, in turn: what differs there is how values are read and written.
    [(case, dtype) for i, case in enumerate(CASES) for dtype in ("float32", ("float16", "bfloat16")[i % 2])],
    ids=lambda value: value if isinstance(value, str) else ids["ids"](value),
)
def test_forward_and_gradients_are_those_of_float64(emitted: Emitted, case: Case, dtype: str):
    blueprint, dims, module = case.blueprint, case.dims(dtype), emitted(case, dtype)
    item = ITEM[layout_of(blueprint.ops)]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        items=st.integers(0, 300 // item),
        gap=st.sampled_from([0, 1, 2, 9]),
        alpha=st.sampled_from([0.0, 0.3, 1.0]),
        seed=st.integers(0, 1000),
    )
    def agrees(items: int, gap: int, alpha: float, seed: int) -> None:
        precision = getattr(torch, dtype)
        change = case.altered(dtype)
        ratios = agreement(blueprint, dims, module, items * item, precision, alpha, seed, gap=gap, altered=change)
        assert max(ratios.values()) <= 1, ratios

    agrees()


@pytest.mark.parametrize("case", CASES, **ids)
def test_the_gradients_of_the_reference_are_finite_differences(case: Case):
    blueprint, dims = case.blueprint, {"d": 4, "r": 2, "n": 3}
    dims = {name: dims[name] for name in blueprint.dims}
    leading = LEADING[layout_of(blueprint.ops)]
    generator = torch.Generator().manual_seed(len(case.text))
    inputs = {}
    for name in blueprint.inputs:
        value = torch.randn(*leading, dims["d"], generator=generator, dtype=torch.float64)
        if case.index and name == "h":
            value[..., 0] = torch.randint(0, dims["n"], leading, generator=generator)
        inputs[name] = value.abs() + 0.25 if name in case.positive else value
    learnt = {} if case.index else inputs  # an index has no derivative
    fixed = {name: value for name, value in inputs.items() if name not in learnt}
    shapes = {n: tuple(dims.get(e) or int(e) for e in s) for n, s in case.parameters.items()}
    parameters = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    names = [*learnt, *parameters]
    leaves = [tensor.clone().requires_grad_() for tensor in [*learnt.values(), *parameters.values()]]

    def k(*values: torch.Tensor) -> torch.Tensor:
        given_ = fixed | dict(zip(names, values, strict=True))
        return reference(blueprint, {n: given_[n] for n in inputs}, {n: given_[n] for n in parameters}, dims=dims)

    assert torch.autograd.gradcheck(k, leaves)
