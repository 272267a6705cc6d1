"""What the command lines of workers have in common: the bus that they serve, and how they end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from esper_triton.oona.bus import Oona
from esper_triton.oona.jobs import JobServer

__all__ = ["add_bus_arguments", "bus_of", "ends_with_a_signal", "serve"]


def add_bus_arguments(parser: argparse.ArgumentParser) -> None:
    """`--bus`, `--token-file`, `--tls-ca` and `--grace`."""
    add = parser.add_argument
    add("--bus", required=True, metavar="URL", help="ws://host:port of a hub, or redis://host:port/0")
    add("--token-file", type=Path, metavar="FILE", help="the bus's token, on its first line; else $ESPER_OONA_TOKEN")
    add("--tls-ca", type=Path, metavar="FILE", help="PEM certificates to trust for wss://")
    add("--grace", type=float, default=30.0, metavar="SECONDS", help="for jobs to end after SIGTERM (%(default)g)")


def bus_of(options: argparse.Namespace, name: str) -> Oona:
    """The bus that is asked for, as a sender of this name. Raises OSError for the token's file, and as `Oona`."""
    token = os.environ.get("ESPER_OONA_TOKEN") or None
    if options.token_file is not None:
        token = options.token_file.read_text(encoding="utf-8").partition("\n")[0].strip()
    return Oona(options.bus, name=name, token=token, tls_ca=options.tls_ca)


def ends_with_a_signal() -> threading.Event:
    """Set by SIGTERM and SIGINT, from now on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def serve(server: JobServer, stop: threading.Event, says: str, grace_s: float) -> None:
    """Serves until `stop` is set; then jobs have `grace_s` to end, or are given back. `says` is printed when it begins.
    Raises BusUnavailable from a hub that refuses."""
    server.start()
    sys.stdout.write(f"{says}\n")
    sys.stdout.flush()
    stop.wait()
    server.stop(grace_s)
