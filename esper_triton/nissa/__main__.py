"""`python -m esper_triton.nissa`: serves the page and `/metrics`; `top` and `status` show the same in a terminal."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from esper_triton.command_output import run_command
from esper_triton.contracts.errors import BusUnavailable, EsperError
from esper_triton.nissa.pages import DEFAULT_PORT, Dashboard
from esper_triton.nissa.terminal import ask, draw
from esper_triton.oona import Oona
from esper_triton.oona.tokens import Tokens
from esper_triton.urza import Urza
from esper_triton.urza.command_line import failed

__all__ = ["main"]

_COMMANDS = ("serve", "top", "status")
_EPILOG = (
    "The bus's token is read from the environment variable ESPER_OONA_TOKEN, that of a store at a URL from "
    "ESPER_URZA_TOKEN, and that of top and status from ESPER_NISSA_TOKEN."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m esper_triton.nissa", description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the page until it is interrupted (the default)", epilog=_EPILOG)
    add = serve.add_argument
    add("--bus", default="ws://127.0.0.1:8765", metavar="URL", help="a hub or Redis (default: %(default)s)")
    add("--store", metavar="URL", help="directory or URL of the store, for artifacts; else $ESPER_URZA")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add("--port", type=int, default=DEFAULT_PORT, help="0 takes any free one (default: %(default)s)")
    add("--token-file", type=Path, help="TOML as the hub's: who may look (subscribe) and command (publish)")
    add("--tls-cert", type=Path, help="PEM certificate chain")
    add("--tls-key", type=Path, help="PEM private key")
    add("--tls-ca", type=Path, help="PEM certificates to trust for wss://")
    top = commands.add_parser("top", help="what the page shows, in this terminal, until it is interrupted")
    status = commands.add_parser("status", help="what the page shows, once")
    for one in (top, status):
        one.add_argument("--page", default=f"http://127.0.0.1:{DEFAULT_PORT}", metavar="URL", help="(%(default)s)")
        one.add_argument("--tls-ca", type=Path, help="PEM certificates to trust for https://")
    top.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="(default: %(default)g)")
    status.add_argument("--json", action="store_true", help="for scripts")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 with one line on stderr for what is wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0] not in _COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "serve")
    options = _parser().parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    run = {"serve": _serve, "top": _top, "status": _status}[options.command]
    try:
        return run(options)
    except (EsperError, OSError, ValueError) as error:
        return failed(error, 1)


def _serve(options: argparse.Namespace) -> int:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    tls = None
    if options.tls_cert is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    tokens = None if options.token_file is None else Tokens.read(options.token_file)
    location = options.store or os.environ.get("ESPER_URZA")
    store = None if location is None else Urza(location)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    token = os.environ.get("ESPER_OONA_TOKEN") or None
    with (
        Oona(options.bus, name="nissa", token=token, tls_ca=options.tls_ca) as bus,
        Dashboard(bus, urza=store, host=options.host, port=options.port, tokens=tokens, tls=tls) as page,
    ):
        sys.stdout.write(f"page at {page.url}\n")
        if page.token is not None:
            sys.stdout.write(f"operator's token: {page.token}\n")
        sys.stdout.flush()
        stop.wait()
    return 0


def _top(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    if not options.every > 0:
        raise ValueError(f"--every is {options.every:g}, expected a number of seconds above 0")
    console = Console()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not console.is_terminal:  # one after the other, for pipes and files
        while True:
            console.print(draw(_asked(options)))
            if stop.wait(options.every):
                return 0
    rows = max(3, console.height - 24)
    with Live(draw(_asked(options), rows), console=console, screen=True, auto_refresh=False) as live:
        while not stop.wait(options.every):
            try:
                live.update(draw(_asked(options), rows), refresh=True)
            except BusUnavailable as error:
                live.update(Text(str(error), style="red"), refresh=True)
    return 0


def _status(options: argparse.Namespace) -> int:
    found = _asked(options)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(draw(found))
    return 0


def _asked(options: argparse.Namespace) -> dict[str, object]:
    return ask(options.page, token=os.environ.get("ESPER_NISSA_TOKEN") or None, tls_ca=options.tls_ca)


if __name__ == "__main__":
    run_command(main)
