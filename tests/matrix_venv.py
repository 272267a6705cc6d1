"""Makes a virtual environment that has everything of the one it is run in, but another release of Triton.

    .venv/bin/python tests/matrix_venv.py .venv-matrix/3.6.0 3.6.0

Nothing but Triton is installed, so what differs between two environments is Triton alone. The packages that are shared
come later on the path than the environment's own, and of two installations of one package Python's metadata, entry
points included, knows the first.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def make(folder: Path, release: str) -> None:
    """Make it, in place of what lies there.

    Raises:
        subprocess.CalledProcessError: pip could not install that release; it has said why.
    """
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", f"triton=={release}"], check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    shared = sysconfig.get_path("purelib")
    # As a folder of packages with .pth files of its own, which a mere line with its path would not make it.
    Path(own, "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
