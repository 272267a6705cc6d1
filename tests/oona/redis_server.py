"""A Redis server from the system's packages. `python redis_server.py` installs it where that needs nobody's leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def find_or_install() -> str | None:
    """Path of redis-server; None where it is not there and cannot be installed: without apt-get, root or a network."""
    found = shutil.which("redis-server")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "redis-server"]):
            done = subprocess.run(["apt-get", "--quiet", *command], env=environment, capture_output=True, check=False)
            if done.returncode:
                return None
        found = shutil.which("redis-server")
    return found


if __name__ == "__main__":
    if find_or_install() is None:
        sys.stderr.write("redis-server is not here and cannot be installed: the tests of the bus over it are skipped\n")
