"""PEFT, torchao, transformers and Lightning are imported from a folder of their own, without the network."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_folder import install

from esper_triton.kasmina import KernelCache

sys.path.append(str(install(Path(__file__).resolve().parent / "requirements.txt")))
with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    patch.setenv("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # about what else one might install
    logging.disable(logging.WARNING)
    try:
        for module in ("peft", "torchao.quantization", "lightning.pytorch", "transformers"):
            importlib.import_module(module)
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()
