"""The numbers that `tl.rand` gives, in torch: what a kernel has drawn can be known without it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uniform"]

# Of Philox4x32: J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_RAISES = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_SCALE = 4.6566127342e-10  # Triton's: the largest float32 that keeps 2^31 - 1 below 1


def uniform(seed: int, offsets: Tensor) -> Tensor:
    """`tl.rand(seed, offsets)`: float32 in [0, 1) of the shape of `offsets`, int64, whose low 64 bits count."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    c0, c1 = offsets & _WORD, offsets >> 32 & _WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        high_a, low_a = _product(c0, _MULTIPLIERS[0])
        high_b, low_b = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + _RAISES[0] & _WORD, k1 + _RAISES[1] & _WORD
    # As an int32 of either sign, folded onto the positive ones.
    folded = torch.where(c0 > _WORD >> 1, _WORD - c0, c0)
    return folded.to(torch.float32) * torch.tensor(_SCALE, dtype=torch.float32, device=offsets.device)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two words, in integers of 63 bits."""
    low = word * (factor & 0xFFFF)
    middle = word * (factor >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
