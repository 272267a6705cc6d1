"""`esper.compile(...)` and `python -m esper_triton.compile`: from a blueprint to proven artifacts in a store."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError, UnknownTarget
from esper_triton.tezzeret.artifacts import Artifacts
from esper_triton.urza import Urza, default_root

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Artifacts", "compile", "main"]


def compile(
    source: str | Path | Blueprint | nn.Module,
    dims: Mapping[str, int] | None = None,
    dtype: torch.dtype | str | None = None,
    targets: Iterable[str] | str | None = None,
    pipeline: str = "standard",
    urza: Urza | str | Path | None = None,
    *,
    for_layer: nn.Module | None = None,
    example_inputs: Any = None,
    budget_s: float = 60.0,
    jobs: int = 1,
) -> Artifacts:
    """Compiles a blueprint for every target, stores what came out, and proves what can run on this machine.

    An artifact that the store has intact is not compiled again, and the same request from several processes is built
    once. Either all targets compile or nothing is stored.

    Args:
        source: a blueprint, the name of one that ships, the path of a TOML or JSON file, or a module, of which
            `Blueprint.from_module` makes one.
        dims: an integer for each of its dims; those that have a default may be left out.
        dtype: of the layer: float32 (the default), float16 or bfloat16.
        targets: `cpu` (the default), `cuda:90`, `hip:gfx942` and the like.
        pipeline: `fast` (one configuration), `standard` (a few, measured where the target can run here) or
            `aggressive` (a search of `budget_s` seconds for each target).
        urza: the store or its directory; without one `$ESPER_URZA`, else `~/.cache/esper/urza`.
        for_layer: a wrapped or an ordinary layer: dims, dtype and target are those of a kernel for it, as far as they
            are not given. The width is that of the first free seed, or the whole of a layer that is not wrapped.
        example_inputs: of a module, as `Blueprint.from_module` takes them.
        jobs: with 2 or more, targets are compiled at the same time in processes of their own, and each stands alone:
            one that fails does not keep the others from being stored.

    Returns the artifacts: VALIDATED, or PENDING_HARDWARE for a GPU that is not here. A compile where it is proves it.

    Raises BlueprintError and UnknownTarget (nothing was compiled), CompileError (nothing was stored), ProofFailed (it
    was stored as REJECTED), ArtifactRefused (its GPU is here and cannot take it), StoreUnavailable; TypeError and
    ValueError for a layer that no kernel is for.
    """
    blueprint = _blueprint(source, example_inputs)
    store = urza if isinstance(urza, Urza) else Urza(urza or default_root())
    given = dict(dims or {})
    if for_layer is not None:
        from esper_triton.model.germination import place_of

        place = place_of(for_layer)
        given = place.dims(blueprint, given)
        dtype, targets = dtype or place.dtype, targets or place.target
    name = str(dtype or "float32").removeprefix("torch.")
    wanted = ("cpu",) if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted:
        raise UnknownTarget("no target was given; 'cpu' is this machine")
    # Here: `import esper_triton.compile` is not to import the compilers, and --help not to wait for them.
    from esper_triton.tezzeret.targets import parse_target

    specs = tuple(parse_target(target) for target in dict.fromkeys(wanted))
    if jobs > 1 and len(specs) > 1:
        from esper_triton.tezzeret.pool import Forge

        with Forge(store, jobs=min(jobs, len(specs)), nice=0) as forge:  # this thread waits for it
            tasks = [
                forge.submit(blueprint, given, name, target, pipeline, budget_s=budget_s)
                for target in dict.fromkeys(wanted)
            ]
            return Artifacts(artifact for task in tasks for artifact in task.result())
    from esper_triton.tezzeret.builds import build_all
    from esper_triton.tezzeret.request import requests_for

    requests = requests_for(blueprint, given, name, specs, pipeline, budget_s)
    return Artifacts(one.artifact for one in build_all(requests, store, lambda *_: None))


def _blueprint(source: str | Path | Blueprint | nn.Module, example_inputs: Any) -> Blueprint:
    if isinstance(source, Blueprint):
        return source
    if isinstance(source, (str, Path)):
        from esper_triton.tezzeret.library import find

        return Blueprint.load(find(source))
    if example_inputs is None:
        raise BlueprintError(
            f"{type(source).__name__} is to be compiled as a module: give example_inputs, tensors of the shapes that "
            "it takes"
        )
    return Blueprint.from_module(source, example_inputs)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 where compile or proof failed; 2 on bad input. An error is a line of stderr."""
    from esper_triton.tezzeret.command import main as command

    return command(argv)


class _CallableModule(ModuleType):
    """`esper.compile` is a function and `esper_triton.compile` a module, and they share one name: whoever imports the
    module last, as `import esper_triton.compile` does, puts it into the package in the function's place. So the module
    is callable too, and `esper.compile(...)` is right either way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Artifacts:
        return compile(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from esper_triton.command_output import run_command

    run_command(main)
