"""What a target's name stands for."""

from __future__ import annotations

import pytest

from esper_triton.contracts.errors import UnknownTarget
from esper_triton.tezzeret.targets import parse_target, shared_memory_limit, triton_target


@pytest.mark.parametrize(
    ("text", "label", "arch", "warp_size", "shared_kib"),
    [
        ("cuda:90", "cuda90", 90, 32, 227),
        ("cuda:80", "cuda80", 80, 32, 163),
        ("cuda:89", "cuda89", 89, 32, 99),
        ("hip:gfx942", "hipgfx942", "gfx942", 64, 64),
        ("hip:gfx1100", "hipgfx1100", "gfx1100", 32, 64),
    ],
)
def test_a_gpu_is_named_by_its_backend_and_architecture(
    text: str, label: str, arch: object, warp_size: int, shared_kib: int
) -> None:
    spec = parse_target(text)
    target = triton_target(spec)
    assert (spec.label, spec.features) == (label, ())
    assert (target.backend, target.arch, target.warp_size) == (text.split(":")[0], arch, warp_size)
    assert shared_memory_limit(spec) == shared_kib * 1024


def test_cpu_is_this_machine_with_its_instruction_sets() -> None:
    import llvmlite.binding as llvm

    spec = parse_target("cpu")
    assert spec.label == "cpu"
    assert spec.arch == llvm.get_host_cpu_name()
    assert set(spec.features) == {name for name, enabled in llvm.get_host_cpu_features().items() if enabled}
    assert shared_memory_limit(spec) is None


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("cuda:91", "'cuda:90'"), ("CPU", "'cpu'"), ("cuda90", "'cuda:90'"), ("hip:942", "'hip:gfx942'"), ("", "known: ")],
)
def test_an_unknown_target_is_refused_with_the_nearest_ones(text: str, nearest: str) -> None:
    with pytest.raises(UnknownTarget) as caught:
        parse_target(text)
    assert repr(text) in str(caught.value)
    assert nearest in str(caught.value)
