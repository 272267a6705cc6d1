"""The sanitizer: accesses outside of the tensors of a launch, and write races, are exceptions before they happen."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_triton.cpu import prepare, storages, work
from esper_triton.cpu.errors import KernelTrap, OutOfBounds, WriteRace
from esper_triton.cpu.native import NativeKernel


@triton.jit
def add_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr + offsets, values + 1, mask=offsets < n)


@triton.jit
def gather(x_ptr, index_ptr, use_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + tl.load(index_ptr + lanes), mask=tl.load(use_ptr + lanes))
    tl.store(out_ptr + lanes, values)


@triton.jit
def strided(x_ptr, out_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(x_ptr + rows * stride + columns)
    tl.store(out_ptr + columns * ROWS + rows, tile)


@triton.jit
def one_element(x_ptr, out_ptr, at, use, KIND: tl.constexpr):
    if KIND == "load":
        tl.store(out_ptr, tl.load(x_ptr + at, mask=use != 0, other=7))
    elif KIND == "store":
        tl.store(x_ptr + at, 5, mask=use != 0)
    elif KIND == "add":
        tl.atomic_add(x_ptr + at, 5, mask=use != 0)
    else:
        tl.atomic_cas(x_ptr + at, 0, 5)


@triton.jit
def atomic_tile(x_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.atomic_max(x_ptr + lanes, lanes, mask=lanes < n)


@triton.jit
def walks(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    pointers = x_ptr + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(steps):
        total += tl.load(pointers)
        pointers += BLOCK
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def walks_alone(x_ptr, out_ptr, limit):
    pointer = x_ptr
    while tl.load(pointer) < limit:
        pointer += 1
    tl.store(out_ptr, tl.load(pointer))


@triton.jit
def chooses(x_ptr, y_ptr, out_ptr, which, at, BLOCK: tl.constexpr):
    pointer = x_ptr
    if which == 1:
        pointer = y_ptr
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(pointer + at + tl.arange(0, BLOCK)))


@triton.jit(noinline=True)
def read(pointer, at):
    return tl.load(pointer + at)


@triton.jit
def calls(x_ptr, out_ptr, at):
    tl.store(out_ptr, read(x_ptr, at))


@triton.jit
def through_an_address(addresses_ptr, out_ptr, at):
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(pointer + at))


@triton.jit
def overlapping_rows(out_ptr, stride, LENGTH: tl.constexpr):
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr + row * stride + tl.arange(0, LENGTH), row)


@triton.jit
def counts(out_ptr):
    tl.atomic_add(out_ptr, 1)
    tl.store(out_ptr + 1 + tl.program_id(0), 1)
    tl.store(out_ptr + 1 + tl.program_id(0), 2)


@triton.jit
def all_write_one(first_ptr, second_ptr):
    if tl.program_id(0) == 0:
        tl.store(first_ptr, 1)
    else:
        tl.store(second_ptr, 1)


def line_of(function, text: str) -> int:
    return function.starting_line_number + next(k for k, at in enumerate(function.raw_src) if text in at)


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


def test_a_store_beyond_a_tensor_names_line_program_argument_offset_and_size(threads):
    memory = torch.full((200,), -1.0)
    x = torch.arange(100.0)
    out = torch.full((90,), -1.0)
    with pytest.raises(
        OutOfBounds, match=r"store of 4 bytes at offset 360 of 'out_ptr', whose storage has 360"
    ) as caught:
        add_one[4,](x, out, 100, BLOCK=32, sanitize=True)
    error = caught.value
    assert isinstance(error, KernelTrap)
    assert (error.kernel, error.program) == ("add_one", (2, 0, 0))
    assert (error.file, error.line) == (__file__, line_of(add_one, "tl.store"))
    assert (error.access, error.argument, error.offset, error.width, error.size) == ("store", "out_ptr", 360, 4, 360)
    assert out[64:].eq(-1).all()  # the chunk of which one element is outside has not been stored
    assert torch.equal(x, torch.arange(100.0))
    assert memory.eq(-1).all()


def test_what_is_within_is_computed_as_ever(threads):
    x, out = torch.arange(1000.0), torch.full((1000,), -1.0)
    add_one[10,](x, out, 1000, BLOCK=128, sanitize=True)
    assert torch.equal(out, x + 1)
    add_one[10,](x[100:], out[200:], 800, BLOCK=128, sanitize=True)  # views reach all of their storage, not more
    assert torch.equal(out[200:], x[100:900] + 1)
    with pytest.raises(OutOfBounds) as caught:
        add_one[10,](x[100:], out[200:], 900, BLOCK=128, sanitize=True)
    assert (caught.value.argument, caught.value.offset) == ("out_ptr", 4000)


@settings(max_examples=40, deadline=None)  # the first call compiles
@given(data=st.data())
def test_a_gather_is_refused_exactly_where_an_index_in_use_is_outside(data):
    size = 16
    index = torch.tensor(data.draw(st.lists(st.integers(-40, 60), min_size=size, max_size=size)), dtype=torch.int64)
    wild = st.sampled_from(data.draw(st.sampled_from([[True], [False], [True, False]])))
    use = torch.tensor(data.draw(st.lists(wild, min_size=size, max_size=size)))
    if data.draw(st.booleans()):
        index[use] = index[use].clamp(-5, 25)
    storage = torch.arange(31.0)
    x, out = storage[5:], torch.full((size,), -1.0)
    outside = use & ((index < -5) | (index >= 26))
    if outside.any():
        with pytest.raises(OutOfBounds) as caught:
            gather[1,](x, index, use, out, BLOCK=size, sanitize=True)
        first = int(index[outside][0])
        assert (caught.value.argument, caught.value.offset) == ("x_ptr", 4 * (first + 5))
        assert out.eq(-1).all()
    else:
        gather[1,](x, index, use, out, BLOCK=size, sanitize=True)
        assert torch.equal(out, torch.where(use, storage[(index + 5).clamp(0, 30)], 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tiles_of_rows_are_checked_to_their_last_element(dtype):
    x = torch.arange(3 * 21 + 16).to(dtype)
    out = torch.zeros(64, dtype=dtype)
    strided[1,](x, out, 21, ROWS=4, COLUMNS=16, sanitize=True)
    assert torch.equal(out.view(16, 4), torch.as_strided(x, (4, 16), (21, 1)).T)
    with pytest.raises(OutOfBounds) as caught:
        strided[1,](x[:-1].clone(), out, 21, ROWS=4, COLUMNS=16, sanitize=True)
    assert (caught.value.argument, caught.value.offset) == ("x_ptr", (3 * 21 + 15) * x.itemsize)
    with pytest.raises(OutOfBounds) as caught:
        strided[1,](x, out[:63].clone(), 21, ROWS=4, COLUMNS=16, sanitize=True)
    assert (caught.value.access, caught.value.argument) == ("store", "out_ptr")


@pytest.mark.parametrize("kind", ["load", "store", "add", "cas"])
def test_single_elements_are_checked_unless_masked_off(kind):
    x, out = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for at in (4, -1, 2**28):
        with pytest.raises(OutOfBounds) as caught:
            one_element[1,](x, out, at, 2, KIND=kind, sanitize=True)
        assert caught.value.access == {"add": "atomic", "cas": "atomic"}.get(kind, kind)
        assert (caught.value.argument, caught.value.offset, caught.value.size) == ("x_ptr", 4 * at, 16)
    assert not x.any()
    one_element[1,](x, out, 3, 2, KIND=kind, sanitize=True)
    if kind == "load":
        assert out.item() == 0
    else:
        assert x.tolist() == [0, 0, 0, 5]
    if kind != "cas":
        one_element[1,](x, out, 2**28, 0, KIND=kind, sanitize=True)


def test_atomics_on_tiles_are_checked():
    x = torch.zeros(20, dtype=torch.int32)
    atomic_tile[1,](x, 20, BLOCK=32, sanitize=True)
    assert torch.equal(x, torch.arange(20, dtype=torch.int32))
    with pytest.raises(OutOfBounds) as caught:
        atomic_tile[1,](x, 21, BLOCK=32, sanitize=True)
    assert (caught.value.access, caught.value.offset) == ("atomic", 80)


def test_a_pointer_that_walks_belongs_to_the_argument_it_began_at():
    x, out = torch.arange(64.0), torch.zeros(16)
    walks[1,](x, out, 4, BLOCK=16, sanitize=True)
    assert torch.equal(out, x.view(4, 16).sum(0))
    with pytest.raises(OutOfBounds) as caught:
        walks[1,](x, out, 5, BLOCK=16, sanitize=True)
    assert (caught.value.argument, caught.value.offset) == ("x_ptr", 256)
    walks_alone[1,](x, out, 40, sanitize=True)
    assert out[0] == 40
    with pytest.raises(OutOfBounds) as caught:
        walks_alone[1,](x, out, 64, sanitize=True)
    assert (caught.value.argument, caught.value.offset) == ("x_ptr", 256)


def test_one_tensor_must_not_be_reached_through_another():
    memory = torch.zeros(8, dtype=torch.int32)
    neighbour = memory.clone()
    distance = (neighbour.data_ptr() - memory.data_ptr()) // 4
    with pytest.raises(OutOfBounds) as caught:
        one_element[1,](memory, neighbour, distance, 1, KIND="store", sanitize=True)
    assert (caught.value.argument, caught.value.offset) == ("x_ptr", 4 * distance)
    assert not neighbour.any()


def test_a_pointer_of_unknown_origin_must_lie_in_some_storage():
    x, y, out = torch.arange(16.0), torch.arange(16.0) + 50, torch.zeros(16)
    for which, tensor in ((0, x), (2, x), (1, y)):
        chooses[1,](x, y, out, which, 0, BLOCK=16, sanitize=True)
        assert torch.equal(out, tensor)
    with pytest.raises(OutOfBounds, match="in no storage of the launch") as caught:
        chooses[1,](x, y, out, 2, 2**32, BLOCK=16, sanitize=True)
    assert (caught.value.argument, caught.value.offset, caught.value.width) == (None, None, 4)
    calls[1,](x, out, 15, sanitize=True)
    assert out[0] == 15
    with pytest.raises(OutOfBounds) as caught:
        calls[1,](x, out, 2**28, sanitize=True)
    assert caught.value.line == line_of(read, "tl.load")
    addresses = torch.tensor([x.data_ptr()])
    with pytest.raises(OutOfBounds, match="in no storage"):
        through_an_address[1,](addresses, out, 3, sanitize=True)


def test_no_memory_is_reached_through_an_empty_tensor():
    with pytest.raises(OutOfBounds) as caught:
        one_element[1,](torch.empty(0, dtype=torch.int32), torch.zeros(1), 0, 2, KIND="load", sanitize=True)
    assert (caught.value.argument, caught.value.offset, caught.value.size) == ("x_ptr", 0, 0)


def test_an_address_that_is_only_a_number_may_reach_everything():
    x, out = torch.arange(10, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    wrapped = triton.reinterpret(x, tl.int32)
    one_element[1,](wrapped, out, 9, 1, KIND="load", sanitize=True)
    assert out.item() == 9


@pytest.mark.parametrize("grid", [(6,), (3, 2)])
def test_two_programs_that_write_one_element_race(threads, grid):
    out = torch.zeros(64, dtype=torch.int32)
    overlapping_rows[grid](out, 8, LENGTH=8, sanitize="race")
    assert torch.equal(out[:48], torch.arange(6, dtype=torch.int32).repeat_interleave(8))
    with pytest.raises(
        WriteRace, match=r"offset 28 of 'out_ptr' were written by program \(0, 0, 0\) as well"
    ) as caught:
        overlapping_rows[grid](out, 7, LENGTH=8, sanitize="race")
    assert caught.value.program == (1, 0, 0)
    assert (caught.value.argument, caught.value.offset, caught.value.other) == ("out_ptr", 28, (0, 0, 0))
    assert caught.value.line == line_of(overlapping_rows, "tl.store")
    overlapping_rows[grid](out, 7, LENGTH=8, sanitize=True)  # not asked for


def test_a_race_is_seen_across_rows_of_the_grid():
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(WriteRace) as caught:
        overlapping_rows[1, 3](out, 2, LENGTH=4, sanitize="race")
    assert (caught.value.program, caught.value.other) == ((0, 1, 0), (0, 0, 0))


def test_a_launch_does_not_race_with_those_before_it():
    out, x = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int8)
    for number in range(6):
        overlapping_rows[6 - number,](out, 8, LENGTH=8, sanitize="race")
        overlapping_rows[6,](x, 8, LENGTH=8, sanitize="race")
        with pytest.raises(WriteRace):
            overlapping_rows[6,](x, 7, LENGTH=8, sanitize="race")


def test_marks_that_are_used_up_begin_again(monkeypatch):
    monkeypatch.setattr(storages, "_shadows", storages._Shadows())
    out = torch.zeros(64, dtype=torch.int32)
    for left in (12, 6, 5, 0):
        overlapping_rows[6,](out, 8, LENGTH=8, sanitize="race")
        storages._shadows._next_mark = 2**32 - left
        overlapping_rows[6,](out, 8, LENGTH=8, sanitize="race")
        with pytest.raises(WriteRace) as caught:
            overlapping_rows[6,](out, 7, LENGTH=8, sanitize="race")
        assert caught.value.other == (0, 0, 0)


def test_atomics_and_a_programs_own_writes_do_not_race():
    out = torch.zeros(9, dtype=torch.int32)
    counts[8,](out, sanitize="race")
    assert out.tolist() == [8] + [2] * 8


@triton.jit(noinline=True)
def acquire(lock_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass


@triton.jit
def adds_up(lock_ptr, out_ptr, CALL: tl.constexpr, LOCK: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if CALL:
        acquire(lock_ptr)
    elif LOCK:
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
    tl.store(out_ptr + lanes, tl.load(out_ptr + lanes) + 1)
    tl.atomic_xchg(lock_ptr, 0)


def test_what_a_lock_protects_does_not_race():
    lock, out = torch.zeros(1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    adds_up[4,](lock, out, CALL=False, LOCK=True, BLOCK=16, sanitize="race")
    adds_up[4,](lock, out, CALL=True, LOCK=True, BLOCK=16, sanitize="race")
    assert out.eq(8).all()
    with pytest.raises(WriteRace):
        adds_up[4,](lock, out, CALL=False, LOCK=False, BLOCK=16, sanitize="race")


def test_a_race_is_seen_through_two_views_of_one_storage():
    memory = torch.zeros(8, dtype=torch.int32)
    all_write_one[2,](memory, memory[1:], sanitize="race")
    assert memory.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(WriteRace) as caught:
        all_write_one[2,](memory[1:], memory[1:], sanitize="race")
    assert (caught.value.argument, caught.value.offset) == ("second_ptr", 4)
    with pytest.raises(OutOfBounds):
        all_write_one[2,](memory[1:], memory[:0].clone(), sanitize="race")


def test_the_environment_asks_for_the_sanitizer(tmp_path):
    program = f"""
import sys, torch
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
from test_sanitizer import overlapping_rows
for elements in (40, 64):
    try:
        overlapping_rows[6,](torch.zeros(elements, dtype=torch.int32), 7, LENGTH=8)
    except Exception as error:
        print(type(error).__name__, error)
"""
    environment = {**os.environ, "ESPER_TRITON_SANITIZE": "race", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["WriteRace", "WriteRace"]


def test_a_prepared_launch_is_checked_as_well():
    x, out = torch.arange(8.0), torch.zeros(8)
    kernel = add_one[1,](x, out, 8, BLOCK=32, sanitize=True)
    launch = prepare(kernel)
    launch(1, 1, 1, x, out, 8)
    assert torch.equal(out, x + 1)
    with pytest.raises(OutOfBounds):
        launch(1, 1, 1, x, out, 9)


@triton.jit
def through_a_descriptor(source, out_ptr, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = source.load([row, 0])
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offsets, tile)


def test_a_descriptor_that_claims_more_than_its_tensor_has_is_found_out():
    x, out = torch.arange(64.0).view(4, 16), torch.zeros(2, 16)
    honest = TensorDescriptor(x, [4, 16], [16, 1], [2, 16])
    through_a_descriptor[1,](honest, out, 3, ROWS=2, COLUMNS=16, sanitize=True)
    assert torch.equal(out, torch.stack([x[3], torch.zeros(16)]))
    with pytest.raises(OutOfBounds) as caught:
        through_a_descriptor[1,](
            TensorDescriptor(x, [5, 16], [16, 1], [2, 16]), out, 3, ROWS=2, COLUMNS=16, sanitize=True
        )
    assert (caught.value.offset, caught.value.size) == (256, 256)


def test_checked_code_that_is_told_of_no_storages_lets_everything_pass():
    x, out = torch.arange(100.0), torch.full((100,), -1.0)
    kernel = add_one[4,](x, out, 100, BLOCK=32, sanitize="race")
    loaded = NativeKernel.load(kernel.asm["o"], symbol="add_one", signature=["*fp32", "*fp32", "i32"])
    out.fill_(-1)
    loaded.launch((4, 1, 1), [x[1:], out[:-1].data_ptr(), 99])
    assert torch.equal(out[:99], x[1:] + 1)
    assert out[99] == -1


def test_an_unknown_kind_of_sanitizer_is_refused():
    with pytest.raises(ValueError, match="sanitize is 'bound', expected"):
        counts[1,](torch.zeros(2, dtype=torch.int32), sanitize="bound")


def test_errors_of_the_sanitizer_survive_copies():
    with pytest.raises(OutOfBounds) as caught:
        one_element[1,](torch.zeros(4, dtype=torch.int32), torch.zeros(1), 9, 1, KIND="load", sanitize=True)
    for other in (copy.deepcopy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert str(other) == str(caught.value)
        assert vars(other) == vars(caught.value)
