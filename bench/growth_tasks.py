"""What `growth.py` trains: hosts that are too narrow in one place, and data that ships with Python and scikit-learn.

A kernel is added to what a layer gives and leaves its width as it is. It cannot bring back what a narrow layer has
thrown away, so a chain with a layer of four units would stay one whatever is grown in it. Each host here is narrow in
what a kernel can add: in the hidden width of a residual block, beside which everything else passes. Such a block is
nearly no block, and what is missing is depth: a nonlinearity, neighbours of a pixel, other positions of a sequence.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from esper_triton.kasmina import Policy, ReconstructionGate, linear

__all__ = [
    "LEAST_WIDTH",
    "TASKS",
    "Data",
    "ImageAdapter",
    "NormalisedAdapter",
    "RowsAdapter",
    "SequenceAdapter",
    "Task",
]

HERE = Path(__file__).resolve().parent
Kernels = list[tuple[str | Path, dict[str, int]]]
Pair = tuple[Tensor, Tensor]


# ---- data


class Data:
    """Inputs and labels in three parts. The gates and the controller see `validation` alone; `test` is reported. Inputs
    that train get normal noise of the standard deviation `noise`, so that few of them are not learnt by heart."""

    def __init__(self, x: Tensor, y: Tensor, sizes: tuple[int, int, int], batch: int, noise: float = 0.0) -> None:
        parts = [tuple(part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
        self.train, self.validation, self.test = parts
        self.batch, self.noise = batch, noise

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.train[0]) / self.batch)

    def epoch(self, generator: torch.Generator) -> Iterator[Pair]:
        x, y = self.train
        for rows in torch.randperm(len(x), generator=generator).split(self.batch):
            noise = self.noise * torch.randn(x[rows].shape, generator=generator) if self.noise else 0
            yield x[rows] + noise, y[rows]


def digits(seed: int) -> Data:
    """scikit-learn's 1,797 digits of 8 by 8, in an order drawn by the seed."""
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(loaded.data).float().div(8).sub(1)[order]
    return Data(x, torch.from_numpy(loaded.target).long()[order], (1000, 300, 497), batch=50, noise=0.4)


def parity(seed: int) -> Data:
    """Which of the digits are odd: what no linear function of the pixels can tell."""
    data = digits(seed)
    for name in ("train", "validation", "test"):
        x, y = getattr(data, name)
        setattr(data, name, (x, y % 2))
    return data


LEAST_WIDTH = 8  # of a layer that gets kernels: of one or two features there is nothing to compute
WINDOW = 16  # characters
WIDTH_IN_POSITIONS = 7  # of the kernels that grow on them


def corpus() -> str:
    """The text of Python's own help: the pages of its language reference that `pydoc` shows."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def words(seed: int) -> Data:
    """Windows of the corpus without its blanks: for each character, whether a blank or a line's end came after it. The
    windows of the test are the last part of the corpus, those of the validation lie before it; the seed draws which
    ones of the rest train."""
    text = corpus()
    kept = [k for k, character in enumerate(text) if not character.isspace()]
    position = {character: k for k, character in enumerate(alphabet())}
    x = torch.tensor([position[text[k]] for k in kept])
    y = torch.tensor([text[k + 1 : k + 2].isspace() for k in kept]).long()
    x, y = (t[: len(t) // WINDOW * WINDOW].view(-1, WINDOW) for t in (x, y))
    held = 1000
    order = torch.randperm(len(x) - 2 * held, generator=torch.Generator().manual_seed(seed))[:12800]
    pick = torch.cat([order, torch.arange(len(x) - 2 * held, len(x))])
    return Data(x[pick], y[pick], (len(order), held, held), batch=64)


def alphabet() -> list[str]:
    return sorted({character for character in corpus() if not character.isspace()})


# ---- hosts


class Residual(nn.Sequential):
    """x + what its modules make of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp(narrow: int) -> nn.Module:
    """64 pixels to 16 features, a residual block with `narrow` hidden units, and two classes."""
    return nn.Sequential(
        nn.Linear(64, 16), Residual(nn.Linear(16, narrow), nn.GELU(), nn.Linear(narrow, 16)), nn.Linear(16, 2)
    )


def cnn(narrow: int) -> nn.Module:
    """A convolution to 16 channels, a residual block of two with `narrow` channels between them, the mean over all
    places, and ten classes."""
    block = Residual(nn.Conv2d(16, narrow, 3, padding=1), nn.GELU(), nn.Conv2d(narrow, 16, 3, padding=1))
    stem = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2))
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Transformer(nn.Module):
    """Characters and sinusoids of their positions to `d` features, one pre-norm block whose attention has `narrow`
    features for queries, keys and values, and two classes for each position."""

    def __init__(self, narrow: int, d: int = 48, embedding: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads if narrow >= heads else 1
        self.embedding, self.stem = nn.Embedding(len(alphabet()), embedding), nn.Linear(embedding + 8, d)
        angles = torch.arange(WINDOW)[:, None] * math.pi / 2 / torch.tensor([1.0, 2.0, 4.0, 8.0])
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1))
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * narrow), nn.Linear(narrow, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 2)

    def forward(self, characters: Tensor) -> Tensor:
        positions = self.get_buffer("positions").expand(*characters.shape, -1)
        x = self.stem(torch.cat([self.embedding(characters), positions], -1))
        x = x + self.out(_attention(self.qkv(self.norm1(x)), self.heads))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x))


def _attention(qkv: Tensor, heads: int) -> Tensor:
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)


# ---- the shipped designs that grow, in plain torch


class Adapter(nn.Module):
    """A layer, and what a kernel would add to it; a fresh one adds nothing."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def _begins(self, *before: nn.Module, last: nn.Module) -> None:
        """With zeros in the last layer, and in the biases of those before."""
        for parameter in (*last.parameters(), *(layer.get_parameter("bias") for layer in before)):
            nn.init.zeros_(parameter)


class RowsAdapter(Adapter):
    """`parallel_adapter`: h + up gelu(down x)."""

    def __init__(self, host: nn.Linear, r: int) -> None:
        super().__init__(host)
        self.down, self.up = nn.Linear(host.in_features, r), nn.Linear(r, host.out_features)
        self._begins(self.down, last=self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x) + self.up(F.gelu(self.down(x)))


class NormalisedAdapter(Adapter):
    """`residual_mlp`: h + up gelu(down norm(h))."""

    def __init__(self, host: nn.Linear, r: int) -> None:
        super().__init__(host)
        d = host.out_features
        self.norm, self.down, self.up = nn.LayerNorm(d), nn.Linear(d, r), nn.Linear(r, d)
        self._begins(last=self.up)

    def forward(self, x: Tensor) -> Tensor:
        h = self.host(x)
        return h + self.up(F.gelu(self.down(self.norm(h))))


class ImageAdapter(Adapter):
    """`inverted_residual.toml`: h + project gelu(depth gelu(expand h)), where depth is a depthwise convolution of 3 by
    3."""

    def __init__(self, host: nn.Conv2d, r: int) -> None:
        super().__init__(host)
        d = host.out_channels
        self.expand, self.project = nn.Conv2d(d, r, 1), nn.Conv2d(r, d, 1)
        self.depth = nn.Conv2d(r, r, 3, padding=1, groups=r)
        self._begins(self.expand, self.depth, last=self.project)

    def forward(self, x: Tensor) -> Tensor:
        h = self.host(x)
        return h + self.project(F.gelu(self.depth(F.gelu(self.expand(h)))))


class SequenceAdapter(Adapter):
    """`sequence_residual.toml`: h + project gelu(depth gelu(expand h)), where depth is a depthwise convolution of `w`
    positions."""

    def __init__(self, host: nn.Linear, r: int, w: int = WIDTH_IN_POSITIONS) -> None:
        super().__init__(host)
        d = host.out_features
        self.expand, self.project = nn.Linear(d, r), nn.Linear(r, d)
        self.depth = nn.Conv1d(r, r, w, padding=w // 2, groups=r)
        self._begins(self.expand, self.depth, last=self.project)

    def forward(self, x: Tensor) -> Tensor:
        h = self.host(x)
        z = self.depth(F.gelu(self.expand(h)).mT).mT
        return h + self.project(F.gelu(z))


# ---- what belongs together


@dataclass(frozen=True, kw_only=True)
class Task:
    """A host, what it learns, and what may grow in it.

    Attributes:
        build: the network, by the width of its narrow place. narrow, wide: that width.
        block: the modules, by prefix, that differ between the two.
        data: by seed. rate, decay: of AdamW.
        kernels: what is compiled for a Linear or convolution: designs, by name or path, with their dims.
        adapter: the design that a rival has from the start, in plain torch: made from a layer and a width. at: the
            layer beside which it sits. parameters: of the largest kernel there, which the rival has where nothing has
            grown.
        policy, heuristic: the options of the grown one.
    """

    build: Callable[[int], nn.Module]
    narrow: int
    wide: int
    block: tuple[str, ...]
    data: Callable[[int], Data]
    epochs: int
    rate: float
    decay: float
    kernels: Callable[[nn.Module], Kernels]
    adapter: Callable[[Any, int], Adapter]
    at: str
    parameters: int
    policy: Policy
    heuristic: dict[str, Any]


def _policy(fine_tuning_steps: int) -> Policy:
    """A seed that is permanent learns no more, so it has as long for its fine-tuning as the run leaves."""
    return Policy(
        to_grafting=ReconstructionGate(max_steps=20),
        schedule=linear(300),
        stabilization_steps=20,
        fine_tuning_steps=fine_tuning_steps,
        embargo_epochs=3,
    )


def _row_kernels(layer: nn.Module) -> Kernels:
    """Two sizes, here and below, so that there is another one to try where the first was thrown away."""
    return [("residual_mlp", {"d": layer.out_features, "hidden_width": r}) for r in (11, 10)]


def _image_kernels(layer: nn.Module) -> Kernels:
    """None for a Linear: a kernel behind the mean over all places sees no place."""
    if isinstance(layer, nn.Linear):
        return []
    return [(HERE / "inverted_residual.toml", {"d": layer.out_channels, "r": r}) for r in (41, 40)]


def _sequence_kernels(layer: nn.Module) -> Kernels:
    d = layer.out_features
    return [(HERE / "sequence_residual.toml", {"d": d, "r": r, "w": WIDTH_IN_POSITIONS}) for r in (16, 15)]


TASKS = {
    "mlp": Task(
        build=mlp,
        narrow=1,
        wide=64,
        block=("1.",),
        data=parity,
        epochs=120,
        rate=3e-3,
        decay=0.05,
        kernels=_row_kernels,
        adapter=NormalisedAdapter,
        at="0",
        parameters=411,
        policy=_policy(800),
        heuristic={"warmup_epochs": 5, "plateau_epochs": 2, "max_seeds": 1},
    ),
    "cnn": Task(
        build=cnn,
        narrow=1,
        wide=32,
        block=("4.",),
        data=digits,
        epochs=160,
        rate=3e-3,
        decay=0.05,
        kernels=_image_kernels,
        adapter=ImageAdapter,
        at="1",
        parameters=1779,
        policy=_policy(2000),
        heuristic={"warmup_epochs": 5, "plateau_epochs": 2, "max_seeds": 1},
    ),
    "transformer": Task(
        build=Transformer,
        narrow=1,
        wide=48,
        block=("qkv.", "out."),
        data=words,
        epochs=30,
        rate=5e-3,
        decay=0.01,
        kernels=_sequence_kernels,
        adapter=SequenceAdapter,
        at="stem",
        parameters=1728,
        policy=_policy(4000),
        heuristic={"warmup_epochs": 2, "plateau_epochs": 1, "max_seeds": 1},
    ),
}
