"""`esper.compile(...)` and `python -m esper_triton.compile`: from a blueprint to proven artifacts in a store."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, overload

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import (
    ArtifactNotFound,
    BlueprintError,
    CorruptObject,
    EsperError,
    ProofFailed,
    StoreUnavailable,
    UnknownTarget,
    UntrustedArtifact,
    nearest,
)
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.urza import Artifact, Urza, default_root

if TYPE_CHECKING:
    import torch

    from esper_triton.tezzeret.plan import Plan

__all__ = ["Artifacts", "compile", "main"]


class Artifacts(tuple[Artifact, ...]):
    """What one compile gave, in the order of its targets: by position, or by target as in `artifacts["cuda90"]`.

    Compiled for one target, it has that artifact's attributes: `esper.compile(...).id`.
    """

    __slots__ = ()

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Artifact: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Artifact, ...]: ...

    def __getitem__(self, key: SupportsIndex | slice | str) -> Artifact | tuple[Artifact, ...]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = {artifact.manifest.target.label: artifact for artifact in self}
        label = key.replace(":", "")  # as the target was asked for: `cuda:90`
        if label not in found:
            raise KeyError(f"nothing was compiled for target {key!r}{nearest(label, found)}")
        return found[label]

    @property
    def id(self) -> str:
        """The only artifact's id. Raises AttributeError where there are several, as the other attributes do."""
        return self._only("id").id

    @property
    def status(self) -> KernelStatus:
        """The only artifact's status."""
        return self._only("status").status

    @property
    def manifest(self) -> Manifest:
        """The only artifact's manifest."""
        return self._only("manifest").manifest

    @property
    def digest(self) -> str:
        """The only artifact's digest: the SHA-256 of its manifest."""
        return self._only("digest").digest

    def _only(self, name: str) -> Artifact:
        if len(self) != 1:
            labels = ", ".join(repr(artifact.manifest.target.label) for artifact in self) or "nothing"
            raise AttributeError(f"compiled for {labels}: .{name} is that of one artifact; pick it by its target")
        return self[0]


def compile(
    source: str | Path | Blueprint,
    dims: Mapping[str, int] | None = None,
    dtype: torch.dtype | str = "float32",
    targets: Iterable[str] | str = ("cpu",),
    pipeline: str = "standard",
    urza: Urza | str | Path | None = None,
) -> Artifacts:
    """Compiles a blueprint for every target, stores what came out, and proves what can run on this machine.

    An artifact that the store has intact is not compiled again. Either all targets compile or nothing is stored.

    Args:
        source: a blueprint, or the path of its TOML file. dims: an integer for each of its dims.
        dtype: of the layer: float32, float16 or bfloat16. targets: `cpu`, `cuda:90`, `hip:gfx942` and the like.
        pipeline: `standard`. urza: the store or its directory; without one `$ESPER_URZA`, else `~/.cache/esper/urza`.

    Returns the artifacts: VALIDATED, or PENDING_HARDWARE for a GPU that is not here. A compile where it is proves it.

    Raises BlueprintError and UnknownTarget (nothing was compiled), CompileError (nothing was stored), ProofFailed (it
    was stored as REJECTED), ArtifactRefused (its GPU is here and cannot take it), StoreUnavailable.
    """
    blueprint = source if isinstance(source, Blueprint) else Blueprint.load(source)
    store = urza if isinstance(urza, Urza) else Urza(urza or default_root())
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    built = _build(blueprint, dims or {}, str(dtype).removeprefix("torch."), names, pipeline, store, lambda _: None)
    return Artifacts(one.artifact for one in built)


@dataclass(frozen=True, kw_only=True)
class _Built:
    artifact: Artifact
    hit: bool
    seconds: float  # from the request to the verdict
    code_bytes: int


def _build(
    blueprint: Blueprint,
    dims: Mapping[str, int],
    dtype: str,
    targets: Sequence[str],
    pipeline: str,
    store: Urza,
    announce: Callable[[str], None],
) -> list[_Built]:
    # Here: `import esper_triton.compile` is not to import torch, and --help not to wait for it.
    from esper_triton.tezzeret.forge import Forged, forge
    from esper_triton.tezzeret.plan import plan_build
    from esper_triton.tezzeret.targets import parse_target

    if not targets:
        raise UnknownTarget("no target was given; 'cpu' is this machine")
    specs = [parse_target(name) for name in dict.fromkeys(targets)]
    plans = [plan_build(blueprint, dims, dtype, spec, pipeline) for spec in specs]
    forged: dict[str, Forged] = {}
    seconds: dict[str, float] = {}
    for plan in plans:
        started = time.perf_counter()
        announce(f"compiling for {plan.target.label}")
        if not _is_intact(store, plan.artifact_id):
            forged[plan.artifact_id] = forge(plan)
        seconds[plan.artifact_id] = time.perf_counter() - started
    for one in forged.values():
        store.commit(one.manifest, one.blobs)
    built = []
    for plan in plans:
        started = time.perf_counter()
        announce(f"proving {plan.artifact_id}")
        artifact = _proven(plan, store)
        built.append(
            _Built(
                artifact=artifact,
                hit=plan.artifact_id not in forged,
                seconds=seconds[plan.artifact_id] + time.perf_counter() - started,
                code_bytes=_code_bytes(store, artifact),
            )
        )
    return built


def _is_intact(store: Urza, artifact_id: str) -> bool:
    try:
        store.load(artifact_id)
    except (ArtifactNotFound, CorruptObject, UntrustedArtifact):
        return False
    return True


def _proven(plan: Plan, store: Urza) -> Artifact:
    """The stored artifact with a verdict, if this machine can give one. Raises ProofFailed."""
    artifact = store.get(plan.artifact_id)
    if artifact.status in (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE):
        import torch

        from esper_triton.kasmina.gpu import find_gpu
        from esper_triton.urabrask.proof import prove

        device = torch.device("cpu") if plan.target.backend == "cpu" else find_gpu(plan.target)
        if device is not None:
            artifact, _ = prove(plan.blueprint, plan.artifact_id, store, device)
    if artifact.status is KernelStatus.REJECTED:
        raise ProofFailed(
            f"artifact {artifact.id} does not compute what {plan.blueprint.name!r} says and was stored as REJECTED: "
            f"{_first_failure(store, artifact)}"
        )
    return artifact


def _first_failure(store: Urza, artifact: Artifact) -> str:
    if artifact.manifest.report is None:
        return "it has no report"
    from esper_triton.urabrask.proof import ProofReport

    _, blobs = store.load(artifact.id)
    failures = ProofReport.model_validate_json(blobs[artifact.manifest.report]).failures
    return f"{failures[0]} (the first of {len(failures)})" if failures else "its report lists no failure"


def _code_bytes(store: Urza, artifact: Artifact) -> int:
    _, blobs = store.load(artifact.id)
    return sum(len(blobs[digest]) for digest in {kernel.binary for kernel in artifact.manifest.kernels.values()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it."""
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m esper_triton.compile",
        description="Compile a blueprint, prove it, and store it.",
        allow_abbrev=False,
    )
    parser.add_argument("blueprint", metavar="BLUEPRINT", help="path of a blueprint (TOML)")
    parser.add_argument(
        "--dim", action="append", default=[], metavar="NAME=N", help="size of a dim; once for each dim of the blueprint"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    parser.add_argument(
        "--target", action="append", metavar="TARGET", help="cpu (default), cuda:90, hip:gfx942, ...; may be repeated"
    )
    parser.add_argument("--pipeline", default="standard", help="standard")
    parser.add_argument(
        "--urza", default=None, metavar="DIR", help="directory of the store; else $ESPER_URZA or ~/.cache/esper/urza"
    )
    parser.add_argument("--emit-source", action="store_true", help="also print the Triton source that was compiled")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _dims(pairs: Iterable[str]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            size = int(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise BlueprintError(f"--dim {pair!r} is not of the form NAME=N, such as d=64")
        if name in dims:
            raise BlueprintError(f"--dim {name!r} is given twice")
        dims[name] = size
    return dims


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 where compile or proof failed; 2 on bad input. An error is a line of stderr."""
    options = _parser().parse_args(argv)
    try:
        blueprint = Blueprint.load(options.blueprint)
        store = Urza(options.urza or default_root())
        targets = options.target or ["cpu"]
        with _progress() as announce:
            built = _build(blueprint, _dims(options.dim), options.dtype, targets, options.pipeline, store, announce)
    except EsperError as error:
        bad_input = isinstance(error, (BlueprintError, UnknownTarget, StoreUnavailable))
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2 if bad_input else 1
    source = blueprint.source_text if options.emit_source else None
    if options.json:
        sys.stdout.write(json.dumps(_summary(built, source), indent=1) + "\n")
    else:
        if source is not None:
            sys.stdout.write(source)
        _print_table(built)
    return 0


class _Progress(AbstractContextManager[Callable[[str], None]]):
    """A spinner with the stage on stderr, where people look and pipes do not; shown after nothing else has been."""

    def __init__(self) -> None:
        from rich.console import Console

        self._status = Console(stderr=True).status("reading the blueprint")

    def __enter__(self) -> Callable[[str], None]:
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        self._status.stop()


def _progress() -> AbstractContextManager[Callable[[str], None]]:
    return _Progress() if sys.stderr.isatty() else nullcontext(lambda _: None)


def _summary(built: Iterable[_Built], source: str | None) -> dict[str, Any]:
    artifacts = [
        {
            "id": one.artifact.id,
            "digest": one.artifact.digest,
            "target": one.artifact.manifest.target.label,
            "status": one.artifact.status.value,
            "kernels": list(one.artifact.manifest.kernels),
            "code_bytes": one.code_bytes,
            "compile_ms": round(one.artifact.manifest.compile_seconds * 1e3, 1),
            "elapsed_ms": round(one.seconds * 1e3, 1),
            "hit": one.hit,
        }
        for one in built
    ]
    return {"artifacts": artifacts} | ({} if source is None else {"source": source})


def _print_table(built: Iterable[_Built]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("artifact", "target", "status"):
        table.add_column(column, overflow="fold")
    for column in ("kernels", "code bytes", "compile ms"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in built:
        manifest = one.artifact.manifest
        table.add_row(
            manifest.id,
            manifest.target.label,
            manifest.status.value,
            str(len(manifest.kernels)),
            f"{one.code_bytes:,}",
            f"{manifest.compile_seconds * 1e3:,.0f}",
            "hit" if one.hit else "built",
        )
    # Piped, a line must hold a whole id: rich would fold it at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


class _CallableModule(ModuleType):
    """`esper.compile` is a function and `esper_triton.compile` a module, and they share one name: whoever imports the
    module last, as `import esper_triton.compile` does, puts it into the package in the function's place. So the module
    is callable too, and `esper.compile(...)` is right either way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Artifacts:
        return compile(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
