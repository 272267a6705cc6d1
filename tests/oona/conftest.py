"""The fixtures of this folder. Others import them from where they are."""

from __future__ import annotations

from bus_fixtures import bus_to, hub, redis_server, scratch, server

__all__ = ["bus_to", "hub", "redis_server", "scratch", "server"]
