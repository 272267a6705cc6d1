"""Packages of Triton kernels from the package index, in a folder of their own."""

import importlib
import sys
import warnings
from pathlib import Path

from package_folder import install

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
# Imported at once, for what they warn of when they are.
MODULES = (
    "adasplash.triton_entmax", "adasplash.triton_entmax_v2", "adasplash.adasplash_no_block_mask", "conch.ops",
    "cut_cross_entropy", "fla.ops", "fla.modules", "liger_kernel.ops", "moe_ops",
)  # fmt: skip


def import_all() -> None:
    """Their modules, found after everything else; warnings about what else one might install are theirs to give."""
    sys.path.append(str(install(REQUIREMENTS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES:
            importlib.import_module(module)
