"""Adopted layers in the company of what PyTorch itself does to modules: pruning, parametrisation, hooks, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeding import grow, law_2, own_parameters
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.urza import Urza

D, R = 16, 4
ALPHA = 0.5


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrised(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def _weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        utils.weight_norm(module)


def _removed(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


# What is done to a module, and how it is undone.
COMPANY: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "prune, structured": (
        lambda m: prune.ln_structured(m, "weight", 0.25, n=2, dim=0),
        lambda m: prune.remove(m, "weight"),
    ),
    "parametrize": (_parametrised, _removed),
    "weight_norm": (parametrizations.weight_norm, _removed),
    "orthogonal": (parametrizations.orthogonal, _removed),
    "spectral_norm": (parametrizations.spectral_norm, _removed),
    "weight_norm by hooks": (_weight_norm, utils.remove_weight_norm),
    "spectral_norm by hooks": (utils.spectral_norm, utils.remove_spectral_norm),
}
BY_PARAMETRIZE = ["parametrize", "weight_norm", "orthogonal", "spectral_norm"]


def host(kind: str = "Linear") -> nn.Module:
    torch.manual_seed(6)
    return (nn.Linear(D, D) if kind == "Linear" else nn.Conv1d(D, D, 3, padding=1)).eval()


def example() -> Tensor:
    return torch.randn(2, D, D, generator=torch.Generator().manual_seed(1))


def blended(h: Tensor, layer: KasminaLayer, kind: str = "Linear") -> Tensor:
    if kind == "Linear":
        return law_2(h, [((0, D), ALPHA, own_parameters(layer, 0))])
    return law_2(h.mT, [((0, D), ALPHA, own_parameters(layer, 0))]).mT


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


# ---- pruning, parametrisation, norms of weights


@pytest.mark.parametrize("order", ["before wrapping", "while dormant", "while active"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
@pytest.mark.parametrize("name", COMPANY)
def test_what_is_done_to_a_weight_works_in_every_order_and_can_be_undone(
    adapter_store: Urza, small: str, name: str, kind: str, order: str
) -> None:
    do, undo = COMPANY[name]
    bare = host(kind)
    do(bare)
    module = host(kind)
    model: Any = nn.Sequential(module)
    if order == "before wrapping":
        do(module)
    esper.wrap(model, ["0"], seeds_per_layer=1, urza=adapter_store)
    if order == "while dormant":
        do(module)
    x = example()
    if order != "while active":
        assert torch.equal(model(x), bare(x))
        assert {n: id(p) for n, p in module.named_parameters()}.keys() == dict(bare.named_parameters()).keys()
    layer: Any = module
    grow(layer, 0, small, alpha=ALPHA)
    if order == "while active":
        do(module)
    out, wanted = model(x), blended(bare(x), layer, kind)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    expected = torch.autograd.grad(wanted.square().sum(), list(bare.parameters()))
    for (leaf, _), grad, right in zip(module.named_parameters(), grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-3, msg=leaf)
    assert list(model.state_dict()) == [f"0.{key}" for key in bare.state_dict()]

    undo(module)
    assert isinstance(module, KasminaLayer)
    assert type(module).__name__ == f"Kasmina{kind}"
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    esper.unwrap(model)
    assert type(module) is type(host(kind))
    torch.testing.assert_close(model(x), bare(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BY_PARAMETRIZE)
@pytest.mark.parametrize("root", [False, True])
def test_unwrapping_a_parametrised_module_gives_back_the_class_that_it_had(
    adapter_store: Urza, small: str, name: str, root: bool
) -> None:
    do, undo = COMPANY[name]
    module = host()
    do(module)
    before = type(module)
    model: Any = module if root else nn.Sequential(module)
    esper.wrap(model, ["" if root else "0"], seeds_per_layer=1, urza=adapter_store)
    assert isinstance(module, before.__bases__[0])
    grow(model if root else model[0], 0, small, alpha=ALPHA)
    esper.unwrap(model)
    assert type(module) is before
    assert torch.equal(module(example()), before.forward(module, example()))
    undo(module)
    assert type(module) is nn.Linear


def test_a_parametrisation_that_came_after_wrapping_stays_when_the_wrap_goes(adapter_store: Urza) -> None:
    module: Any = host()
    plain = module(example())
    parametrize.register_parametrization(module, "weight", Doubled())
    original = type(module)
    model = esper.wrap(nn.Sequential(module), ["0"], seeds_per_layer=1, urza=adapter_store)
    parametrize.register_parametrization(module, "bias", Doubled())
    esper.unwrap(model)
    assert type(module) is not original  # which knows nothing of the bias
    assert type(module).__name__ == "ParametrizedLinear"
    assert not isinstance(module, KasminaLayer)
    torch.testing.assert_close(module(example()), 2 * plain)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(example()), module(example()))
    for name in ("bias", "weight"):
        parametrize.remove_parametrizations(module, name)
    assert type(module) is nn.Linear
    torch.testing.assert_close(module(example()), 2 * plain)


# ---- copies and files


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("name", ["prune", *BY_PARAMETRIZE])
@pytest.mark.parametrize("after", [False, True])
def test_a_deep_copy_of_an_active_layer_is_whole_and_independent(
    adapter_store: Urza, small: str, name: str, after: bool, root: bool
) -> None:
    do, _ = COMPANY[name]
    module: Any = host()
    model: Any = module if root else nn.Sequential(module)
    with torch.no_grad():  # torch copies a pruned weight only where it has no history
        if not after:
            do(module)
        esper.wrap(model, ["" if root else "0"], seeds_per_layer=1, urza=adapter_store)
        if after:
            do(module)
        grow(module, 0, small, alpha=ALPHA)
        x = example()
        out = model(x)
        other = copy.deepcopy(model)
        copied = other if root else other[0]
        assert type(copied) is type(module)
        assert torch.equal(other(x), out)
        assert {id(p) for p in esper.seed_parameters(other)}.isdisjoint(id(p) for p in esper.seed_parameters(model))
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())
        for parameter in (*other.parameters(), *esper.seed_parameters(other)):
            parameter.add_(1.0)
        assert torch.equal(model(x), out)
        KasminaLayer.unload_kernel(copied, 0)
        assert torch.equal(model(x), out)


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self)(self.in_features, self.out_features)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


@pytest.mark.parametrize("root", [False, True])
def test_a_host_that_copies_itself_in_its_own_way_is_adopted_in_the_copy(
    adapter_store: Urza, small: str, root: bool
) -> None:
    module: Any = CopiesItself(D, D)
    model: Any = module if root else nn.Sequential(module)
    esper.wrap(model, ["" if root else "0"], seeds_per_layer=1, urza=adapter_store)
    grow(module, 0, small, alpha=ALPHA)
    other = copy.deepcopy(model)
    out = model(example())
    assert type(other) is type(model)
    assert torch.equal(other(example()), out)
    copied: Any = other if root else other[0]
    copied.set_alpha(0, 0.0)
    assert torch.equal(other(example()), copied.default_transform(example()))
    assert torch.equal(model(example()), out)
    model.unload_kernel("" if root else "0", 0)
    copied.set_alpha(0, ALPHA)
    assert torch.equal(other(example()), out)


def test_a_traced_module_stays_a_wrapped_model_in_a_deep_copy(adapter_store: Urza, small: str) -> None:
    model: Any = torch.fx.symbolic_trace(nn.Sequential(host(), nn.Tanh()))
    esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    grow(model.kasmina_layers["0"], 0, small, alpha=ALPHA)
    other = copy.deepcopy(model)
    assert isinstance(other, esper.MorphableModel)
    assert isinstance(other, torch.fx.GraphModule)
    assert torch.equal(other(example()), model(example()))
    esper.unwrap(other)
    assert not isinstance(other, esper.MorphableModel)
    assert torch.equal(other(example()), torch.tanh(host()(example())))


@pytest.mark.parametrize("name", BY_PARAMETRIZE)
@pytest.mark.parametrize("adopted", [False, True])
def test_a_parametrised_layer_is_pickled_as_little_as_torchs_own_and_its_state_dict_loads(
    store: Urza, tmp_path: Path, name: str, adopted: bool
) -> None:
    do, _ = COMPANY[name]
    model = nn.Sequential(host())
    do(model[0])
    if adopted:
        esper.wrap(model, ["0"], seeds_per_layer=1, urza=store)
    for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
        with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
            save(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = nn.Sequential(nn.Linear(D, D).eval())
    do(other[0])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    torch.testing.assert_close(other(example()), model(example()))


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pruned_layer_with_an_active_seed_comes_back_from_a_file(
    adapter_store: Urza, small: str, tmp_path: Path, way: str
) -> None:
    model: Any = nn.Sequential(host())
    prune.l1_unstructured(model[0], "weight", 0.5)
    esper.wrap(model, ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, small, alpha=ALPHA)
    model[0].weight = model[0].weight.detach()  # the pruned weight is made anew in every call
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(example()), model(example()))
    prune.remove(other[0], "weight")
    assert torch.equal(other(example()), model(example()))


# ---- hooks


def _hooked(module: nn.Module, calls: list[tuple[str, Any]]) -> list[Any]:
    """Every kind of hook of a module, each noting its name and what it sees."""

    def note(name: str) -> Callable[..., None]:
        return lambda *seen: calls.append((name, seen[1:]))

    return [
        module.register_forward_hook(note("forward 1")),
        module.register_forward_pre_hook(note("pre")),
        module.register_forward_hook(note("forward, keywords"), with_kwargs=True),
        module.register_forward_hook(note("forward 0"), prepend=True),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward 1")),
        module.register_full_backward_hook(note("backward 0"), prepend=True),
    ]


@pytest.mark.parametrize("hooked_at", ["before wrapping", "while dormant", "while active"])
def test_hooks_keep_their_order_and_see_the_blended_output_and_its_gradients(
    adapter_store: Urza, small: str, hooked_at: str
) -> None:
    bare, module = nn.Sequential(host(), nn.Tanh()), nn.Sequential(host(), nn.Tanh())
    expected: list[tuple[str, Any]] = []
    calls: list[tuple[str, Any]] = []
    handles: list[Any] = []

    def hook_both() -> None:
        for part in ("0", ""):
            handles.extend(_hooked(module.get_submodule(part), calls))

    if hooked_at == "before wrapping":
        hook_both()
    model: Any = esper.wrap(module, ["0"], seeds_per_layer=1, urza=adapter_store)
    if hooked_at == "while dormant":
        hook_both()
    grow(model[0], 0, small, alpha=ALPHA)
    if hooked_at == "while active":
        hook_both()
    # The same in plain torch: the blend as the first hook of the bare layer.
    bare[0].register_forward_hook(lambda _m, _args, h: blended(h, model[0]))
    for part in ("0", ""):
        _hooked(bare.get_submodule(part), expected)
    # `forward 0` is put in front of the blend there, and sees the host's output: not compared.
    for net in (bare, model):
        x = example().requires_grad_()
        net(x).square().sum().backward()
    order = [name for name, _ in calls]
    assert order == [name for name, _ in expected]
    for (name, seen), (_, wanted) in zip(calls, expected, strict=True):
        if name == "forward 0":
            continue
        for found, right in zip(_tensors(seen), _tensors(wanted), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    blend = blended(model[0].default_transform(example()), model[0])
    seen_first = next(seen for name, seen in calls if name == "forward 0")
    torch.testing.assert_close(seen_first[-1], blend, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(example())
    assert calls == []


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else []


def test_a_hook_that_changes_the_input_or_the_output_does_so_around_the_seed(adapter_store: Urza, small: str) -> None:
    layer: Any = host()
    layer.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    layer.register_forward_hook(lambda _m, _args, out: 3 * out)
    model = esper.wrap(nn.Sequential(layer), ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(layer, 0, small, alpha=ALPHA)
    wanted = 3 * blended(nn.functional.linear(example() + 1, layer.weight, layer.bias), layer)
    torch.testing.assert_close(model(example()), wanted, rtol=1e-4, atol=1e-5)


# ---- flags, casts and gradients


def test_flags_of_the_model_leave_seeds_alone_and_those_of_the_lifecycle_leave_the_model_alone(
    adapter_store: Urza, small: str
) -> None:
    model: Any = esper.wrap(nn.Sequential(host()), ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, small, alpha=ALPHA)
    model.requires_grad_(False)
    assert all(p.requires_grad for p in esper.seed_parameters(model))
    model(example()).sum().backward()
    assert all(p.grad is not None for p in esper.seed_parameters(model))
    assert all(p.grad is None for p in model.parameters())
    model[0].request_transition(0, SeedLifecycleState.STABILIZATION)
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in esper.seed_parameters(model))
    out = model.eval()(example())
    assert torch.equal(model.train()(example()), out)
    assert model[0].training


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_the_model_clears_the_seeds_too(adapter_store: Urza, small: str, set_to_none: bool) -> None:
    model: Any = esper.wrap(nn.Sequential(host()), ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, small, alpha=ALPHA)
    model(example()).sum().backward()
    model.zero_grad(set_to_none=set_to_none)
    for parameter in (*model.parameters(), *esper.seed_parameters(model)):
        assert parameter.grad is None if set_to_none else torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)],
    ids=["half", "bfloat16", "double", "to"],
)
def test_a_cast_takes_the_seed_along_and_the_host_runs_alone_until_it_fits_again(
    adapter_store: Urza, small: str, cast: Callable[[nn.Module], nn.Module], kind: str
) -> None:
    model: Any = esper.wrap(nn.Sequential(host(kind)), ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, small, alpha=ALPHA)
    parameters = list(esper.seed_parameters(model))
    cast(model)
    dtype = model[0].weight.dtype
    assert [id(p) for p in esper.seed_parameters(model)] == [id(p) for p in parameters]
    assert {p.dtype for p in parameters} == {dtype}
    x = example().to(dtype)
    assert torch.equal(model(x), model[0].default_transform(x))
    assert model[0].get_layer_stats()["seeds"][0]["specialisation_misses"] == 1
    model.float()
    h = model[0].default_transform(example())
    torch.testing.assert_close(model(example()), blended(h, model[0], kind), rtol=1e-4, atol=1e-5)
    assert model[0].state.alpha(0) == ALPHA  # float32, whatever the model is cast to


def test_a_layers_state_can_be_handed_to_itself_alone(store: Urza) -> None:
    layers = [KasminaLayer.adopt(nn.Linear(D, D), num_seeds=1, urza=store, name=name) for name in ("one", "other")]
    before = layers[0].state.storage
    layers[0].state = layers[0].state
    assert layers[0].state.storage is before
    with pytest.raises(AttributeError, match="state of layer 'one' follows its seeds and cannot be set"):
        layers[0].state = layers[1].state
