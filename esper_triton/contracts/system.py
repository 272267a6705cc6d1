"""SystemState: everything that a controller decides on, as one value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.blueprint import DTypeName
from esper_triton.contracts.commands import CommandResult
from esper_triton.contracts.health import HealthFrame

__all__ = ["LayerForm", "LayerGradients", "SystemState"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerForm(_Value):
    """What a layer asks of a kernel, and what it costs itself.

    Attributes:
        x_width: of the layer's input, null where rows of it do not fit those of the output.
        dtype, target: of its kernels; `target` is a label such as `cpu` or `cuda90`, and null on a device that no
            kernel is for.
        may_be_image: whether kernels of layout `image` fit.
        parameters: of the host layer, counted.
    """

    name: str
    x_width: int | None
    dtype: DTypeName | None
    target: str | None
    may_be_image: bool
    parameters: int


class LayerGradients(_Value):
    """What the loss asks of a layer's output, and how much of it the layer's own weights cannot give.

    With `n` rows, let `X` [n, p + 1] be what the layer computes its output from, with a column of ones; `G` [n, d] the
    gradient of the loss with respect to the output, scaled as below; and `R = G - X X^+ G` the part of `G` that no
    change of the layer's weights and bias takes away, to first order: the expressivity bottleneck of M. Verbockhaven,
    T. Rudkiewicz, S. Chevallier and G. Charpiat, Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing
    Them Optimally, TMLR 2024. A seed, which is no linear function of `X`, may.

        gradient_norm = sqrt(||G||^2 / n)
        bottleneck = sqrt(||R||^2 / (n - rank X))
        unexpressed = bottleneck^2 / gradient_norm^2, 1 where the weights can do nothing more

    Rows of sequences and images are their positions. The gradient of a mean over a batch is multiplied by the batch's
    items and by the root of an item's rows: `gradient_norm` is then the norm that the gradient of one item's loss has
    over all of its positions (the root of its mean square), so that layers of different sizes can be compared. The
    subtraction of the rank keeps a wide layer, which can fit any gradient of few rows, from looking as if it could do
    everything.

    `rank` is how many independent numbers a row of `X` has, the column of ones aside: no kernel of the layer that works
    on rows sees more. Null where it was not measured.
    """

    rows: int
    step: int
    gradient_norm: float
    bottleneck: float
    unexpressed: float
    rank: int | None = None


class SystemState(_Value):
    """A model with seeds between two steps.

    Attributes:
        layers: what does not change, in the order of `seeds.layers`.
        gradients: as measured last, for each layer; null where none was, or is of no kind that can be measured.
        seeds: state and health of every seed, column by column.
        opens_at: for each seed, the epoch from which its slot takes an artifact again.
        artifacts: for each seed, the artifact that it has.
        metrics: the validation metric at the end of each epoch so far, null where it was not measured.
        results: what became of the commands that were given since the state before.
    """

    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    layers: tuple[LayerForm, ...]
    gradients: tuple[LayerGradients | None, ...]
    seeds: HealthFrame
    opens_at: tuple[int, ...]
    artifacts: tuple[str | None, ...]
    metrics: tuple[float | None, ...] = ()
    lower_is_better: bool = True
    results: tuple[CommandResult, ...] = ()
