"""Packages of Triton kernels from the package index, in a folder of their own beside this environment's packages.

They see its torch and triton, and nothing of theirs is seen outside of these tests. `python packages.py` installs them.
"""

import importlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
FOLDER = Path(sys.prefix) / "third_party"
# Imported at once, for what they warn of when they are.
MODULES = (
    "adasplash.triton_entmax", "adasplash.triton_entmax_v2", "adasplash.adasplash_no_block_mask", "conch.ops",
    "cut_cross_entropy", "fla.ops", "fla.modules", "liger_kernel.ops", "moe_ops",
)  # fmt: skip


def install() -> Path:
    """The folder with what requirements.txt lists, installed if another list or none was installed before.

    Raises CalledProcessError if pip cannot; a folder that is there is whole.
    """
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    installed = FOLDER / REQUIREMENTS.name
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
            made = Path(scratch) / FOLDER.name
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", made, "--requirement", REQUIREMENTS], check=True)
            (made / REQUIREMENTS.name).write_text(wanted, encoding="utf-8")
            shutil.rmtree(FOLDER, ignore_errors=True)
            made.rename(FOLDER)
    return FOLDER


def import_all() -> None:
    """Their modules, found after everything else; warnings about what else one might install are theirs to give."""
    sys.path.append(str(install()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES:
            importlib.import_module(module)


if __name__ == "__main__":
    install()
