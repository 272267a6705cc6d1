"""Servers and buses that are gone after the test."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bus_servers import HubServer, RedisServer, Server
from redis_server import find_or_install

from esper_triton.oona import Oona


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="oona-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def hub(scratch: Path) -> Iterator[HubServer]:
    """A hub for anybody on this machine."""
    server = HubServer(scratch).start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(scratch: Path) -> Iterator[RedisServer]:
    if importlib.util.find_spec("redis") is None:
        pytest.skip("the package redis is not installed")
    binary = find_or_install()
    if binary is None:
        pytest.skip("redis-server is not installed, and cannot be: apt-get, root and a network are needed")
    server = RedisServer(scratch, binary).start()
    yield server
    server.stop()


@pytest.fixture(params=["hub", "redis_server"])
def server(request: pytest.FixtureRequest) -> Server:
    """Either of the two."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def bus_to(scratch: Path) -> Iterator[Callable[..., Oona]]:
    """`bus_to(server, name="a", ...)`: a bus with its journal in the scratch folder, closed at the end."""
    made: list[Oona] = []

    def make(server: Server | None = None, **options: object) -> Oona:
        address = None if server is None else server.address
        bus = Oona(address, **{"journal": scratch / "journal", **options})
        made.append(bus)
        return bus

    yield make
    for bus in made:
        bus.close(1.0)
