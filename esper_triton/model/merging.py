"""Permanent seeds that are affine, merged into their host's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from esper_triton.contracts.errors import ArtifactRefused

if TYPE_CHECKING:
    from esper_triton.kasmina.launcher import KernelProgram
    from esper_triton.model.baking import FixedSeed

__all__ = ["merge"]

_PROBES = 32


def merge(host: nn.Module, seeds: Sequence[FixedSeed], *, unshared: bool) -> bool:
    """Merges all of a layer's permanent seeds into the host's weights, or none of them, and says which.

    A seed with an affine k blends to `out = M h + N x + c` on its span. M, N and c are read off the kernel itself, from
    its results at 0 and at every unit vector, and are checked on drawn inputs. With `h = W x + b` of an nn.Linear,

        W' = W + sum_i P_i ((M_i - 1) W[c_i] + N_i),    b' = b + sum_i P_i ((M_i - 1) b[c_i] + c_i)

    over spans c_i (law 2), in float64 and rounded once. A convolution's h is such a product at every place, of what
    lies under its kernel; an x is that only where the kernel covers a single place. A row of an nn.Embedding's table is
    an h.

    Raises ArtifactRefused for a kernel that says it is affine and is not. Nothing is changed then.
    """
    if not unshared or not all(_is_row_map(seed.program) for seed in seeds):
        return False
    # Exactly these classes with exactly these parameters: what a subclass or a reparametrization makes of its weight
    # is not known.
    if _is_linear(host, reads_x=any("x" in seed.program.inputs for seed in seeds)):
        weight, table = host.weight.detach().double().flatten(1), None
        own_bias = host._parameters["bias"]
        bias = weight.new_zeros(weight.shape[0]) if own_bias is None else own_bias.detach().double()
    elif type(host) is nn.Embedding and host._parameters.keys() == {"weight"} and host.max_norm is None:
        table = host.weight.detach().double()
    else:
        return False
    maps = [_affine_map(seed) for seed in seeds]
    if table is not None:
        merged = table.clone()
        for seed, (to_h, _, constant) in zip(seeds, maps, strict=True):
            span = slice(*seed.span)
            merged[:, span] += table[:, span] @ _without_identity(to_h).T + constant
        _assign(host, "weight", merged)
        return True
    merged_weight, merged_bias = weight.clone(), bias.clone()
    for seed, (to_h, to_x, constant) in zip(seeds, maps, strict=True):
        span, change = slice(*seed.span), _without_identity(to_h)
        merged_weight[span] += change @ weight[span]
        if to_x is not None:
            merged_weight[span] += to_x
        merged_bias[span] += change @ bias[span] + constant
    _assign(host, "weight", merged_weight.view(host.weight.shape))
    if own_bias is not None:
        _assign(host, "bias", merged_bias)
    elif merged_bias.any():
        value = merged_bias.to(host.weight.dtype)
        host.bias = nn.Parameter(value, requires_grad=host.weight.requires_grad)
    return True


def _is_linear(host: nn.Module, *, reads_x: bool) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether every row of its output is its weight, [width, ...] flattened, times something, and its bias; times the
    row of x, where a seed reads that."""
    if host._parameters.keys() != {"weight", "bias"}:
        return False
    if isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(host) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if host.groups != 1:  # a feature that another one is made from may be of another group
            return False
        return not reads_x or math.prod(host.kernel_size) == 1  # the load has looked at stride and padding
    return type(host) is nn.Linear


def _is_row_map(program: KernelProgram) -> bool:
    """Whether every row of the result is the same affine function of its own row alone, in training mode too."""
    return program.manifest.affine and program.layout == "rows" and not program.follows_mode


def _assign(host: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        host.get_parameter(name).copy_(value)


def _without_identity(matrix: Tensor) -> Tensor:
    return matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _affine_map(seed: FixedSeed) -> tuple[Tensor, Tensor | None, Tensor]:
    """M [width, width], N [width, d_in] where the kernel reads x, and c [width], all float64."""
    program = seed.program
    device = program.device
    x_width = program.x_width or 0
    unit = torch.eye(program.width + x_width, dtype=program.dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_PROBES, unit.shape[1], generator=generator).to(unit)
    out = _blended(seed, torch.cat([torch.zeros_like(unit[:1]), unit, drawn]))
    constant, columns, found = out[0], out[1 : 1 + len(unit)], out[1 + len(unit) :]
    whole = (columns - constant).T
    expected = drawn.double() @ whole.T + constant
    # The kernel sums up to so many terms in float32 and rounds p + 1 times to its dtype, and whole.T has the same
    # errors again (see Urabrask's proof, whose bound this is).
    terms = 2 * sum(program.manifest.dims.values()) * 2.0**-24
    rounding = 2 * (len(program.manifest.parameters) + 2) * torch.finfo(program.dtype).eps
    size = drawn.double().abs() @ (columns.abs() + constant.abs()) + constant.abs()
    if not bool(((found - expected).abs() <= 4 * (terms + rounding) * size).all()):
        raise ArtifactRefused(
            f"artifact {seed.artifact_id!r} says that it is affine, and its kernel is not: off by "
            f"{float((found - expected).abs().max()):.3g} from the map that its results at unit vectors make"
        )
    return whole[:, : program.width], whole[:, program.width :] if x_width else None, constant


def _blended(seed: FixedSeed, inputs: Tensor) -> Tensor:
    """The kernel's blend, float64, for rows that hold h and then x."""
    program = seed.program
    h, x = inputs[:, : program.width].contiguous(), inputs[:, program.width :].contiguous()
    alpha = torch.full((1,), seed.alpha, dtype=torch.float32, device=inputs.device)
    out = torch.empty_like(h)
    parameters = dict(zip(sorted(seed.weights), seed.tensors(), strict=True))
    given = {"h": h, "x": x} if "x" in program.inputs else {"h": h}
    with torch.no_grad():
        program.forward(given, parameters, alpha, out)
    return out.double()
