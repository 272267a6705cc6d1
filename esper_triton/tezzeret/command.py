"""`python -m esper_triton.compile`: what it is asked for, and what it shows."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError, EsperError, StoreUnavailable, UnknownTarget, nearest
from esper_triton.urza import Artifact, Urza, default_root
from esper_triton.urza.command_line import OneLineParser, failed

if TYPE_CHECKING:
    from esper_triton.tezzeret.request import Request

__all__ = ["main"]

_PIPELINES = ("fast", "standard", "aggressive")
_POLL_S = 0.05


class _Outcome(Protocol):
    @property
    def artifact(self) -> Artifact: ...
    @property
    def hit(self) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def code_bytes(self) -> int: ...


Update = Callable[[int, str, float], None]
"""Told of a blueprint, by its place: the stage, and the part of the work that is done."""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m esper_triton.compile",
        description="Compile blueprints, prove them, and store them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("blueprints", metavar="BLUEPRINT", nargs="*", help="path of a blueprint, name of one that ships, or a folder")
    add("--dim", action="append", default=[], metavar="NAME=N", help="size of a dim; once for each that has no default")
    add("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    add("--target", action="append", metavar="TARGET", help="cpu (default), cuda:90, hip:gfx942, ...; may be repeated")
    add("--pipeline", default="standard", help="fast, standard (default) or aggressive")
    add("--budget", type=float, default=60.0, metavar="SECONDS", help="of the search of aggressive, a target; 60")
    add("--jobs", type=int, metavar="N", help="blueprints at a time, in processes of their own; by default all cores")
    add("--from-module", metavar="PKG.MOD:CLASS", help="also compile the graph of this nn.Module")
    add("--module-args", default="", metavar="ARGS", help='of its constructor, as in "512, 64, bias=False"')
    add("--example-shape", action="append", default=[], metavar="NxM", help="of a tensor that it takes, such as 8x512")
    add("--urza", default=None, metavar="DIR", help="directory of the store; else $ESPER_URZA or ~/.cache/esper/urza")
    add("--emit-source", action="store_true", help="also print the Triton source that was compiled")
    add("--dry-run", action="store_true", help="check and plan, and compile nothing")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 where compile or proof failed; 2 on bad input. An error is a line of stderr."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        blueprints = _blueprints(options)
        store = Urza(options.urza or default_root())
        jobs = _requests(blueprints, options)
        if options.dry_run:
            return _show_plans(blueprints, jobs, store, as_json=options.json)
        outcomes, failures = _run(blueprints, jobs, store, options)
        for error in failures:
            failed(error, _code(error))
        done = [outcome for group in outcomes for outcome in group]
        sources = _sources(done, store) if options.emit_source else {}
    except EsperError as error:
        return failed(error, _code(error))
    if done or not failures:
        _show(done, sources, options)
    return max(map(_code, failures), default=0)


def _code(error: BaseException) -> int:
    return 2 if isinstance(error, (BlueprintError, UnknownTarget, StoreUnavailable)) else 1


# ---- what is asked for


def _check(options: argparse.Namespace) -> None:
    if not options.blueprints and options.from_module is None:
        raise BlueprintError("nothing to compile: name a blueprint, a folder, or a module with --from-module")
    if options.pipeline not in _PIPELINES:
        raise BlueprintError(f"unknown pipeline {options.pipeline!r}{nearest(options.pipeline, _PIPELINES)}")
    if not options.budget > 0:
        raise BlueprintError(f"--budget is {options.budget:g}, expected a number of seconds above 0")
    if options.jobs is not None and options.jobs < 1:
        raise BlueprintError(f"--jobs is {options.jobs}, expected at least 1")
    if options.from_module is None and (options.module_args or options.example_shape):
        raise BlueprintError("--module-args and --example-shape are of --from-module, which is not given")


def _blueprints(options: argparse.Namespace) -> list[Blueprint]:
    from esper_triton.tezzeret.library import find, in_folder

    paths: list[Path] = []
    for name in options.blueprints:
        if not Path(name).is_dir():
            paths.append(find(name))
            continue
        found = in_folder(Path(name))
        if not found:
            raise BlueprintError(f"folder {name}: it holds no blueprint (*.toml, *.json)")
        paths += found
    blueprints = [Blueprint.load(path) for path in paths]
    if options.from_module is not None:
        blueprints.append(_from_module(options.from_module, options.module_args, options.example_shape))
    return blueprints


def _from_module(name: str, arguments: str, shapes: Sequence[str]) -> Blueprint:
    import torch

    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise BlueprintError(f"--from-module {name!r} is not of the form PKG.MOD:CLASS, such as torch.nn:Linear")
    if not shapes:
        raise BlueprintError("--from-module needs --example-shape, once for each tensor that it takes, such as 8x512")
    examples = [torch.zeros(_shape(text)) for text in shapes]
    sys.path.insert(0, os.getcwd())  # as for -m: the user's own package lies there
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BlueprintError(f"--from-module: {module_name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    made = getattr(module, class_name, None)
    if not callable(made):
        raise BlueprintError(
            f"--from-module: {module_name} has no class {class_name!r}{nearest(class_name, vars(module))}"
        )
    positional, keywords = _literals(arguments)
    try:
        instance = made(*positional, **keywords)
    except Exception as error:
        raise BlueprintError(
            f"--from-module: {class_name}({arguments}) cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(instance, torch.nn.Module):
        raise BlueprintError(f"--from-module: {class_name}({arguments}) is {type(instance).__name__}, no nn.Module")
    return Blueprint.from_module(instance, examples)


def _literals(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call, all of them literals. Raises BlueprintError."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
        return [ast.literal_eval(argument) for argument in call.args], keywords
    except (SyntaxError, ValueError, AssertionError) as error:
        raise BlueprintError(f'--module-args {text!r} are no literals, as in "512, 64, bias=False"') from error


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError as error:
        raise BlueprintError(f"--example-shape {text!r} is not of the form NxM, such as 8x512") from error


def _requests(blueprints: Sequence[Blueprint], options: argparse.Namespace) -> list[list[Request]]:
    from esper_triton.tezzeret.request import requests_for
    from esper_triton.tezzeret.targets import parse_target

    dims = _dims(options.dim)
    known = {name for blueprint in blueprints for name in blueprint.dims}
    for name in dims:
        if len(blueprints) > 1 and name not in known:
            raise BlueprintError(f"no blueprint has a dim {name!r}{nearest(name, known)}")
    targets = tuple(parse_target(name) for name in dict.fromkeys(options.target or ["cpu"]))

    def own(blueprint: Blueprint) -> Mapping[str, int]:
        """Of several blueprints each takes the dims that it has."""
        return dims if len(blueprints) == 1 else {n: size for n, size in dims.items() if n in blueprint.dims}

    return [requests_for(one, own(one), options.dtype, targets, options.pipeline, options.budget) for one in blueprints]


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


# ---- doing it


def _run(
    blueprints: Sequence[Blueprint], jobs: Sequence[list[Request]], store: Urza, options: argparse.Namespace
) -> tuple[list[Sequence[_Outcome]], list[BaseException]]:
    """What came of each blueprint, and the errors of those of which nothing came."""
    processes = min(options.jobs or os.cpu_count() or 1, len(jobs))
    with _bars([blueprint.name for blueprint in blueprints]) as update:
        if processes > 1:
            return _run_in_pool(blueprints, jobs, store, processes, options, update)
        return _run_here(jobs, store, update)


def _run_here(
    jobs: Sequence[list[Request]], store: Urza, update: Update
) -> tuple[list[Sequence[_Outcome]], list[BaseException]]:
    from esper_triton.tezzeret.builds import build_all

    outcomes: list[Sequence[_Outcome]] = []
    failures: list[BaseException] = []
    for place, requests in enumerate(jobs):

        def announce(stage: str, part: float, place: int = place) -> None:
            update(place, stage, part)

        try:
            outcomes.append(build_all(requests, store, announce))
            update(place, "done", 1.0)
        except EsperError as error:
            failures.append(error)
            update(place, "failed", 1.0)
    return outcomes, failures


def _run_in_pool(
    blueprints: Sequence[Blueprint],
    jobs: Sequence[list[Request]],
    store: Urza,
    processes: int,
    options: argparse.Namespace,
    update: Update,
) -> tuple[list[Sequence[_Outcome]], list[BaseException]]:
    from esper_triton.tezzeret.pool import Forge

    with Forge(store, jobs=processes, time_limit=None, nice=0) as forge:
        tasks = [
            forge.submit(
                blueprint,
                requests[0].dims,
                options.dtype,
                options.target or ["cpu"],
                options.pipeline,
                budget_s=options.budget,
            )
            for blueprint, requests in zip(blueprints, jobs, strict=True)
        ]
        while not all(task.done() for task in tasks):
            for place, task in enumerate(tasks):
                update(place, task.stage, task.progress)
            time.sleep(_POLL_S)
        return [task.outcomes for task in tasks], [task.error for task in tasks if task.error is not None]


@contextlib.contextmanager
def _bars(names: Sequence[str]) -> Iterator[Update]:
    """A bar for each blueprint on stderr, where people look and pipes do not; gone after."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[name]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = [progress.add_task("waiting", total=1.0, name=name) for name in names]
        yield lambda place, stage, part: progress.update(bars[place], description=stage, completed=part)


# ---- showing it


def _sources(outcomes: Iterable[_Outcome], store: Urza) -> dict[str, str]:
    """The Triton source of each artifact, by its id."""
    found = {}
    for outcome in outcomes:
        artifact, blobs = store.load(outcome.artifact.id)
        digests = dict.fromkeys(kernel.source for kernel in artifact.manifest.kernels.values())
        found[artifact.id] = "\n".join(blobs[digest].decode() for digest in digests)
    return found


def _show(outcomes: Sequence[_Outcome], sources: Mapping[str, str], options: argparse.Namespace) -> None:
    distinct = list(dict.fromkeys(sources.values()))
    if not options.json:
        for source in distinct:
            sys.stdout.write(source)
        _print_table(
            ("artifact", "target", "status", "#kernels", "#code bytes", "#compile ms", ""),
            [
                (
                    one.artifact.id,
                    one.artifact.manifest.target.label,
                    one.artifact.status.value,
                    str(len(one.artifact.manifest.kernels)),
                    f"{one.code_bytes:,}",
                    f"{one.artifact.manifest.compile_seconds * 1e3:,.0f}",
                    "hit" if one.hit else "built",
                )
                for one in outcomes
            ],
        )
        return
    artifacts = [
        {
            "id": one.artifact.id,
            "digest": one.artifact.digest,
            "blueprint": one.artifact.manifest.blueprint_name,
            "target": one.artifact.manifest.target.label,
            "status": one.artifact.status.value,
            "kernels": list(one.artifact.manifest.kernels),
            "code_bytes": one.code_bytes,
            "compile_ms": round(one.artifact.manifest.compile_seconds * 1e3, 1),
            "elapsed_ms": round(one.seconds * 1e3, 1),
            "hit": one.hit,
        }
        | ({"source": sources[one.artifact.id]} if len(distinct) > 1 else {})
        for one in outcomes
    ]
    _print_json({"artifacts": artifacts} | ({"source": distinct[0]} if len(distinct) == 1 else {}))


def _show_plans(blueprints: Sequence[Blueprint], jobs: Sequence[list[Request]], store: Urza, *, as_json: bool) -> int:
    from esper_triton.tezzeret.builds import is_stored
    from esper_triton.tezzeret.pipelines import plan_of

    plans: list[dict[str, Any]] = []
    failures: list[EsperError] = []
    for blueprint, requests in zip(blueprints, jobs, strict=True):
        try:
            for request in requests:
                plan = plan_of(request)
                plans.append(
                    {
                        "blueprint": blueprint.name,
                        "target": request.target.label,
                        "dims": dict(plan.dims),
                        "kernels": list(plan.kernels),
                        "parameters": sum(_elements(record.shape) for record in plan.parameters.values()),
                        "hit": is_stored(request, store),
                    }
                )
        except EsperError as error:
            failed(error, _code(error))
            failures.append(error)
    if as_json:
        _print_json({"plans": plans})
    elif plans:
        _print_table(
            ("blueprint", "target", "dims", "#kernels", "#parameters", ""),
            [
                (
                    one["blueprint"],
                    one["target"],
                    ", ".join(f"{name}={size}" for name, size in one["dims"].items()),
                    str(len(one["kernels"])),
                    f"{one['parameters']:,}",
                    "hit" if one["hit"] else "to build",
                )
                for one in plans
            ],
        )
    return max(map(_code, failures), default=0)


def _elements(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _print_json(body: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(body, indent=1) + "\n")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A column whose name begins with # holds numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column.removeprefix("#"), overflow="fold", justify="right" if column[:1] == "#" else "left")
    for row in rows:
        table.add_row(*row)
    # Piped, a line must hold a whole id: rich would fold it at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
