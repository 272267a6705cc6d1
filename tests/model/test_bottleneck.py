from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.system import LayerGradients
from esper_triton.model.bottleneck import GradientProbe


def measured(layer: nn.Module, batches: list[Tensor], loss_of: Any) -> tuple[LayerGradients | None, list[Tensor]]:
    """What the probe says of a layer after one step for each batch, and each step's gradient of the output."""
    model = esper.wrap(nn.Sequential(layer), ["0"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=1000)
    gradients = []
    for step, x in enumerate(batches):
        probe.before_step(step, wanted=True)
        h = model(x)
        h.retain_grad()
        loss_of(h).backward()
        gradients.append(h.grad.detach().clone())
        probe.after_step(step)
    return probe.results.get("0"), gradients


def scale_of(rows: Tensor, x: Tensor) -> float:
    """Of the gradient of a mean over a batch, to the norm of that of an item."""
    return len(x) * (len(rows) / len(x)) ** 0.5


def residual(layer: nn.Module, batches: list[Tensor], gradients: list[Tensor], channels: int) -> tuple[float, int, int]:
    """||R||^2, rank and rows in float64, with the Jacobian of the layer in its weights for X: what changes of them can
    make of its output."""
    bare = esper.unwrap(layer).double()
    names = [name for name, _ in bare.named_parameters()]

    def output(x: Tensor, *values: Tensor) -> Tensor:
        out = torch.func.functional_call(bare, dict(zip(names, values, strict=True)), (x,))
        return out[..., :1] if isinstance(bare, nn.Linear) else out[:, :1]  # one feature: the others have the same

    columns, wanted = [], []
    for x, g in zip(batches, gradients, strict=True):
        values = tuple(p.detach() for p in bare.parameters())
        jacobians = torch.autograd.functional.jacobian(lambda *v, x=x: output(x.double(), *v).flatten(), values)
        columns.append(torch.cat([j[:, 0].reshape(len(j), -1) for j in jacobians], dim=1))
        rows = g.double().movedim(-1 if isinstance(bare, nn.Linear) else 1, -1).reshape(-1, channels)
        wanted.append(rows * scale_of(rows, x))
    a, g = torch.cat(columns), torch.cat(wanted)
    rest = g - a @ (torch.linalg.pinv(a) @ g)
    return float(rest.square().sum()), int(torch.linalg.matrix_rank(a)), len(g)


@settings(max_examples=20, deadline=None)
@given(
    d_in=st.integers(1, 5),
    d=st.integers(1, 4),
    bias=st.booleans(),
    leading=st.sampled_from([(64,), (8, 9), (3, 4, 8)]),
    seed=st.integers(0, 99),
)
def test_of_a_linear_layer_what_no_change_of_its_weights_gives(d_in, d, bias, leading, seed) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(d_in, d, bias=bias)
    batches = [torch.randn(*leading, d_in)]
    found, gradients = measured(layer, batches, lambda h: (h.sin() * torch.randn_like(h)).mean())
    if not bias:  # the column of ones is a change that it could not make
        layer.bias = nn.Parameter(torch.zeros(d))
    rest, rank, rows = residual(layer, batches, gradients, d)
    assert found is not None
    assert found.rows == rows
    assert found.bottleneck == pytest.approx((rest / (rows - rank)) ** 0.5, rel=1e-6)
    norm = sum(float((g.double() * scale_of(g.reshape(-1, d), batches[0])).square().sum()) for g in gradients)
    assert found.gradient_norm == pytest.approx((norm / rows) ** 0.5, rel=1e-6)
    assert found.unexpressed == pytest.approx((found.bottleneck / found.gradient_norm) ** 2)


@settings(max_examples=20, deadline=None)
@given(
    dims=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_of_a_convolution_too(dims, kernel, stride, padding, dilation, seed) -> None:
    torch.manual_seed(seed)
    if padding == "same" and (stride > 1 or (dilation * (kernel - 1)) % 2):
        stride, dilation = 1, 2
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    layer = kind(2, 3, kernel, stride=stride, padding=padding, dilation=dilation)
    size = (2, 90) if dims == 1 else (2, 11, 12)  # no step has so many rows that some are left out
    batches = [torch.randn(2, *size) for _ in range(6)]
    found, gradients = measured(layer, batches, lambda h: (h.sin() * torch.randn_like(h)).mean())
    assert found is not None
    steps = found.rows // gradients[0][:, 0].numel()  # that were enough
    batches, gradients = batches[:steps], gradients[:steps]
    rest, rank, rows = residual(layer, batches, gradients, 3)
    assert found.rows == rows
    assert found.bottleneck == pytest.approx((rest / (rows - rank)) ** 0.5, rel=1e-6)


def test_a_gradient_that_the_weights_can_follow_is_no_bottleneck_and_one_that_they_cannot_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    linear, _ = measured(nn.Linear(3, 2), [x], lambda h: (h * (x @ torch.ones(3, 2))).mean())
    assert linear.unexpressed < 1e-12
    square, _ = measured(nn.Linear(3, 2), [x], lambda h: (h * (x.square() @ torch.ones(3, 2))).mean())
    assert square.unexpressed > 0.3


def test_the_rank_is_that_of_the_input_without_the_column_of_ones() -> None:
    torch.manual_seed(0)
    scalar = torch.randn(400, 1)
    for x, rank in ((torch.randn(400, 3), 3), (torch.cat([scalar, 2 * scalar + 1, -scalar], 1), 1)):
        found, _ = measured(nn.Linear(3, 2), [x], lambda h: h.sin().mean())
        assert found.rank == rank


def test_rows_of_several_steps_are_put_together_and_too_few_give_nothing() -> None:
    few = [torch.randn(1, 20) for _ in range(16)]
    assert measured(nn.Linear(20, 4), few, lambda h: h.square().mean())[0] is None
    many = [torch.randn(8, 20) for _ in range(16)]
    found, gradients = measured(nn.Linear(20, 4), many, lambda h: h.square().mean())
    assert found.rows == 88  # as many as make four a feature
    assert len(gradients) == 16


def test_a_large_call_is_measured_on_some_of_its_rows() -> None:
    found, _ = measured(nn.Linear(3, 2), [torch.randn(5000, 3)], lambda h: h.sin().mean())
    assert found.rows == 512
    found, _ = measured(nn.Conv2d(1, 2, 3), [torch.randn(40, 1, 12, 12)], lambda h: h.sin().mean())
    assert found.rows == 512


def test_between_rounds_there_is_nothing_in_any_layer_and_random_streams_do_not_move() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.LayerNorm(2)), ["0", "2"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=4)
    before, listening, outputs = torch.get_rng_state(), [], []
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    for watched in (True, False):
        torch.set_rng_state(before)
        for step in range(8):
            if watched:
                probe.before_step(step, wanted=True)
                listening.append([len(layer._forward_hooks) for layer in model.kasmina_layers.values()])
            out = model(x)
            out.sum().backward()
            outputs.append(out.detach())
            if watched:
                probe.after_step(step)
    assert listening == [[1, 0], *[[0, 0]] * 3] * 2
    assert all(torch.equal(a, b) for a, b in zip(outputs[:8], outputs[8:], strict=True))
    assert probe.results["0"].step == 4


def test_a_round_begins_when_one_is_wanted_and_not_too_soon_after_the_last() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)), ["0"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=4)
    begun = []
    for step, wanted in enumerate([False, True, True, False, False, True, True, False, False, False]):
        probe.before_step(step, wanted=wanted)
        begun += [step] if model[0]._forward_hooks else []
        model(torch.randn(50, 3)).sum().backward()
        probe.after_step(step)
    assert begun == [1, 5]  # at once, and four steps later


def test_a_round_goes_on_in_another_process_as_it_would_have_here() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 20) for _ in range(12)]
    whole, _ = measured(nn.Linear(20, 4), batches, lambda h: h.sin().mean())
    torch.manual_seed(0)
    [torch.randn(8, 20) for _ in range(12)]
    model = esper.wrap(nn.Sequential(nn.Linear(20, 4)), ["0"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=100)
    for step, x in enumerate(batches):
        if step == 5:
            file = io.BytesIO()
            torch.save(probe.state_dict(), file)
            file.seek(0)
            probe.close()
            assert not model[0]._forward_hooks
            probe = GradientProbe(model.kasmina_layers, every=100)
            probe.load_state_dict(torch.load(file, weights_only=True))
        probe.before_step(step, wanted=True)
        model(x).sin().mean().backward()
        probe.after_step(step)
    assert probe.results["0"] == whole


def test_what_a_checkpoint_has_of_a_round_goes_to_the_layers_device() -> None:
    def probe_on(device: str) -> tuple[esper.MorphableModel, GradientProbe]:
        model = esper.wrap(nn.Sequential(nn.Linear(4, 3, device=device)), ["0"], seeds_per_layer=1)
        return model, GradientProbe(model.kasmina_layers, every=100)

    model, probe = probe_on("cpu")
    for step in (0, 1):  # too few rows for a result, and a step that has not ended
        probe.before_step(step, wanted=True)
        model(torch.randn(3, 4)).square().mean().backward()
        if step == 0:
            probe.after_step(step)
    saved = probe.state_dict()
    _, other = probe_on("meta")  # stands for any that is not the CPU, which checkpoints are read to
    other.load_state_dict(saved)
    loaded = other.state_dict()
    tensors = [loaded["sums"]["0"][name] for name in ("xx", "xg", "gg")]
    tensors += [loaded["seen"]["0"][name] for name in ("x", "g")]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5
    assert (loaded["sums"]["0"]["count"], loaded["seen"]["0"]["x"].shape) == (3, (3, 4))


def test_evaluation_and_calls_without_gradients_are_not_measured() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)), ["0"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=1)
    probe.before_step(0, wanted=True)
    with torch.no_grad():
        model(torch.randn(100, 3))
    model.eval()
    model(torch.randn(100, 3))
    model.train()
    model(torch.ones(30, 3)).sum().backward()
    probe.after_step(0)
    assert probe.results["0"].rows == 30


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")],
    ids=["norm", "grouped", "circular"],
)
def test_layers_of_other_kinds_are_left_alone(layer: nn.Module) -> None:
    model = esper.wrap(nn.Sequential(layer), ["0"], seeds_per_layer=1)
    probe = GradientProbe(model.kasmina_layers, every=1)
    probe.before_step(0, wanted=True)
    assert not layer._forward_hooks
