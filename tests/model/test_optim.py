from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from seeding import grow
from torch import Tensor, nn
from torch.optim import lr_scheduler

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.urza import Urza

D, R = 16, 4
S = SeedLifecycleState
Optimizers = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 17)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-6]),
}


@pytest.fixture
def adapter(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


@pytest.fixture
def model(adapter_store: Urza) -> esper.MorphableModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    return esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=adapter_store)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None) -> None:
    """The same inputs for the same call, whatever came before."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x, y = torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def groups_of_seeds(optimizer: torch.optim.Optimizer) -> list[str]:
    return [group["esper_seed"] for group in optimizer.param_groups if "esper_seed" in group]


def own(model: esper.MorphableModel, layer: str) -> list[nn.Parameter]:
    return [p for _, p in model.kasmina_layers[layer].seed_parameters()]


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in (*model.parameters(), *esper.seed_parameters(model))]


def moments(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Any]:
    return [copy.deepcopy(optimizer.state[p]) for p in parameters]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x if x[k] is not None) for x, y in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_seeds_groups_come_and_go_and_the_moments_of_everything_else_stay(
    model: esper.MorphableModel, adapter: str, name: str
) -> None:
    optimizer = OPTIMIZERS[name](model.parameters())
    esper.attach(optimizer, model, weight_decay=0.0)
    host = list(model.parameters())
    train(model, optimizer, 3)
    before = moments(optimizer, host)
    grow(model.kasmina_layers["2"], 0, adapter, alpha=0.5)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    assert groups_of_seeds(optimizer) == ["2:0", "0:0"]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in own(model, "2")}
    assert same(moments(optimizer, host), before)
    assert [g["weight_decay"] for g in optimizer.param_groups[1:]] == [0.0, 0.0]
    untrained = values(model)
    train(model, optimizer, 3)
    assert not any(torch.equal(a, b) for a, b in zip(values(model), untrained, strict=True))
    kept = host + own(model, "0")
    gone = own(model, "2")
    before = moments(optimizer, kept)
    model.unload_kernel("2", 0)
    assert groups_of_seeds(optimizer) == ["0:0"]
    assert same(moments(optimizer, kept), before)
    assert not any(p in optimizer.state for p in gone)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_seed_trains_as_it_would_in_an_optimizer_that_had_it_from_the_start(
    adapter_store: Urza, adapter: str, name: str
) -> None:
    def grown() -> esper.MorphableModel:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, 3))
        model = esper.wrap(host, ["0"], seeds_per_layer=1, urza=adapter_store)
        grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
        return model

    model, by_hand = grown(), grown()
    optimizer = OPTIMIZERS[name](model.parameters())
    esper.attach(optimizer, model)
    train(model, optimizer, 4)
    train(by_hand, OPTIMIZERS[name]([*by_hand.parameters(), *esper.seed_parameters(by_hand)]), 4)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(by_hand), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_frozen_seed_keeps_its_group_and_nothing_moves_it(
    model: esper.MorphableModel, adapter: str, name: str
) -> None:
    layer = model.kasmina_layers["0"]
    optimizer = OPTIMIZERS[name](model.parameters())
    esper.attach(optimizer, model)
    grow(layer, 0, adapter, alpha=0.5)
    train(model, optimizer, 2)
    assert all(p.grad is not None for p in own(model, "0"))
    for state in (S.STABILIZATION, S.EVALUATING):
        layer.request_transition(0, state)
        optimizer.step()  # gradients of before the transition, momentum and weight decay
        before = [p.detach().clone() for p in own(model, "0")]
        train(model, optimizer, 2)
        assert all(torch.equal(a, b) for a, b in zip(own(model, "0"), before, strict=True))
    kept = moments(optimizer, own(model, "0"))
    layer.request_transition(0, S.FINE_TUNING)
    assert same(moments(optimizer, own(model, "0")), kept)
    train(model, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(own(model, "0"), before, strict=True))
    layer.request_transition(0, S.FOSSILIZED)
    before = [p.detach().clone() for p in own(model, "0")]
    train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(own(model, "0"), before, strict=True))
    assert groups_of_seeds(optimizer) == ["0:0"]


def test_a_seed_in_recovery_keeps_its_moments_and_another_artifact_starts_anew(
    model: esper.MorphableModel, adapter: str, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model.kasmina_layers["0"]
    optimizer = torch.optim.Adam(model.parameters())
    esper.attach(optimizer, model)
    grow(layer, 0, adapter, alpha=0.5)
    train(model, optimizer, 2)
    learned, before = own(model, "0"), moments(optimizer, own(model, "0"))

    def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(layer._kasmina.seeds[0].kernel.program), "forward", lambda *_: 1 / 0)
            model(torch.randn(2, 6))
        model.step_boundary()
        assert layer.seed_state(0) is S.ERROR_RECOVERY

    fail()
    grow(layer, 0, adapter, alpha=0.5, draw=None, force=True)
    assert own(model, "0") == learned
    assert same(moments(optimizer, learned), before)
    fail()
    grow(layer, 0, adapter_for(D, 2), alpha=0.5)
    assert groups_of_seeds(optimizer) == ["0:0"]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in own(model, "0")}
    assert not any(p in optimizer.state for p in learned)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_group_that_comes_late_is_scheduled_as_the_first_one(
    model: esper.MorphableModel, adapter: str, name: str
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    esper.attach(optimizer, model, schedulers=[scheduler])
    train(model, optimizer, 3, scheduler)
    grow(model.kasmina_layers["2"], 0, adapter, alpha=0.5)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    for step in range(10):
        if step == 5:
            model.unload_kernel("2", 0)
        train(model, optimizer, 1, scheduler)
        first, *others = optimizer.param_groups
        assert [g["lr"] for g in others] == [first["lr"]] * len(others)
        assert [g["momentum"] for g in others] == [first["momentum"]] * len(others)
        assert len(scheduler.get_last_lr()) == len(optimizer.param_groups)


@pytest.mark.parametrize("name", ["lambda", "multiplicative", "step", "cosine", "one-cycle", "cyclic", "plateau"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_group_with_its_own_rate_follows_the_schedule_in_proportion(
    model: esper.MorphableModel, adapter: str, name: str, as_tensor: bool
) -> None:
    lr: Any = torch.tensor(0.1) if as_tensor else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    own_lr = float(optimizer.param_groups[0].get("initial_lr", 0.1)) / 4
    esper.attach(optimizer, model, schedulers=[scheduler], lr=torch.tensor(own_lr) if as_tensor else own_lr)
    train(model, optimizer, 2, scheduler)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    for _ in range(6):
        train(model, optimizer, 1, scheduler)
        first, second = (float(g["lr"]) for g in optimizer.param_groups)
        # min_lr of ReduceLROnPlateau is absolute, and reached by the smaller rate first
        assert second == pytest.approx(max(first / 4, 1e-6) if name == "plateau" else first / 4, rel=1e-5)


def test_a_scheduler_that_was_not_named_is_one_clear_error(model: esper.MorphableModel, adapter: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(ValueError, match=r"schedulers=\[scheduler\]"):
        esper.attach(optimizer, model)
    with pytest.raises(ValueError, match="CosineAnnealingLR does not schedule the optimizer"):
        esper.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, schedulers=[scheduler])
    esper.attach(optimizer, model, schedulers=[])  # there was one, and it is done with


def test_a_scheduler_that_is_built_after_attaching_is_followed_or_the_step_says_what_is_missing(
    model: esper.MorphableModel, adapter: str
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = esper.attach(optimizer, model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    with pytest.raises(RuntimeError, match=r"attachment\.follow\(scheduler\)"):
        optimizer.step()
    attachment.follow(scheduler)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    train(model, optimizer, 3, scheduler)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] < 0.1


def test_what_cannot_be_attached_is_refused_and_nothing_is_changed(
    model: esper.MorphableModel, adapter: str, adapter_store: Urza
) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="Linear has no seeds to attach; wrap it first"):
        esper.attach(optimizer, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Adam has no option 'momentun'"):
        esper.attach(optimizer, model, momentun=0.5)
    with pytest.raises(TypeError, match="LBFGS cannot take seeds' parameters: it optimizes its first"):
        esper.attach(torch.optim.LBFGS(model.parameters()), model)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    by_hand = torch.optim.Adam([*model.parameters(), *esper.seed_parameters(model)])
    with pytest.raises(ValueError, match=r"parameter '0\.down_bias' of layer '0' is in a group of this optimizer"):
        esper.attach(by_hand, model)
    assert all(not layer._kasmina.observers for layer in model.kasmina_layers.values())
    assert len(optimizer.param_groups) == len(by_hand.param_groups) == 1

    esper.attach(optimizer, model)
    other = esper.wrap(nn.Sequential(nn.Linear(6, D)), ["0"], seeds_per_layer=1, urza=adapter_store)
    with pytest.raises(ValueError, match="this Adam is attached already"):
        esper.attach(optimizer, model)
    with pytest.raises(ValueError, match="this Adam is attached already"):
        esper.attach(optimizer, other)
    with pytest.raises(ValueError, match="layer '0' is attached to an optimizer already"):
        esper.attach(torch.optim.Adam(model.parameters()), model)
    assert groups_of_seeds(optimizer) == ["0:0"]


def test_detaching_takes_the_groups_out_and_lets_another_optimizer_in(
    model: esper.MorphableModel, adapter: str
) -> None:
    first, second = (torch.optim.Adam(model.parameters()) for _ in range(2))
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    attachment = esper.attach(first, model)
    train(model, first, 1)
    attachment.detach()
    attachment.detach()
    assert groups_of_seeds(first) == []
    assert set(first.state) == set(model.parameters())
    esper.attach(second, model)
    model.unload_kernel("0", 0)
    grow(model.kasmina_layers["2"], 0, adapter, alpha=0.5)
    assert (groups_of_seeds(first), groups_of_seeds(second)) == ([], ["2:0"])


def test_neither_keeps_the_other_alive(adapter_store: Urza, adapter: str) -> None:
    def pair() -> tuple[esper.MorphableModel, torch.optim.Optimizer]:
        model = esper.wrap(nn.Sequential(nn.Linear(6, D)), ["0"], seeds_per_layer=1, urza=adapter_store)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        esper.attach(optimizer, model, schedulers=[scheduler])
        grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
        return model, optimizer

    model, optimizer = pair()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not model.kasmina_layers["0"]._kasmina.observers
    esper.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)

    model, optimizer = pair()
    layer = weakref.ref(model.kasmina_layers["0"])
    del model
    gc.collect()
    assert layer() is None
    assert groups_of_seeds(optimizer) == ["0:0"]


def test_unwrapping_takes_the_groups_out(model: esper.MorphableModel, adapter: str) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    esper.attach(optimizer, model)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    esper.unwrap(model)
    assert groups_of_seeds(optimizer) == []


def test_a_loss_that_is_scaled_skips_the_steps_with_infinite_gradients(
    model: esper.MorphableModel, adapter: str
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    esper.attach(optimizer, model)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf")):
        before = values(model)
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(values(model), before, strict=True)]
        assert all(moved) if factor == 1.0 else not any(moved)
    assert scaler.get_scale() == 4.0


def test_hooks_of_the_optimizer_and_names_of_its_parameters_go_on(model: esper.MorphableModel, adapter: str) -> None:
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    esper.attach(optimizer, model)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    train(model, optimizer, 1)
    assert calls == ["before", "after"]
    assert optimizer.param_groups[1]["param_names"] == [
        "0:0.down_bias",
        "0:0.down_weight",
        "0:0.up_bias",
        "0:0.up_weight",
    ]


def test_a_saved_optimizer_of_other_seeds_is_refused_with_what_to_do(model: esper.MorphableModel, adapter: str) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    bare = copy.deepcopy(optimizer.state_dict())
    esper.attach(optimizer, model)
    grow(model.kasmina_layers["0"], 0, adapter, alpha=0.5)
    with pytest.raises(ValueError, match=r"groups of seeds none, this one has '0:0'.*load_esper_state_dict"):
        optimizer.load_state_dict(bare)
    train(model, optimizer, 2)
    saved, before = copy.deepcopy(optimizer.state_dict()), moments(optimizer, own(model, "0"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(saved)
    assert same(moments(optimizer, own(model, "0")), before)
    model.unload_kernel("0", 0)
    assert groups_of_seeds(optimizer) == []


def test_one_layer_can_be_attached_without_a_model(adapter_store: Urza, adapter: str) -> None:
    layer = KasminaLayer.adopt(nn.Linear(6, D), num_seeds=1, urza=adapter_store)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    esper.attach(optimizer, layer)
    grow(layer, 0, adapter, alpha=0.5)
    assert groups_of_seeds(optimizer) == [":0"]
