"""What an artifact is tried on: sizes, numbers, alphas and strides, drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_triton.contracts.manifest import Manifest
from esper_triton.contracts.report import CaseRecord
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.subject import Call, Subject

__all__ = [
    "A_TURN",
    "VALUES",
    "call_of",
    "cases",
    "dirty_rows",
    "dropout_seed_of",
    "extents_of_case",
    "sizes",
    "tensors_of",
    "variants_of",
]

VALUES = ("normal", "large", "huge", "tiny", "denormal", "zeros", "equal", "sorted", "one row", "inf", "nan")
"""What the inputs are of. `large` is where the exponential of a product overflows; with `tiny` inputs biases are tiny
too, or nothing would show of them; `one row` is one for all, which may lie in memory once; `inf` and `nan` are among
ordinary numbers, in some rows or items."""
# A turn has every kind, what most often shows something first.
_TURNS = (
    "normal",
    "large",
    "nan",
    "normal",
    "one row",
    "huge",
    "normal",
    "tiny",
    "sorted",
    "normal",
    "inf",
    "equal",
    "normal",
    "zeros",
    "denormal",
    "normal",
)
A_TURN = len(_TURNS)
"""So many groups have numbers of every kind."""
_ORDINARY = (1, 2, 3, 7, 13, 31, 37, 61, 97, 127, 193, 257)
_MOST_ELEMENTS = 1 << 18  # of an activation
_MOST_PRODUCTS = 1 << 28
_USUAL_PRODUCTS = 1 << 25  # but for a call in eight
_MANY_PARAMETERS = 1 << 16
_VARIANTS = 8
_ALPHAS = (1.0, 0.0, 0.3, 0.999, 1e-3, 0.5)
_POISONED_EVERY = 8
_LONG_EVERY = 8
_TINY = (1e-10, 1e-3)  # and in float16


def variants_of(subject: Subject) -> int:
    """How many more cases a group has for a wide layer, whose numbers take longer to draw, and to know the answer of,
    than a call takes."""
    return 0 if subject.elements < _MANY_PARAMETERS else _VARIANTS


def sizes(subject: Subject, seed: int, most_products: int = _MOST_PRODUCTS) -> Iterator[Extents]:
    """Extents without end: one row, primes, and around the edges of the kernels' own blocks, in a drawn order. Rows
    times elements of parameters are at most about `most_products`, and mostly far fewer."""
    manifest = subject.manifest
    blocks = {
        value
        for record in manifest.kernels.values()
        for name, value in record.constexprs.items()
        if 4 <= value <= 256 and "block" in name.lower()
    } or {32}
    edges = sorted({b + d for b in blocks for d in (-1, 0, 1)} | {2 * b + 1 for b in blocks})
    widest = max(subject.widths.values())
    most = max(2, min(_MOST_ELEMENTS // widest, most_products // max(1, subject.elements)))
    counts = [n for n in dict.fromkeys((*_ORDINARY, *edges)) if 1 <= n <= most]
    usual = [n for n in counts if n <= max(2, _USUAL_PRODUCTS // max(1, subject.elements))]
    draw = random.Random(seed)
    first = True
    while True:
        order = counts[:]
        draw.shuffle(order)
        if first:
            # One row less than two blocks is what blocks that are placed a little off leave out, or compute twice.
            order = [1, min(most, 2 * max(blocks) - 1), *order]
            first = False
        for number, rows in enumerate(order):
            is_usual = rows in usual or number % _LONG_EVERY == 1
            yield _extents(subject.layout, rows if is_usual else draw.choice(usual), draw)


def _extents(layout: str, rows: int, draw: random.Random) -> Extents:
    """With about so many rows."""
    if layout == "rows":
        return Extents.of_rows(rows)
    batch = draw.choice((1, 1, 2, 3, 5))
    length = max(1, rows // draw.choice((1, 1, batch)))
    if layout == "sequence":
        return Extents(batch * length, batch, length)
    height = draw.choice((1, 2, 3, 5, 7, 8))
    width = max(1, -(-length // height))
    return Extents(batch * height * width, batch, height * width, height, width)


def cases(subject: Subject, seed: int, most_products: int = _MOST_PRODUCTS) -> Iterator[list[CaseRecord]]:
    """Groups of cases without end. Those of a group are of the same numbers: they differ in alpha, strides, addresses
    and threads. `most_products` as of `sizes`."""
    draw = random.Random(seed)
    variants = variants_of(subject)
    names = (*subject.reads, "out", "grad_out")
    follows = subject.program.follows_mode
    for number, extents in enumerate(sizes(subject, seed, most_products)):
        values = _TURNS[number % len(_TURNS)]
        common: dict[str, Any] = {**extents._asdict(), "values": values, "seed": draw.getrandbits(48)}
        training = follows and number % 2 == 1

        def gaps(values: str = values) -> dict[str, int]:
            found = {name: draw.choice((0, 1, 3, 8, 64)) for name in names}
            if values == "one row":
                found |= {name: -1 for name in subject.reads if draw.random() < 0.8}
            return found

        group = [
            CaseRecord(**common, alpha=1.0, training=training),
            CaseRecord(
                **common,
                alpha=draw.choice(_ALPHAS[2:]),
                training=training,
                gaps=gaps(),
                shift=draw.choice((0, 1, 3)),
                threads="two",
            ),
            CaseRecord(**common, alpha=0.0, training=training, gaps=gaps() if number % 2 else {}),
            # Only some of the tensors are spread out: a kernel that takes one's stride for another's shows.
            CaseRecord(
                **common,
                alpha=draw.choice((1.0, draw.random())),
                training=training,
                gaps={draw.choice(names): draw.choice((1, 5, 16))},
                threads=draw.choice(("one", "two", "usual")),
            ),
        ]
        if number % _POISONED_EVERY == 0 and subject.manifest.parameters:
            group.append(CaseRecord(**common, alpha=0.0, parameters="nan", gaps=gaps()))
        for _ in range(variants):
            like = draw.choice(group[:2])
            more = {"gaps": gaps(), "shift": draw.choice((0, 1, 3)), "threads": draw.choice(("one", "two", "usual"))}
            group.append(like.model_copy(update=more))
        yield group


def extents_of_case(case: CaseRecord) -> Extents:
    return Extents(case.rows, case.batch, case.length, case.image_height, case.image_width)


def tensors_of(manifest: Manifest, case: CaseRecord, subject: Subject) -> dict[str, Tensor]:
    """A case's numbers: `h`, `x`, `grad_out` and the parameters, in the artifact's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = subject.dtype
    found = {}
    for name in subject.reads:
        shape = (case.rows, subject.widths[name])
        found[name] = _values(case.values, shape, dtype, generator)
    # In which rows there is what is not finite, is drawn for all inputs together, by items.
    if case.values in ("inf", "nan") and case.rows:
        for name in subject.reads:
            rows = dirty_rows(case)
            column = int(torch.randint(0, found[name].shape[1], (), generator=generator))
            sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
            places = rows.nonzero()[:, 0][:: max(1, case.length)]
            found[name][places, column] = sign * (torch.inf if case.values == "inf" else torch.nan)
    found["grad_out"] = torch.randn(case.rows, subject.width, generator=generator).to(dtype)
    for name, record in manifest.parameters.items():
        scale = record.shape[-1] ** -0.5 if len(record.shape) > 1 else 1.0
        if case.values == "tiny" and len(record.shape) == 1:
            scale = _TINY[dtype is torch.float16]
        drawn = (torch.randn(*record.shape, generator=generator) * scale).to(dtype)
        found[name] = drawn if case.parameters == "drawn" else torch.full_like(drawn, torch.nan)
    return found


def dirty_rows(case: CaseRecord) -> Tensor:
    """Which rows belong to an item that has something in it which is not finite, bool [rows]."""
    if case.values not in ("inf", "nan"):
        return torch.zeros(case.rows, dtype=torch.bool)
    items = torch.arange(case.batch) % 3 == 0  # at least one, and not all of several
    return items.repeat_interleave(case.length)


def _values(kind: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    limits = torch.finfo(dtype)
    normal = torch.randn(*shape, generator=generator)
    narrow = dtype is torch.float16
    match kind:
        case "large":
            value = normal * 30.0
        case "huge":
            # So that squares, and sums of them, can be represented where kernels compute, in float32.
            value = normal * (30.0 if narrow else 1e10)
        case "tiny":
            value = normal * _TINY[narrow]
        case "denormal":
            steps = torch.randint(-9, 10, tuple(shape), generator=generator)
            return (steps.double() * limits.smallest_normal * limits.eps).to(dtype)
        case "zeros":
            value = torch.zeros(*shape) * normal
        case "equal":
            value = torch.full(tuple(shape), float(torch.randn((), generator=generator)))
        case "sorted":
            value = normal.flatten().sort().values.reshape(normal.shape)
        case "one row":
            value = normal[:1].expand(tuple(shape)).clone() if shape[0] else normal
        case _:
            value = normal
    return value.to(dtype)


def call_of(manifest: Manifest, subject: Subject, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Call:
    """A case as the kernels are called."""
    return Call(
        extents=extents_of_case(case),
        inputs={name: tensors[name] for name in subject.reads},
        parameters={name: tensors[name] for name in manifest.parameters},
        grad_out=tensors["grad_out"],
        alpha=case.alpha,
        training=case.training,
        dropout_seed=dropout_seed_of(case),
        gaps=case.gaps,
        shift=case.shift,
    )


def dropout_seed_of(case: CaseRecord) -> int:
    """Of more than 32 bits, and another for each draw."""
    return (case.seed * 0x9E3779B97F4A7C15 & (2**62 - 1)) | 1 << 40
