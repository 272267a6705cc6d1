"""Programs that end early: device assertions, on one thread and several, in callees and loops."""

import copy
import pickle

import pytest
import torch
import triton
import triton.language as tl

from esper_triton.cpu.errors import CPUBackendError, DeviceAssertionError


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


def line_of(function, text: str) -> int:
    lines = function.raw_src
    return function.starting_line_number + next(k for k, line in enumerate(lines) if text in line)


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
