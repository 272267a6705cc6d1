"""PyTorch's own layers as references: those that blueprints say they are equal to, and anybody's module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.manifest import Manifest

__all__ = ["layer_reference", "module_reference"]

Apply = Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def module_reference(
    module: nn.Module,
    parameters: Sequence[str],
    names: Mapping[str, str] | None = None,
    call: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """A reference, as `oracle.LocalOracle` takes it, that calls `module` with an artifact's parameters for its own.

    Args:
        parameters: what the artifact calls them. names: what the module calls those that it calls otherwise
            (`out_proj_bias` may be `out_proj.bias`); each gets the shape that it has there.
        call: takes the module, in place of it `functional_call`'s, and the inputs by name; by default the module is
            called with `x`, or with `h` where there is no `x`, features last.

    Raises ValueError where the module has no such parameter.
    """
    own = dict(module.named_parameters())
    theirs = {name: (names or {}).get(name, name) for name in parameters}
    missing = sorted(set(theirs.values()) - set(own))
    if missing:
        known, lacking = ", ".join(own), ", ".join(map(repr, missing))
        raise ValueError(f"{type(module).__name__} has no parameter {lacking}; it has {known}: give names")

    def reference(**tensors: Tensor) -> Tensor:
        inputs = {name: tensors[name] for name in ("x", "h") if name in tensors}
        given = {theirs[name]: tensors[name].reshape(own[theirs[name]].shape) for name in parameters}
        # What else it has must not be of another dtype.
        dtype = next(iter(inputs.values())).dtype
        rest = {n: b.to(dtype) if b.is_floating_point() else b for n, b in module.named_buffers()}
        rest |= {n: p.detach().to(dtype) for n, p in own.items() if n not in given}
        wrapped = _Called(module, call)
        state = {f"inner.{name}": value for name, value in (rest | given).items()}
        found: Tensor = functional_call(wrapped, state, (inputs,))
        return found

    return reference


class _Called(nn.Module):
    """A module with the way in which it is called."""

    def __init__(self, inner: nn.Module, call: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.inner, self._call = inner, call

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._call is not None:
            return self._call(self.inner, **inputs)
        found: Tensor = self.inner(inputs.get("x", inputs.get("h")))
        return found


def layer_reference(blueprint: Blueprint, manifest: Manifest) -> Callable[..., Tensor] | None:
    """The layer that a blueprint says it is equal to, for an artifact's dims; None where it says none, or one that is
    not known here."""
    make = _LAYERS.get(blueprint.equivalent_to or "")
    if make is None:
        return None
    with torch.random.fork_rng(devices=[]):  # a layer draws its weights, which are not used
        layer, names, call = make(blueprint, manifest)
    layer.requires_grad_(False)
    return module_reference(layer, tuple(manifest.parameters), names, call)


Made = tuple[nn.Module, dict[str, str], Callable[..., Tensor] | None]


def _attribute(blueprint: Blueprint, name: str) -> float:
    return next(float(value) for op in blueprint.ops for key, value in op.attrs.items() if key == name)  # type: ignore[arg-type]


def _linear(blueprint: Blueprint, manifest: Manifest) -> Made:
    dims = manifest.dims
    return nn.Linear(dims["d_in"], dims["d"], bias="bias" in manifest.parameters), {}, None


def _convolution(blueprint: Blueprint, manifest: Manifest) -> Made:
    dims, shape = manifest.dims, manifest.parameters["weight"].shape
    size = shape[2] if len(shape) == 4 else 1
    layer = nn.Conv2d(dims["d_in"], dims["d"], size, padding=size // 2, bias="bias" in manifest.parameters)

    def call(layer: nn.Module, x: Tensor, **_: Tensor) -> Tensor:
        if x.dim() == 4:
            image: Tensor = layer(x.movedim(-1, 1))
            return image.movedim(1, -1)
        # Rows of a kernel of one pixel are pixels, wherever they lie.
        pixels: Tensor = layer(x.reshape(-1, x.shape[-1], 1, 1))
        return pixels.reshape(*x.shape[:-1], -1)

    return layer, {}, call


def _layer_norm(blueprint: Blueprint, manifest: Manifest) -> Made:
    return nn.LayerNorm(manifest.width, eps=_attribute(blueprint, "eps")), {}, None


def _rms_norm(blueprint: Blueprint, manifest: Manifest) -> Made:
    return nn.RMSNorm(manifest.width, eps=_attribute(blueprint, "eps")), {}, None


def _attention(blueprint: Blueprint, manifest: Manifest) -> Made:
    layer = nn.MultiheadAttention(manifest.width, manifest.dims["heads"], batch_first=True)

    def call(layer: nn.Module, x: Tensor, **_: Tensor) -> Tensor:
        found: Tensor = layer(x, x, x, need_weights=False)[0]
        return found

    return layer, {"out_proj_weight": "out_proj.weight", "out_proj_bias": "out_proj.bias"}, call


_LAYERS: dict[str, Callable[[Blueprint, Manifest], Made]] = {
    "torch.nn.Linear": _linear,
    "torch.nn.Conv2d": _convolution,
    "torch.nn.LayerNorm": _layer_norm,
    "torch.nn.RMSNorm": _rms_norm,
    "torch.nn.MultiheadAttention": _attention,
}
