"""Launches by machine code: the same results and the same errors as launches that go through Python."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import COPY, STATUS, VISIT, assemble

from esper_triton.cpu import driver, launcher, native, stock
from esper_triton.cpu.errors import LaunchError
from esper_triton.cpu.native import NativeKernel

TYPES = ["*fp32", "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp32", "fp16", "bf16", "fp64"]


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) * factor, mask=mask)


@pytest.fixture(autouse=True)
def cpu():
    triton.runtime.driver.set_active(driver.CPUDriver())
    yield
    triton.runtime.driver.reset_active()


class Recorder:
    """A kernel that copies its argument slots out, with a note of each launch that went through Python."""

    def __init__(self, signature: list[str]) -> None:
        size = 8 * len(signature)
        code = assemble(COPY.replace("COUNT", str(size)))
        self.out = ctypes.create_string_buffer(size)
        self.kernel = NativeKernel.load(code, symbol="copy", signature=["*i8", *signature])
        self.fast = self.kernel.launcher()
        self.slow_calls = 0
        original = self.kernel.launch

        def launch(*args):
            self.slow_calls += 1
            return original(*args)

        self.kernel.launch = launch

    def __call__(self, *values, grid=(1, 1, 1)) -> bytes:
        ctypes.memset(self.out, 0xAA, len(self.out))
        self.fast(*grid, ctypes.addressof(self.out), *values)
        return self.out.raw


def native_visitor() -> NativeKernel:
    return NativeKernel.load(assemble(VISIT), symbol="visit", signature=["*i64", "*i64"])


def test_the_fast_path_is_there_on_this_machine():
    assert launcher.unavailable() is None
    assert type(native_visitor().launcher()).__name__ == "builtin_function_or_method"


def bounds(type: str) -> tuple[int, int]:
    bits = 64 if type[0] == "*" else int(type[1:])
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if type[0] == "i" and bits > 1 else (0, 2**bits - 1)


RECORDERS = {type: Recorder([type]) for type in ["*fp32", *TYPES[1:10]]}


@given(st.data(), st.sampled_from(sorted(RECORDERS)))
@settings(max_examples=200, deadline=None)
def test_integers_arrive_whole_and_without_python_in_between(data, type):
    recorder = RECORDERS[type]
    low, high = bounds(type)
    value = data.draw(st.one_of(st.integers(low, high), st.sampled_from([low, high, -1 if low else 0])))
    before = recorder.slow_calls
    assert int.from_bytes(recorder(value), "little", signed=low < 0) == value
    assert recorder.slow_calls == before
    for outside in (low - 1, high + 1, 2**70, -(2**70)):
        with pytest.raises(LaunchError, match=f"argument 1 of kernel 'copy' is {outside}, expected an integer from"):
            recorder(outside)


@given(st.floats(), st.floats(width=32), st.one_of(st.booleans(), st.integers(-(2**53), 2**53)))
@settings(deadline=None)
def test_floats_arrive_rounded_once_to_the_width_of_their_slot(wide, narrow, whole):
    with np.errstate(over="ignore"):
        expected = [np.float32(wide), np.float32(narrow), np.float32(whole), np.float64(wide), np.float64(whole)]
    raw = RECORDER_OF_FLOATS(wide, narrow, whole, wide, whole)
    arrived = [np.frombuffer(raw, np.float32)[2 * k] for k in range(3)] + list(np.frombuffer(raw, np.float64)[3:])
    np.testing.assert_array_equal(arrived, expected)
    assert np.signbit(arrived).tolist() == np.signbit(expected).tolist() or np.isnan(wide)
    assert raw[4:8] == raw[12:16] == raw[20:24] == bytes(4)
    assert RECORDER_OF_FLOATS.slow_calls == 0


RECORDER_OF_FLOATS = Recorder(["fp32", "fp16", "bf16", "fp64", "fp64"])


def test_tensors_of_every_kind_arrive_as_their_address():
    class Mine(torch.Tensor):
        pass

    base = torch.arange(24.0).reshape(4, 6)
    tensors = [
        base,
        base[1:, ::2].t(),
        base[0, 0],
        torch.nn.Parameter(base),
        base.as_subclass(Mine),
        base.clone().requires_grad_(),
        torch.empty(0),
        torch.zeros(3, dtype=torch.bfloat16),
    ]
    recorder = Recorder(["*fp32"])
    for tensor in tensors:
        assert int.from_bytes(recorder(tensor), "little") == tensor.data_ptr()
    assert recorder(None) == bytes(8)
    assert recorder.slow_calls == 0


def test_other_objects_with_an_address_and_numbers_of_numpy_are_taken_by_the_slow_path():
    class Buffer:
        def data_ptr(self):
            return 2**47 + 8

    recorder = Recorder(["*fp32", "i32", "u64", "fp32"])
    raw = recorder(Buffer(), np.int32(-5), np.uint64(2**63), np.float32(0.25))
    assert np.frombuffer(raw, np.uint64)[[0, 2]].tolist() == [2**47 + 8, 2**63]
    assert np.frombuffer(raw, np.int64)[1] == -5
    assert np.frombuffer(raw, np.float32)[6] == 0.25
    assert recorder.slow_calls == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1,), r"was given 2 arguments, expected 3 \(\*i8, \*fp32, i32\)"),
        ((1, 2, 3), "was given 4 arguments, expected 3"),
        ((1.5, 2), r"argument 1 of kernel 'copy' is 1.5, expected an integer from 0 to 18446744073709551615"),
        ((1, 2.0), r"argument 2 of kernel 'copy' is 2.0, expected an integer from -2147483648 to 2147483647 \(i32\)"),
        ((1, None), "argument 2 of kernel 'copy' is None"),
        (("x", 1), "argument 1 of kernel 'copy' is 'x'"),
        ((torch.zeros(1, device="meta"), 1), "argument 1 of kernel 'copy' is a tensor on meta, expected cpu"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(values, message):
    recorder = Recorder(["*fp32", "i32"])
    ctypes.memset(recorder.out, 0x55, len(recorder.out))
    with pytest.raises(LaunchError, match=message):
        recorder.fast(1, 1, 1, ctypes.addressof(recorder.out), *values)
    assert recorder.out.raw == b"\x55" * len(recorder.out)


@pytest.mark.parametrize("grid", [(), (1,), (1, 1)])
def test_a_launch_without_a_whole_grid_is_refused(grid):
    with pytest.raises(
        LaunchError, match=f"kernel 'visit' was given {len(grid)} arguments, expected a grid x, y, z first"
    ):
        native_visitor().launcher()(*grid)


@pytest.mark.parametrize("grid", [(-1, 1, 1), (2**31, 1, 1), (2**31 - 1,) * 3, (1.0, 1, 1), ("1", 1, 1), (2**80, 1, 1)])
def test_a_grid_that_is_not_three_sizes_is_refused(grid):
    with pytest.raises(LaunchError, match="grid of kernel 'visit' is"):
        native_visitor().launcher()(*grid, 0, 0)


def test_keywords_are_no_arguments_of_a_launcher():
    with pytest.raises(TypeError):
        native_visitor().launcher()(1, 1, 1, 0, threads=0)


@pytest.mark.parametrize("error", [ValueError("lost"), KeyboardInterrupt()])
def test_what_a_tensor_raises_when_asked_for_its_address_comes_out(error):
    class Broken:
        is_cpu = True

        def data_ptr(self):
            raise error

    with pytest.raises(type(error)) as caught:
        Recorder(["*fp32"])(Broken())
    assert caught.value is error


@given(st.tuples(*[st.integers(0, 6)] * 3), st.one_of(st.none(), st.integers(1, 4)))
@settings(max_examples=30, deadline=None)
def test_every_program_is_visited_once_on_at_most_the_threads_asked_for(grid, num_threads):
    programs = grid[0] * grid[1] * grid[2]
    visits, threads = torch.zeros(programs, dtype=torch.int64), torch.full((programs,), -1)
    VISITOR.launcher(num_threads)(*grid, visits, threads)
    assert visits.tolist() == [1] * programs
    limit = min(num_threads or torch.get_num_threads(), max(programs, 1))
    assert set(threads.tolist()) <= set(range(limit))
    if programs:
        assert max(threads.tolist()) == limit - 1


VISITOR = native_visitor()


def test_torchs_number_of_threads_holds_for_each_launch():
    before = torch.get_num_threads()
    launch = VISITOR.launcher()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            visits, threads = torch.zeros(12, dtype=torch.int64), torch.full((12,), -1)
            launch(12, 1, 1, visits, threads)
            assert set(threads.tolist()) == set(range(count))
    finally:
        torch.set_num_threads(before)


def test_fewer_than_one_thread_is_refused():
    with pytest.raises(LaunchError, match="on 0 threads, expected at least 1"):
        VISITOR.launcher(0)


def test_a_status_that_is_not_zero_becomes_an_error_and_does_not_stick():
    launch = NativeKernel.load(assemble(STATUS), symbol="status", signature=["i64"]).launcher()
    for _ in range(2):
        with pytest.raises(LaunchError, match="'status' ran out of memory for its scratch"):
            launch(1, 1, 1, 1)
        assert launch(1, 1, 1, 0) is None


def test_other_python_threads_run_while_a_kernel_does():
    source = """
    define void @wait(ptr %frame) {
    entry:
      %args = load ptr, ptr %frame
      %flag = load ptr, ptr %args
      br label %loop
    loop:
      %value = load atomic i64, ptr %flag seq_cst, align 8
      %set = icmp ne i64 %value, 0
      br i1 %set, label %done, label %loop
    done:
      ret void
    }
    """
    launch = NativeKernel.load(assemble(source), symbol="wait", signature=["*i64"]).launcher()
    flag = torch.zeros(1, dtype=torch.int64)
    timer = threading.Timer(0.05, lambda: flag.fill_(1))
    timer.start()
    launch(1, 1, 1, flag)  # would never return with the lock held
    timer.join()
    assert flag.item() == 1


def test_launches_leave_reference_counts_and_memory_as_they_were():
    class Token:
        is_cpu = True

        def data_ptr(self):
            return 10**15

    x, token, number, none = torch.zeros(4), Token(), 10**6, None
    recorder = Recorder(["*fp32", "*fp32", "i32", "*fp32"])
    launch, address = recorder.fast, ctypes.addressof(recorder.out)

    def counts():
        return [sys.getrefcount(o) for o in (x, token, number, launch, True, "data_ptr")]

    def launch_all(times):
        for _ in range(times):
            launch(1, 1, 1, address, x, token, number, none)
            launch(0, 1, 1, address, x, token, number, none)
            for wrong in (1.5, "x"):
                with suppress(LaunchError):
                    launch(1, 1, 1, address, x, token, wrong, none)

    launch_all(100)
    gc.collect()
    before, pages = counts(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    launch_all(3000)
    gc.collect()
    # Others hold True and the interned name too, and may come to or let go: not 12 000 of them.
    assert all(abs(now - then) < 100 for now, then in zip(counts(), before, strict=True))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - pages
    assert grown_kib < 1024  # 12 000 launches: even 100 bytes of each would show


def test_without_machine_code_launches_go_through_python_and_say_why(monkeypatch):
    monkeypatch.setattr(launcher, "_machine", None)
    monkeypatch.setattr(launcher, "_failure", None)

    def broken():
        raise OSError("no memory that can be run")

    monkeypatch.setattr(launcher, "_load_code", broken)
    assert launcher.unavailable() == "OSError: no memory that can be run"
    visits, threads = torch.zeros(4, dtype=torch.int64), torch.full((4,), -1)
    launch = native_visitor().launcher()
    assert type(launch).__name__ == "function"
    launch(4, 1, 1, visits, threads)
    assert visits.tolist() == [1] * 4
    scale.device_caches.clear()
    x, out = torch.arange(8.0), torch.empty(8)
    scale[(1,)](x, out, 8, 0.5, BLOCK=8)
    assert out.tolist() == [k / 2 for k in range(8)]
    scale.device_caches.clear()


def test_the_code_is_kept_on_disk_and_made_again_when_it_is_damaged(tmp_path, monkeypatch):
    made = []
    original = launcher._compile
    monkeypatch.setattr(launcher, "_compile", lambda: made.append(1) or original())
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for _ in range(2):
            assert launcher._load_code().addresses["stock"]
        assert made == [1]
        (file,) = tmp_path.rglob("*.o")
        file.write_bytes(file.read_bytes()[:-500])
        assert launcher._load_code().addresses["stock"]
        assert made == [1, 1]
        assert launcher._load_code().addresses["stock"]
        assert made == [1, 1]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "file" / "folder")
        assert launcher._load_code().addresses["stock"]


def test_stock_launches_take_the_fast_path_from_the_second_on(monkeypatch):
    scale.device_caches.clear()
    slow = []
    original = stock._Launcher.__call__
    monkeypatch.setattr(stock._Launcher, "__call__", lambda *args: slow.append(1) or original(*args))
    x, out = torch.arange(100.0), torch.full((100,), float("nan"))
    for k in range(4):
        scale[(4,)](x, out, 100, 0.5 + k, BLOCK=32)
        assert torch.equal(out, x * (0.5 + k))
    assert slow == [1]
    scale.device_caches.clear()


def test_an_added_hook_is_called_and_a_removed_one_is_not(monkeypatch):
    scale.device_caches.clear()
    seen = []
    x, out = torch.arange(8.0), torch.empty(8)

    def hook(data):
        seen.append(data.get()["name"])

    scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    chain = triton.knobs.runtime.launch_enter_hook
    if chain is None:  # a wheel whose hooks are plain functions
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        scale[(1,)](x, out, 8, 2.0, BLOCK=8)
        assert seen == ["scale"]
        return
    chain.add(hook)
    try:
        scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    finally:
        chain.remove(hook)
    scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    assert seen == ["scale"]


def test_a_hook_that_only_looks_like_triton_s_empty_chain_is_called():
    class Counting:
        def __init__(self):
            self.calls = []

        def __call__(self, data):
            self.calls.append(data)

    x, out = torch.arange(8.0), torch.empty(8)
    kernel = scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    hook = Counting()
    kernel.run(1, 1, 1, 0, kernel.function, kernel.packed_metadata, "data", hook, None, x, out, 8, 2.0, 8)
    kernel.run(1, 1, 1, 0, kernel.function, kernel.packed_metadata, "data", None, hook, x, out, 8, 2.0, 8)
    assert hook.calls == ["data", "data"]


def test_a_launch_that_is_refused_calls_no_hook():
    x, out = torch.arange(8.0), torch.empty(8)
    kernel = scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    seen = []
    with pytest.raises(LaunchError):
        kernel.run(1, 1, 1, 0, kernel.function, (), "data", seen.append, seen.append, x, out, 2**31, 2.0, 8)
    assert seen == []


def test_code_of_another_load_of_the_same_kernel_runs_and_not_the_first():
    x, out = torch.arange(8.0), torch.empty(8)
    kernel = scale[(1,)](x, out, 8, 2.0, BLOCK=8)
    stub = assemble("define void @scale(ptr %frame) {\n ret void\n}")
    other = native.LoadedCode.load(stub, symbol="scale")
    out.fill_(-1.0)
    for _ in range(2):
        kernel.run(1, 1, 1, 0, other, (), None, None, None, x, out, 8, 2.0, 8)
        assert out.tolist() == [-1.0] * 8
    kernel.run(1, 1, 1, 0, kernel.function, (), None, None, None, x, out, 8, 2.0, 8)
    assert out.tolist() == [2.0 * k for k in range(8)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_launches_on_its_own_thread():
    launch = VISITOR.launcher(2)

    def visit():
        visits, threads = torch.zeros(64, dtype=torch.int64), torch.full((64,), -1)
        launch(64, 1, 1, visits, threads)
        return visits.tolist() == [1] * 64, set(threads.tolist())

    assert visit() == (True, {0, 1})
    child = os.fork()
    if not child:
        os._exit(0 if visit() == (True, {0}) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert visit() == (True, {0, 1})
