"""The tests of this folder need a GPU that torch and Triton can use; without one they are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from seeding import linear_with_seeds

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache
from esper_triton.model.germination import target_name
from esper_triton.urza import Urza

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture
def device() -> torch.device:
    """The GPU that is current."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def target() -> str:
    """That GPU, as in `esper.compile`."""
    return target_name(torch.device("cuda"))


@pytest.fixture(scope="session")
def gpu_store(run_folder: Path) -> Urza:
    """A store for the whole run; `gpu_adapter` fills it."""
    return Urza(run_folder / "gpu")


@pytest.fixture(scope="session")
def gpu_adapter(gpu_store: Urza, adapter_path: Path, target: str) -> Callable[..., str]:
    """`gpu_adapter(d, r, dtype="float32")`: id of the shipped adapter for this GPU, proven on it."""

    def compiled(d: int, r: int, dtype: str = "float32") -> str:
        return esper.compile(adapter_path, dims={"d": d, "r": r}, dtype=dtype, targets=target, urza=gpu_store).id

    return compiled


@pytest.fixture(autouse=True)
def _nothing_is_left_failing() -> Iterator[None]:
    """A kernel that wrote where it must not is seen in the test that launched it, and not in a later one."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def layer_on(gpu_store: Urza, device: torch.device) -> Callable[..., KasminaLayer]:
    """`layer_on(features_in, width, num_seeds, **options)`: a Linear with seeds on the GPU."""

    def made(features_in: int, width: int, num_seeds: int, **options: object) -> KasminaLayer:
        return linear_with_seeds(gpu_store, features_in, width, num_seeds, **options).to(device)

    return made
