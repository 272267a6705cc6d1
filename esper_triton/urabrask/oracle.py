"""What a call should come to, and how far from it a computation in the layer's dtype may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper_triton.contracts.blueprint import Blueprint, Layout
from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.arena import Arena, Region
from esper_triton.urabrask.philox import uniform
from esper_triton.urabrask.references import draws_itself, reference_of
from esper_triton.urabrask.rounding import Rounded
from esper_triton.urabrask.sandbox import Died, Failed, Limits, Sandbox

__all__ = [
    "Answer",
    "LocalOracle",
    "Oracle",
    "Question",
    "RemoteOracle",
    "all_finite",
    "answer_in",
    "in_layout",
    "warm_up",
]

K = "k"
"""The name of k among an answer's tensors; `grad_<name>` are what k passes back to each of its operands."""
PIECE = 1 << 16
"""Elements that a piece of a large tensor has."""
_SAMPLES = 3
_ROOM = 8.0  # a kernel may keep some multiple of what the reference computes


@dataclass(frozen=True, kw_only=True)
class Question:
    """k of these inputs (as the blueprint reads them) and parameters, and its vector-Jacobian products with `grad_k`.

    All are [rows, width] or of their own shape, in the layer's dtype. `seed` is what rounding errors are drawn by.
    """

    extents: Extents
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    grad_k: Tensor
    training: bool = False
    dropout_seed: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """By name, in float64: `exact` is the answer; `narrow` what torch's own kernels give in the layer's dtype;
    `spread` the largest deviation of evaluations with drawn rounding errors, and of `narrow`, from `exact`."""

    exact: dict[str, Tensor]
    narrow: dict[str, Tensor]
    spread: dict[str, Tensor] = field(default_factory=dict)

    def allowance(self, name: str, lines: Any = ...) -> Tensor:
        """By how much k, or a gradient, may be missed for what the reference's own condition is: 3 (s + r + R) of
        `judging`; of some lines of it."""
        spread = self.spread[name][lines]
        if not spread.numel():
            return spread
        r, whole = self._typical[name]
        return (spread + (r[lines] + whole)).mul_(3)

    @functools.cached_property
    def _typical(self) -> dict[str, tuple[Tensor, float]]:
        return {name: _typical(spread) for name, spread in self.spread.items() if spread.numel()}


def all_finite(values: Tensor) -> bool:
    """Whether all are, in one pass; where False is said, a sum of large ones may have overflowed."""
    return math.isfinite(float(values.sum(dtype=torch.float32 if values.itemsize == 2 else None)))


def _typical(spread: Tensor) -> tuple[Tensor, float]:
    """The root of the mean square of what is finite in each line, and that of these."""
    lines = spread if spread.dim() else spread[None]
    finite = lines if all_finite(lines) else torch.where(lines.isfinite(), lines, 0.0)
    r = torch.linalg.vector_norm(finite, dim=-1, keepdim=True) / math.sqrt(lines.shape[-1])
    if not all_finite(r):  # the square of a large float64 may be none
        largest = finite.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        r = largest * (finite / largest).square_().mean(-1, keepdim=True).sqrt()
    most = max(float(r.max()), torch.finfo(torch.float64).tiny)
    whole = most * float((r / most).square_().mean().sqrt())
    # A tensor of one dimension is one line, of which each element may be asked for.
    return (r.expand_as(lines).view(spread.shape) if spread.dim() < 2 else r), whole


class Oracle(Protocol):
    """Answers questions about one blueprint."""

    @property
    def knows_dropout(self) -> bool:
        """Whether it knows what is dropped in training mode."""

    def answer(self, question: Question) -> Answer:
        """Raises what the blueprint's reference raises."""

    def exact(self, question: Question) -> dict[str, Tensor]:
        """`answer(...).exact` alone, at a fifth of its price."""


def in_layout(rows: Tensor, layout: str, extents: Extents) -> Tensor:
    """[rows, width] as a reference takes it."""
    lead: dict[str, tuple[int, ...]] = {
        "rows": (extents.rows,),
        "sequence": (extents.batch, extents.length),
        "image": (extents.batch, extents.image_height, extents.image_width),
    }
    return rows.reshape(*lead[layout], rows.shape[-1])


class LocalOracle:
    """Evaluates a torch function of inputs and parameters by keyword in this process. `layout` says how it takes its
    inputs, `dtype` is the layer's."""

    def __init__(self, reference: Callable[..., Tensor], layout: Layout, dtype: torch.dtype) -> None:
        self.reference, self.layout, self.dtype = reference, layout, dtype
        self._knows_dropout = draws_itself(reference)

    @property
    def knows_dropout(self) -> bool:
        """Whether the reference takes `rand`."""
        return self._knows_dropout

    @classmethod
    def of_blueprint(cls, blueprint: Blueprint, dims: Mapping[str, int], dtype: str) -> LocalOracle:
        """A graph is evaluated op by op; of a source this runs its own `reference`, which is code of its author's."""
        return cls(reference_of(blueprint, dims), blueprint.layout, TORCH_DTYPE[dtype])

    def answer(self, question: Question) -> Answer:
        """Raises what the reference raises."""
        wide = self._leaves(question, torch.float64)
        exact = self._evaluate(question, wide)
        narrow = self._evaluate(question, self._leaves(question, self.dtype))
        spread = {name: _distance(narrow[name], value) for name, value in exact.items()}
        generator = torch.Generator().manual_seed(question.seed)
        roundoff = torch.finfo(self.dtype).eps / 2
        limit = torch.finfo(self.dtype).max / _ROOM
        largest = 0.0
        for sample in range(_SAMPLES):
            # Not in one operation, so that every step of it is rounded.
            with (
                sdpa_kernel(SDPBackend.MATH),
                Rounded(
                    roundoff, generator, together=sample == 0, watched=sample == 1 and self.dtype is torch.float16
                ) as rounded,
            ):
                found = self._evaluate(question, wide)
            largest = max(largest, rounded.largest)
            for name, value in exact.items():
                _take_in(spread[name], found[name], value)
        if largest > limit:  # what is between may not fit the dtype, and then nothing can be demanded
            spread = {name: torch.full_like(value, torch.inf) for name, value in spread.items()}
        return Answer(exact, narrow, spread)

    def exact(self, question: Question) -> dict[str, Tensor]:
        """Raises what the reference raises."""
        return self._evaluate(question, self._leaves(question, torch.float64))

    def _call(self, question: Question, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        drawn: dict[str, Any] = {}
        if question.training and self.knows_dropout:

            def rand(offsets: Tensor, salt: int = 0) -> Tensor:
                return uniform(question.dropout_seed + salt, offsets)

            drawn["rand"] = rand
        k = self.reference(**inputs, **parameters, **drawn)
        return k.reshape(question.extents.rows, k.shape[-1])

    @staticmethod
    def _leaves(question: Question, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of inputs and parameters that gradients are taken at."""
        named = (*question.inputs.items(), *question.parameters.items())
        return {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in named}

    def _evaluate(self, question: Question, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: in_layout(named[name], self.layout, question.extents) for name in question.inputs}
        k = self._call(question, inputs, {name: named[name] for name in question.parameters})
        if k.requires_grad:
            grads = torch.autograd.grad(
                k, list(named.values()), question.grad_k.to(k.dtype), materialize_grads=True, allow_unused=True
            )
        else:
            grads = tuple(torch.zeros_like(value) for value in named.values())
        found = {K: k.detach()} | {f"grad_{name}": grad for name, grad in zip(named, grads, strict=True)}
        return {name: value.double() for name, value in found.items()}


def _take_in(spread: Tensor, found: Tensor, exact: Tensor) -> None:
    """Makes the spread as large as the distance, in pieces that stay in the processor's cache."""
    if spread.dim() < 2 or spread.numel() <= PIECE:
        torch.maximum(spread, _distance(found, exact), out=spread)
        return
    step = max(1, PIECE * len(spread) // spread.numel())
    for start in range(0, len(spread), step):
        piece = slice(start, start + step)
        torch.maximum(spread[piece], _distance(found[piece], exact[piece]), out=spread[piece])


def _distance(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).abs_()


def warm_up() -> None:
    """Does everything once that imports something, or is made on first use."""
    oracle = LocalOracle(lambda h, w: torch.softmax(torch.nn.functional.gelu(h @ w), -1), "rows", torch.float32)
    oracle.answer(
        Question(
            extents=Extents.of_rows(2),
            inputs={"h": torch.ones(2, 2)},
            parameters={"w": torch.ones(2, 2)},
            grad_k=torch.ones(2, 2),
        )
    )


# ---- in another process


class RemoteOracle:
    """Asks a cell that has loaded the blueprint: for a source that came with the artifact."""

    def __init__(self, sandbox: Sandbox, manifest: Manifest) -> None:
        self._sandbox, self._manifest = sandbox, manifest
        self._knows_dropout: bool | None = None

    @classmethod
    @contextmanager
    def of_blueprint(cls, blueprint: Blueprint, manifest: Manifest, limits: Limits) -> Iterator[RemoteOracle]:
        """With a cell of its own, which is closed with the context."""
        told = {
            "kind": "reference",
            "blueprint": "blueprint.json",
            "dims": dict(manifest.dims),
            "dtype": manifest.dtype,
        }
        # A reference takes memory by its own measure, and its answers are in float64, three times over.
        with Sandbox(told, {"blueprint.json": blueprint.model_dump_json().encode()}, limits) as sandbox:
            yield cls(sandbox, manifest)

    @property
    def knows_dropout(self) -> bool:
        """Whether the reference takes `rand`."""
        if self._knows_dropout is None:
            self._knows_dropout = self._tell({"about": True}).draws
        return self._knows_dropout

    def _tell(self, message: dict[str, Any]) -> Any:
        try:
            return self._sandbox.tell(message, "the reference")
        except (Died, Failed) as error:
            raise Failed(f"the blueprint's reference: {error}") from error

    def answer(self, question: Question) -> Answer:
        """Raises Failed where the reference fails or its cell dies."""
        return Answer(*self._ask(question, ("exact", "narrow", "spread")))

    def exact(self, question: Question) -> dict[str, Tensor]:
        """Raises Failed where the reference fails or its cell dies."""
        return self._ask(question, ("exact",))[0]

    def _ask(self, question: Question, parts: tuple[str, ...]) -> list[dict[str, Tensor]]:
        arena: Arena = self._sandbox.arena
        arena.clear()
        given: dict[str, Region] = {}
        for name, value in (*question.inputs.items(), *question.parameters.items(), (f"{K} grad", question.grad_k)):
            given[name] = arena.place(name, tuple(value.shape), value.dtype)
            arena.write(given[name], value)
        rows = question.extents.rows
        shapes: dict[str, tuple[int, ...]] = {K: (rows, self._manifest.width)}
        shapes |= {f"grad_{n}": tuple(v.shape) for n, v in (*question.inputs.items(), *question.parameters.items())}
        wanted = {
            part: {name: arena.place(f"{part} {name}", shape, torch.float64) for name, shape in shapes.items()}
            for part in parts
        }
        message = {
            "question": {
                "extents": list(question.extents),
                "training": question.training,
                "dropout_seed": question.dropout_seed,
                "seed": question.seed,
            },
            "inputs": {name: _told(given[name]) for name in question.inputs},
            "parameters": {name: _told(given[name]) for name in question.parameters},
            "grad_k": _told(given[f"{K} grad"]),
            "wanted": {part: {name: _told(region) for name, region in of.items()} for part, of in wanted.items()},
        }
        self._tell(message)
        after = arena.snapshot()
        return [{name: after.read(region) for name, region in of.items()} for of in wanted.values()]


def _told(region: Region) -> list[Any]:
    return [region.offset, list(region.shape), str(region.dtype).removeprefix("torch.")]


def answer_in(oracle: LocalOracle, message: Mapping[str, Any], shared: Any) -> dict[str, Any]:
    """In the cell: reads a question from the shared memory and writes the answer there."""

    def tensor(told: list[Any]) -> Tensor:
        offset, shape, dtype = told
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        flat: Tensor = torch.frombuffer(shared, dtype=getattr(torch, dtype), count=count, offset=offset)
        return flat.view(shape)

    if "about" in message:
        return {"draws": oracle.knows_dropout}
    asked = message["question"]
    question = Question(
        extents=Extents(*asked["extents"]),
        inputs={name: tensor(told) for name, told in message["inputs"].items()},
        parameters={name: tensor(told) for name, told in message["parameters"].items()},
        grad_k=tensor(message["grad_k"]),
        training=asked["training"],
        dropout_seed=asked["dropout_seed"],
        seed=asked["seed"],
    )
    if set(message["wanted"]) == {"exact"}:
        found = {"exact": oracle.exact(question)}
    else:
        found = vars(oracle.answer(question))
    for part, wanted in message["wanted"].items():
        for name, told in wanted.items():
            tensor(told).copy_(found[part][name])
    return {"done": True}
