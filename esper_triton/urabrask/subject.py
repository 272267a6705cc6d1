"""What is on trial: an artifact as its manifest describes it, and a call of it as launches on memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.launcher import Bound, KernelProgram, x_width_of
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.arena import Arena, Region, Snapshot, changes

__all__ = ["Call", "Launch", "Outcome", "Placed", "Subject"]

Launch = tuple[str, tuple[int, int, int], list[Any]]
"""A kernel's name, its grid, and its arguments: integers, and [offset, bytes] of what lies in the arena."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, forward and (where there is one) backward.

    Attributes:
        inputs: `h`, and `x` where it is read, [rows, width] in the artifact's dtype. parameters: by name.
        grad_out: [rows, width]. alpha: a float32. dropout_seed: of one that draws; used in training mode.
        gaps: elements between the end of a row and the next, by tensor; -1 for one row that counts for all.
        shift: elements by which tensors are off from an address that is a multiple of 64 bytes.
    """

    extents: Extents
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    grad_out: Tensor
    alpha: float
    training: bool = False
    dropout_seed: int = 0
    gaps: Mapping[str, int] = field(default_factory=dict)
    shift: int = 0
    backward: bool = True


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A call in an arena. `results` are what is asked for; `before` is good until the next call is placed there."""

    regions: dict[str, Region]
    results: tuple[str, ...]
    forward: list[Launch]
    backward: list[Launch]
    forward_writes: tuple[str, ...]
    backward_writes: tuple[str, ...]
    before: Snapshot


@dataclass(frozen=True)
class Outcome:
    """What a call gave: `out` and `grad_<name>`, on the CPU, and what it wrote where it was not to, if it did."""

    results: dict[str, Tensor]
    trespass: str | None


class _Described:
    """A kernel of which only the name is known."""

    code_bytes = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def launcher(self) -> Callable[..., None]:
        return _NamedLaunch(self.name)


class _NamedLaunch:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> None:
        raise AssertionError(f"kernel {self.name!r} is described here and not loaded")


class Subject:
    """An artifact's launch plan without its code; `elements` are those of all its parameters. Raises ArtifactRefused
    where the plan is not consistent."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.program = KernelProgram(manifest, {name: _Described(name) for name in manifest.kernels})
        self.widths = {"h": manifest.width, "x": x_width_of(manifest)}
        self.reads = self.program.tensors_read
        self.dtype = self.program.dtype
        self.layout = self.program.layout
        self.width = manifest.width
        self.elements = sum(math.prod(record.shape) for record in manifest.parameters.values())
        self.terms_added = max(manifest.dims.values())  # to h, at most, where a product is accumulated onto it

    @property
    def result_names(self) -> tuple[str, ...]:
        """`out`, and the gradients that it computes."""
        if not self.program.has_backward:
            return ("out",)
        return ("out", *(f"grad_{name}" for name in (*self.program.input_grads, *self.manifest.parameters)))

    def bytes_of(self, extents: Extents) -> int:
        """Of the tensors of a call without gaps, at least. Raises ValueError where the plan does not take it."""
        program, manifest, rows = self.program, self.manifest, extents.rows
        strides = {name: self.widths[name] for name in self.reads} | {"out": self.width, "grad_out": self.width}
        bounds = [program.bind_forward(extents, strides)]
        if program.has_backward:
            bounds.append(program.bind_backward(extents, strides))
        shapes = [(shape, bound.dtypes[name]) for bound in bounds for name, shape in bound.shapes.items()]
        shapes += [((rows, width), self.dtype) for width in strides.values()]
        shapes += [(record.shape, self.dtype) for record in manifest.parameters.values()]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    def place(self, call: Call, arena: Arena) -> Placed:
        """Puts a call's tensors into the arena. Raises TooLarge, and ValueError where the plan does not take it."""
        program, rows = self.program, call.extents.rows
        arena.clear()
        regions: dict[str, Region] = {}

        def stride(name: str, width: int) -> int:
            gap = call.gaps.get(name, 0)
            return 0 if gap < 0 else width + gap

        def put(name: str, shape: Sequence[int], dtype: torch.dtype, value: Tensor | None = None) -> None:
            row_stride = stride(name, shape[1]) if name in strides else None
            regions[name] = arena.place(name, shape, dtype, row_stride=row_stride, shift=call.shift)
            if value is not None:
                arena.write(regions[name], value)

        strides = {name: stride(name, self.widths[name]) for name in self.reads}
        strides |= {name: stride(name, self.width) for name in ("out", "grad_out")}
        for name in self.reads:
            put(name, (rows, self.widths[name]), self.dtype, call.inputs[name])
        put("alpha", (1,), torch.float32, torch.tensor([call.alpha]))
        for name, record in self.manifest.parameters.items():
            put(name, record.shape, self.dtype, call.parameters[name])
        if program.draws:
            seed = call.dropout_seed if call.training else 0
            put("dropout_seed", (1,), torch.int64, torch.tensor([seed], dtype=torch.int64))
        put("out", (rows, self.width), self.dtype)
        results, writes = ["out"], ["out"]
        backward_writes: list[str] = []
        forward: list[Launch] = []
        backward: list[Launch] = []
        if rows:
            bound = program.bind_forward(call.extents, strides)
            for name, shape in bound.shapes.items():
                put(name, shape, bound.dtypes[name])
            writes += bound.shapes
            forward = self._launches(bound, regions, call)
            if program.has_backward and call.backward:
                put("grad_out", (rows, self.width), self.dtype, call.grad_out)
                bound = program.bind_backward(call.extents, strides)
                for name, shape in bound.shapes.items():
                    put(name, shape, bound.dtypes[name])
                backward_writes += bound.shapes
                backward = self._launches(bound, regions, call)
                results += [name for name in bound.shapes if name.startswith("grad_")]
        return Placed(
            regions=regions,
            results=tuple(results),
            forward=forward,
            backward=backward,
            forward_writes=tuple(writes),
            backward_writes=tuple(backward_writes),
            before=arena.snapshot("before"),
        )

    def _launches(self, bound: Bound, regions: Mapping[str, Region], call: Call) -> list[Launch]:
        values: list[Any] = [*bound.constants]
        for name in bound.order:
            if name == "training":
                values.append(int(call.training))
            elif name in regions:
                values.append([regions[name].offset, regions[name].size_bytes])
            else:  # a dropout seed that is not read
                values.append(0)
        return [(launch.run.name, launch.grid, list(launch.pick(values))) for launch in bound.launches]  # type: ignore[attr-defined]

    def outcome(self, placed: Placed, after: Snapshot) -> Outcome:
        """Reads a call's results and looks for what else was written. Gradients come in the artifact's dtype."""
        writable = [placed.regions[name] for name in (*placed.forward_writes, *placed.backward_writes)]
        trespass = changes(placed.before, after, placed.regions.values(), writable)
        results = {name: after.read(placed.regions[name]) for name in placed.results}
        return Outcome({name: value.to(self.dtype) for name, value in results.items()}, trespass)
