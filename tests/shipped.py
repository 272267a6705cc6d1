"""The library that ships, for its tests: small dims, and the PyTorch layers that some of it is equal to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.reference import reference

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
BLUEPRINTS = {path.stem: Blueprint.load(path) for path in sorted(KERNELS.glob("*.toml"))}
SIZES = {"d": 24, "d_in": 20, "r": 8, "hidden_width": 40, "heads": 2}
"""Off the blocks' extents, and enough for the heads to share."""
POSITIONS: dict[str, tuple[int, ...]] = {"rows": (), "sequence": (7,), "image": (3, 5)}


def dims_of(name: str, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    known = SIZES | (sizes or {})
    return {dim: known[dim] for dim in BLUEPRINTS[name].dims}


def k_of(name: str, dims: Mapping[str, int], inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """k, op by op in torch; features are the last dimension. Where rows are on their own, they may lie in any shape."""
    blueprint = BLUEPRINTS[name]
    given = {n: inputs[n] for n in blueprint.inputs}
    if blueprint.layout != "rows":
        return reference(blueprint, given, parameters, dims=dims)
    leading = next(iter(given.values())).shape[:-1]
    rows = {n: value.reshape(-1, value.shape[-1]) for n, value in given.items()}
    return reference(blueprint, rows, parameters, dims=dims).reshape(*leading, dims["d"])


@dataclass(frozen=True)
class Equivalent:
    """The layer that a blueprint is equal to. `names` are what the layer calls the parameters, where that is another
    name; `apply` gives the layer an input whose features come last."""

    make: Callable[[Mapping[str, int]], nn.Module]
    names: Mapping[str, str]
    apply: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def parameters(self, layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """The layer's own, by the blueprint's names."""
        own = dict(layer.named_parameters())
        return {parameter: own[self.names.get(parameter, parameter)] for parameter in BLUEPRINTS[name].parameters}


def _convolved(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.movedim(-1, 1)).movedim(1, -1)


EQUIVALENTS = {
    "linear": Equivalent(lambda s: nn.Linear(s["d_in"], s["d"]), {}),
    "conv1x1": Equivalent(lambda s: nn.Conv2d(s["d_in"], s["d"], 1), {}, _convolved),
    "conv3x3": Equivalent(lambda s: nn.Conv2d(s["d_in"], s["d"], 3, padding=1), {}, _convolved),
    "layernorm": Equivalent(lambda s: nn.LayerNorm(s["d"]), {}),
    "rmsnorm": Equivalent(lambda s: nn.RMSNorm(s["d"], eps=1e-6), {}),
    "multi_head_attention": Equivalent(
        lambda s: nn.MultiheadAttention(s["d"], s["heads"], batch_first=True),
        {"out_proj_weight": "out_proj.weight", "out_proj_bias": "out_proj.bias"},
        lambda layer, x: layer(x, x, x, need_weights=False)[0],
    ),
}
"""By the name of the blueprint."""
