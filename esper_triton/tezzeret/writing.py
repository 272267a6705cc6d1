"""A graph blueprint as the blueprint of a written source: what is planned and compiled as if by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from esper_triton.contracts.blueprint import Blueprint, LaunchSpec, TensorSpec
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.manifest import TargetSpec
from esper_triton.tezzeret.design import design_of
from esper_triton.tezzeret.emission import Intermediate, Launch, emit
from esper_triton.tezzeret.rows import Tiles

__all__ = ["Choice", "first_choice", "tiles_for", "write"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a pipeline decides about. A hand-written source has its own blocks, so `tiles` count for graphs alone; a CPU
    has neither warps nor stages. Two stages keep the tiles within every target's shared memory."""

    tiles: Tiles
    num_warps: int = 4
    num_stages: int = 2


def tiles_for(target: TargetSpec, *, convolves: bool = False) -> Tiles:
    """Blocks for a target, without a measurement; `convolves`: with 3x3 weights.

    On a CPU a block of 64 rows amortises the packing of a weight's tile over 64 rows while its operands of 128 columns
    stay in the second-level cache; of a 3x3 weight, whose taps lie nine elements apart, packing costs so much more that
    twice the rows pay for it. Rows without products are taken one at a time. On a GPU the tiles of two pipeline
    stages have to fit a program's shared memory, where the weight's tiles of a loop lie, and its accumulators the
    registers of four warps. Each of the nine taps of a 3x3 weight is a product of its own in the code, and one of
    float32 an instruction for each of its terms: there a tile has half of the rows and of the depth, for twice the
    warps.
    """
    if target.backend == "cpu":
        rows, depth = (128, 64) if convolves else (64, 128)
        return Tiles(rows=rows, cols=128, depth=depth, held=2**20, sums_rows=1, full=8192, sum_depth=32)
    rows, depth = (16, 16) if convolves else (32, 32)
    return Tiles(rows=rows, cols=64, depth=depth, held=64 * 256, sums_rows=4, full=4096, sum_depth=32)


def first_choice(blueprint: Blueprint, target: TargetSpec, pipeline: str) -> Choice:
    """What a pipeline builds, or begins with.

    The time to compile for a GPU goes with the elements that a thread holds, each of which is code of its own: `fast`
    has small blocks and many threads, and compiles in a fifth of the time of the tiles that compute fastest.
    """
    if pipeline == "fast" and blueprint.ops and target.backend != "cpu":
        return Choice(
            tiles=Tiles(rows=16, cols=32, depth=16, held=32 * 256, sums_rows=4, full=4096, sum_depth=16),
            num_warps=8,
            num_stages=2,
        )
    convolves = any(op.op == "conv3x3" for op in blueprint.ops)
    return Choice(
        tiles=tiles_for(target, convolves=convolves),
        num_warps=8 if convolves and target.backend != "cpu" else 4,
    )


def write(blueprint: Blueprint, dims: Mapping[str, int], dtype: str, tiles: Tiles) -> Blueprint:
    """The same name, dims and parameters with kernels in place of the graph; it lives no longer than its build.

    Raises BlueprintError with every fault of the graph at these dims, and where it has no derivative.
    """
    try:
        emitted = emit(design_of(blueprint, dims, dtype), tiles)
    except ValueError as error:
        raise BlueprintError(f"blueprint {blueprint.name!r} cannot be written as kernels: {error}") from error
    return Blueprint(
        name=blueprint.name,
        input=blueprint.input,
        layout=blueprint.layout,
        affine=blueprint.affine,
        feature_dim=blueprint.feature_dim,
        dims=blueprint.dims,
        parameters=blueprint.parameters,
        source=f"{blueprint.id[:12]}.py",
        source_text=emitted.source,
        saved=_tensors(emitted.saved),
        scratch=_tensors(emitted.scratch),
        constexprs={name: str(value) for name, value in emitted.constexprs.items()},
        forward=_launches(emitted.forward),
        backward=_launches(emitted.backward),
    )


def _tensors(intermediates: Iterable[Intermediate]) -> dict[str, TensorSpec]:
    return {
        one.name: TensorSpec(
            shape=(one.level,) if one.size == 1 else (one.level, str(one.size)),
            dtype="input" if one.is_input_dtype else "float32",
        )
        for one in intermediates
    }


def _launches(launches: Iterable[Launch]) -> tuple[LaunchSpec, ...]:
    return tuple(LaunchSpec(kernel=launch.kernel, grid=launch.grid) for launch in launches)
