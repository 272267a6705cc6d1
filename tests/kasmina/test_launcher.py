from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import adapter
from torch import Tensor

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.urza import Urza

D, R = 16, 4


@pytest.fixture
def program(adapter_store: Urza, adapter_for: Callable[..., str]) -> KernelProgram:
    artifact, blobs = adapter_store.load(adapter_for(D, R))
    return KernelProgram.load(artifact.manifest, blobs)


def drawn_parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down_weight": (R, D), "down_bias": (R,), "up_weight": (D, R), "up_bias": (D,)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 70), gap=st.integers(0, 5), alpha=st.floats(0, 1, width=32))
def test_forward_and_backward_match_float64_torch_for_any_rows_and_row_stride(
    program: KernelProgram, rows: int, gap: int, alpha: float
) -> None:
    parameters = drawn_parameters()
    wide = torch.randn(rows, D + gap)
    h, a = wide[:, :D], torch.tensor(alpha)
    out = torch.full((rows, D + gap), 7.0)
    saved = program.forward({"h": h}, parameters, a, out[:, :D])
    g = torch.randn(rows, D + gap)[:, :D]
    to_inputs, to_parameters = program.backward(g, {"h": h}, parameters, a, saved)

    h64 = h.double().requires_grad_()
    p64 = {name: p.double().requires_grad_() for name, p in parameters.items()}
    wanted = h64 + alpha * (adapter(h64, p64) - h64)
    grads = torch.autograd.grad(wanted, [h64, *p64.values()], g.double())
    # Sums of at most 70 float32 products of values near 1: 70 * 2^-24 times a few.
    torch.testing.assert_close(out[:, :D].double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_inputs["h"].double(), grads[0], rtol=1e-4, atol=1e-4)
    for name, grad in zip(p64, grads[1:], strict=True):
        torch.testing.assert_close(to_parameters[name].double(), grad, rtol=1e-4, atol=1e-4)
    assert (out[:, D:] == 7.0).all()


def test_no_rows_launch_nothing_and_give_empty_inputs_and_zero_parameter_gradients(program: KernelProgram) -> None:
    parameters, h, alpha = drawn_parameters(), torch.empty(0, D), torch.tensor(1.0)
    saved = program.forward({"h": h}, parameters, alpha, torch.empty(0, D))
    to_inputs, to_parameters = program.backward(h, {"h": h}, parameters, alpha, saved)
    assert to_inputs["h"].shape == (0, D)
    assert {name: grad.shape for name, grad in to_parameters.items()} == {n: p.shape for n, p in parameters.items()}
    assert all(not grad.any() for grad in to_parameters.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.zeros(3, D + 1)}, r"h is \(3, 17\)"),
        ({"h": torch.zeros(4, D)}, r"h is \(4, 16\)"),
        ({"h": torch.zeros(3, D, dtype=torch.float64)}, "float64"),
        ({"h": torch.zeros(D, 3).T}, "stride 3 in its last dimension"),
        ({"h": torch.zeros(3, D, device="meta")}, "on meta"),
        ({"out": torch.zeros(3)}, r"out is \(3,\)"),
        ({"alpha": torch.zeros(2)}, r"alpha is \(2,\)"),
        ({"alpha": torch.tensor(0.5, dtype=torch.float64)}, "one float32 is expected"),
        ({"up_bias": torch.zeros(D + 1)}, r"parameter up_bias is \(17,\)"),
        ({"up_weight": torch.zeros(R, D).T}, "contiguous"),
        ({"down_bias": torch.zeros(R, dtype=torch.float16)}, "float16"),
    ],
)
def test_what_a_kernel_was_not_compiled_for_is_an_error_before_any_launch(
    program: KernelProgram, changes: dict[str, Tensor], message: str
) -> None:
    given: dict[str, Any] = {"h": torch.zeros(3, D), "alpha": torch.tensor(0.5), "out": torch.full((3, D), 7.0)}
    given |= drawn_parameters() | changes
    parameters = {name: given[name] for name in drawn_parameters()}
    with pytest.raises(ValueError, match=message):
        program.forward({"h": given["h"]}, parameters, given["alpha"], given["out"])
    assert "out" in changes or (given["out"] == 7.0).all()


class _Recorder:
    """Stands where a kernel would be launched."""

    code_bytes = 0

    def __init__(self) -> None:
        self.launches = 0

    def launcher(self) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any) -> None:
        self.launches += 1


class _Strided:
    """A tensor that claims a row stride for which no test machine has the memory."""

    def __init__(self, tensor: Tensor, row_stride: int) -> None:
        self._tensor, self._row_stride = tensor, row_stride

    def stride(self, dim: int) -> int:
        return self._row_stride if dim == 0 else 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


@pytest.mark.parametrize(("stride_type", "launches"), [("i32", 0), ("i64", 1)])
def test_a_view_too_long_for_a_kernel_that_indexes_with_32_bits_is_an_error_before_any_launch(
    adapter_store: Urza, adapter_for: Callable[..., str], stride_type: str, launches: int
) -> None:
    manifest = adapter_store.get(adapter_for(D, R)).manifest
    kernels = {}
    for name, record in manifest.kernels.items():
        steps = [step for step in (*manifest.forward, *manifest.backward) if step.kernel == name]
        types = zip(steps[0].arguments, record.signature, strict=True)
        signature = tuple(stride_type if argument.endswith("row_stride") else kind for argument, kind in types)
        kernels[name] = record.model_copy(update={"signature": signature})
    recorder = _Recorder()
    program = KernelProgram(manifest.model_copy(update={"kernels": kernels}), dict.fromkeys(kernels, recorder))
    inputs: dict[str, Any] = {"h": _Strided(torch.zeros(3, D), 2**30)}
    if launches:
        program.forward(inputs, drawn_parameters(), torch.tensor(0.5), torch.zeros(3, D))
    else:
        with pytest.raises(ValueError, match=r"h spans 3 rows of stride 1073741824, more than 2\*\*31 elements"):
            program.forward(inputs, drawn_parameters(), torch.tensor(0.5), torch.zeros(3, D))
    assert recorder.launches == launches


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kernel": "nothing"}, "no such kernel"),
        ({"arguments": ("h",)}, "binds 1 arguments"),
        ("h:q", "argument 'q' is not a tensor"),
        ("h:h.column_stride", "argument 'h.column_stride' is not"),
        ("h:rows", r"rows is \*fp32"),
        ("rows:h", "h is i32 in the signature, a pointer is expected"),
    ],
)
def test_a_plan_that_does_not_fit_its_kernels_is_refused_at_load(
    adapter_store: Urza, adapter_for: Callable[..., str], step: dict[str, Any] | str, message: str
) -> None:
    artifact, blobs = adapter_store.load(adapter_for(D, R))
    first = artifact.manifest.forward[0]
    if isinstance(step, str):
        old, new = step.split(":")
        step = {"arguments": tuple(new if a == old else a for a in first.arguments)}
    manifest = artifact.manifest.model_copy(update={"forward": (first.model_copy(update=step),)})
    with pytest.raises(ArtifactRefused, match=message):
        KernelProgram.load(manifest, blobs)


def test_a_backward_that_leaves_out_a_parameter_is_refused_at_load(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifact, blobs = adapter_store.load(adapter_for(D, R))
    manifest = artifact.manifest.model_copy(update={"backward": artifact.manifest.backward[:1]})
    with pytest.raises(ArtifactRefused, match="no gradient of down_bias, down_weight, up_bias, up_weight"):
        KernelProgram.load(manifest, blobs)


def test_what_is_loaded_is_native_code_of_the_stored_size(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    artifact, blobs = adapter_store.load(adapter_for(D, R))
    program = KernelProgram.load(artifact.manifest, blobs)
    assert program.code_bytes == sum(len(blobs[k.binary]) for k in artifact.manifest.kernels.values())
