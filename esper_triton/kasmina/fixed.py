"""Seeds that will not change any more, as one operator of torch: `esper_triton::fixed_seeds`.

It computes what an active layer's dispatch computes, to the bit, with constant alpha and frozen parameters, and holds
nothing of a layer: the loaded kernels are found by the digest of their manifest. Where dispatch would fall back to the
host (a dtype or width that a kernel is not for), it raises: a fixed model has no other path that would be right.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina.blending import add_gradients, run_seeds
from esper_triton.kasmina.launcher import KernelProgram, check_runs_here
from esper_triton.kasmina.plan import ActiveSeed, Call, Plan, spread
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.views import Axes, empty_output, extents_of, from_matrix, matches, matrix, settle
from esper_triton.urza import Urza

__all__ = ["fetch_program", "fixed_seeds", "keep_program"]

_programs: weakref.WeakValueDictionary[tuple[str, torch.device], KernelProgram] = weakref.WeakValueDictionary()
"""By manifest digest and device, those that somebody holds: the operator's arguments can only be tensors and plain
values."""


def keep_program(digest: str, program: KernelProgram) -> KernelProgram:
    """Lets the operator find a verified `program` for as long as the caller holds what this returns."""
    return _programs.setdefault((digest, program.device), program)


def fetch_program(urza: Urza, artifact_id: str, digest: str, device: torch.device) -> KernelProgram:
    """Loads an artifact whose manifest must have `digest`, for the operator on tensors of `device`, as long as the
    caller holds it (law 4).

    Raises an EsperError as `Urza.load` does, and ArtifactRefused where it is another manifest or may not run here.
    """
    artifact, blobs = urza.load(artifact_id)
    if artifact.digest != digest:
        raise ArtifactRefused(
            f"artifact {artifact_id!r} has a manifest of digest {artifact.digest} in {urza}, expected {digest}: it was "
            "built or judged anew since; use the store that the model was baked with"
        )
    check_runs_here(artifact.manifest, device)
    return keep_program(digest, KernelProgram.load(artifact.manifest, blobs, device))


_library = torch.library.Library("esper_triton", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch does not annotate
_SEEDS = (
    "Tensor[] parameters, float[] alphas, str[] digests, int[] starts, int width, int feature_dim, "
    "bool length_first, bool training, Tensor? dropout_seeds"
)
for _schema in (
    f"fixed_seeds(Tensor h, Tensor? x, {_SEEDS}) -> Tensor",
    f"fixed_seeds_backward(Tensor grad_out, Tensor h, Tensor? x, {_SEEDS}) -> Tensor[]",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def fixed_seeds(
    h: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    alphas: Sequence[float],
    digests: Sequence[str],
    starts: Sequence[int],
    width: int,
    feature_dim: int = -1,
    length_first: bool = False,
    training: bool = False,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    """`h + sum_i alpha_i * (k_i - h[c_i])` (law 2), a new tensor of the shape, strides and dtype of `h`.

    Differentiable once, by `h` and `x` alone.

    Args:
        h: the host's output, with `width` features in dimension `feature_dim`. x: the host's input, with d_in there,
            where a kernel reads it.
        parameters: those of every seed, one after the other, by name within a seed; contiguous, in the kernel's dtype.
        digests: of the seeds' manifests; loaded by `keep_program` or `fetch_program`.
        starts: first column of each seed's span.
        length_first: whether `h` of three dimensions is [length, batch, width].
        training: whether kernels with a dropout drop. dropout_seeds: int64, one for each seed, where one then does.

    Raises RuntimeError for a kernel that is not loaded, ValueError for tensors that a kernel is not for.
    """
    result: Tensor = torch.ops.esper_triton.fixed_seeds(
        h, x, parameters, alphas, digests, starts, width, feature_dim, length_first, training, dropout_seeds
    )
    return result


class _Fixed(Seed):
    """A seed whose failure is the caller's: there is no other path that would be right."""

    def fault(self, error: BaseException) -> None:
        raise error


def _plan(
    h: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    alphas: Sequence[float],
    digests: Sequence[str],
    starts: Sequence[int],
    width: int,
    axes: Axes,
) -> Plan:
    given = iter(parameters)
    seeds = []
    for place, (alpha, digest, start) in enumerate(zip(alphas, digests, starts, strict=True)):
        program = _programs.get((digest, h.device))
        if program is None:
            raise RuntimeError(
                f"the kernel of manifest {digest} is not loaded in this process for {h.device}; a baked model loads it"
            )
        if x is None and "x" in program.inputs:
            raise ValueError(f"artifact {program.manifest.id} reads the layer's input, and there is none")
        stop = start + program.width
        own = {name: next(given) for name in sorted(program.manifest.parameters)}
        constant = torch.full((1,), alpha, dtype=torch.float32, device=h.device)
        seeds.append(ActiveSeed(_Fixed(place, (start, stop)), program, start, stop, constant, own))
    gaps, overlapping = spread([(seed.start, seed.stop) for seed in seeds], width)
    return Plan(
        width=width,
        axes=axes,
        x_name="",
        first_of_tuple=False,
        seeds=tuple(seeds),
        gaps=gaps,
        overlapping=overlapping,
        guard=False,
        timed=False,
    )


@torch.library.impl(_library, "fixed_seeds", "CompositeExplicitAutograd")
def _forward(
    h: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    alphas: Sequence[float],
    digests: Sequence[str],
    starts: Sequence[int],
    width: int,
    feature_dim: int,
    length_first: bool,
    training: bool,
    dropout_seeds: Tensor | None,
) -> Tensor:
    if not matches(h, width, feature_dim):
        raise ValueError(
            f"the host's output is {tuple(h.shape)}, {width} features in dimension {feature_dim} are expected"
        )
    axes = Axes(feature_dim, length_first)
    plan = _plan(h, x, parameters, alphas, digests, starts, width, axes)
    call = Call(extents_of(h.shape, axes), training, dropout_seeds)
    out, out2 = empty_output(h, axes)
    run_seeds(plan, plan.seeds, None if x is None else matrix(x, axes), matrix(h, axes), out2, call)
    settle(out, out2, axes)
    return out


@torch.library.impl(_library, "fixed_seeds_backward", "CompositeExplicitAutograd")
def _backward(
    grad_out: Tensor,
    h: Tensor,
    x: Tensor | None,
    parameters: Sequence[Tensor],
    alphas: Sequence[float],
    digests: Sequence[str],
    starts: Sequence[int],
    width: int,
    feature_dim: int,
    length_first: bool,
    training: bool,
    dropout_seeds: Tensor | None,
) -> list[Tensor]:
    """Gradients at h and, where it is given, at x. What forward saves is computed again: most calls of a fixed model
    have no backward, and would hold it for nothing."""
    axes = Axes(feature_dim, length_first)
    plan = _plan(h, x, parameters, alphas, digests, starts, width, axes)
    call = Call(extents_of(h.shape, axes), training, dropout_seeds)
    g, h2 = matrix(grad_out, axes), matrix(h, axes)
    x2 = None if x is None else matrix(x, axes)
    grad_h = g.clone(memory_format=torch.contiguous_format)
    grad_x = None if x2 is None else torch.zeros_like(x2, memory_format=torch.contiguous_format)
    again = torch.empty_like(g, memory_format=torch.contiguous_format)
    for contribution in run_seeds(plan, plan.seeds, x2, h2, again, call):
        add_gradients(plan, contribution, g, h2, x2, contribution.active.parameters, grad_h, grad_x)
    grads = [from_matrix(grad_h, h, axes)]
    return grads if grad_x is None or x is None else [*grads, from_matrix(grad_x, x, axes)]


def _forward_shape(h: Tensor, x: Tensor | None, *seeds: object) -> Tensor:
    return torch.empty_like(h)


def _backward_shapes(grad_out: Tensor, h: Tensor, x: Tensor | None, *seeds: Any) -> list[Tensor]:
    axes = Axes(seeds[5], seeds[6])

    def empty(like: Tensor) -> Tensor:
        width = like.shape[axes.feature_dim]
        rows = torch.empty((like.numel() // width, width), dtype=like.dtype, device=like.device)
        return from_matrix(rows, like, axes)

    return [empty(tensor) for tensor in (h, x) if tensor is not None]


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    h, x, parameters, *ctx.seeds, dropout_seeds = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(h, x, dropout_seeds, *parameters)  # type: ignore[misc, arg-type]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor) -> tuple[object, ...]:
    h, x, dropout_seeds, *parameters = ctx.saved_tensors  # type: ignore[attr-defined]
    if any(ctx.needs_input_grad[2]):  # type: ignore[attr-defined]
        raise RuntimeError("the parameters of fixed seeds are frozen; a gradient at them is not computed")
    seeds = ctx.seeds  # type: ignore[attr-defined]
    grads = torch.ops.esper_triton.fixed_seeds_backward(grad_out, h, x, parameters, *seeds, dropout_seeds)
    return (grads[0], None if x is None else grads[1], [None] * len(parameters), *[None] * (len(seeds) + 1))


def _refuse(ctx: object, *grads: object) -> None:
    raise RuntimeError("fixed seeds are differentiable once; a second derivative has no kernel")


torch.library.register_fake("esper_triton::fixed_seeds", _forward_shape, lib=_library)
torch.library.register_fake("esper_triton::fixed_seeds_backward", _backward_shapes, lib=_library)
torch.library.register_autograd("esper_triton::fixed_seeds", _gradients, setup_context=_keep_inputs, lib=_library)
torch.library.register_autograd("esper_triton::fixed_seeds_backward", _refuse, lib=_library)
