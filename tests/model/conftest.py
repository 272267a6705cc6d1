from __future__ import annotations

from collections.abc import Iterator

import pytest

from esper_triton.kasmina import KernelCache


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()
