"""What the tests of the bus have: servers, and buses to them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "oona"))

from bus_fixtures import bus_to, hub, redis_server, scratch

__all__ = ["bus_to", "hub", "redis_server", "scratch"]
