"""Which layers the loss asks for what their weights cannot give: measured on sampled training steps.

On the steps of a round each layer that can be measured has a forward hook, which keeps some rows of its input and of
its output's gradient. Between rounds there is nothing in any call. Random streams do not move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from esper_triton.contracts.system import LayerGradients
from esper_triton.kasmina.layer import KasminaLayer

__all__ = ["GradientProbe"]

_ROWS_PER_STEP = 512  # of one layer
_STEPS_PER_ROUND = 16
_MOST_FEATURES = 2048  # of X: a round solves a system of this size for each layer
_ROWS_PER_FEATURE = 4  # a round has enough rows then; with fewer than a third of them there is no result
_SMALLEST_EIGENVALUE = 1e-10  # over the largest


class GradientProbe:
    """Measures `LayerGradients`, round by round. A round begins when it is wanted, at the earliest `every` steps after
    the one before, and lasts for as many steps as it takes to see enough rows, up to 16.

    A round takes as long as some steps of training do (a system of the layer's input width is solved for each layer),
    which is why nothing is measured that nobody waits for.

    Linear layers and convolutions in one and two dimensions, in one group and padded with zeros, can be measured.

    Attributes:
        results: of the last round in which a layer was seen, by name.
    """

    def __init__(self, layers: Mapping[str, KasminaLayer], every: int) -> None:
        self._layers = {name: layer for name, layer in layers.items() if _features(layer) is not None}
        self._every = every
        self._sums: dict[str, _Sums] = {}
        self._seen: dict[str, _Seen] = {}
        self._handles: list[RemovableHandle] = []
        self._steps_left, self._opens_at = 0, 0
        self.results: dict[str, LayerGradients] = {}

    def before_step(self, step: int, *, wanted: bool) -> None:
        """Call it when a step is about to begin, with its number: listens if it belongs to a round, which begins now if
        one is wanted."""
        if wanted and not self._steps_left and self._every and step >= self._opens_at:
            self._steps_left, self._opens_at = _STEPS_PER_ROUND, step + self._every
            self._sums = {name: _Sums() for name in self._layers}
        if self._steps_left and not self._handles:
            for name, sums in self._sums.items():
                if not sums.is_enough:
                    self._handles.append(
                        self._layers[name].register_forward_hook(self._listener(name), with_kwargs=True)
                    )

    def after_step(self, step: int) -> None:
        """Call it when the step has ended: takes in what was heard, and ends a round that has heard enough."""
        if not self._handles:
            return
        self._stop()
        for name, seen in self._seen.items():
            self._sums[name].add(seen)
        self._seen = {}
        self._steps_left -= 1
        if self._steps_left == 0 or all(sums.is_enough for sums in self._sums.values()):
            for name, sums in self._sums.items():
                result = sums.result(step)
                if result is not None:
                    self.results[name] = result
            self._steps_left, self._sums = 0, {}

    def close(self) -> None:
        """Leaves nothing in any layer, and drops a round that has begun."""
        self._stop()
        self._steps_left, self._sums, self._seen = 0, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Results, and what a round that has begun, and a step whose gradients are accumulated, have come to; plain
        values and tensors."""
        return {
            "seen": {name: {"x": seen.x, "g": seen.g} for name, seen in self._seen.items()},
            "results": {name: result.model_dump() for name, result in self.results.items()},
            "steps_left": self._steps_left,
            "opens_at": self._opens_at,
            "sums": {name: dict(vars(sums)) for name, sums in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been. Layers that are not here are left out."""
        self.close()
        self.results = {
            name: LayerGradients(**result) for name, result in state["results"].items() if name in self._layers
        }
        self._steps_left, self._opens_at = state["steps_left"], state.get("opens_at", 0)  # the release before had none
        self._sums = {
            name: _Sums(**self._placed(name, sums)) for name, sums in state["sums"].items() if name in self._layers
        }
        self._seen = {
            name: _Seen(self._layers[name], None, None, 1.0, **self._placed(name, rows))
            for name, rows in state.get("seen", {}).items()  # nor this
            if name in self._sums
        }

    def _placed(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """On the layer's device, where checkpoints are not read to."""
        device = next(self._layers[name].parameters()).device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}

    def _listener(self, name: str) -> Any:
        def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling() or not layer.training or not torch.is_grad_enabled():
                return
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
                return
            if name not in self._seen:  # of one that is called more than once, the first call counts
                seen = self._seen[name] = _Seen.of(layer, x.detach(), output.detach())
                output.register_hook(seen.take_gradient)  # type: ignore[no-untyped-call]

        return listen

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@dataclass(eq=False)
class _Seen:
    """Rows of one call: X without the ones, and G when it has come."""

    layer: nn.Module
    items: Tensor | None  # which ones of the batch; None for all
    rows: Tensor | None  # which ones of those items' rows
    scale: float  # of the gradient, to that of an item
    x: Tensor
    g: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor, h: Tensor) -> _Seen:
        positions = h[0].numel() // h.shape[_feature_dim(layer)] if h.dim() > 1 else 1
        batch = h.shape[0] if h.dim() > 1 else 1
        items = _evenly(batch, -(-_ROWS_PER_STEP // positions), h.device)
        seen = cls(layer, items, None, batch * math.sqrt(positions), x)
        picked = h if items is None else h[items]
        seen.rows = _evenly(picked.numel() // picked.shape[_feature_dim(layer)], _ROWS_PER_STEP, h.device)
        seen.x = seen._rows_of(x, _input_rows)
        return seen

    def take_gradient(self, gradient: Tensor) -> None:
        self.g = self._rows_of(gradient.detach(), _output_rows) * self.scale

    def _rows_of(self, tensor: Tensor, matrix: Any) -> Tensor:
        found: Tensor = matrix(self.layer, tensor if self.items is None else tensor[self.items])
        return (found if self.rows is None else found[self.rows]).to(torch.float64, copy=True)


@dataclass(eq=False)
class _Sums:
    """Sums over rows, from which everything follows. All in float64, on the layer's device."""

    count: int = 0
    xx: Tensor | None = None  # [p + 1, p + 1]
    xg: Tensor | None = None  # [p + 1, d]
    gg: Tensor | None = None  # 0-d

    @property
    def is_enough(self) -> bool:
        return self.xx is not None and self.count >= _ROWS_PER_FEATURE * len(self.xx)

    def add(self, seen: _Seen) -> None:
        if seen.g is None:  # the loss does not depend on that call
            return
        x = F.pad(seen.x, (0, 1), value=1.0)
        new = {"xx": x.mT @ x, "xg": x.mT @ seen.g, "gg": seen.g.square().sum()}
        for name, value in new.items():
            before = getattr(self, name)
            setattr(self, name, value if before is None else before + value)
        self.count += len(x)

    def result(self, step: int) -> LayerGradients | None:
        """None with too few rows, or where something was not finite."""
        if self.xx is None or self.xg is None or self.gg is None:
            return None
        if 3 * self.count < _ROWS_PER_FEATURE * len(self.xx) or not bool(self.xx.isfinite().all()):
            return None
        values, vectors = torch.linalg.eigh(self.xx)
        kept = values > _SMALLEST_EIGENVALUE * values[-1]
        rank, n = int(kept.sum()), self.count
        expressed = float(((vectors[:, kept].mT @ self.xg).square() / values[kept, None]).sum())
        gg = float(self.gg)
        if n <= rank:
            return None
        norm = math.sqrt(gg / n)
        bottleneck = math.sqrt(max(gg - expressed, 0.0) / (n - rank))
        if not math.isfinite(norm + bottleneck):
            return None
        unexpressed = (bottleneck / norm) ** 2 if norm else 0.0
        return LayerGradients(
            rows=n, step=step, gradient_norm=norm, bottleneck=bottleneck, unexpressed=unexpressed, rank=rank - 1
        )


def _evenly(count: int, most: int, device: torch.device) -> Tensor | None:
    """Positions of at most so many of `count`; None for all of them."""
    if count <= most:
        return None
    return torch.arange(most, device=device) * count // most


def _feature_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _features(layer: nn.Module) -> int | None:
    """Columns of X without that of ones; None for a layer that is not measured."""
    if isinstance(layer, nn.Linear):
        features = layer.in_features
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == 1 and layer.padding_mode == "zeros":
        if _padding(layer) is None:
            return None
        features = layer.weight[0].numel()
    else:
        return None
    return features if features < _MOST_FEATURES else None


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros on either side of each dimension; None where they are not as many on both."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return tuple(r // 2 for r in reach) if not any(r % 2 for r in reach) else None


def _output_rows(layer: nn.Module, h: Tensor) -> Tensor:
    """[rows, d]."""
    dim = _feature_dim(layer)
    return h.movedim(dim, -1).reshape(-1, h.shape[dim])


def _input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """[rows, p]: for each row of the output what the layer's weights are multiplied with."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    padding = _padding(layer)
    assert padding is not None  # else it would not be measured
    size, dilation, stride = tuple(layer.kernel_size), tuple(layer.dilation), tuple(layer.stride)
    if isinstance(layer, nn.Conv1d):
        x, one = x[..., None, :], ((1,), (0,))
        size, dilation, stride, padding = one[0] + size, one[0] + dilation, one[0] + stride, one[1] + padding
    patches = F.unfold(x, size, dilation=dilation, padding=padding, stride=stride)  # [batch, p, positions]
    return patches.mT.reshape(-1, patches.shape[1])
