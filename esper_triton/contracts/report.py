"""ValidationReport: what Urabrask has done with an artifact, what it found, and how fast the artifact is. JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.manifest import ArtifactId, Digest
from esper_triton.contracts.record import Tag

__all__ = [
    "CaseRecord",
    "CheckRecord",
    "Counterexample",
    "Environment",
    "Latency",
    "Level",
    "RowsBenchmark",
    "ValidationReport",
]

SCHEMA_VERSION = "2.0"
Level = Literal["fast", "standard", "thorough"]


class _Value(BaseModel):
    # Strings for inf and NaN: they are findings too, and JSON has no numbers for them.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class CaseRecord(_Value):
    """One call, from which it can be drawn again: `seed` is that of its numbers, `values` what kind they are of.

    `gaps` are elements between the rows of a tensor (-1: one row counts for all), `shift` elements by which tensors are
    off from a multiple of 64 bytes; `threads` is `one`, `two`, or `usual` as in a layer.
    """

    rows: Annotated[int, Field(ge=0)]
    batch: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=0)]
    image_height: Annotated[int, Field(ge=0)] = 0
    image_width: Annotated[int, Field(ge=0)] = 0
    values: str
    seed: int
    alpha: float
    training: bool = False
    gaps: dict[str, int] = Field(default_factory=dict)
    shift: int = 0
    threads: Literal["one", "two", "usual"] = "one"
    parameters: Literal["drawn", "nan"] = "drawn"

    def __str__(self) -> str:
        sizes = f"rows={self.rows}"
        if self.length != 1 or self.image_height:
            sizes = f"batch={self.batch} length={self.length}"
        if self.image_height:
            sizes = f"batch={self.batch} height={self.image_height} width={self.image_width}"
        more = [f"alpha={self.alpha:g}", f"values={self.values}"]
        more += ["parameters=NaN"] if self.parameters == "nan" else []
        more += ["training"] if self.training else []
        more += [f"gap({name})={gap}" for name, gap in sorted(self.gaps.items()) if gap]
        more += [f"shift={self.shift}"] if self.shift else []
        more += [f"threads={self.threads}"] if self.threads != "one" else []
        return " ".join((sizes, *more))


class Counterexample(_Value):
    """The simplest call that was found to fail. `tensor` and `index` name an element with what it was (`found`) and
    should have been, where an element is what was wrong; `tried` counts the simpler calls that did not fail."""

    case: CaseRecord
    what: str
    tensor: str | None = None
    index: tuple[int, ...] | None = None
    found: float | None = None
    expected: float | None = None
    tolerance: float | None = None
    tried: int = 0


class CheckRecord(_Value):
    """One kind of check: how often it was made, and its failures (the first few). `worst` is the largest error in units
    of its tolerance, null where there is nothing of the kind to measure. `skipped` says why it was not made."""

    name: str
    cases: Annotated[int, Field(ge=0)] = 0
    worst: float | None = None
    failures: tuple[str, ...] = ()
    skipped: str | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0


class Latency(_Value):
    """Of one forward call, in microseconds, over `samples` measurements, each the mean of some calls. `histogram` are
    the counts of samples in equal bins from `low_us` to `high_us`."""

    mean_us: float
    p50_us: float
    p99_us: float
    samples: Annotated[int, Field(ge=1)]
    low_us: float
    high_us: float
    histogram: tuple[int, ...]


class RowsBenchmark(_Value):
    """The kernel and what else computes the same, for calls of `rows` rows, measured in turn.

    `interval` is half the 95 % confidence interval of the kernel's median, as a part of it; `converged` says that it is
    under 5 %, and otherwise that the time for it was spent. `compiled` is `torch.compile`, null where it was not asked.
    """

    rows: Annotated[int, Field(ge=1)]
    kernel: Latency
    backward: Latency | None = None
    eager: Latency | None = None
    compiled: Latency | None = None
    interval: float
    converged: bool
    throughput_rows_per_s: float
    tensor_bytes: Annotated[int, Field(ge=0)]


class Environment(_Value):
    """Where it was measured, and how well the sandbox kept the code in. `degraded` is null where it kept all it can."""

    device: str
    processor: str
    cores: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    system: str
    torch: str
    triton: str
    sandbox: str
    degraded: str | None = None


class ValidationReport(_Value):
    """What was done with an artifact, and the verdict with its reasons.

    `seed` is that of everything that was drawn: with it and the same level the same cases are run again. `worst` has
    for every result its largest error in units of its tolerance. `drift` is the largest relative error of `out` against
    float64 over ordinary numbers. `risk_score`, from 0 to 1, is how near the worst error came to its tolerance; null
    where nothing was measured.
    """

    schema_version: str = SCHEMA_VERSION
    artifact_id: ArtifactId
    blueprint_id: Digest
    blueprint_name: str
    level: Level
    seed: int
    verdict: Literal["VALIDATED", "REJECTED", "PENDING_HARDWARE"]
    reasons: tuple[str, ...]
    cases: Annotated[int, Field(ge=0)]
    worst: dict[str, float]
    checks: tuple[CheckRecord, ...]
    counterexample: Counterexample | None = None
    out_of_bounds: tuple[str, ...] = ()
    drift: float | None = None
    risk_score: float | None = None
    benchmarks: tuple[RowsBenchmark, ...] = ()
    memory_bytes_peak: int | None = None
    tags: tuple[Tag, ...] = ()
    environment: Environment
    seconds: Annotated[float, Field(ge=0)]
    field_reports: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """What every check found, in their order."""
        return tuple(failure for check in self.checks for failure in check.failures)
