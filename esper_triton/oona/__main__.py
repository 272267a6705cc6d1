"""`python -m esper_triton.oona`: a hub, and what it counts."""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import json
import logging
import os
import signal
import sqlite3
import ssl
import sys
import time
from pathlib import Path

from esper_triton.command_output import run_command
from esper_triton.contracts.errors import BusUnavailable
from esper_triton.oona.exchange import Limits
from esper_triton.oona.hub import Hub
from esper_triton.oona.tokens import Tokens

_LOOK_S = 1.0
_COLLECT_S = 60.0  # from one collection of everything to the next, in a quiet moment
_COLLECT_AT_LAST_S = 3600.0  # the same, in any moment
_EPILOG = "The token of stats and forget is taken from the environment variable ESPER_OONA_TOKEN, where nobody sees it."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m esper_triton.oona", description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run a hub until it is interrupted")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8765, help="0 takes any free one (default: %(default)s)")
    serve.add_argument("--state", type=Path, help="folder of what must not be lost (default: ~/.cache/esper/oona/hub)")
    serve.add_argument(
        "--durable", action="store_true", help="wait for the disk, so that a power failure loses nothing"
    )
    serve.add_argument("--token-file", type=Path, help="TOML with [[token]]: name, token, publish, subscribe")
    serve.add_argument("--tls-cert", type=Path, help="PEM certificate chain")
    serve.add_argument("--tls-key", type=Path, help="PEM private key")
    serve.add_argument("--heartbeat", type=float, default=10.0, help="seconds without an answer from a live client")
    serve.add_argument("--max-message-bytes", type=int, default=8 * 2**20)
    serve.add_argument("--telemetry-hours", type=float, default=72.0, help="how long telemetry is kept")
    stats = commands.add_parser("stats", help="print a hub's counters as JSON")
    stats.add_argument("address", help="ws://host:port")
    forget = commands.add_parser("forget", help="end a group that will not come back, with all that is kept for it")
    for command in (stats, forget):
        command.add_argument("--tls-ca", type=Path, help="PEM certificates to trust")
    forget.add_argument("address", help="ws://host:port")
    forget.add_argument("group", help="its name, as stats prints it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return asyncio.run(_serve(options)) if options.command == "serve" else _ask(options)
    except (OSError, ValueError, sqlite3.Error, BusUnavailable) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


async def _serve(options: argparse.Namespace) -> int:
    tokens = None if options.token_file is None else Tokens.read(options.token_file)
    if tokens is None and not _is_loopback(options.host):
        raise ValueError(f"a hub that others can reach, at {options.host}, needs a --token-file")
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    tls = None
    if options.tls_cert is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    elif not _is_loopback(options.host):
        logging.warning("tokens and messages go over the network as they are, without --tls-cert and --tls-key")
    state = options.state or Path(os.environ.get("ESPER_OONA") or Path.home() / ".cache" / "esper" / "oona") / "hub"
    try:
        hub = Hub(
            state=state,
            tokens=tokens,
            limits=Limits(telemetry_age_s=options.telemetry_hours * 3600.0),
            heartbeat_s=options.heartbeat,
            max_message_bytes=options.max_message_bytes,
            durable=options.durable,
        )
    except sqlite3.Error as error:
        raise ValueError(f"{state}: {error}; does another hub use it?") from error
    collecting = asyncio.create_task(_collect_garbage())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, hub.stopped.set)
    try:
        port = await hub.start(options.host, options.port, tls=tls)
        host = f"[{options.host}]" if ":" in options.host else options.host
        sys.stdout.write(f"listening on {'ws' if tls is None else 'wss'}://{host}:{port}\n")
        sys.stdout.flush()
        await hub.stopped.wait()
    finally:
        collecting.cancel()
        await hub.stop()
    return 1 if hub.failed else 0


async def _collect_garbage() -> None:
    """Collects all generations in seconds in which there is little to do, and at last without one.

    By itself Python does so whenever there is a quarter more to look at, which is every message that is kept: at 5,000
    messages a second one in a hundred then waited for 30 to 90 ms. The young generations go on by themselves.
    """
    young, middle, old = gc.get_threshold()
    gc.freeze()  # what has been imported stays
    gc.set_threshold(young, middle, 1 << 30)
    try:
        last = time.monotonic()
        while True:
            used = time.process_time()
            await asyncio.sleep(_LOOK_S)
            waited = time.monotonic() - last
            is_quiet = time.process_time() - used < 0.02 * _LOOK_S
            if waited >= (_COLLECT_S if is_quiet else _COLLECT_AT_LAST_S):
                gc.collect()
                last = time.monotonic()
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()


def _ask(options: argparse.Namespace) -> int:
    from esper_triton.oona.websocket import WebSocketTransport

    transport = WebSocketTransport(options.address, token=os.environ.get("ESPER_OONA_TOKEN"), tls_ca=options.tls_ca)
    try:
        if options.command == "forget":
            transport.forget(options.group)
        else:
            sys.stdout.write(json.dumps(transport.server_stats(), indent=2) + "\n")
    finally:
        transport.close()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_command(main)
