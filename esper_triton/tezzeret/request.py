"""What somebody asks to have compiled for one target, with a digest by which it is known again."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import esper_triton
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.manifest import LAUNCH_FORMAT, Manifest, TargetSpec, build_digest
from esper_triton.tezzeret.plan import compiler_key, toolchain_of

__all__ = ["Request", "requests_for"]

_WRITERS = ("tezzeret", "contracts")  # rooms whose code decides what is written and how it is launched


@dataclass(frozen=True, kw_only=True)
class Request:
    """A blueprint for numbers, a dtype and one target. Not checked: `plan_build` says what is wrong with it.

    `budget_s` are the seconds that the pipeline `aggressive` may search for; it counts for no other.
    """

    blueprint: Blueprint
    dims: Mapping[str, int]
    dtype: str
    target: TargetSpec
    pipeline: str
    budget_s: float = field(default=0.0)

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what is built, up to what is measured: equal in every process with
        the same toolchain."""
        return build_digest(
            {
                "blueprint": self.blueprint.id,
                "dims": {name: repr(size) for name, size in self.dims.items()},  # not checked yet: of any type
                "dtype": self.dtype,
                "pipeline": self.pipeline,
                "budget_s": self.budget_s if self.pipeline == "aggressive" else 0.0,
                "target": self.target.model_dump(mode="json"),
                "toolchain": toolchain_of(self.target).model_dump(mode="json"),
                "compiler": compiler_key(self.target),
                "writers": _writers_digest(),
                "launch_format": LAUNCH_FORMAT,
            }
        )

    @property
    def turn(self) -> str:
        """In the form of an artifact's id, under which there is no artifact: what builders of this request take turns
        by, before they know what it will be."""
        return f"{self.blueprint.id[:12]}-{self.target.label}-{self.pipeline}-{self.digest[:12]}"

    def is_of(self, manifest: Manifest) -> bool:
        """Whether an artifact is one that this request could have been built as."""
        return (
            manifest.blueprint_id == self.blueprint.id
            and manifest.dims == dict(self.dims)
            and manifest.dtype == self.dtype
            and manifest.target == self.target
            and manifest.pipeline == self.pipeline
            and manifest.toolchain == toolchain_of(self.target)
        )


def requests_for(
    blueprint: Blueprint,
    dims: Mapping[str, int],
    dtype: str,
    targets: tuple[TargetSpec, ...],
    pipeline: str,
    budget_s: float,
) -> list[Request]:
    """One request for each target. Dims that have no number get the blueprint's defaults."""
    defaults = {name: dim.default for name, dim in blueprint.dims.items() if dim.default is not None}
    return [
        Request(
            blueprint=blueprint,
            dims=defaults | dict(dims),
            dtype=dtype,
            target=target,
            pipeline=pipeline,
            budget_s=budget_s,
        )
        for target in targets
    ]


@functools.cache
def _writers_digest() -> str:
    """Of the code that writes kernels: a version would not tell two states of a working copy apart."""
    digest = hashlib.sha256()
    package = Path(esper_triton.__file__).parent
    for room in _WRITERS:
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
