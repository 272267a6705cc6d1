"""The global random streams of a process, as plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["random_streams", "set_random_streams"]


def random_streams() -> dict[str, Any]:
    """Where torch's default generators (of the CPU, and of every CUDA device once CUDA is in use), numpy's and Python's
    are; in what `torch.load(weights_only=True)` accepts.

    Raises TypeError where numpy's global generator was replaced by one of another kind than its own.
    """
    kind, key, position, has_gauss, gauss = np.random.get_state()
    if kind != "MT19937":
        raise TypeError(f"numpy's global generator is {kind}, and only its own, MT19937, can be saved")
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }


def set_random_streams(state: Mapping[str, Any]) -> None:
    """Puts them there. Streams of CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(value, device)
    key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
