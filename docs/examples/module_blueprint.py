"""A module of PyTorch becomes a blueprint, then a kernel; then it is proven to be the module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.testing import assert_equivalent


class GatedBottleneck(nn.Module):
    """h + up(activation(down(h)) * sigmoid(gate(h)))"""

    def __init__(self, d: int, r: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.activation = activation
        self.down, self.gate, self.up = nn.Linear(d, r), nn.Linear(d, r), nn.Linear(r, d)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(self.activation(self.down(h)) * torch.sigmoid(self.gate(h)))


module = GatedBottleneck(32, 8)
blueprint = esper.Blueprint.from_module(module, torch.ones(1, 32), input="h")  # traced by torch.export
print(blueprint.to_toml())  # what may be kept, read and changed

# Written as Triton kernels, forward and backward, compiled, and proven against float64.
urza = esper.Urza("urza")
artifact = esper.compile(blueprint, dims={"d": 32}, urza=urza, pipeline="fast")
print(artifact.id, artifact.status)

# The proof above is of the blueprint. This one is of the kernel against the module itself, for tests of your own.
assert_equivalent(module, artifact, urza=urza, groups=10)
print("equivalent, forward and backward, on drawn inputs and parameters")

# And it says so where they differ, with the simplest call that tells.
try:
    assert_equivalent(GatedBottleneck(32, 8, activation=F.silu), artifact, urza=urza, groups=10)
except AssertionError as difference:
    print("with another activation:", difference)
