"""Programs that end early: device assertions and deadlines, on one thread and several, in callees and loops."""

import contextvars
import copy
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
import triton
import triton.language as tl

from esper_triton.cpu import deadline, prepare, work
from esper_triton.cpu.errors import CPUBackendError, DeviceAssertionError, KernelTimeout


@triton.jit
def checked_copy(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < n, other=0)
    tl.device_assert(values >= 0, "only what is not negative")
    tl.store(y + offsets, values, mask=offsets < n)


@triton.jit
def scalar_check(x):
    tl.device_assert(tl.load(x) == 1, "one")


@triton.jit(noinline=True)
def checked(value, limit):
    tl.device_assert(value < limit, "too large")
    return value + 1


@triton.jit
def calls(x, y, limit):
    for _ in range(3):
        tl.store(y, checked(tl.load(x + tl.program_id(0)), limit))
        tl.store(y + 1 + tl.program_id(0), 7)


@triton.jit
def adds_16_bits(x, y, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), values + values)


@triton.jit
def spins(flag, BLOCK: tl.constexpr):
    seen = tl.load(flag)
    while seen == 0:
        seen = tl.atomic_add(flag, 0)
    tl.store(flag + 1 + tl.arange(0, BLOCK), seen)


@triton.jit
def counts(x, n):
    for _ in range(n):
        tl.atomic_add(x, 1)
    tl.store(x + 1, 1)


@triton.jit(noinline=True)
def waits_for(flag):
    while tl.atomic_add(flag, 0) == 0:
        pass
    return 3


@triton.jit
def calls_what_waits(flag):
    tl.store(flag + 1, waits_for(flag))


@triton.jit
def waits_for_a_neighbour(flag):
    if tl.program_id(0) == 0:
        while tl.atomic_add(flag, 0) == 0:
            pass
    else:
        tl.device_assert(tl.load(flag) == 1, "never set")
        tl.atomic_add(flag, 1)


@triton.jit
def touches(x):
    tl.atomic_add(x, 1)


def line_of(function, text: str) -> int:
    lines = function.raw_src
    return function.starting_line_number + next(k for k, line in enumerate(lines) if text in line)


@pytest.fixture(scope="module", autouse=True)
def _threads_for_any_work():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "THREAD_GRAIN", 1)
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_an_assertion_that_fails_names_kernel_line_program_and_message(threads):
    x, y = torch.ones(64 * 9, dtype=torch.int32), torch.full((64 * 9,), -5, dtype=torch.int32)
    x[64 * 5 + 3] = -1
    with pytest.raises(DeviceAssertionError, match="only what is not negative") as caught:
        checked_copy[9,](x, y, x.numel(), BLOCK=64, debug=True)
    assert caught.value.program == (5, 0, 0)
    assert (caught.value.kernel, caught.value.message) == ("checked_copy", "only what is not negative")
    assert caught.value.file == __file__
    assert caught.value.line == line_of(checked_copy, "device_assert")
    assert isinstance(caught.value, AssertionError)
    assert y[64 * 5 : 64 * 6].eq(-5).all()  # the program stopped where it failed
    x[64 * 5 + 3] = 2
    checked_copy[9,](x, y, x.numel(), BLOCK=64, debug=True)
    assert torch.equal(x, y)


def test_without_debug_there_is_no_assertion():
    x, y = torch.full((64,), -1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    checked_copy[1,](x, y, 64, BLOCK=64, debug=False)
    assert torch.equal(x, y)


def test_tritons_own_switch_for_debugging_keeps_assertions():
    x = torch.zeros(1, dtype=torch.int8)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = True
        with pytest.raises(DeviceAssertionError, match="one"):
            scalar_check[1,](x)


def test_no_program_is_begun_after_one_has_failed():
    x, y = torch.ones(64 * 9, dtype=torch.int32), torch.zeros(64 * 9, dtype=torch.int32)
    x[64 * 4] = -1
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(DeviceAssertionError):
        checked_copy[9,](x, y, x.numel(), BLOCK=64, debug=True)
    torch.set_num_threads(before)
    assert y.view(9, 64).ne(0).any(1).tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("value", [0, 1, 3])
def test_a_scalar_is_asserted(value):
    x = torch.tensor([value], dtype=torch.int8)
    if value == 1:
        scalar_check[1,](x, debug=True)
    else:
        with pytest.raises(DeviceAssertionError, match="one"):
            scalar_check[2, 2](x, debug=True)


def test_a_callee_that_fails_ends_its_caller_inside_a_loop(threads):
    x, y = torch.tensor([1, 2, 30, 4]), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(DeviceAssertionError, match="too large") as caught:
        calls[4,](x, y, 10, debug=True)
    assert caught.value.program == (2, 0, 0)
    assert caught.value.line == line_of(checked, "device_assert")
    assert y[3] == 0
    calls[4,](x, y, 31, debug=True)
    assert y[1:].tolist() == [7] * 4


def test_an_error_of_a_trap_survives_copies():
    error = DeviceAssertionError("m", kernel="k", program=(1, 2, 3), file="f.py", line=4)
    for other in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert str(other) == str(error) == "device assertion failed: m (kernel 'k', f.py:4, program (1, 2, 3))"
        assert (other.message, other.kernel, other.program, other.file, other.line) == ("m", "k", (1, 2, 3), "f.py", 4)
        assert isinstance(other, CPUBackendError)


def test_overflow_of_integers_is_checked_under_debug():
    x, y = torch.tensor([1, 2, 2**30, 3], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(DeviceAssertionError, match="overflow") as caught:
        adds_16_bits[1,](x, y, BLOCK=4, debug=True)
    assert caught.value.line == line_of(adds_16_bits, "values + values")
    adds_16_bits[1,](x, y, BLOCK=4, debug=True, sanitize_overflow=False)
    assert y.tolist() == [2, 4, -(2**31), 6]


@pytest.mark.parametrize(
    ("kernel", "arguments", "loop"),
    [(spins, {"BLOCK": 4}, "while"), (counts, {"n": 2**31 - 1}, "for _"), (calls_what_waits, {}, None)],
)
def test_a_loop_that_does_not_end_is_stopped_at_the_deadline(threads, kernel, arguments, loop):
    memory = torch.zeros(8, dtype=torch.int32)
    begun = time.monotonic()
    with deadline(0.1), pytest.raises(KernelTimeout, match="ran past its deadline") as caught:
        kernel[3, 2](memory, **arguments)
    assert time.monotonic() - begun > 0.1
    assert memory[1:].eq(0).all()
    assert caught.value.kernel == kernel.fn.__name__
    assert caught.value.file == __file__
    assert caught.value.line == (line_of(kernel, loop) if loop else line_of(waits_for, "while"))


def test_a_grid_that_takes_too_long_is_stopped_between_programs(threads):
    count = torch.zeros(1, dtype=torch.int32)
    with deadline(0.1), pytest.raises(KernelTimeout) as caught:
        touches[2**31 - 1, 2**20](count)
    assert caught.value.line in (line_of(touches, "def touches"), line_of(touches, "@triton.jit"))
    assert 0 < count.item() < 2**30


def test_what_is_done_in_time_is_not_stopped(threads):
    memory = torch.zeros(8, dtype=torch.int32)
    with deadline(60):
        counts[2,](memory, 1000)
        with deadline(30):
            counts[2,](memory, 1000)
    assert memory[0] == 4000
    with deadline(0.05):
        time.sleep(0.1)  # the time of a launch is meant, not that of the block
        counts[2,](memory, 1000)
    assert memory[0] == 6000


def test_a_prepared_launch_is_stopped_at_the_deadline():
    memory = torch.ones(8, dtype=torch.int32)
    launch = prepare(spins[1,](memory, BLOCK=4))
    memory.zero_()
    with deadline(0.1), pytest.raises(KernelTimeout):
        launch(1, 1, 1, memory)
    memory.fill_(3)
    launch(1, 1, 1, memory)
    assert memory[1:5].eq(3).all()


def test_a_deadline_is_its_own_threads_and_ends_with_its_block():
    memory = torch.zeros(8, dtype=torch.int32)
    with deadline(0.0001):
        thread = threading.Thread(target=contextvars.Context().run, args=(counts[1,], memory, 10**6))
        thread.start()
        thread.join()
    assert memory[0] == 10**6
    counts[1,](memory, 10**6)
    assert memory[0] == 2 * 10**6


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_deadline_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match="positive"), deadline(seconds):
        pass


def test_the_environment_sets_a_deadline_for_all_launches(monkeypatch):
    program = f"""
import os, sys, torch
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
from test_traps import spins, CPUBackendError
for _ in range(2):
    try:
        spins[1,](torch.zeros(8, dtype=torch.int32), BLOCK=4)
    except CPUBackendError as error:
        print(type(error).__name__, error)
    os.environ["ESPER_TRITON_DEADLINE"] = "soon"
"""
    monkeypatch.setenv("ESPER_TRITON_DEADLINE", "0.1")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("KernelTimeout the launch ran past")
    assert second == "LaunchError ESPER_TRITON_DEADLINE is 'soon', expected a positive number of seconds"


def test_a_program_that_waits_for_one_that_trapped_is_stopped():
    memory = torch.zeros(8, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with deadline(20), pytest.raises(DeviceAssertionError, match="never set"):
            waits_for_a_neighbour[2,](memory, debug=True)
    finally:
        torch.set_num_threads(before)
