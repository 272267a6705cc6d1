"""Kernels of these tests are compiled afresh, into a folder that goes away with the run."""

import pytest
import torch
import triton


@pytest.fixture(autouse=True, scope="session")
def _own_triton_cache(tmp_path_factory: pytest.TempPathFactory):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20260131)
