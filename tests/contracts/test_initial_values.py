"""What parameters start as: which texts there are, and what is drawn for them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esper_triton.contracts.blueprint import ParameterSpec
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.expressions import ExpressionError
from esper_triton.contracts.initial import Init, fill_init
from esper_triton.contracts.manifest import ParameterRecord, parameter_records
from esper_triton.kasmina.loading import make_parameters


def drawn(shape: tuple[int, ...], init: str) -> torch.Tensor:
    """As a seed's parameter."""
    manifest = SimpleNamespace(id="a", dtype="float32", parameters={"w": ParameterRecord(shape=shape, init=init)})
    request = SimpleNamespace(layer_name="fc", seed=0, device=torch.device("cpu"))
    return make_parameters(request, manifest)["w"].detach()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("init", "value"), [("zeros", 0.0), ("ones", 1.0), ("constant:-2.5", -2.5), ("constant:1e-3", 0.001)]
)
def test_constants(init: str, value: float):
    assert torch.equal(drawn((3, 4), init), torch.full((3, 4), value))


def test_a_normal_one_has_its_standard_deviation():
    values = drawn((200, 300), "normal:0.02").double()
    assert abs(values.std().item() / 0.02 - 1) < 0.02  # the relative error of 60,000 draws is 0.003
    assert abs(values.mean().item()) < 0.0005


@pytest.mark.parametrize(
    ("shape", "init", "bound"),
    [
        ((64, 100), "uniform:0.3", 0.3),
        ((64, 100), "kaiming_uniform", math.sqrt(1 / 100)),
        ((4096,), "kaiming_uniform", math.sqrt(1 / 4096)),
        ((64, 20, 3, 3), "kaiming_uniform", math.sqrt(1 / 180)),
        ((512, 5, 3), "kaiming_uniform", math.sqrt(1 / 15)),
        ((100, 64), "kaiming_uniform:100", math.sqrt(1 / 100)),
        ((300, 100), "xavier_uniform", math.sqrt(6 / 400)),
        ((64, 20, 3, 3), "xavier_uniform", math.sqrt(6 / (84 * 9))),
    ],
)
def test_uniform_ones_fill_their_interval(shape: tuple[int, ...], init: str, bound: float):
    values = drawn(shape, init).abs()
    assert 0.98 * bound < values.max().item() <= bound
    assert abs(values.mean().item() / bound - 0.5) < 0.03


@pytest.mark.parametrize(
    "module", [nn.Linear(30, 200), nn.Conv1d(6, 50, 5), nn.Conv2d(6, 50, 3), nn.Conv1d(40, 40, 7, groups=40)]
)
def test_kaiming_is_what_torch_draws_for_its_own_layers(module: nn.Module):
    weight = module.weight
    bound = Init.parse("kaiming_uniform").bound(weight.shape)
    assert 0.9 * bound < weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("kaiming_uniforn", "unknown init 'kaiming_uniforn'; did you mean 'kaiming_uniform'"),
        ("normal", "expected normal:NUMBER"),
        ("normal:-1", "not negative"),
        ("uniform:nan", "finite number"),
        ("constant:1e999", "finite number"),
        ("zeros:1", "zeros takes no argument"),
        ("kaiming_uniform:d +", "not an integer expression"),
    ],
)
def test_what_is_no_init_is_refused(init: str, message: str):
    with pytest.raises(ValueError, match=message):
        ParameterSpec(shape=("d",), init=init)


def test_a_manifest_with_an_unknown_init_is_refused():
    with pytest.raises(ArtifactRefused, match="parameter 'w' has unknown init 'orthogonal'"):
        drawn((3,), "orthogonal")


def test_fan_in_is_worked_out_for_the_manifest():
    spec = {"b": ParameterSpec(shape=("n",), init="kaiming_uniform:2 * d"), "w": ParameterSpec(shape=("n",))}
    records = parameter_records(spec, {"n": 3, "d": 4})
    assert records["b"].init == "kaiming_uniform:8"
    assert records["w"].init == "zeros"
    with pytest.raises(ExpressionError, match="fan-in is 0"):
        fill_init("kaiming_uniform:d - 4", {"d": 4})
