"""What LLVM says of this machine's processor, against what the kernel of the operating system says."""

from __future__ import annotations

from pathlib import Path

import llvmlite.binding as llvm
import pytest

from esper_triton.cpu import host


def test_the_processor_has_a_name_that_llvm_can_compile_for():
    assert host.cpu_name()
    llvm.initialize_native_target()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=host.cpu_name(), features=host.feature_string()
    )
    assert machine.triple == llvm.get_default_triple()


def test_features_are_sorted_names_without_signs():
    features = host.cpu_features()
    assert list(features) == sorted(set(features))
    assert all(name and name[0] not in "+-" for name in features)


def test_features_agree_with_proc_cpuinfo():
    text = Path("/proc/cpuinfo").read_text()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    if not lines:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    flags = set(lines[0].split(":")[1].split())
    for name in ("avx", "avx2", "fma", "f16c", "avx512f"):
        assert (name in host.cpu_features()) == (name in flags), name


def test_the_feature_string_switches_every_feature_on_or_off():
    words = host.feature_string().split(",")
    assert all(word[0] in "+-" for word in words)
    assert tuple(word[1:] for word in words if word[0] == "+") == host.cpu_features()


def test_vectors_are_as_wide_as_the_widest_feature_allows():
    features = host.cpu_features()
    expected = 512 if "avx512f" in features else 256 if "avx" in features else 128
    assert host.vector_bits() == expected
