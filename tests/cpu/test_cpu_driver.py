"""The plugin as Triton sees it: discovery, compilation, caching, launching through stock `kernel[grid](...)`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import struct
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from esper_triton.cpu import compiler, driver, elf, host, native
from esper_triton.cpu.errors import CPUBackendError, LaunchError, ObjectRefused, UnsupportedOperation

SIGNATURE = {"x": "*fp32", "y": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
CONSTANTS = {(4,): 64}


@triton.jit
def axpy(x, y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(y + i, tl.load(x + i, mask=mask) * factor + tl.load(y + i, mask=mask), mask=mask)


@triton.jit
def add_pair(pair, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(pair[0] + i) + pair[1])


@triton.jit
def optional(x, bias, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if bias is not None:
        value += tl.load(bias + i)
    tl.store(out + i, value)


@triton.jit
def exponential(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.exp(tl.load(x + i)))


@pytest.fixture
def triton_cache(tmp_path):
    """An empty disk cache for kernels, and no kernel remembered in this process."""
    for kernel in (axpy, add_pair, optional):
        kernel.device_caches.clear()
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield tmp_path / "cache"


@pytest.fixture
def cpu():
    """The CPU as the active driver, on a machine with a GPU as well."""
    triton.runtime.driver.set_active(driver.CPUDriver())
    yield triton.runtime.driver.active
    triton.runtime.driver.reset_active()


def compiled(arch: str = "native", **options) -> triton.compiler.CompiledKernel:
    return triton.compile(ASTSource(axpy, SIGNATURE, CONSTANTS), GPUTarget("cpu", arch, 1), options)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_triton_finds_the_backend_and_loads_neither_torch_nor_llvmlite():
    out = run_python(
        "import sys, triton; from triton.backends import backends; "
        "print(backends['cpu'].driver.__module__, 'torch' in sys.modules, 'llvmlite' in sys.modules)"
    )
    assert out == "esper_triton.cpu.driver False False"


def test_a_compiled_kernel_holds_every_stage_and_an_object_with_its_symbol(triton_cache):
    kernel = compiled()
    assert {"ttir", "llir", "o"} <= set(kernel.asm)
    assert "tt.func public @axpy" in kernel.asm["ttir"]
    assert kernel.metadata.name == "axpy"
    assert (kernel.metadata.shared, kernel.metadata.num_warps, kernel.metadata.warp_size) == (0, 1, 1)
    assert elf.is_relocatable(kernel.asm["o"])
    assert "axpy" in [s.name for s in elf.symbols(kernel.asm["o"]) if s.defined and s.is_function]


def test_object_code_is_the_same_every_time(triton_cache, monkeypatch):
    first = compiled().asm["o"]
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    assert compiled().asm["o"] == first


@pytest.mark.skipif(platform.machine() != "x86_64", reason="relocation numbers of x86-64")
def test_code_reaches_constants_and_libraries_at_any_distance(triton_cache):
    signature = {"x": "*fp32", "out": "*fp32", "BLOCK": "constexpr"}
    kernel = triton.compile(ASTSource(exponential, signature, {(2,): 64}), GPUTarget("cpu", "native", 1))
    relocations = elf.section(kernel.asm["o"], ".rela.ltext")
    kinds = {info & 0xFFFFFFFF for _, info, _ in struct.iter_unpack("<QQq", relocations)}
    r_x86_64_64 = 1  # an absolute 64-bit address
    assert kinds == {r_x86_64_64}


def test_object_code_names_the_features_it_may_use_and_is_refused_where_one_is_missing(triton_cache, monkeypatch):
    code = compiled().asm["o"]
    note = json.loads(elf.section(code, native.NOTE_SECTION))
    assert note["cpu"] == host.cpu_name()
    assert tuple(note["features"]) == host.cpu_features()
    native.LoadedCode.load(code, symbol="axpy")
    fewer = host.cpu_features()[2:]
    missing = ", ".join(host.cpu_features()[:2])
    monkeypatch.setattr(host, "cpu_features", lambda: fewer)
    monkeypatch.setattr(host, "cpu_name", lambda: "pentium")
    with pytest.raises(
        ObjectRefused,
        match=rf"of 'axpy' was compiled for {note['cpu']} and uses CPU features that this machine \(pentium\) "
        f"does not have: {missing}; compile it on this machine",
    ):
        native.LoadedCode.load(code, symbol="axpy")


@pytest.mark.parametrize("damage", [b"[", b"1", b"{}"])
def test_a_note_that_cannot_be_read_is_refused(triton_cache, damage):
    code = compiled().asm["o"]
    note = elf.section(code, native.NOTE_SECTION)
    with pytest.raises(ObjectRefused, match="'axpy' has a note that is malformed"):
        native.LoadedCode.load(code.replace(note, damage.ljust(len(note))), symbol="axpy")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # CUDA's backend in 3.9
def test_the_same_kernel_still_compiles_for_cuda(triton_cache):
    kernel = triton.compile(ASTSource(axpy, SIGNATURE, CONSTANTS), GPUTarget("cuda", 90, 32))
    assert elf.machine(kernel.asm["cubin"]) == elf.EM_CUDA


def test_a_kernel_launched_on_tensors_computes_what_torch_computes(triton_cache, cpu):
    for n in (1, 63, 64, 1000):
        x, y = torch.randn(n), torch.randn(n)
        expected = x.double() * 1.5 + y.double()
        axpy[(triton.cdiv(n, 64),)](x, y, n, 1.5, BLOCK=64)
        # One fused or two separate roundings of float32.
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_kernel_is_loaded_from_the_disk_cache_the_second_time(triton_cache, cpu, monkeypatch):
    hits = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: hits.append(event["cache_hit"]))
    for _ in range(2):
        y = torch.ones(64)
        axpy[(1,)](torch.ones(64), y, 64, 2.0, BLOCK=64)
        assert y.tolist() == [3.0] * 64
        axpy.device_caches.clear()
    assert hits == [False, True]


def test_tuples_are_opened_and_constants_and_none_left_out(triton_cache, cpu):
    x, out = torch.arange(8.0), torch.empty(8)
    add_pair[(1,)]((x, 3), out, BLOCK=8)
    assert out.tolist() == [float(k + 3) for k in range(8)]
    optional[(1,)](x, None, out, BLOCK=8)
    assert out.tolist() == list(range(8))
    optional[(1,)](x, x, out, BLOCK=8)
    assert out.tolist() == [2.0 * k for k in range(8)]


def test_hooks_are_called_around_a_launch_with_its_metadata(triton_cache, cpu, monkeypatch):
    seen = []
    y = torch.zeros(64)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda data: seen.append((data.get()["name"], y[0].item())))
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda data: seen.append((data.get()["name"], y[0].item())))
    axpy[(1,)](torch.ones(64), y, 64, 2.0, BLOCK=64)
    assert seen == [("axpy", 0.0), ("axpy", 2.0)]


def test_a_tensor_elsewhere_is_refused_by_position(triton_cache, cpu):
    kernel = compiled()
    good = torch.zeros(64)
    with pytest.raises(LaunchError, match="argument 1 of kernel 'axpy' is a tensor on meta, expected cpu"):
        kernel[(1, 1, 1)](good, torch.zeros(64, device="meta"), 64, 1.0, 64)


def test_wrong_arguments_of_a_compiled_kernel_are_refused(triton_cache, cpu):
    kernel = compiled()
    x = torch.zeros(64)
    with pytest.raises(LaunchError, match="was given 3 arguments, expected 4 to 5: x, y, n, factor, BLOCK"):
        kernel[(1, 1, 1)](x, x, 64)
    with pytest.raises(LaunchError, match="argument 2 of kernel 'axpy' is 2147483648, expected an integer"):
        kernel[(1, 1, 1)](x, x, 2**31, 1.0, 64)
    with pytest.raises(LaunchError, match="grid of kernel 'axpy'"):
        kernel[(-1, 1, 1)](x, x, 64, 1.0, 64)
    assert x.tolist() == [0.0] * 64


def test_triton_measures_a_kernel_with_its_own_benchmark(triton_cache, cpu):
    x = torch.ones(64)
    milliseconds = triton.testing.do_bench(lambda: axpy[(1,)](x, x, 64, 0.0, BLOCK=64), warmup=1, rep=1)
    assert 0 < milliseconds < 1000


def test_options_of_gpus_are_taken_and_change_nothing_but_the_key(triton_cache):
    plain = compiled()
    tuned = compiled(num_warps=8, num_stages=3, maxnreg=64, waves_per_eu=2, fpsan_homomorphic_casts=False)
    assert tuned.metadata.num_warps == 8
    assert tuned.asm["o"] == plain.asm["o"]
    assert tuned.hash != plain.hash


def test_options_hash_by_every_field():
    plain = compiler.CPUOptions()
    assert plain.hash() == compiler.CPUOptions().hash()
    for change in ({"num_warps": 2}, {"debug": True}, {"opt_level": 2}, {"extern_libs": {"a": "b"}}):
        assert dataclasses.replace(plain, **change).hash() != plain.hash()
    assert hash(compiler.CPUOptions(extern_libs={"a": "b"})) == hash(compiler.CPUOptions(extern_libs={"a": "b"}))
    with pytest.raises(ValueError, match="opt_level is 4, expected 0 to 3"):
        compiler.CPUOptions(opt_level=4)


def _own_text(monkeypatch, tmp_path):
    (tmp_path / "lowering.py").write_text("another")
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))


@pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch, _: monkeypatch.setattr(host, "cpu_name", lambda: "another"),
        lambda monkeypatch, _: monkeypatch.setattr(host, "feature_string", lambda: "another"),
        lambda monkeypatch, _: monkeypatch.setattr(host, "last_level_cache_bytes", lambda: 1),
        _own_text,
    ],
    ids=["processor", "features", "cache", "text"],
)
def test_the_backends_hash_changes_with_the_processor_and_its_own_text(monkeypatch, tmp_path, change):
    backend = make_backend(GPUTarget("cpu", "native", 1))
    before = backend.hash()
    change(monkeypatch, tmp_path)
    compiler._toolchain_hash.cache_clear()
    try:
        assert backend.hash() != before
    finally:
        monkeypatch.undo()
        compiler._toolchain_hash.cache_clear()
    assert backend.hash() == before


def test_another_processor_is_refused(triton_cache):
    with pytest.raises(CPUBackendError, match=f"processor 'pentium' here: expected 'native', '{host.cpu_name()}'"):
        compiled("pentium")


def test_gluon_is_refused():
    backend = make_backend(GPUTarget("cpu", "native", 1))
    with pytest.raises(UnsupportedOperation, match="Gluon is not supported by the CPU backend yet"):
        backend.add_stages({}, backend.parse_options({}), Language.GLUON)


def test_metadata_is_plain_json(triton_cache):
    metadata = json.loads(json.dumps(compiled().metadata._asdict(), default=vars))
    assert metadata["target"] == {"backend": "cpu", "arch": "native", "warp_size": 1}
    assert metadata["arch"] == host.cpu_name()


def test_every_type_of_an_argument_has_a_c_type(cpu):
    assert cpu.map_python_to_cpp_type("*fp16") == "void*"
    assert cpu.map_python_to_cpp_type("i32") == "int32_t"
    assert cpu.map_python_to_cpp_type("u1") == "uint8_t"
    assert cpu.map_python_to_cpp_type("bf16") == "float"


def test_the_device_is_the_cpu(cpu):
    assert cpu.get_current_device() == "cpu"
    assert cpu.get_active_torch_device() == torch.device("cpu")
    assert cpu.get_current_target() == GPUTarget("cpu", host.cpu_name(), 1)
    assert cpu.utils.get_device_properties("cpu")["multiprocessor_count"] == os.cpu_count()
