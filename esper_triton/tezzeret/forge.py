"""The forge: a plan compiled to binaries and the manifest that describes them."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from typing import Any, Literal

from esper_triton.contracts.blueprint import TEXT_LIMIT_BYTES
from esper_triton.contracts.errors import BlueprintError, CompileError
from esper_triton.contracts.manifest import KernelRecord, KernelStatus, Manifest, sha256
from esper_triton.tezzeret.plan import KernelPlan, Plan
from esper_triton.tezzeret.targets import runs_on_this_cpu, shared_memory_limit, triton_target

__all__ = ["Forged", "TooLarge", "forge"]

_BINARY_KIND: dict[str, Literal["o", "cubin", "hsaco"]] = {"cpu": "o", "cuda": "cubin", "hip": "hsaco"}


class TooLarge(CompileError):
    """A kernel's blocks do not fit the shared memory of its target."""


@dataclass(frozen=True, kw_only=True)
class Forged:
    """An artifact that is complete and not in a store yet. `blobs` are keyed by SHA-256."""

    manifest: Manifest
    blobs: dict[str, bytes]


def forge(plan: Plan) -> Forged:
    """Compiles every kernel of `plan`. The status says that nothing is proven yet.

    One after the other: CPython 3.11 counts the depth of its parser for all threads together, so that Triton's front
    end fails now and then where two threads parse (gh-106905). Processes compile side by side, see `pool`.

    No divisibility of strides or addresses is assumed, so one binary serves every view of a tensor; on a GPU that costs
    wide loads.

    Raises CompileError naming kernel and target, from the compiler's own error (TooLarge where smaller blocks would
    do), and BlueprintError where the blueprint's text is too long to be kept.
    """
    started = time.perf_counter()
    blobs: dict[str, bytes] = {}
    text = plan.blueprint.canonical_bytes()
    if len(text) > TEXT_LIMIT_BYTES:
        raise BlueprintError(
            f"blueprint {plan.blueprint.name!r}: its text has {len(text)} bytes; at most {TEXT_LIMIT_BYTES} are allowed"
        )
    design = _keep(text, blobs)
    records = {name: _compile_kernel(plan, kernel, blobs) for name, kernel in plan.kernels.items()}
    blueprint = plan.blueprint
    manifest = Manifest(
        id=plan.artifact_id,
        blueprint_id=blueprint.id,
        blueprint_name=blueprint.name,
        blueprint=design,
        input=blueprint.input,
        layout=blueprint.layout,
        affine=blueprint.affine,
        target=plan.target,
        pipeline=plan.pipeline,
        toolchain=plan.toolchain,
        dims=plan.dims,
        feature_dim=blueprint.feature_dim,
        dtype=plan.dtype,
        parameters=plan.parameters,
        saved=plan.written.saved,
        scratch=plan.written.scratch,
        kernels=records,
        forward=plan.forward,
        backward=plan.backward,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        compile_seconds=time.perf_counter() - started,
        status=KernelStatus.PENDING_BENCHMARKING if runs_on_this_cpu(plan.target) else KernelStatus.PENDING_HARDWARE,
    )
    return Forged(manifest=manifest, blobs=blobs)


def _compile_kernel(plan: Plan, kernel: KernelPlan, blobs: dict[str, bytes]) -> KernelRecord:
    import triton
    from triton.compiler import ASTSource

    where = f"blueprint {plan.blueprint.name!r}: kernel {kernel.name!r} for {plan.target.label}"
    kind = _BINARY_KIND[plan.target.backend]
    # Triton wants every parameter in the signature, constexprs under that very word.
    signature = {name: kernel.signature.get(name, "constexpr") for name in kernel.function.arg_names}
    try:
        source = ASTSource(kernel.function, signature, constexprs=kernel.constexprs)
        compiled = triton.compile(source, target=triton_target(plan.target), options=plan.options)
        ttir, binary = compiled.asm["ttir"], compiled.asm[kind]
    except Exception as error:
        raise CompileError(f"{where} does not compile: {type(error).__name__}: {error}") from error
    metadata = compiled.metadata
    limit = shared_memory_limit(plan.target)
    if limit is not None and metadata.shared > limit:
        raise TooLarge(
            f"{where} needs {metadata.shared} bytes of shared memory, one program can have {limit}; use smaller blocks"
        )
    for scratch in ("global", "profile"):  # the second is a profiler's
        if getattr(metadata, f"{scratch}_scratch_size", 0):
            raise CompileError(f"{where} needs {scratch} scratch memory, which a launch plan cannot give it")
    return KernelRecord(
        name=kernel.name,
        symbol=metadata.name,
        signature=tuple(kernel.signature.values()),
        constexprs=kernel.constexprs,
        num_warps=metadata.num_warps,
        num_stages=getattr(metadata, "num_stages", 1),
        shared_bytes=metadata.shared,
        source=_keep(plan.written.source_text, blobs),
        ttir=_keep(ttir, blobs),
        binary=_keep(binary, blobs),
        binary_kind=kind,
    )


def _keep(content: Any, blobs: dict[str, bytes]) -> str:
    data = content.encode() if isinstance(content, str) else bytes(content)
    digest = sha256(data)
    blobs[digest] = data
    return digest
