"""Packages from the package index that some tests need, in a folder of their own beside this environment's packages.

They see its torch and triton, and nothing of theirs is seen outside of these tests. `python package_folder.py
tests/NAME/requirements.txt` installs what that lists into the folder NAME.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def install(requirements: Path) -> Path:
    """The folder with what `requirements` lists, installed if another list or none was installed before.

    Raises CalledProcessError if pip cannot; a folder that is there is whole.
    """
    folder = Path(sys.prefix) / requirements.parent.name
    wanted = requirements.read_text(encoding="utf-8")
    installed = folder / requirements.name
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
            made = Path(scratch) / folder.name
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", made, "--requirement", requirements], check=True)
            (made / requirements.name).write_text(wanted, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


if __name__ == "__main__":
    install(Path(sys.argv[1]).resolve())
