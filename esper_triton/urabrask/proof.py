"""The first proof: an artifact's kernels, from the bytes in the store, against a float64 reference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from esper_triton.contracts.blueprint import EXTENTS, Blueprint, Layout
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.launcher import KernelProgram, x_width_of
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.philox import uniform
from esper_triton.urabrask.references import reference_of
from esper_triton.urza import Artifact, Urza

__all__ = ["ProofReport", "prove"]

_CPU = torch.device("cpu")
_SEED = 20190615
# Every layout with as many rows: none, one, and numbers that are no multiple of a block. Items of one position and of
# more, one item and several.
_EXTENTS: dict[Layout, tuple[Extents, ...]] = {
    "rows": tuple(map(Extents.of_rows, (0, 1, 7, 33, 64, 100))),
    "sequence": tuple(Extents(b * t, b, t) for b, t in ((0, 5), (1, 1), (1, 7), (3, 11), (4, 16), (5, 20))),
    "image": tuple(
        Extents(b * h * w, b, h * w, h, w)
        for b, h, w in ((0, 2, 3), (1, 1, 1), (1, 7, 1), (1, 3, 11), (2, 4, 8), (5, 4, 5))
    ),
}
_DROPOUT_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # pi's digits; both of more than 32 bits
_ALPHAS = (0.0, 0.3, 1.0)
_GAP = 3  # elements between the end of one row and the start of the next
_FENCE = 64  # elements before and after every tensor: a vector or a row of a block that is read too far ends in them
_MOST_FAILURES = 20  # a kernel that is wrong is wrong in every case; the first ones show how


class ProofReport(BaseModel):
    """What was run and how far it was from float64. `worst` holds, for every result, the largest error in units of its
    tolerance; where it is at most 1 everywhere and nothing failed, the verdict is VALIDATED."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: str = "1.0"
    artifact_id: str
    seed: int
    cases: int
    worst: dict[str, float]
    failures: tuple[str, ...]
    verdict: Literal["VALIDATED", "REJECTED"]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One call."""

    layout: Layout
    extents: Extents
    alpha: float
    poisoned: bool = False  # parameters are NaN, as in a seed that has run away; only with alpha 0, which must not care
    training: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={getattr(self.extents, name)}" for name in EXTENTS[self.layout])
        poisoned, training = " parameters=NaN" if self.poisoned else "", " training" if self.training else ""
        return f"{sizes} alpha={self.alpha}{poisoned}{training}"

    def in_layout(self, rows: Tensor) -> Tensor:
        """[rows, width] as the reference takes it."""
        extents = self.extents
        lead = {
            "rows": (extents.rows,),
            "sequence": (extents.batch, extents.length),
            "image": (extents.batch, extents.image_height, extents.image_width),
        }
        return rows.reshape(*lead[self.layout], rows.shape[-1])


def prove(
    blueprint: Blueprint, artifact_id: str, urza: Urza, device: torch.device = _CPU
) -> tuple[Artifact, ProofReport]:
    """Runs the stored kernels and gives the artifact its status, VALIDATED or REJECTED, with the report beside it.

    Every case is one forward and, where there is one, one backward, with drawn inputs, over row counts (in a layout
    with positions: batches, lengths, heights and widths), alphas and row strides wider than the rows. Demanded is:

    - results within the tolerance below of the float64 reference: the blueprint source's `reference`, blended by law
      2, and its gradients by torch's autograd;
    - at alpha 0 the host's output and its gradient to the bit and zero gradients for parameters, also where these are
      NaN;
    - inputs unchanged, and nothing written around the rows of `out`;
    - of a blueprint that calls itself affine, a reference that is: k(u + v) + k(0) = k(u) + k(v) in float64;
    - of kernels that compute something else in training mode, there: finite results, the same bits for the same dropout
      seed, others for another, and the second and third demand above; the first one too where the reference takes
      `rand`, and so knows what has been dropped. Where it does not, results are proven in eval mode alone.

    Every tensor that is given lies among NaN, between its rows too: what is read outside of it shows in the results.
    Inputs are drawn and results are compared on the CPU; `device` is where the kernels run. A kernel that leaves a
    GPU's memory altogether makes every later use of the GPU by this process fail; it is rejected, and the process
    should end.

    Tolerance. A sum of n products in float32 is off by at most n v times the sum of the absolute values of its terms,
    v = 2^-24 (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1). The sums here follow
    each other, so n is the total: every dim once, the length of an item in a layout with positions, and the rows in a
    parameter's gradient. A value is rounded to the
    layer's dtype (unit roundoff u) when it meets a parameter and when it is stored: p + 1 times with p parameters. So

        |error| <= 4 (n v + (p + 1) u) M + s,

    where M is the same computation in float64 on the absolute values of everything, which adds up what might cancel,
    and s is the smallest normal number of the dtype. The 4 is for an activation whose slope is larger where it is
    evaluated than at the absolute value: for gelu at most 1.13 against at least 0.5. An error inside an activation and
    what it does to the slope are covered by n v being the worst case: sums of drawn terms come to about sqrt(n) v.

    That bound needs the absolute values to be what adds up, which in a graph of norms and quotients they are not. There
    the measure is torch: its own kernels compute the reference in the layer's dtype, with their own error, and the
    tolerance is four times the largest of it in the tensor and 16 roundings of the tensor's largest value.

    Raises as `Urza.load` does, and ArtifactRefused where the artifact is not for `device`.
    """
    artifact, blobs = urza.load(artifact_id)
    manifest = artifact.manifest
    if blueprint.id != manifest.blueprint_id:
        raise ArtifactRefused(f"artifact {artifact_id} was not made from blueprint {blueprint.name!r}")
    program = KernelProgram.load(manifest, blobs, device)
    reference = reference_of(blueprint, manifest.dims)
    worst: dict[str, float] = {}
    failures: list[str] = []
    cases = 0
    generator = torch.Generator().manual_seed(_SEED)
    for case in _cases(program):
        cases += 1
        try:
            for name, ratio in _run(program, reference, case, generator, is_graph=bool(blueprint.ops)):
                worst[name] = max(worst.get(name, 0.0), ratio)
                if ratio > 1.0:
                    failures.append(f"{case}: {name} is off by {ratio:.3g} times its tolerance")
        except Exception as error:  # whatever a kernel's launch raises is a verdict on the kernel
            failures.append(f"{case}: {type(error).__name__}: {error}")
    if manifest.affine and not _is_affine(program, reference, generator):
        failures.insert(0, "the blueprint says that k is affine in its inputs, and its reference is not")
    report = ProofReport(
        artifact_id=artifact_id,
        seed=_SEED,
        cases=cases,
        worst=worst,
        failures=tuple(failures[:_MOST_FAILURES]),
        verdict="REJECTED" if failures else "VALIDATED",
    )
    proven = urza.set_status(artifact_id, KernelStatus(report.verdict), report.model_dump_json(indent=1).encode())
    return proven, report


def _cases(program: KernelProgram) -> Iterator[_Case]:
    layout = program.layout
    for extents in _EXTENTS[layout]:
        for alpha in _ALPHAS:
            yield _Case(layout=layout, extents=extents, alpha=alpha)
            if program.follows_mode:
                yield _Case(layout=layout, extents=extents, alpha=alpha, training=True)
    yield _Case(layout=layout, extents=_EXTENTS[layout][-1], alpha=0.0, poisoned=True)


def _is_affine(program: KernelProgram, reference: Callable[..., Tensor], generator: torch.Generator) -> bool:
    manifest = program.manifest
    widths = {"h": manifest.width, "x": x_width_of(manifest)}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = {name: draw(*record.shape) for name, record in manifest.parameters.items()}
    # Far apart and close together: a function that is affine in between, or far out, is not affine.
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).repeat_interleave(64)
    lead = (len(scales), *{"rows": (), "sequence": (4,), "image": (3, 3)}[program.layout])
    scales = scales.reshape(-1, *[1] * len(lead))
    u, v = ({name: scales * draw(*lead, widths[name]) for name in program.inputs} for _ in range(2))
    both = {name: u[name] + v[name] for name in u}
    zero = {name: torch.zeros_like(u[name]) for name in u}
    k_u, k_v, k_both, k_zero = (reference(**inputs, **parameters) for inputs in (u, v, both, zero))
    terms = sum(manifest.dims.values()) + math.prod(lead[1:])
    # Sums of so many terms in float64, each off by 2^-53 of its size; 1e3 for terms that cancel in a drawn sum.
    size = (k_u.abs() + k_v.abs() + k_zero.abs()).amax(dim=tuple(range(1, k_u.dim())), keepdim=True)
    return bool(((k_both + k_zero - k_u - k_v).abs() <= 1e3 * terms * 2.0**-53 * size).all())


def _run(
    program: KernelProgram,
    reference: Callable[..., Tensor],
    case: _Case,
    generator: torch.Generator,
    *,
    is_graph: bool,
) -> Iterator[tuple[str, float]]:
    """Yields each result's error in units of its tolerance; a broken rule that has no tolerance counts as infinite."""
    manifest, rows, dtype = program.manifest, case.extents.rows, program.dtype

    memory: dict[str, Tensor] = {}

    def place(name: str, value: Tensor, gap: int = 0) -> Tensor:
        size = value.numel() + rows * gap + 2 * _FENCE
        memory[name] = torch.full((size,), torch.nan, dtype=value.dtype, device=program.device)
        return _within(memory[name], value.shape, gap).copy_(value)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    widths = {"h": manifest.width, "x": x_width_of(manifest)}
    # The launcher takes h in every case: it is what is blended with.
    read: dict[str, None] = {"h": None, **dict.fromkeys(program.inputs)}
    inputs = {name: place(name, draw(rows, widths[name]), _GAP) for name in read}
    parameters = {}
    for name, record in manifest.parameters.items():
        value = draw(*record.shape, scale=record.shape[-1] ** -0.5 if len(record.shape) > 1 else 1.0)
        parameters[name] = place(name, value * torch.nan if case.poisoned else value)
    grad_out = place("grad_out", draw(rows, manifest.width), _GAP)
    alpha = torch.tensor([case.alpha], dtype=torch.float32, device=program.device)
    before = {name: buffer.clone() for name, buffer in memory.items()}
    out = place("out", draw(rows, manifest.width) * torch.nan, _GAP)

    def run(dropout_seed: Tensor | None) -> dict[str, Tensor]:
        mode: dict[str, Any] = {"extents": case.extents, "training": case.training}
        saved = program.forward(inputs, parameters, alpha, out, dropout_seed=dropout_seed, **mode)
        results = {"out": out}
        if program.has_backward:
            input_grads, parameter_grads = program.backward(grad_out, inputs, parameters, alpha, saved, **mode)
            results |= {f"grad_{name}": value for name, value in (input_grads | parameter_grads).items()}
        return results

    seeds = torch.tensor(_DROPOUT_SEEDS, device=program.device)
    results = run(seeds[:1])
    around = memory["out"].clone()
    _within(around, out.shape, _GAP).fill_(torch.nan)
    yield "around the rows of out", 0.0 if bool(around.isnan().all()) else torch.inf
    for name, buffer in before.items():
        yield f"{name} unchanged", 0.0 if _same_bits(memory[name], buffer) else torch.inf

    if case.alpha == 0.0:
        exact = {"out": inputs["h"], "grad_h": grad_out}
        for name, value in results.items():
            right = _same_bits(value, exact[name]) if name in exact else not value.count_nonzero()
            yield f"{name} at alpha 0", 0.0 if right else torch.inf
        return
    draws_itself = "rand" in inspect.signature(reference).parameters
    if case.training:
        first = {name: value.clone() for name, value in results.items()}
        for name, value in run(seeds[:1]).items():
            right = bool(value.isfinite().all()) and _same_bits(value, first[name])
            yield f"{name} in training", 0.0 if right else torch.inf
        if program.draws and rows * manifest.width >= 64:  # a few elements may all be kept twice
            other = run(seeds[1:])["out"]
            yield "out of another dropout seed", torch.inf if _same_bits(other, first["out"]) else 0.0
        if not draws_itself:
            return
        results = first  # `out` has been written again

    def of_inputs(given: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        drawn = {"rand": _rand} if case.training else {}
        k = reference(**{name: case.in_layout(given[name]) for name in program.inputs}, **weights, **drawn)
        return k.reshape(rows, manifest.width)

    results, inputs, parameters = _on_cpu(results), _on_cpu(inputs), _on_cpu(parameters)
    grad_out = grad_out.cpu()
    terms = sum(manifest.dims.values()) + (0 if case.layout == "rows" else case.extents.length)
    expected = _float64(of_inputs, inputs, parameters, grad_out, float(alpha))
    if is_graph:
        narrow = _with_autograd(of_inputs, inputs, parameters, grad_out, float(alpha), dtype)
        # What cancels to nothing in one result does so among terms of the others' size.
        largest = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    else:
        magnitude = _float64(of_inputs, _absolute(inputs), _absolute(parameters), grad_out.abs(), float(alpha))
    for name, value in results.items():
        if is_graph:
            tolerance = _observed(narrow[name], expected[name], dtype) + 4 * torch.finfo(dtype).eps * largest
        else:
            summed = terms + (rows if name.removeprefix("grad_") in parameters else 0)
            relative = 4 * (summed * 2.0**-24 + (len(parameters) + 1) * torch.finfo(dtype).eps / 2)
            tolerance = relative * magnitude[name] + torch.finfo(dtype).smallest_normal
        ratio = ((value.double() - expected[name]).abs() / tolerance).nan_to_num(nan=torch.inf)
        yield name, float(ratio.max()) if ratio.numel() else 0.0


def _rand(offsets: Tensor, salt: int = 0) -> Tensor:
    """`tl.rand` of the first dropout seed, or of one that is so much more."""
    return uniform(_DROPOUT_SEEDS[0] + salt, offsets)


def _observed(narrow: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Four times what torch's own kernels are off by at most in this tensor, and 16 roundings of its largest value."""
    if not exact.numel():
        return torch.zeros((), dtype=torch.float64)
    finfo = torch.finfo(dtype)
    return 4 * (narrow.double() - exact).abs().max() + 16 * finfo.eps * exact.abs().max() + finfo.smallest_normal


def _float64(
    reference: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    grad_out: Tensor,
    alpha: float,
) -> dict[str, Tensor]:
    return _with_autograd(reference, inputs, parameters, grad_out, alpha, torch.float64)


def _with_autograd(
    reference: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    grad_out: Tensor,
    alpha: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`out` and, by autograd, `grad_<name>` for every input and parameter, computed in `dtype`."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    weights = {name: value.to(dtype).requires_grad_() for name, value in parameters.items()}
    k = reference(leaves, weights)
    out = leaves["h"] + alpha * (k - leaves["h"])
    named = leaves | weights
    grads = torch.autograd.grad(out, list(named.values()), grad_out.to(dtype), materialize_grads=True)
    return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(named, grads, strict=True)}


def _within(buffer: Tensor, shape: Sequence[int], gap: int) -> Tensor:
    """The tensor of this shape inside its fences, with a row stride of its width and `gap`."""
    if len(shape) != 2:
        return buffer[_FENCE : buffer.numel() - _FENCE].view(shape)
    return buffer.as_strided(shape, (shape[1] + gap, 1), _FENCE)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


def _absolute(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.abs() for name, value in tensors.items()}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise: NaN equals itself and -0.0 is not 0.0."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
