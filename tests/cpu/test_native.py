"""Loading and launching object code, with entry points written by hand in LLVM IR to the contract of a frame."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from functools import lru_cache

import llvmlite.binding as llvm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_triton.cpu import elf, native
from esper_triton.cpu.errors import LaunchError, ObjectRefused
from esper_triton.cpu.native import NativeKernel

# Adds 1 to visits[p] and stores the calling thread's number in threads[p], for each program p of its share of the grid.
VISIT = """
define void @visit(ptr %frame) {
entry:
  %args = load ptr, ptr %frame
  %visits = load ptr, ptr %args
  %threads_slot = getelementptr i64, ptr %args, i64 1
  %threads = load ptr, ptr %threads_slot
  %x_slot = getelementptr i64, ptr %frame, i64 1
  %y_slot = getelementptr i64, ptr %frame, i64 2
  %z_slot = getelementptr i64, ptr %frame, i64 3
  %x = load i64, ptr %x_slot
  %y = load i64, ptr %y_slot
  %z = load i64, ptr %z_slot
  %xy = mul i64 %x, %y
  %programs = mul i64 %xy, %z
  %number_slot = getelementptr i64, ptr %frame, i64 4
  %count_slot = getelementptr i64, ptr %frame, i64 5
  %number_function = load ptr, ptr %number_slot
  %count_function = load ptr, ptr %count_slot
  %parallel = icmp ne ptr %number_function, null
  br i1 %parallel, label %ask, label %start
ask:
  %number32 = call i32 %number_function()
  %count32 = call i32 %count_function()
  %asked_number = sext i32 %number32 to i64
  %asked_count = sext i32 %count32 to i64
  br label %start
start:
  %number = phi i64 [0, %entry], [%asked_number, %ask]
  %count = phi i64 [1, %entry], [%asked_count, %ask]
  br label %loop
loop:
  %p = phi i64 [%number, %start], [%next, %body]
  %more = icmp slt i64 %p, %programs
  br i1 %more, label %body, label %done
body:
  %visit = getelementptr i64, ptr %visits, i64 %p
  %old = load i64, ptr %visit
  %new = add i64 %old, 1
  store i64 %new, ptr %visit
  %thread = getelementptr i64, ptr %threads, i64 %p
  store i64 %number, ptr %thread
  %next = add i64 %p, %count
  br label %loop
done:
  ret void
}
"""

# Copies all its 8-byte argument slots but the first to the address in the first.
COPY = """
declare ptr @memcpy(ptr, ptr, i64)
define void @copy(ptr %frame) {
  %args = load ptr, ptr %frame
  %out = load ptr, ptr %args
  %from = getelementptr i64, ptr %args, i64 1
  %ignored = call ptr @memcpy(ptr %out, ptr %from, i64 COUNT)
  ret void
}
"""

STATUS = """
define void @status(ptr %frame) {
  %args = load ptr, ptr %frame
  %value = load i64, ptr %args
  %slot = getelementptr i64, ptr %frame, i64 6
  store i64 %value, ptr %slot
  ret void
}
"""


@lru_cache
def assemble(source: str) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(source, llvm.create_context())
    return llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small").emit_object(module)


def visitor() -> NativeKernel:
    return NativeKernel.load(assemble(VISIT), symbol="visit", signature=["*i64", "*i64"])


def visit(kernel: NativeKernel, grid: tuple[int, int, int], num_threads: int | None = None):
    """(visits, thread numbers) of each program."""
    programs = grid[0] * grid[1] * grid[2]
    visits, threads = torch.zeros(programs, dtype=torch.int64), torch.full((programs,), -1)
    kernel.launch(grid, [visits.data_ptr(), threads.data_ptr()], num_threads)
    return visits.tolist(), threads.tolist()


def slots_of(signature: list[str], values: list) -> bytes:
    """The bytes in which the arguments arrive at the entry point."""
    size = 8 * len(values)
    kernel = NativeKernel.load(assemble(COPY.replace("COUNT", str(size))), symbol="copy", signature=["*i8", *signature])
    out = ctypes.create_string_buffer(size)
    kernel.launch((1, 1, 1), [ctypes.addressof(out), *values])
    return out.raw


@given(st.tuples(*[st.integers(1, 7)] * 3), st.one_of(st.none(), st.integers(1, 5)))
def test_every_program_of_a_grid_is_visited_exactly_once(grid, num_threads):
    visits, threads = visit(visitor(), grid, num_threads)
    assert visits == [1] * (grid[0] * grid[1] * grid[2])
    assert min(threads) == 0


def test_a_grid_is_shared_among_the_threads_asked_for():
    _, threads = visit(visitor(), (64, 1, 1), 2)
    assert set(threads) == {0, 1}


def test_torchs_number_of_threads_is_the_default():
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert set(visit(visitor(), (64, 1, 1))[1]) == set(range(count))
    finally:
        torch.set_num_threads(before)


def test_there_are_never_more_threads_than_programs():
    assert set(visit(visitor(), (2, 1, 1), 64)[1]) == {0, 1}
    assert visit(visitor(), (1, 1, 1), 64) == ([1], [0])


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (5, 5, 0)])
def test_a_grid_of_no_programs_runs_nothing(grid):
    assert visit(visitor(), grid) == ([], [])
    visitor().launch(grid, [0, 0])  # the null pointers would crash if a program ran


@pytest.mark.parametrize(
    "grid",
    [(-1, 1, 1), (2**31, 1, 1), (2**31 - 1, 2**31 - 1, 2**31 - 1), (1, 1), (1, 1, 1, 1), (1.0, 1, 1), ("1", 1, 1)],
)
def test_a_grid_that_is_not_three_sizes_is_refused(grid):
    with pytest.raises(LaunchError, match="grid of kernel 'visit' is"):
        visitor().launch(grid, [0, 0])


def test_a_number_of_threads_below_one_is_refused():
    with pytest.raises(LaunchError, match="on 0 threads, expected at least 1"):
        visitor().launch((1, 1, 1), [0, 0], 0)


def test_arguments_arrive_in_eight_byte_slots_in_their_types():
    signature = ["*fp32", "i1", "u8", "i32", "i64", "u64", "fp32", "fp16", "bf16", "fp64"]
    values = [2**47 + 8, True, 200, -7, -(2**63), 2**64 - 1, 1.1, 0.5, -2.0, 1.1]
    raw = slots_of(signature, values)

    def slot(index: int, type):
        return type.from_buffer_copy(raw, 8 * index).value

    assert [slot(k, ctypes.c_uint64) for k in range(3)] == [2**47 + 8, 1, 200]
    assert [slot(k, ctypes.c_int64) for k in (3, 4)] == [-7, -(2**63)]
    assert slot(5, ctypes.c_uint64) == 2**64 - 1
    assert [slot(k, ctypes.c_float) for k in (6, 7, 8)] == [ctypes.c_float(1.1).value, 0.5, -2.0]
    assert slot(9, ctypes.c_double) == 1.1
    assert [slot(k, ctypes.c_uint64) >> 32 for k in (6, 7, 8)] == [0, 0, 0]


@given(st.data(), st.sampled_from(["i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "i1", "*fp32"]))
def test_integers_are_taken_exactly_within_the_range_of_their_type(data, type):
    bits = 64 if type[0] == "*" else int(type[1:])
    signed = type[0] == "i" and bits > 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    value = data.draw(st.integers(low, high))
    assert int.from_bytes(slots_of([type], [value]), "little", signed=signed) == value
    for outside in (low - 1, high + 1):
        with pytest.raises(LaunchError, match=f"argument 1 of kernel 'copy' is {outside}, expected an integer from"):
            slots_of([type], [outside])


@pytest.mark.parametrize(("type", "value"), [("i32", 1.0), ("i32", "1"), ("*fp32", 1.5), ("fp32", "x"), ("fp64", None)])
def test_a_value_of_another_type_is_refused_by_position(type, value):
    with pytest.raises(
        LaunchError, match=rf"argument 1 of kernel 'copy' is {value!r}, expected .* \({type[-4:]}|\*fp32\)"
    ):
        slots_of([type], [value])


def test_integers_are_welcome_where_a_float_is_expected():
    assert slots_of(["fp32", "fp64"], [3, -4]) == bytes(ctypes.c_float(3)) + bytes(4) + bytes(ctypes.c_double(-4))


def test_a_wrong_number_of_arguments_is_refused():
    with pytest.raises(LaunchError, match=r"'visit' was given 1 arguments, expected 2 \(\*i64, \*i64\)"):
        visitor().launch((1, 1, 1), [0])


def test_an_unknown_type_of_argument_is_refused_when_loading():
    with pytest.raises(LaunchError, match="unknown type 'complex64'"):
        NativeKernel.load(assemble(VISIT), symbol="visit", signature=["*i64", "complex64"])


def test_a_status_that_is_not_zero_becomes_an_error_and_does_not_stick():
    kernel = NativeKernel.load(assemble(STATUS), symbol="status", signature=["i64"])
    with pytest.raises(LaunchError, match="'status' ran out of memory for its scratch"):
        kernel.launch((1, 1, 1), [1])
    with pytest.raises(LaunchError, match="'status' ended with status 5"):
        kernel.launch((1, 1, 1), [5])
    kernel.launch((1, 1, 1), [0])


def test_an_undefined_symbol_outside_the_list_is_refused_by_name():
    source = "declare i32 @system(ptr)\ndefine void @k(ptr %f) { %r = call i32 @system(ptr %f)\n ret void }"
    with pytest.raises(ObjectRefused, match="object code of 'k' refers to 'system', which it may not use"):
        NativeKernel.load(assemble(source), symbol="k", signature=[])


def test_a_listed_symbol_that_this_process_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ALLOWED_SYMBOLS", frozenset({"esper_no_such_function"}))
    source = """
    declare void @esper_no_such_function()
    define void @k(ptr %frame) {
      call void @esper_no_such_function()
      ret void
    }
    """
    with pytest.raises(ObjectRefused, match="refers to 'esper_no_such_function', which is not in this process"):
        NativeKernel.load(assemble(source), symbol="k", signature=[])


def test_functions_of_libm_and_constants_are_within_reach_of_the_code():
    source = """
    declare double @exp(double)
    declare float @tanhf(float)
    declare ptr @malloc(i64)
    declare void @free(ptr)
    @table = internal constant [2 x double] [double 1.5, double 2.5]
    define void @k(ptr %frame) {
      %args = load ptr, ptr %frame
      %out = load ptr, ptr %args
      %slot = getelementptr i64, ptr %args, i64 1
      %scratch = call ptr @malloc(i64 8)
      %index = load i64, ptr %slot
      %entry = getelementptr double, ptr @table, i64 %index
      %x = load double, ptr %entry
      %y = call double @exp(double %x)
      store double %y, ptr %scratch
      %x32 = fptrunc double %x to float
      %t = call float @tanhf(float %x32)
      %t64 = fpext float %t to double
      %s = load double, ptr %scratch
      %sum = fadd double %s, %t64
      call void @free(ptr %scratch)
      store double %sum, ptr %out
      ret void
    }
    """
    kernel = NativeKernel.load(assemble(source), symbol="k", signature=["*fp64", "i64"])
    out = torch.zeros(1, dtype=torch.float64)
    kernel.launch((1, 1, 1), [out.data_ptr(), 1])
    expected = torch.tensor(2.5, dtype=torch.float64)
    # tanhf is within 1 ulp of float32 near 1.
    torch.testing.assert_close(out[0], expected.exp() + expected.tanh(), rtol=0, atol=1.2e-7)


def test_an_object_without_the_entry_point_is_refused_with_what_it_has():
    with pytest.raises(ObjectRefused, match="has no function 'vizit'; it has: visit"):
        NativeKernel.load(assemble(VISIT), symbol="vizit", signature=["*i64", "*i64"])


def test_a_name_that_is_not_a_function_is_no_entry_point():
    with pytest.raises(ObjectRefused, match="no function 'table'"):
        NativeKernel.load(assemble("@table = constant i32 1"), symbol="table", signature=[])


def test_bytes_that_are_no_object_are_refused():
    with pytest.raises(ObjectRefused, match="object code of 'k' is malformed"):
        NativeKernel.load(b"not an object", symbol="k", signature=[])
    with pytest.raises(ObjectRefused, match="object code of 'visit' is malformed"):
        NativeKernel.load(assemble(VISIT)[:-100], symbol="visit", signature=[])


@pytest.mark.parametrize(("number", "name"), [(elf.EM_CUDA, "CUDA"), (8, "ELF machine 8")])
def test_an_object_for_another_machine_is_refused(number, name):
    data = bytearray(assemble(VISIT))
    data[18:20] = number.to_bytes(2, "little")
    with pytest.raises(ObjectRefused, match=f"object code of 'visit' is for {name}, expected "):
        NativeKernel.load(bytes(data), symbol="visit", signature=["*i64", "*i64"])


def test_an_executable_is_not_an_object():
    data = bytearray(assemble(VISIT))
    data[16:18] = (2).to_bytes(2, "little")
    with pytest.raises(ObjectRefused, match="not a relocatable"):
        NativeKernel.load(bytes(data), symbol="visit", signature=["*i64", "*i64"])


def test_a_kernel_reports_its_address_and_size():
    kernel = visitor()
    assert kernel.address > 0
    assert kernel.code_bytes == len(assemble(VISIT))
    assert kernel.signature == ("*i64", "*i64")


def test_code_lives_as_long_as_a_launcher_of_it():
    visits, threads = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    launch = visitor().launcher()
    gc.collect()
    launch(1, 1, 1, visits, threads)
    assert visits.item() == 1


def test_pointers_are_tensors_addresses_or_none():
    x = torch.zeros(3)
    assert slots_of(["*fp32"] * 3, [x, x.data_ptr(), None]) == x.data_ptr().to_bytes(8, "little") * 2 + bytes(8)
    with pytest.raises(LaunchError, match="argument 1 of kernel 'copy' is a tensor on meta, expected cpu"):
        slots_of(["*fp32"], [torch.zeros(3, device="meta")])


def test_kernels_are_loaded_and_launched_from_several_threads_at_once():
    results: list[list[int]] = []

    def work():
        kernel = visitor()
        for _ in range(20):
            results.append(visit(kernel, (17, 2, 1))[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1] * 34] * 80


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_runs_every_program_on_its_own_thread():
    kernel = visitor()
    assert set(visit(kernel, (64, 1, 1), 2)[1]) == {0, 1}  # the parent's pool is up
    child = os.fork()
    if not child:
        visits, threads = visit(kernel, (64, 1, 1), 2)
        os._exit(0 if visits == [1] * 64 and set(threads) == {0} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert set(visit(kernel, (64, 1, 1), 2)[1]) == {0, 1}
