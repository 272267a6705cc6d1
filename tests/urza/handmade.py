"""Artifacts made by hand: a store does not care what its bytes are, so no compiler is needed.

tests/attacks keeps what is made of them as files, and bench/urza.py fills a large store with them.
"""

from __future__ import annotations

from esper_triton.contracts.manifest import (
    KernelRecord,
    KernelStatus,
    LaunchStep,
    Manifest,
    TargetSpec,
    Toolchain,
    sha256,
)

ARTIFACT_ID = "0123456789ab-cpu-standard-ba9876543210"
CPU = TargetSpec(backend="cpu", arch="generic", features=("avx2",))
SOURCE, TTIR, BINARY = b"def forward(): ...", b"module {}", b"\x7fELF forward"
BLUEPRINT = b'{"name":"adapter"}'


def _kernel(name: str, binary: bytes) -> KernelRecord:
    return KernelRecord(
        name=name,
        symbol=name,
        signature=("*fp32", "i32"),
        constexprs={"BLOCK": 16},
        num_warps=1,
        num_stages=1,
        shared_bytes=0,
        source=sha256(SOURCE),
        ttir=sha256(TTIR),
        binary=sha256(binary),
        binary_kind="o",
    )


def make_artifact(
    artifact_id: str = ARTIFACT_ID,
    *,
    binary: bytes = BINARY,
    status: KernelStatus = KernelStatus.PENDING_BENCHMARKING,
    created_at: str = "2025-01-01T00:00:00+00:00",
    dims: dict[str, int] | None = None,
    compile_seconds: float = 0.5,
    target: TargetSpec = CPU,
) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of one kernel and its blobs by digest."""
    manifest = Manifest(
        id=artifact_id,
        blueprint_id=artifact_id[:12] + 52 * "0",
        blueprint_name="adapter",
        blueprint=sha256(BLUEPRINT),
        input="h",
        target=target,
        pipeline="standard",
        toolchain=Toolchain(triton="3.7.1", llvm="20", torch="2.13.0", python="3.11", esper_triton="0.1.0"),
        dims={"d": 8} if dims is None else dims,
        feature_dim="d",
        dtype="float32",
        parameters={},
        saved={},
        scratch={},
        kernels={"forward": _kernel("forward", binary)},
        forward=(LaunchStep(kernel="forward", arguments=("h", "rows"), grid=("rows", "1", "1")),),
        backward=(),
        created_at=created_at,
        compile_seconds=compile_seconds,
        status=status,
    )
    return manifest, {sha256(blob): blob for blob in (SOURCE, TTIR, binary, BLUEPRINT)}
