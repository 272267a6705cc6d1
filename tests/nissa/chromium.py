"""Chromium from the system's packages. `python chromium.py` installs it where that needs nobody's leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def find_or_install() -> str | None:
    """Path of chromium; None where it is not there and cannot be installed: without apt-get, root or a network."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            done = subprocess.run(["apt-get", "--quiet", *command], env=environment, capture_output=True, check=False)
            if done.returncode:
                return None
        found = shutil.which("chromium")
    return found


if __name__ == "__main__":
    if find_or_install() is None:
        sys.stderr.write("chromium is not here and cannot be installed: the tests of the page in it are skipped\n")
