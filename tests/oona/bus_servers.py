"""Servers of the bus that tests start, kill and start again, and waiting for what comes by itself."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A process of its own on a port that stays its own, with a folder that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        raise NotImplementedError

    def kill(self) -> None:
        """As a power failure of the process: nothing is tidied up."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None


class HubServer(Server):
    """`python -m esper_triton.oona serve`."""

    def __init__(self, folder: Path, *arguments: str, scheme: str = "ws") -> None:
        super().__init__(folder)
        self.arguments = arguments
        self.address = f"{scheme}://127.0.0.1:{self.port}"

    def start(self) -> HubServer:
        command = [sys.executable, "-m", "esper_triton.oona", "serve", "--port", str(self.port)]
        with (self.folder / "hub.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--state", str(self.folder / "state"), *self.arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"listening on {self.address}\n", (self.folder / "hub.log").read_text()
        return self


class RedisServer(Server):
    """`redis-server`, with a log of what it was told that is on the disk before it answers."""

    def __init__(self, folder: Path, binary: str) -> None:
        super().__init__(folder)
        self.binary = binary
        self.address = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        options = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--logfile", "redis.log"]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([self.binary, "--port", str(self.port), *options, *durable], text=True)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(64).startswith(b"+PONG"):
                        return self
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError((self.folder / "redis.log").read_text())


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for a condition; fails when it does not come."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
