"""The first proof: an artifact's kernels, from the bytes in the store, against a float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.launcher import X_DIM, KernelProgram
from esper_triton.tezzeret.source import load_source
from esper_triton.urza import Artifact, Urza

__all__ = ["ProofReport", "prove"]

_CPU = torch.device("cpu")
_SEED = 20190615
_ROWS = (0, 1, 7, 33, 64, 100)
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

    rows: int
    alpha: float
    poisoned: bool  # parameters are NaN, as in a seed that has run away; only with alpha 0, which must not care

    def __str__(self) -> str:
        return f"rows={self.rows} alpha={self.alpha}" + (" parameters=NaN" if self.poisoned else "")


def prove(
    blueprint: Blueprint, artifact_id: str, urza: Urza, device: torch.device = _CPU
) -> tuple[Artifact, ProofReport]:
    """Runs the stored kernels and gives the artifact its status, VALIDATED or REJECTED, with the report beside it.

    Every case is one forward and, where there is one, one backward, with drawn inputs, over row counts, alphas and row
    strides wider than the rows. Demanded is:

    - results within the tolerance below of the float64 reference: the blueprint source's `reference`, blended by law
      2, and its gradients by torch's autograd;
    - at alpha 0 the host's output and its gradient to the bit and zero gradients for parameters, also where these are
      NaN;
    - inputs unchanged, and nothing written around the rows of `out`;
    - of a blueprint that calls itself affine, a reference that is: k(u + v) + k(0) = k(u) + k(v) in float64.

    Every tensor that is given lies among NaN, between its rows too: what is read outside of it shows in the results.
    Inputs are drawn and results are compared on the CPU; `device` is where the kernels run. A kernel that leaves a
    GPU's memory altogether makes every later use of the GPU by this process fail; it is rejected, and the process
    should end.

    Tolerance. A sum of n products in float32 is off by at most n v times the sum of the absolute values of its terms,
    v = 2^-24 (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1). The sums here follow
    each other, so n is the total: every dim once, and the rows in a parameter's gradient. A value is rounded to the
    layer's dtype (unit roundoff u) when it meets a parameter and when it is stored: p + 1 times with p parameters. So

        |error| <= 4 (n v + (p + 1) u) M + s,

    where M is the same computation in float64 on the absolute values of everything, which adds up what might cancel,
    and s is the smallest normal number of the dtype. The 4 is for an activation whose slope is larger where it is
    evaluated than at the absolute value: for gelu at most 1.13 against at least 0.5. An error inside an activation and
    what it does to the slope are covered by n v being the worst case: sums of drawn terms come to about sqrt(n) v.

    Raises as `Urza.load` does, and ArtifactRefused where the artifact is not for `device`.
    """
    artifact, blobs = urza.load(artifact_id)
    manifest = artifact.manifest
    if blueprint.id != manifest.blueprint_id:
        raise ArtifactRefused(f"artifact {artifact_id} was not made from blueprint {blueprint.name!r}")
    program = KernelProgram.load(manifest, blobs, device)
    reference: Callable[..., Tensor] = load_source(blueprint).reference
    worst: dict[str, float] = {}
    failures: list[str] = []
    cases = 0
    generator = torch.Generator().manual_seed(_SEED)
    for case in _cases():
        cases += 1
        try:
            for name, ratio in _run(program, reference, case, generator):
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


def _cases() -> Iterator[_Case]:
    for rows in _ROWS:
        for alpha in _ALPHAS:
            yield _Case(rows=rows, alpha=alpha, poisoned=False)
    yield _Case(rows=_ROWS[-1], alpha=0.0, poisoned=True)


def _is_affine(program: KernelProgram, reference: Callable[..., Tensor], generator: torch.Generator) -> bool:
    manifest = program.manifest
    widths = {"h": manifest.width, "x": manifest.dims.get(X_DIM, 0)}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = {name: draw(*record.shape) for name, record in manifest.parameters.items()}
    # Far apart and close together: a function that is affine in between, or far out, is not affine.
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).repeat_interleave(64)[:, None]
    u, v = ({name: scales * draw(len(scales), widths[name]) for name in program.inputs} for _ in range(2))
    both = {name: u[name] + v[name] for name in u}
    zero = {name: torch.zeros_like(u[name]) for name in u}
    k_u, k_v, k_both, k_zero = (reference(**inputs, **parameters) for inputs in (u, v, both, zero))
    terms = sum(manifest.dims.values())
    # Sums of so many terms in float64, each off by 2^-53 of its size; 1e3 for terms that cancel in a drawn sum.
    size = (k_u.abs() + k_v.abs() + k_zero.abs()).amax(dim=1, keepdim=True)
    return bool(((k_both + k_zero - k_u - k_v).abs() <= 1e3 * terms * 2.0**-53 * size).all())


def _run(
    program: KernelProgram, reference: Callable[..., Tensor], case: _Case, generator: torch.Generator
) -> Iterator[tuple[str, float]]:
    """Yields each result's error in units of its tolerance; a broken rule that has no tolerance counts as infinite."""
    manifest, rows, dtype = program.manifest, case.rows, program.dtype

    memory: dict[str, Tensor] = {}

    def place(name: str, value: Tensor, gap: int = 0) -> Tensor:
        size = value.numel() + rows * gap + 2 * _FENCE
        memory[name] = torch.full((size,), torch.nan, dtype=value.dtype, device=program.device)
        return _within(memory[name], value.shape, gap).copy_(value)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    widths = {"h": manifest.width, "x": manifest.dims.get(X_DIM, 0)}
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

    saved = program.forward(inputs, parameters, alpha, out)
    around = memory["out"].clone()
    _within(around, out.shape, _GAP).fill_(torch.nan)
    yield "around the rows of out", 0.0 if bool(around.isnan().all()) else torch.inf
    results = {"out": out}
    if program.has_backward:
        input_grads, parameter_grads = program.backward(grad_out, inputs, parameters, alpha, saved)
        results |= {f"grad_{name}": value for name, value in (input_grads | parameter_grads).items()}
    for name, buffer in before.items():
        yield f"{name} unchanged", 0.0 if _same_bits(memory[name], buffer) else torch.inf

    if case.alpha == 0.0:
        exact = {"out": inputs["h"], "grad_h": grad_out}
        for name, value in results.items():
            right = _same_bits(value, exact[name]) if name in exact else not value.count_nonzero()
            yield f"{name} at alpha 0", 0.0 if right else torch.inf
        return

    def of_inputs(given: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        return reference(**{name: given[name] for name in program.inputs}, **weights)

    results, inputs, parameters = _on_cpu(results), _on_cpu(inputs), _on_cpu(parameters)
    grad_out = grad_out.cpu()
    terms = sum(manifest.dims.values())
    expected = _float64(of_inputs, inputs, parameters, grad_out, float(alpha))
    magnitude = _float64(of_inputs, _absolute(inputs), _absolute(parameters), grad_out.abs(), float(alpha))
    for name, value in results.items():
        summed = terms + (rows if name.removeprefix("grad_") in parameters else 0)
        relative = 4 * (summed * 2.0**-24 + (len(parameters) + 1) * torch.finfo(dtype).eps / 2)
        tolerance = relative * magnitude[name] + torch.finfo(dtype).smallest_normal
        ratio = ((value.double() - expected[name]).abs() / tolerance).nan_to_num(nan=torch.inf)
        yield name, float(ratio.max()) if ratio.numel() else 0.0


def _float64(
    reference: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    grad_out: Tensor,
    alpha: float,
) -> dict[str, Tensor]:
    """`out` and, by autograd, `grad_<name>` for every input and parameter."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    weights = {name: value.double().requires_grad_() for name, value in parameters.items()}
    k = reference(leaves, weights)
    out = leaves["h"] + alpha * (k - leaves["h"])
    named = leaves | weights
    grads = torch.autograd.grad(out, list(named.values()), grad_out.double(), materialize_grads=True)
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
