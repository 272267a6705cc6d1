"""The models that `kasmina.py` and `kasmina_instructions.py` wrap."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HOSTS", "Transformer"]


class Transformer(nn.Module):
    """Twelve pre-norm blocks of width 256, written out so that every projection is a Linear that is called."""

    def __init__(self, blocks: int = 12, d: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d),
                    "out": nn.Linear(d, d),
                    "norm2": nn.LayerNorm(d),
                    "up": nn.Linear(d, 4 * d),
                    "down": nn.Linear(4 * d, d),
                }
            )
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, d)
            x = x + block["out"](mixed)
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return x


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer, 12 blocks, d=256": (Transformer, (2, 32, 256)),
    "MLP, 3 layers, d=64, batch 8": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
        (8, 64),
    ),
}
