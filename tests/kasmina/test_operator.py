"""Layers under torch.compile and torch.export: one graph, which alpha does not change and a transition changes once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from seeding import break_launches, grow, linear_with_seeds, own_parameters
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper_triton as esper
from esper_triton.contracts.errors import NonFiniteOutput
from esper_triton.kasmina import KasminaLayer, KernelCache, Policy, SeedLifecycleState
from esper_triton.kasmina.boundary import refresh
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState
# torch's own, of its compiler's parts.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    KernelCache.process().reset()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    KernelCache.process().reset()


@pytest.fixture
def layer(adapter_store: Urza, adapter_for: Callable[..., str]) -> KasminaLayer:
    """Two seeds, of which the first is grafted."""
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    return layer


def _gradients(call: Callable[[Tensor], Tensor], layer: KasminaLayer, x: Tensor) -> tuple[Tensor, ...]:
    parameters = [layer.weight, layer.bias, *(p for _, p in layer.seed_parameters())]
    out = call(x)
    return (out, *torch.autograd.grad(out.square().sum(), [x, *parameters]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_active_layer_compiles_to_one_graph_with_the_gradients_of_an_uncompiled_one(
    layer: KasminaLayer, backend: str
) -> None:
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend=backend)
    for shape in ((3, IN), (2, 5, IN)):
        x = torch.randn(shape, requires_grad=True)
        for ours, wanted in zip(_gradients(compiled, layer, x), _gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(ours, wanted)


def test_an_alpha_ramp_compiles_nothing_again_and_a_transition_once(
    layer: KasminaLayer, adapter_for: Callable[..., str]
) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend=counter)
    x = torch.randn(3, IN)
    for alpha in (0.1, 0.2, 0.7, 1.0):
        layer.set_alpha(0, alpha)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
    layer.request_transition(0, S.STABILIZATION)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 2
    grow(layer, 1, adapter_for(D, R), alpha=0.5)
    torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 3


def test_steps_that_are_sampled_or_checked_compile_nothing_again(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(
        adapter_store, IN, D, 1, policy=Policy(sample_every=3, statistics_every=2, stabilization_steps=1000)
    )
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    layer.request_transition(0, S.STABILIZATION)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend=counter)
    x = torch.randn(3, IN)
    for _ in range(12):
        torch.testing.assert_close(compiled(x), layer(x))
        layer.step_boundary()
    assert counter.frame_count == 1
    assert layer.get_layer_stats()["seeds"][0]["activation_variance"] is not None
    with torch.no_grad():
        own_parameters(layer, 0)["up_bias"].fill_(float("nan"))
    while not layer._kasmina.sampling:
        layer.step_boundary()
    compiled(x)
    layer.step_boundary()
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    assert isinstance(layer.last_error(0), NonFiniteOutput)


def test_a_dormant_layer_compiles_to_the_graph_of_the_bare_module(store: Urza) -> None:
    def graph_of(module: nn.Module) -> str:
        graphs: list[str] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            graphs.append(graph.print_readable(print_output=False).split("def forward")[1])
            return graph.forward

        torch._dynamo.reset()
        torch.compile(module, fullgraph=True, backend=backend)(torch.randn(3, IN))
        (only,) = graphs
        return "\n".join(line.split("#")[0] for line in only.splitlines())

    bare = nn.Sequential(nn.Linear(IN, D), nn.ReLU())
    before = graph_of(bare)
    assert graph_of(esper.wrap(bare, [nn.Linear], urza=store)) == before


def test_a_host_that_does_not_fit_the_kernel_is_compiled_alone(layer: KasminaLayer) -> None:
    layer.double()
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(compiled(x), layer.default_transform(x))


def test_a_launch_that_fails_in_a_graph_leaves_its_span_to_the_host(
    layer: KasminaLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_launches(monkeypatch, layer, 0)
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN, requires_grad=True)
    out = compiled(x)
    host = layer.default_transform(x)
    torch.testing.assert_close(out, host, rtol=0, atol=0)
    for ours, wanted in zip(
        torch.autograd.grad(out.square().sum(), [x, layer.weight]),
        torch.autograd.grad(host.square().sum(), [x, layer.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)
    layer.commit()
    assert layer.seed_state(0) is S.ERROR_RECOVERY


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_the_operator_keeps_what_torch_asks_of_operators(
    adapter_store: Urza, adapter_for: Callable[..., str], chunking: str, guard: bool
) -> None:
    width = D if chunking == "whole" else 2 * D
    layer = linear_with_seeds(adapter_store, IN, width, 2, chunking=chunking, guard=guard)
    for seed in range(2):
        grow(layer, seed, adapter_for(D, R), alpha=0.5, draw=seed)
    dispatch = vars(layer)["forward"]
    assert isinstance(dispatch, Dispatch)
    h = torch.randn(3, width, requires_grad=True)
    alphas = [active.alpha for active in dispatch.plan.seeds]
    parameters = [p for active in dispatch.plan.seeds for p in active.parameters.values()]
    torch.library.opcheck(
        torch.ops.esper_triton.blend.default, (h, None, alphas, parameters, None, dispatch._name, False)
    )


def test_a_dormant_and_a_fossilised_model_are_exported_whole(
    layer: KasminaLayer, store: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(3, IN)
    model = nn.Sequential(layer, nn.ReLU())
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        layer.request_transition(0, state)
    with caplog.at_level(logging.WARNING, "esper_triton"):
        exported = torch.export.export(model, (x,)).module()
    assert not caplog.records
    torch.testing.assert_close(exported(x), model(x))
    assert not torch.equal(model(x), layer.default_transform(x).relu())
    dormant = esper.wrap(nn.Sequential(nn.Linear(IN, D), nn.ReLU()), [nn.Linear], urza=store)
    assert torch.equal(torch.export.export(dormant, (x,)).module()(x), dormant(x))


def test_an_exported_model_whose_layer_has_moved_on_says_so(layer: KasminaLayer) -> None:
    x = torch.randn(3, IN)
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        layer.request_transition(0, state)
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    own_parameters(layer, 0)
    refresh(layer)
    with pytest.raises(RuntimeError, match=r"of a compiled graph is gone.*bake"):
        exported(x)
