"""`python -m esper_triton.tezzeret worker`: compiles what is asked for over the bus."""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Sequence

from esper_triton.command_output import run_command
from esper_triton.contracts import envelope as topics
from esper_triton.contracts.errors import EsperError
from esper_triton.oona.workers import add_bus_arguments, bus_of, ends_with_a_signal, serve
from esper_triton.tezzeret.jobs import compile_server
from esper_triton.tezzeret.pool import Forge
from esper_triton.urza import Urza, default_root
from esper_triton.urza.command_line import failed

__all__ = ["main"]

_EPILOG = (
    "The bus's token is read from --token-file or the environment variable ESPER_OONA_TOKEN, that of a store at a URL "
    "from ESPER_URZA_TOKEN. On SIGTERM the worker takes no more jobs, finishes those that it has, or gives them back, "
    "and exits with 0."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m esper_triton.tezzeret", description=__doc__, epilog=_EPILOG)
    worker = parser.add_subparsers(dest="command", required=True).add_parser(
        "worker", help="serve the queue of the bus until it is ended", epilog=_EPILOG
    )
    add_bus_arguments(worker)
    add = worker.add_argument
    add("--store", metavar="URL", help="directory or URL of the store; else $ESPER_URZA or ~/.cache/esper/urza")
    add("--jobs", type=int, default=1, metavar="N", help="jobs at a time, each in a process of its own (default: 1)")
    add("--time-limit", type=float, default=600.0, metavar="SECONDS", help="of one job (default: %(default)g)")
    add("--memory-limit", type=int, metavar="BYTES", help="that one job may take; by default no limit")
    add(
        "--nice",
        type=int,
        default=15,
        metavar="N",
        help="niceness of the processes that compile (default: %(default)s, below whatever else the machine does; "
        "0 for a machine of its own)",
    )
    add("--allow-sources", action="store_true", help="also run hand-written sources that come over the bus")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after SIGTERM or SIGINT, 1 with one line on stderr for what is wrong."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = ends_with_a_signal()
    try:
        return _serve(options, stop)
    except (EsperError, OSError, ValueError) as error:
        return failed(error, 1)


def _serve(options: argparse.Namespace, stop: threading.Event) -> int:
    store = Urza(options.store or default_root())
    store.ids()  # a store that cannot be read at all is told now
    limits = {"time_limit": options.time_limit, "memory_limit": options.memory_limit}
    with (
        Forge(store, jobs=options.jobs, nice=options.nice, **limits) as forge,
        bus_of(options, "tezzeret") as bus,
    ):
        server = compile_server(bus, forge, store, slots=options.jobs, allow_sources=options.allow_sources)
        says = f"serving {topics.SUBMITTED} of {options.bus} with {options.jobs} at a time; store: {store.location}"
        serve(server, stop, says, options.grace)
    return 0


if __name__ == "__main__":
    run_command(main)
