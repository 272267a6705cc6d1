"""Quantised hosts: `quantize_` before wrapping, after it, and under an active seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from seeding import grow, law_2, own_parameters
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import esper_triton as esper
from esper_triton.urza import Urza

D, R = 16, 4
ALPHA = 0.5
CONFIGS = [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Float8WeightOnlyConfig]


def net() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)).eval()


def example() -> Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("order", ["before wrapping", "while dormant", "while active"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantised_host_is_invisible_while_dormant_and_blends_and_teaches_while_active(
    adapter_store: Urza, adapter_for: Callable[..., str], config: Callable[[], Any], order: str
) -> None:
    bare = net()
    assert bare[0](example()).shape == (5, D)
    quantize_(bare, config())
    model: Any = net()
    if order == "before wrapping":
        quantize_(model, config())
    esper.wrap(model, [nn.Linear, nn.LayerNorm], seeds_per_layer=1, urza=adapter_store)
    if order == "while active":
        grow(model[2], 0, adapter_for(D, R), alpha=ALPHA)
    if order != "before wrapping":
        quantize_(model, config())
    assert [type(m.weight) for m in model] == [type(m.weight) for m in bare]
    assert list(model.state_dict()) == list(bare.state_dict())
    assert isinstance(model, esper.MorphableModel)
    assert len(model.kasmina_layers) == 3
    with torch.no_grad():
        host = bare(example())
    if order != "while active":
        with torch.no_grad():
            assert torch.equal(model(example()), host)
        grow(model[2], 0, adapter_for(D, R), alpha=ALPHA)
    model.requires_grad_(False)
    out = model(example())
    parameters = own_parameters(model[2], 0)
    wanted = law_2(host, [((0, D), ALPHA, parameters)])
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), list(parameters.values()))
    expected = torch.autograd.grad(wanted.square().sum(), list(parameters.values()))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(example()), out)
        esper.unwrap(model)
        assert torch.equal(model(example()), host)
    assert repr(model) == repr(bare)


def test_a_host_prepared_for_training_with_quantised_weights_grows(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    model: Any = net()
    prepare = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare")
    quantize_(model, prepare)
    bare = copy.deepcopy(model)
    esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    assert torch.equal(model(example()), bare(example()))
    grow(model[2], 0, adapter_for(D, R), alpha=ALPHA)
    out, wanted = model(example()), law_2(bare(example()), [((0, D), ALPHA, own_parameters(model[2], 0))])
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    for grad, expected in zip(grads, torch.autograd.grad(wanted.square().sum(), list(bare.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)

    late: Any = esper.wrap(net(), [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    quantize_(late, prepare)  # puts modules of its own in the place of the wrapped ones
    with pytest.raises(ValueError, match=r"FakeQuantizedLinear .* what replaces modules comes first, then wrap"):
        late.load_kernel_sync("2", 0, adapter_for(D, R))
