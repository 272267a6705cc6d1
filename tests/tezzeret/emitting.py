"""Emitted sources, run alone: as a file of their own, by their own host functions, with nothing of this package."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.graph import layout_of
from esper_triton.tezzeret.design import design_of
from esper_triton.tezzeret.emission import emit
from esper_triton.tezzeret.reference import reference
from esper_triton.tezzeret.rows import Tiles

__all__ = ["EXTENTS", "agreement", "draw", "load", "source_of", "spread"]

EXTENTS: dict[str, dict[str, int]] = {
    "rows": {},
    "sequence": {"length": 7},
    "image": {"image_height": 3, "image_width": 5},
}


def source_of(blueprint: Blueprint, dims: Mapping[str, int], dtype: str = "float32", tiles: Tiles | None = None) -> str:
    return emit(design_of(blueprint, dims, dtype), tiles or Tiles()).source


def load(source: str, folder: Path) -> ModuleType:
    """The source as a module of its own."""
    name = "emitted_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(
    blueprint: Blueprint, dims: Mapping[str, int], rows: int, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs (h always among them), parameters, and the gradient at the output, as matrices."""
    from esper_triton.contracts.expressions import evaluate
    from esper_triton.contracts.graph import input_dims

    generator = torch.Generator().manual_seed(seed)
    widths = {"h": dims[blueprint.feature_dim]} | {n: dims[d] for n, d in input_dims(blueprint).items()}
    inputs = {name: torch.randn(rows, width, generator=generator).to(dtype) for name, width in widths.items()}
    parameters = {}
    for name, spec in blueprint.parameters.items():
        shape = [evaluate(text, dims) for text in spec.shape]
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        parameters[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return inputs, parameters, torch.randn(rows, widths["h"], generator=generator).to(dtype)


def spread(rows: Tensor, gap: int) -> Tensor:
    """The same rows in a wider matrix, with NaN before and after them."""
    if not gap:
        return rows
    wide = torch.full((rows.shape[0], rows.shape[1] + gap), torch.nan, dtype=rows.dtype)
    inner = wide[:, gap // 2 : gap // 2 + rows.shape[1]]
    return inner.copy_(rows)


def expected(
    blueprint: Blueprint,
    dims: Mapping[str, int],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    grad_out: Tensor,
    alpha: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`out` and the gradients of everything, by torch's autograd on the blueprint's reference."""
    layout = layout_of(blueprint.ops)
    leaves = {n: t.to(dtype).requires_grad_() for n, t in {**inputs, **parameters}.items()}
    extents = EXTENTS[layout]
    leading = {"rows": (-1,), "sequence": (-1, 7), "image": (-1, 3, 5)}[layout]
    assert set(extents) <= {"length", "image_height", "image_width"}
    given = {n: leaves[n].view(*leading, leaves[n].shape[-1]) for n in blueprint.inputs}
    h = leaves["h"]
    k = reference(blueprint, given, {n: leaves[n] for n in parameters}, dims=dims).reshape(h.shape)
    out = h + alpha * (k - h)
    names = [*blueprint.inputs, *parameters]
    grads = torch.autograd.grad(out, [leaves[n] for n in names], grad_out.to(dtype), materialize_grads=True)
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def agreement(
    blueprint: Blueprint,
    dims: Mapping[str, int],
    module: ModuleType,
    rows: int,
    dtype: torch.dtype = torch.float32,
    alpha: float = 0.3,
    seed: int = 0,
    gap: int = 0,
    altered: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> dict[str, float]:
    """For `out` and every gradient the largest error against float64, in units of what is allowed.

    Allowed is what torch itself, computing the reference in float32, is off by, ten times, and 16 roundings of the
    largest value to the dtype. Inputs, which are `altered` by name, have `gap` elements of NaN between their rows.
    """
    inputs, parameters, grad_out = draw(blueprint, dims, rows, dtype, seed)
    inputs = {name: spread(altered(name, value), gap) for name, value in inputs.items()}
    grad_out = spread(grad_out, gap // 2)
    extents: dict[str, Any] = dict(EXTENTS[layout_of(blueprint.ops)])
    if "training" in module.forward.__code__.co_varnames:
        extents |= {"training": 0, "dropout_seed": torch.zeros(1, dtype=torch.int64)}
    given = {**inputs, **parameters}
    before = {name: tensor.clone() for name, tensor in given.items()}
    call = {**given, "alpha": torch.tensor([alpha]), **extents}
    out, saved = module.forward(**call)
    grads = module.backward(grad_out=grad_out, saved=saved, **call)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), f"{name} has been written to"
    exact = expected(blueprint, dims, inputs, parameters, grad_out, alpha, torch.float64)
    narrow = expected(blueprint, dims, inputs, parameters, grad_out, alpha, torch.float32)
    found = {"out": out, **grads}
    assert set(found) == set(exact)
    ratios = {}
    # A gradient that cancels to nothing does so among terms of the others' size.
    largest = max((float(value.abs().max()) for value in exact.values() if value.numel()), default=0.0)
    for name, value in exact.items():
        size = value.abs().max() if value.numel() else torch.zeros(())
        rounding = (narrow[name].double() - value).abs().max() if value.numel() else torch.zeros(())
        allowed = (
            10 * rounding + torch.finfo(dtype).eps * (16 * size + 4 * largest) + torch.finfo(dtype).smallest_normal
        )
        error = (found[name].double() - value).abs().max() if value.numel() else torch.zeros(())
        ratios[name] = float((error / allowed).nan_to_num(nan=float("inf")))
    return ratios
