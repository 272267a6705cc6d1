"""The plugin as its user meets it: native code runs, programs are spread over threads, what is missing is named."""

import contextlib
import ctypes
import gc
import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esper_triton.cpu import compiler
from esper_triton.cpu.errors import LaunchError, UnsupportedOperation
from esper_triton.cpu.host import cpu_name
from esper_triton.cpu.native import NativeKernel


@triton.jit
def scale(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * factor, mask=mask)


def test_an_ordinary_kernel_runs_on_cpu_tensors(rng):
    x = torch.randn(10_001, generator=rng)
    out = torch.full_like(x, float("nan"))
    compiled = scale[(triton.cdiv(x.numel(), 256),)](x, out, 1.5, x.numel(), BLOCK=256)
    assert torch.equal(out, (x.double() * 1.5).float())
    assert compiled.metadata.target.backend == "cpu"


def test_what_runs_is_the_machine_code_of_the_compiled_object():
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "factor": "fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(scale, signature, {"BLOCK": 64})
    compiled = triton.compile(source, target=GPUTarget("cpu", cpu_name(), 1))
    code = compiled.asm["o"]
    assert code.startswith(b"\x7fELF")
    kernel = NativeKernel.load(code, symbol="scale", signature=["*fp32", "*fp32", "fp32", "i32"])
    # The bytes at the address that is called are the object's own (its prologue, before any relocation).
    prologue = ctypes.string_at(kernel.address, 12)
    assert code.count(prologue) == 1
    x, out = torch.arange(100.0), torch.zeros(100)
    kernel.launch((2, 1, 1), [x.data_ptr(), out.data_ptr(), 3.0, 100])
    assert torch.equal(out, x * 3)
    # And nothing but that code: with its first byte replaced by a return, the same call leaves the output alone.
    stub = bytearray(code)
    stub[code.index(prologue)] = 0xC3
    out.zero_()
    NativeKernel.load(bytes(stub), symbol="scale", signature=kernel.signature).launch(
        (2, 1, 1), [x.data_ptr(), out.data_ptr(), 3.0, 100]
    )
    assert torch.equal(out, torch.zeros(100))


def test_kernels_that_differ_only_in_warps_and_stages_are_compiled_once(rng):
    before = compiler._lower.cache_info().misses, compiler._object.cache_info().misses
    x = torch.randn(128, generator=rng)
    for warps in (1, 2, 4, 8):
        out = torch.full_like(x, float("nan"))
        scale[(1,)](x, out, 2.5, x.numel(), BLOCK=128, num_warps=warps, num_stages=1 + warps % 3)
        assert torch.equal(out, (x.double() * 2.5).float())
    after = compiler._lower.cache_info().misses, compiler._object.cache_info().misses
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_kernels_that_differ_only_in_what_16_divides_are_lowered_once(rng):
    before = compiler._lower.cache_info().misses, compiler._object.cache_info().misses
    x = torch.randn(129, generator=rng)
    for start, count in ((0, 64), (0, 65), (1, 64), (1, 65)):
        out = torch.full((count + start,), float("nan"))[start:]
        given = x[start : start + count]
        kernel = scale[(1,)](given, out, 0.75, count, BLOCK=512)
        assert ("tt.divisibility" in kernel.asm["ttir"]) is ((start, count) != (1, 65))
        assert torch.equal(out, (given.double() * 0.75).float())
    after = compiler._lower.cache_info().misses, compiler._object.cache_info().misses
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_after_a_kernel_is_lowered_if_it_was_before(monkeypatch, is_enabled, fails):
    seen = []

    def lower(*given):
        seen.append(gc.isenabled())
        if fails:
            raise MemoryError
        return "name", 1, None, "text"

    monkeypatch.setattr(compiler, "_lower", lower)
    monkeypatch.setattr("esper_triton.cpu.mlir.generic_text", lambda *_: "")
    options = compiler.CPUBackend(GPUTarget("cpu", "native", 1)).parse_options({})
    if not is_enabled:
        gc.disable()
    try:
        with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
            compiler._make_llir(SimpleNamespace(context=None), {}, options)
        assert gc.isenabled() is is_enabled
    finally:
        gc.enable()
    assert seen == [False]


@triton.jit
def where_am_i(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    tl.store(out_ptr + (z * ny + y) * nx + x, x + 10 * y + 100 * z + 1000 * nz)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1,), (7,), (3, 4), (2, 3, 5), (1, 1, 6)])
def test_every_program_of_a_grid_runs_once(grid, threads):
    x, y, z = (*grid, 1, 1)[:3]
    out = torch.zeros(z, y, x, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        where_am_i[grid](out)
    finally:
        torch.set_num_threads(before)
    expected = torch.arange(x) + 10 * torch.arange(y)[:, None] + 100 * torch.arange(z)[:, None, None] + 1000 * z
    assert torch.equal(out, expected.int())


def test_an_empty_grid_runs_nothing():
    out = torch.zeros(1, dtype=torch.int32)
    where_am_i[(0,)](out)
    assert out.item() == 0


def test_threads_of_python_launch_and_compile_at_once(rng):
    x = torch.randn(5000, generator=rng)
    failures = []

    def work(block):
        out = torch.zeros_like(x)
        for _ in range(20):
            scale[(triton.cdiv(5000, block),)](x, out, 2.0, 5000, BLOCK=block)
        if not torch.equal(out, x * 2):
            failures.append(block)

    threads = [threading.Thread(target=work, args=(2**k,)) for k in range(3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@triton.jit
def uses_inline_assembly(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr + tl.arange(0, N), y)


@triton.jit
def uses_assembly_of_numbers(x_ptr):
    x = tl.load(x_ptr)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr, y)


@pytest.mark.parametrize(
    ("kernel", "args", "constants", "operation", "line"),
    [
        (uses_assembly_of_numbers, lambda: (torch.zeros(1),), {}, "tt.elementwise_inline_asm", 3),
        (uses_inline_assembly, lambda: (torch.zeros(32),), {"N": 32}, "tt.elementwise_inline_asm", 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_operation_that_is_refused_is_named(kernel, args, constants, operation, line):
    tensors = args()
    before = tensors[0].clone()
    with pytest.raises(UnsupportedOperation) as caught:
        kernel[(1,)](*tensors, **constants)
    error = caught.value
    assert error.operation == operation
    assert error.kernel == kernel.__name__
    assert error.file == __file__
    assert error.line == inspect.getsourcelines(kernel.fn)[1] + line
    for part in (operation, kernel.__name__, __file__, str(error.line)):
        assert part in str(error)
    assert torch.equal(tensors[0], before)


def test_wrong_arguments_are_refused_before_anything_runs():
    class Elsewhere:
        """What a tensor on another device looks like to a launcher."""

        dtype = torch.float32
        device = torch.device("meta")

        def data_ptr(self):
            return 16

    out = torch.zeros(4)
    with pytest.raises(LaunchError, match="argument 0 of kernel 'scale' is a tensor on meta"):
        scale[(1,)](Elsewhere(), out, 1.0, 4, BLOCK=4)
    assert torch.equal(out, torch.zeros(4))
