"""Seeds that draw: from torch's own generator, in training alone, and the same again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seeding import grow, linear_with_seeds, own_parameters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.prepared import Prepared
from esper_triton.model.baking import BakedLayer
from esper_triton.urza import Urza

DROPOUT = Path(__file__).resolve().parent / "blueprints" / "dropout.toml"
D, IN, P = 16, 6, 0.25
S = SeedLifecycleState
# torch's own, of its compiler's parts.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def artifact(adapter_store: Urza) -> str:
    return esper.compile(DROPOUT, dims={"d": D}, urza=adapter_store).id


@pytest.fixture
def layer(adapter_store: Urza, artifact: str) -> KasminaLayer:
    """Two seeds at alpha 1, whose scale is 1: their output is the host's with a quarter of it dropped."""
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2)
    for seed in range(2):
        grow(layer, seed, artifact, alpha=1.0, draw=None)
    return layer


@pytest.fixture(params=["general", "prepared"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that calls go."""
    if request.param == "general":
        monkeypatch.setattr(Prepared, "fits", lambda *_: False)
    return str(request.param)


def call(layer: Callable[[Tensor], Tensor], x: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return layer(x)


def factors(out: Tensor, h: Tensor) -> Tensor:
    """What each element was multiplied by: 0 or 4/3."""
    found = (out / h).detach().double()
    kept = found != 0
    # One rounding of the product and one of the quotient.
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - P)), rtol=3e-7, atol=0)
    return kept.double() / (1 - P)


def test_a_quarter_is_dropped_and_the_rest_is_scaled(layer: KasminaLayer, way: str) -> None:
    x = torch.randn(500, IN)
    layer(x)
    found = factors(call(layer, x), layer.default_transform(x))
    share = (found == 0).double().mean().item()
    sigma = (P * (1 - P) / found.numel()) ** 0.5
    assert abs(share - P) < 5 * sigma
    # Each seed of the layer has drawn for itself: elements agree as those of independent draws do.
    agreeing = (found[:, :D] == found[:, D:]).double().mean().item()
    assert abs(agreeing - (P**2 + (1 - P) ** 2)) < 5 * (0.25 / (found.numel() / 2)) ** 0.5


def test_gradients_are_those_of_what_was_kept_in_forward(layer: KasminaLayer, way: str) -> None:
    for seed in range(2):
        with torch.no_grad():
            own_parameters(layer, seed)["scale"].copy_(torch.randn(D))
    x = torch.randn(7, IN, requires_grad=True)
    layer(x)
    # At alpha 1 what was kept can be read off the output, and the same seed keeps the same at any alpha.
    kept = (call(layer, x) != 0).double() / (1 - P)
    for seed, alpha in enumerate((0.75, 0.4)):
        layer.set_alpha(seed, alpha)
    out = call(layer, x)
    assert not torch.equal(call(layer, x, seed=4), out)
    x64 = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    scales = [own_parameters(layer, seed)["scale"] for seed in range(2)]
    scales64 = [scale.detach().double().requires_grad_() for scale in scales]
    h = x64 @ weight.T + bias
    alphas = torch.tensor([0.75] * D + [0.4] * D, dtype=torch.float64)
    wanted = h + alphas * (h * torch.cat(scales64) * kept - h)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), [x, *scales])
    grads64 = torch.autograd.grad(wanted.square().sum(), [x64, *scales64])
    for grad, grad64 in zip(grads, grads64, strict=True):
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-4)


def test_the_generator_of_torch_decides_what_is_dropped_and_moves_on(layer: KasminaLayer, way: str) -> None:
    x = torch.randn(5, IN)
    layer(x)
    first, second = call(layer, x), layer(x)
    after = torch.get_rng_state()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), second)
    assert torch.equal(torch.get_rng_state(), after)


def test_both_ways_through_a_call_drop_the_same(layer: KasminaLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, IN)
    layer(x)
    prepared = call(layer, x)
    assert vars(layer)["forward"]._prepared is not None
    monkeypatch.setattr(Prepared, "fits", lambda *_: False)
    assert torch.equal(call(layer, x), prepared)


def test_in_eval_mode_nothing_is_dropped_and_nothing_is_drawn(layer: KasminaLayer, way: str) -> None:
    x = torch.randn(5, IN, requires_grad=True)
    layer(x)
    layer.eval()
    before = torch.get_rng_state()
    for _ in range(2):
        out = layer(x)
        h = layer.default_transform(x)
        torch.testing.assert_close(out, h, rtol=0, atol=0)
        (grad,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, h))
        torch.testing.assert_close(grad, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    layer.train()
    assert (layer(x) == 0).any()


def test_a_seed_that_does_not_draw_leaves_the_generator_alone(
    adapter_store: Urza, adapter_for: Callable[..., str], way: str
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, 4), alpha=0.5)
    before = torch.get_rng_state()
    for _ in range(2):
        layer(torch.ones(3, IN)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_gradients_of_a_call_without_it(
    layer: KasminaLayer, way: str, use_reentrant: bool
) -> None:
    model = nn.Sequential(layer, nn.Dropout(0.3), nn.Linear(2 * D, 3))
    parameters = [*model.parameters(), *(p for _, p in layer.seed_parameters())]
    x = torch.randn(5, IN, requires_grad=True)
    layer(x)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        for parameter in (x, *parameters):
            parameter.grad = None
        out = call(run, x)
        out.square().sum().backward()
        results.append([out, *(parameter.grad.clone() for parameter in (x, *parameters))])
        torch.manual_seed(100)  # what the recomputation would draw from
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


# With backend "eager" torch does not put the generator back for the recomputation, for nn.Dropout either.
@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [("eager", False), ("aot_eager", False), ("aot_eager", True), ("inductor", False), ("inductor", True)],
)
def test_a_compiled_layer_drops_and_its_gradients_are_of_what_it_kept(
    layer: KasminaLayer, backend: str, checkpointed: bool
) -> None:
    model = nn.Sequential(layer)
    model.requires_grad_(False)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False) if checkpointed else self.model(x)

    compiled = torch.compile(Run(), fullgraph=True, backend=backend)
    x = torch.randn(40, IN, requires_grad=True)
    probe = torch.randn(40, 2 * D)
    outs = []
    for seed in (3, 4):
        out = call(compiled, x, seed)
        kept = factors(out, layer.default_transform(x))
        (grad,) = torch.autograd.grad((out * probe).sum(), x)
        wanted = (probe.double() * kept) @ layer.weight.double()
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-4)
        outs.append(out)
    assert not torch.equal(*outs)
    assert torch.equal(call(compiled, x, 3), outs[0])
    if backend == "eager":
        assert torch.equal(call(layer, x, 3), outs[0])
    model.eval()
    torch.testing.assert_close(compiled(x), layer.default_transform(x), rtol=0, atol=1e-7)


def test_the_operators_keep_what_torch_asks_of_operators_with_drawn_numbers(layer: KasminaLayer) -> None:
    dispatch = vars(layer)["forward"]
    assert isinstance(dispatch, Dispatch)
    h = torch.randn(3, 2 * D, requires_grad=True)
    alphas = [active.alpha for active in dispatch.plan.seeds]
    parameters = [p for active in dispatch.plan.seeds for p in active.parameters.values()]
    drawn = torch.tensor([5, 6])
    for seeds, training in ((drawn, True), (None, False)):
        arguments = (h, None, alphas, parameters, seeds, dispatch._name, training)
        torch.library.opcheck(torch.ops.esper_triton.blend.default, arguments)


def test_a_seed_in_training_drops_in_its_own_loss(adapter_store: Urza, artifact: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, artifact)
    x = torch.randn(50, IN)
    h = layer(x)
    loss = layer.seed_loss()
    # k is h times 0 or 4/3, so what is lost is a share of h, or a third of it.
    assert loss is not None
    ninth = ((1 / (1 - P) - 1) ** 2) * 0.75 + P
    assert 0.5 * ninth < loss.item() < 1.5 * ninth
    assert h.requires_grad


@pytest.fixture
def fossil(adapter_store: Urza, artifact: str) -> Any:
    """A model with one permanent seed."""
    model: Any = esper.wrap(nn.Sequential(nn.Linear(IN, D)), ["0"], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, artifact, alpha=1.0, draw=None)
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        model[0].request_transition(0, state)
    return model


def test_a_baked_seed_drops_while_the_copy_is_in_training_mode_as_it_did(fossil: Any) -> None:
    baked: Any = esper.bake(fossil)
    assert isinstance(baked[0], BakedLayer)
    results = []
    for model in (fossil, baked):
        x = torch.ones(5, IN, requires_grad=True)
        out = call(model, x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert (results[1][0] == 0).any()
    baked.eval()
    before = torch.get_rng_state()
    assert torch.equal(baked(x), baked[0].host(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_baked_seed_is_compiled_and_checkpointed_with_what_it_drops(fossil: Any) -> None:
    baked: Any = esper.bake(fossil)
    x = torch.randn(40, IN, requires_grad=True)
    compiled = torch.compile(baked, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda x: checkpoint(baked, x, use_reentrant=False)):
        out = call(run, x)
        kept = factors(out, baked[0].host(x))
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad.double(), kept @ baked[0].weight.double(), rtol=1e-4, atol=1e-4)
        assert (kept == 0).any()


@pytest.mark.parametrize(
    ("seed", "found"),
    [
        (None, "none"),
        (torch.zeros(1), r"\(1,\) torch.float32"),
        (torch.zeros(2, dtype=torch.int64), r"\(2,\) torch.int64"),
    ],
)
def test_a_program_that_draws_is_not_run_in_training_without_a_seed(
    adapter_store: Urza, artifact: str, seed: Tensor | None, found: str
) -> None:
    stored, blobs = adapter_store.load(artifact)
    program = KernelProgram.load(stored.manifest, blobs)
    h, out = torch.ones(3, D), torch.full((3, D), 7.0)
    arguments = ({"h": h}, {"scale": torch.ones(D)}, torch.tensor(1.0), out)
    with pytest.raises(ValueError, match=rf"dropout_seed is {found}.* takes one int64 on cpu in training"):
        program.forward(*arguments, training=True, dropout_seed=seed)
    assert (out == 7.0).all()
    saved = program.forward(*arguments)
    assert torch.equal(out, h)
    assert saved["dropout_seed"].tolist() == [0]
