"""Every shipped blueprint on a GPU: proven there, and then inside a layer, against torch in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tezzeret_modules import CASES
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KasminaLayer, KernelProgram
from esper_triton.urabrask.verdict import read_report
from esper_triton.urza import Urza

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
LAYOUT = {"rows": (19,), "sequence": (3, 32), "image": (3, 4, 8)}
D = 64
# What is compared is one float32 sum or a few after the other, of at most 2,000 terms.
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


class Given(nn.Module):
    """The layer whose output is there already."""

    h: Tensor


class GivenLinear(Given, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.h


class GivenImage(Given, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.h


def test_every_shipped_blueprint_is_here() -> None:
    assert {path.stem for path in KERNELS.glob("*.toml")} == set(CASES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_proven_on_this_gpu(gpu_store: Urza, target: str, name: str, dtype: str) -> None:
    artifact = esper.compile(
        KERNELS / f"{name}.toml", dims=CASES[name].dims(D), dtype=dtype, targets=target, urza=gpu_store
    )
    report = read_report(artifact.id, gpu_store)
    assert artifact.status is KernelStatus.VALIDATED, report.reasons
    assert report.environment.device.startswith("cuda")
    assert report.cases > 50  # as many as a level's time allows


@pytest.mark.parametrize("name", CASES)
def test_a_layer_on_the_gpu_gives_what_float64_gives(
    gpu_store: Urza, target: str, device: torch.device, name: str
) -> None:
    case, dims = CASES[name], CASES[name].dims(D)
    artifact_id = esper.compile(KERNELS / f"{name}.toml", dims=dims, targets=target, urza=gpu_store).id
    artifact, blobs = gpu_store.load(artifact_id)
    program = KernelProgram.load(artifact.manifest, blobs, device)
    layout, d_in = program.layout, dims.get("d_in", D)
    host = GivenImage(d_in, D, 1) if layout == "image" else GivenLinear(d_in, D)
    layer = KasminaLayer.adopt(host.to(device), num_seeds=1, chunking="whole", urza=gpu_store, name="host")
    assert layer.load_kernel_sync(0, artifact_id), layer.last_error(0)
    layer.graft(0)
    layer.set_alpha(0, 0.5)

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = LAYOUT[layout]
    h64, x64 = drawn(*lead, D).requires_grad_(), drawn(*lead, d_in).requires_grad_()
    own = {name.removeprefix("0."): parameter for name, parameter in layer.seed_parameters()}
    own64 = {
        key: (drawn(*p.shape) * (math.prod(p.shape[1:]) ** -0.5 if p.dim() > 1 else 1.0)).requires_grad_()
        for key, p in own.items()
    }
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(own64[key])
    inputs = [{"h": h64, "x": x64}[key] for key in program.inputs]
    exact = torch.lerp(h64, case.k(*inputs, own64), 0.5)
    grad64 = drawn(*exact.shape)

    h, x = (t.detach().float().to(device).requires_grad_() for t in (h64, x64))
    if layout == "image":
        layer.h = h.permute(0, 3, 1, 2)
        out = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        layer.h = h
        out = layer(x)
    torch.testing.assert_close(out.detach().double().cpu(), exact.detach(), **CLOSE)
    leaves64, leaves = [*dict.fromkeys([h64, *inputs]), *own64.values()], [h, *([x] if "x" in program.inputs else [])]
    wanted = torch.autograd.grad(exact, leaves64, grad64)
    found = torch.autograd.grad(out, [*leaves, *(own[key] for key in own64)], grad64.float().to(device))
    for got, exactly in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double().cpu(), exactly, **CLOSE)
