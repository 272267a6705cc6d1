"""Manifest: what a stored artifact is, where its bytes are, and how it is launched. JSON on disk."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.blueprint import DTypeName, Layout, ParameterSpec, TensorSpec
from esper_triton.contracts.expressions import evaluate
from esper_triton.contracts.initial import fill_init

__all__ = [
    "ARTIFACT_ID",
    "ArtifactId",
    "Digest",
    "KernelRecord",
    "KernelStatus",
    "LaunchStep",
    "Manifest",
    "ParameterRecord",
    "TargetSpec",
    "Toolchain",
    "build_digest",
    "parameter_records",
    "sha256",
]

SCHEMA_VERSION = "1.3"
# What the loader understands of binaries and launch plans. Raised when an older binary could not be launched rightly.
LAUNCH_FORMAT = 1

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ARTIFACT_ID = re.compile(r"^[0-9a-f]{12}-[a-z0-9]+-[a-z]+-[0-9a-f]{12}$")
ArtifactId = Annotated[str, Field(pattern=ARTIFACT_ID.pattern)]


def sha256(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def build_digest(parts: object) -> str:
    """Hex SHA-256 of a JSON-able description of a build, keys sorted."""
    return sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KernelStatus(enum.StrEnum):
    """Whether an artifact may run. Only VALIDATED ones do (law 4)."""

    PENDING_BENCHMARKING = "PENDING_BENCHMARKING"
    PENDING_HARDWARE = "PENDING_HARDWARE"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    ARCHIVED = "ARCHIVED"


class TargetSpec(_Value):
    """The machine that the binaries are for. `arch` is the CPU's name, the compute capability, or the gfx name;
    `features` are the instruction-set extensions the code may use (CPU only)."""

    backend: Literal["cpu", "cuda", "hip"]
    arch: str
    features: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As in artifact ids: `cpu` for the machine it was built on, `cpux8664v3`, `cuda90`, `hipgfx942`."""
        if self.backend == "cpu" and not self.arch.startswith("x86-64"):
            return "cpu"
        return f"{self.backend}{self.arch}".replace("-", "")


class Toolchain(_Value):
    """Versions of what made the binaries."""

    triton: str
    llvm: str
    torch: str
    python: str
    esper_triton: str


class ParameterRecord(_Value):
    """A trainable tensor with its shape worked out (elements)."""

    shape: tuple[int, ...]
    init: str


class KernelRecord(_Value):
    """One compiled kernel. `signature` has a Triton type for each run-time argument in order, constexprs left out."""

    name: str
    symbol: str
    signature: tuple[str, ...]
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int
    shared_bytes: int
    source: Digest
    ttir: Digest
    binary: Digest
    binary_kind: Literal["o", "cubin", "hsaco"]


class LaunchStep(_Value):
    """One launch of a plan. `arguments` bind the kernel's signature in order: `<tensor>` (address),
    `<tensor>.row_stride` (elements), an extent of the layout (`rows`, `batch`, ...) or `training`. `grid` holds three
    expressions over the layout's extents."""

    kernel: str
    arguments: tuple[str, ...]
    grid: tuple[str, str, str]


class Manifest(_Value):
    """Everything needed to load and launch an artifact, and nothing that runs by being read.

    `blueprint` is the blob with the text of the design that it was made from (`Blueprint.canonical_bytes`), None in
    what releases before schema 1.3 have stored. The text of a hand-written source is the `source` of its kernels.

    Its address in a store is the SHA-256 of `canonical_bytes()`. A change of status is a new manifest under the same
    id.
    """

    schema_version: str = SCHEMA_VERSION
    launch_format: int = LAUNCH_FORMAT
    id: ArtifactId
    blueprint_id: Digest
    blueprint_name: str
    blueprint: Digest | None = None
    input: Literal["x", "h", "xh"]
    layout: Layout = "rows"
    affine: bool = False
    target: TargetSpec
    pipeline: Literal["fast", "standard", "aggressive"]
    toolchain: Toolchain
    dims: dict[str, int]
    feature_dim: str
    dtype: DTypeName
    parameters: dict[str, ParameterRecord]
    saved: dict[str, TensorSpec]
    scratch: dict[str, TensorSpec]
    kernels: dict[str, KernelRecord]
    forward: tuple[LaunchStep, ...]
    backward: tuple[LaunchStep, ...]
    created_at: str
    compile_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    status: KernelStatus
    report: Digest | None = None

    @property
    def width(self) -> int:
        """Elements in the last dimension of the span that this artifact computes."""
        return self.dims[self.feature_dim]

    @property
    def blobs(self) -> tuple[Digest, ...]:
        """Digests of every blob that the artifact needs, each once, in a fixed order."""
        digests = [d for k in self.kernels.values() for d in (k.source, k.ttir, k.binary)]
        digests += [d for d in (self.blueprint, self.report) if d is not None]
        return tuple(dict.fromkeys(digests))

    def with_status(self, status: KernelStatus, report: Digest | None) -> Manifest:
        """The same artifact after a verdict. It has the schema of what is written, not of what was read: an older
        release would take the fields that it does not know for damage."""
        return self.model_copy(update={"schema_version": SCHEMA_VERSION, "status": status, "report": report})

    def canonical_bytes(self) -> bytes:
        """UTF-8 JSON with sorted keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `canonical_bytes()`: the manifest's address."""
        return sha256(self.canonical_bytes())


def parameter_records(parameters: dict[str, ParameterSpec], dims: dict[str, int]) -> dict[str, ParameterRecord]:
    """The blueprint's parameters with their shapes worked out for `dims`."""
    return {
        name: ParameterRecord(shape=tuple(evaluate(text, dims) for text in spec.shape), init=fill_init(spec.init, dims))
        for name, spec in parameters.items()
    }
