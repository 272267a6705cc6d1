"""Adapters of PEFT beside seeds, whichever came first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from seeding import grow, law_2, own_parameters
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.urza import Urza

D, R = 16, 4
ALPHA = 0.5
TARGETS = [nn.Linear, nn.Embedding, nn.Conv1d, nn.MultiheadAttention]
ADAPTERS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["fc1", "emb"], init_lora_weights=False),
    "LoRA of a convolution": peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False),
    "LoRA of an attention": peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False),
    "DoRA": peft.LoraConfig(r=2, target_modules=["fc1"], use_dora=True, init_lora_weights=False),
    "IA3": peft.IA3Config(target_modules=["fc1"], feedforward_modules=[], init_ia3_weights=False),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["fc1"], init_weights=False),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.conv = nn.Conv1d(D, D, 1)
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        x = self.attn(x, x, x)[0]
        return self.fc2(torch.relu(self.fc1(self.conv(x.mT).mT)))


def net() -> nn.Module:
    torch.manual_seed(8)
    return Net()


def adapted(model: nn.Module, config: peft.PeftConfig) -> Any:
    torch.manual_seed(9)
    return peft.get_peft_model(model, copy.deepcopy(config))


def tokens() -> Tensor:
    return torch.tensor([[0, 1, 2, 8], [3, 4, 5, 6]])


def both(config: peft.PeftConfig, store: Urza, order: str) -> tuple[Any, Any]:
    """An adapted model, and one that is wrapped too."""
    if order == "PEFT first":
        return adapted(net(), config), esper.wrap(adapted(net(), config), TARGETS, seeds_per_layer=1, urza=store)
    return adapted(net(), config), adapted(esper.wrap(net(), TARGETS, seeds_per_layer=1, urza=store), config)


def original_name(model: Any, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


@pytest.mark.parametrize("order", ["PEFT first", "wrap first"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_dormant_wrap_of_an_adapted_model_is_invisible(store: Urza, name: str, order: str) -> None:
    bare, model = both(ADAPTERS[name], store, order)
    results = []
    for each in (bare, model):
        out = each(tokens())
        trained = [p for p in each.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
        with each.disable_adapter():
            plain = each(tokens())
        results.append([out, plain, *(g for g in grads if g is not None)])
    assert len(results[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert list(model.state_dict()) == list(bare.state_dict())
    assert list(peft.get_peft_model_state_dict(model)) == list(peft.get_peft_model_state_dict(bare))
    if order == "wrap first":
        moved = next(name for name in model.kasmina_layers if name.endswith(".base_layer"))
        with pytest.raises(ValueError, match=rf"no wrapped layer '\w+'; within it: '{moved}'"):
            model.load_kernel_sync(moved.removesuffix(".base_layer"), 0, "id")
    merged = model.merge_and_unload()
    assert torch.equal(merged(tokens()), bare.merge_and_unload()(tokens()))
    esper.unwrap(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in net().modules()]


@pytest.mark.parametrize("order", ["PEFT first", "wrap first"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_seed_that_can_be_given_to_an_adapted_model_blends_and_learns_beside_the_adapter(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str, order: str
) -> None:
    bare, model = both(ADAPTERS[name], adapter_store, order)
    host = model(tokens())
    layers = {name: layer for name, layer in model.kasmina_layers.items() if layer.seed_span(0) == (0, D)}
    assert len(layers) >= 5
    for layer in layers.values():
        grow(layer, 0, adapter_for(D, R), alpha=ALPHA)
        where = original_name(model, layer)
        parameters = {n: p.detach().clone().requires_grad_() for n, p in own_parameters(layer, 0).items()}

        def blend(module: nn.Module, _args: Any, h: Any, parameters: Any = parameters) -> Any:
            last = isinstance(module, nn.Conv1d)
            tensor = h[0] if isinstance(h, tuple) else h
            out = law_2(tensor.mT if last else tensor, [((0, D), ALPHA, parameters)])
            out = out.mT if last else out
            return (out, *h[1:]) if isinstance(h, tuple) else out

        handle = bare.get_submodule(where).register_forward_hook(blend)
        results = []
        for each, seeds in ((model, own_parameters(layer, 0)), (bare, parameters)):
            out = each(tokens())
            leaves = [*(p for p in each.parameters() if p.requires_grad), *seeds.values()]
            results.append((out, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)))
        (out, grads), (wanted, wanted_grads) = results
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
        assert (out - host).abs().max() > 1e-3, where
        for grad, expected in zip(grads, wanted_grads, strict=True):
            assert (grad is None) == (expected is None)
            if grad is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-3 * max(1, expected.abs().max().item()))
        handle.remove()
        layer.unload_kernel(0)
    assert torch.equal(model(tokens()), host)


def test_what_an_adapter_of_an_attention_only_adds_to_its_weights_is_refused(store: Urza) -> None:
    model = adapted(net(), ADAPTERS["LoRA of an attention"])
    base = "base_model.model.attn"
    for name, reason in {
        f"{base}.lora_A.default": rf"never called; target '{base}\.base_layer'",
        f"{base}.lora_B.default": rf"never called; target '{base}\.base_layer'",
        f"{base}.base_layer.out_proj.lora_A.default": "never calls it",
    }.items():
        assert isinstance(model.get_submodule(name), nn.Linear)
        with pytest.raises(ValueError, match=reason):
            esper.wrap(model, [name], seeds_per_layer=1, urza=store)
    wrapped = esper.wrap(model, ["*attn*"], seeds_per_layer=1, urza=store)
    assert list(wrapped.kasmina_layers) == [f"{base}.base_layer"]


def test_the_module_that_peft_trains_a_copy_of_is_refused_and_the_copy_is_not(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["fc2"])
    model = adapted(net(), config)
    base = "base_model.model.fc2"
    with pytest.raises(ValueError, match="PEFT trains a copy and calls that; target the one in modules_to_save"):
        esper.wrap(model, [f"{base}.original_module"], seeds_per_layer=1, urza=adapter_store)
    wrapped = esper.wrap(model, [f"{base}.*"], seeds_per_layer=1, urza=adapter_store)
    assert list(wrapped.kasmina_layers) == [f"{base}.modules_to_save.default"]
    host = model(tokens())
    layer = wrapped.kasmina_layers[f"{base}.modules_to_save.default"]
    grow(layer, 0, adapter_for(D, R), alpha=ALPHA)
    wanted = law_2(host, [((0, D), ALPHA, own_parameters(layer, 0))])
    torch.testing.assert_close(model(tokens()), wanted, rtol=1e-4, atol=1e-5)

    late = adapted(esper.wrap(net(), [nn.Linear], seeds_per_layer=1, urza=adapter_store), config)
    with pytest.raises(ValueError, match=r"'fc2\.original_module' is out of use: .* PEFT trains a copy"):
        late.load_kernel_sync("fc2.original_module", 0, adapter_for(D, R))
    host = late(tokens())
    grow(late.kasmina_layers["fc2.modules_to_save.default"], 0, adapter_for(D, R), alpha=ALPHA)
    assert not torch.equal(late(tokens()), host)
