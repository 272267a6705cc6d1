"""What LLVM says of this machine's processor, against what the kernel of the operating system says."""

from __future__ import annotations

from pathlib import Path

import llvmlite.binding as llvm
import pytest
import triton

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


@pytest.fixture
def folder(tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        host._processor.cache_clear()
        yield tmp_path
    host._processor.cache_clear()


def test_llvm_is_asked_once_in_the_life_of_a_machine(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(host, "_ask_llvm", lambda: asked.append(1) or ("pentium", {"mmx": True, "sse": False}))
    for _ in range(2):
        assert (host.cpu_name(), host._features()) == ("pentium", {"mmx": True, "sse": False})
        host._processor.cache_clear()
    assert asked == [1]
    monkeypatch.setattr(host, "_boot", lambda: "another machine, or this one started again")
    host.cpu_name()
    assert asked == [1, 1]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "pentium"}', '{"name": "pentium", "features": 3}'])
def test_an_answer_that_is_damaged_on_disk_is_asked_for_again(folder, monkeypatch, damage):
    monkeypatch.setattr(host, "_ask_llvm", lambda: ("pentium", {"mmx": True}))
    host.cpu_name()
    (kept,) = folder.rglob("processor.json")
    kept.write_text(damage)
    host._processor.cache_clear()
    assert host._features() == {"mmx": True}
    host._processor.cache_clear()
    monkeypatch.setattr(host, "_ask_llvm", None)
    assert host._features() == {"mmx": True}


def test_without_a_folder_or_a_name_of_the_boot_llvm_is_asked_each_time(folder, monkeypatch):
    monkeypatch.setattr(host, "_ask_llvm", lambda: ("pentium", {}))
    (folder / "file").write_text("")
    triton.knobs.cache.dir = str(folder / "file" / "x")
    assert host.cpu_name() == "pentium"
    host._processor.cache_clear()
    monkeypatch.setattr(host, "_boot", lambda: None)
    assert host.cpu_name() == "pentium"
    assert [path.name for path in folder.iterdir()] == ["file"]
