"""`python -m esper_triton.urabrask`: artifacts put to the proof, and what came of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esper_triton.command_output import run_command
from esper_triton.contracts.errors import EsperError, ProofUnavailable, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.query import MOST_ANSWERED, KernelQuery
from esper_triton.oona.workers import add_bus_arguments, bus_of, ends_with_a_signal, serve
from esper_triton.urza import Urza, default_root
from esper_triton.urza.command_line import OneLineParser, commands_of, failed, parser_of

__all__ = ["main"]

Tell = Callable[[str, float], None]
_EXIT = """exit codes:
  0  every artifact is VALIDATED, or PENDING_HARDWARE where its GPU is not here; the report was shown
  1  an artifact is REJECTED or could not be proven, or has no report
  2  the command line is wrong, or the store or a file cannot be read or written
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code that --help documents. An error is a line of stderr."""
    options = _parser().parse_args(argv)
    try:
        store = Urza(options.urza or default_root(), trust=options.trust)
    except (ValueError, StoreUnavailable) as error:
        return failed(error, 2)
    command: Callable[[Urza, argparse.Namespace], int] = options.command
    try:
        return command(store, options)
    except EsperError as error:
        return failed(error, 2 if isinstance(error, StoreUnavailable) else 1)
    finally:
        store.close()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("python -m esper_triton.urabrask", "Prove artifacts, and look at what came of it.", _EXIT)
    common = OneLineParser(add_help=False)
    common.add_argument(
        *("--urza", "--store"),
        default=None,
        metavar="DIR|URL",
        help="the store; else $ESPER_URZA or ~/.cache/esper/urza",
    )
    common.add_argument(
        "--trust", default="local", metavar="POLICY", help="local (default), unsigned-ok, or keys:prover=HEX,forge=HEX"
    )
    common.add_argument("--json", action="store_true", help="print JSON; of validate, a report on each line")
    add = commands_of(parser, common)

    def add_effort(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--level", choices=("fast", "standard", "thorough"), default="standard", help="how much (standard)"
        )
        to.add_argument(
            "--policy",
            choices=("strict", "static-ok"),
            default="strict",
            help="static-ok: one whose GPU is not here is VALIDATED by what can be read of it and its Triton IR",
        )

    validate = add("validate", _validate, "prove artifacts and give them their status")
    validate.add_argument("ids", nargs="*", metavar="ID", help="artifacts")
    validate.add_argument("--pending", action="store_true", help="every artifact that has no verdict yet")
    add_effort(validate)
    validate.add_argument("--seed", type=int, metavar="N", help="of everything that is drawn; else a new one")
    validate.add_argument("--seconds", type=float, metavar="S", help="draw cases for so long, not as the level says")
    report = add("report", _report, "what an artifact was validated or rejected for")
    report.add_argument("ids", nargs=1, metavar="ID", help="an artifact")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page with the distribution of its latency")
    worker = add("worker", _worker, "prove what is compiled, as the bus tells, until it is ended by SIGTERM")
    add_bus_arguments(worker)
    add_effort(worker)
    worker.add_argument(
        "--watch-training",
        action="store_true",
        help="also try again, at level fast, what models report to have failed (innovation.field_reports)",
    )
    return parser


def _worker(store: Urza, options: argparse.Namespace) -> int:
    from esper_triton.contracts import envelope as topics
    from esper_triton.urabrask.field import FieldWatch
    from esper_triton.urabrask.jobs import proof_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = ends_with_a_signal()
    store.ids()  # a store that cannot be read at all is told now
    try:
        with bus_of(options, "urabrask") as bus:
            watch = FieldWatch(bus, store) if options.watch_training else contextlib.nullcontext()
            server = proof_server(bus, store, level=options.level, policy=options.policy)
            says = f"serving {topics.KERNEL_READY} of {options.bus} at level {options.level}; store: {store.location}"
            with watch:
                serve(server, stop, says, options.grace)
    except (OSError, ValueError) as error:
        return failed(error, 2)
    return 0


def _validate(store: Urza, options: argparse.Namespace) -> int:
    ids: list[str] = list(dict.fromkeys(options.ids))
    if options.pending:
        pending = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)
        found = [match.id for match in store.query(KernelQuery(statuses=pending, limit=MOST_ANSWERED))]
        ids += [one for one in sorted(found) if one not in ids]
    elif not ids:
        return failed(ValueError("name artifacts, or give --pending; see --help"), 2)
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        return failed(ValueError(f"--seconds {options.seconds}: a positive number is expected"), 2)
    # Here: --help does not wait for torch.
    import torch

    from esper_triton.tezzeret.pipelines import device_of
    from esper_triton.urabrask import validate
    from esper_triton.urabrask.page import line, lines_of_failure

    worst = 0
    for number, artifact_id in enumerate(ids, start=1):
        where = f"{artifact_id} ({number} of {len(ids)})" if len(ids) > 1 else artifact_id
        try:
            with _progress(where) as tell:
                target = store.get(artifact_id).manifest.target
                _, report = validate(
                    artifact_id,
                    store,
                    options.level,
                    seed=options.seed,
                    seconds=options.seconds,
                    policy=options.policy,
                    device=device_of(target) or torch.device("cpu"),
                    tell=tell,
                )
        except (StoreUnavailable, ProofUnavailable):
            raise
        except EsperError as error:
            worst = max(worst, failed(error, 1))
            continue
        worst = max(worst, 1 if report.verdict == "REJECTED" else 0)
        if options.json:
            _say(report.model_dump_json())
            continue
        _say(line(report))
        for text in lines_of_failure(report):
            _say(f"  {text}")
    if not ids and not options.json:
        _say("nothing is pending")
    return worst


def _report(store: Urza, options: argparse.Namespace) -> int:
    from esper_triton.urabrask.page import html, tables
    from esper_triton.urabrask.verdict import read_report

    (artifact_id,) = options.ids
    report = read_report(artifact_id, store)
    if options.html is not None:
        try:
            options.html.write_text(html(report), encoding="utf-8")
        except OSError as error:
            return failed(ValueError(f"--html {options.html} cannot be written: {error.strerror}"), 2)
    if options.json:
        _say(json.dumps(json.loads(report.model_dump_json()), indent=1))
    elif options.html is None:
        from rich.console import Console

        # Piped, a line must hold a whole id: rich would fold it at 80 columns.
        console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
        for table in tables(report):
            console.print(table)
    return 0


def _say(text: str) -> None:
    """At once, so that results stream."""
    sys.stdout.write(text + "\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()


@contextmanager
def _progress(doing: str) -> Iterator[Tell]:
    """A bar on stderr, where people look and pipes do not; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield lambda what, part: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(doing, total=1.0)
        yield lambda what, part: bars.update(task, description=f"{doing}: {what}", completed=part)


if __name__ == "__main__":
    run_command(main)
