"""Threads and processes that launch, compile, load and drop kernels at the same time."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable

import llvmlite.binding as llvm
import pytest
import torch
import triton
import triton.language as tl
from torch.utils.data import DataLoader, Dataset

from esper_triton.cpu import deadline, prepare
from esper_triton.cpu.driver import CPUDriver

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def cpu():
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@triton.jit
def power(x, out, n, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    value = tl.load(x + i, mask=mask)
    result = tl.full((BLOCK,), 1.0, tl.float32)
    for _ in tl.static_range(EXPONENT):
        result *= value
    tl.store(out + i, result, mask=mask)


@triton.jit
def wait_for(flag, out):
    while tl.atomic_add(flag, 0) == 0:
        pass
    tl.store(out, 1)


def check(exponent: int, n: int = 300) -> bool:
    """Launches `power` and compares with torch. Small whole numbers, so that every product is exact."""
    x = torch.randint(-3, 4, (n,)).float()
    kept, out = x.clone(), torch.full((n,), float("nan"))
    power[(triton.cdiv(n, 64),)](x, out, n, EXPONENT=exponent, BLOCK=64)
    return torch.equal(out, kept**exponent) and torch.equal(x, kept)


def in_threads(*works: Callable[[], bool]) -> None:
    """Runs all at once, in threads of their own, and asserts that each returns true."""
    barrier, results = threading.Barrier(len(works)), []

    def run(work):
        barrier.wait()
        try:
            results.append(work())
        except SystemError as error:
            # Python 3.11 counts the depth of a parse for all threads together (gh-106905), and Triton parses sources.
            if "AST constructor recursion depth mismatch" not in str(error):
                raise
            results.append(work())

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * len(works)


def in_children(count: int, work: Callable[[int], bool]) -> None:
    """Runs `work(k)` in forked children, which all begin at once, and asserts that each returns true."""
    read, write = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(write)
                os.read(read, 1)  # until the parent closes its end
                code = 0 if work(number) else 2
            finally:
                os._exit(code)
        children.append(child)
    os.close(read)
    os.close(write)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * count


@pytest.fixture
def empty_cache(tmp_path):
    power.device_caches.clear()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path
    power.device_caches.clear()


def test_threads_launch_one_kernel_and_others_at_once():
    assert all(check(k) for k in (1, 2, 3))
    works = [lambda k=k: all(check(k) for _ in range(100)) for k in (1, 2, 3, 1, 2, 3)]
    in_threads(*works)


def test_threads_compile_one_kernel_and_others_at_once(empty_cache):
    in_threads(*[lambda k=k: check(k) for k in (4, 5, 6, 4, 5, 6)])
    assert all(check(k) for k in (4, 5, 6))


def test_one_prepared_launch_serves_several_threads():
    x, out = torch.ones(64), torch.ones(64)
    launch = prepare(power[(1,)](x, out, 64, EXPONENT=2, BLOCK=64))

    def work(seed: int) -> bool:
        x, out = torch.full((64,), float(seed)), torch.empty(64)
        for _ in range(500):
            out.fill_(-1)
            launch(1, 1, 1, x, out, 64)
            if out.tolist() != [float(seed) ** 2] * 64:
                return False
        return True

    in_threads(*[lambda seed=seed: work(seed) for seed in (2, 3, 4)])


def test_code_that_is_dropped_while_it_runs_stays_until_it_is_done():
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    started = threading.Event()

    def work() -> None:
        started.set()
        wait_for[(1,)](flag, out)

    thread = threading.Thread(target=work)
    wait_for.warmup(flag, out, grid=(1,))
    thread.start()
    started.wait()
    wait_for.device_caches.clear()
    gc.collect()
    assert all(check(k) for k in (1, 2))  # others are loaded where it was, if it is gone
    flag.fill_(1)
    thread.join()
    assert out.item() == 1


def test_kernels_are_loaded_and_dropped_while_others_run():
    stop = threading.Event()

    def churn() -> bool:
        for _ in range(8):
            power.device_caches.clear()
            gc.collect()
            if not check(3):
                return False
        stop.set()
        return True

    def use() -> bool:
        return all(check(2) for _ in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()))

    in_threads(churn, use, use)


def test_eight_processes_compile_one_kernel_at_once_into_one_folder(empty_cache):
    in_children(8, lambda _: check(7))
    assert sorted({path.name for path in empty_cache.rglob("power.o")}) == ["power.o"]
    assert not list(empty_cache.rglob("*.tmp*"))
    assert check(7)


def test_a_child_forked_while_a_kernel_runs_launches_and_compiles():
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert check(2)
    thread = threading.Thread(target=lambda: wait_for[(1,)](flag, out))
    thread.start()
    try:
        in_children(2, lambda number: check(2) and check(8 + number))
    finally:
        flag.fill_(1)
        thread.join()
    assert out.item() == 1


def test_a_child_forked_while_others_compile_compiles_too(empty_cache):
    stop = threading.Event()

    def compile_on() -> None:
        for k in itertools.count(20):
            if stop.is_set():
                break
            check(k)

    thread = threading.Thread(target=compile_on)
    thread.start()
    try:
        for k in range(4):
            in_children(1, lambda _, k=k: check(10 + k))
    finally:
        stop.set()
        thread.join()


def test_a_child_does_not_wait_for_a_call_of_llvm_that_its_parent_was_in():
    inside = threading.Event()

    def call_slowly() -> None:
        with llvm.ffi.lib._lock:
            inside.set()
            time.sleep(0.1)

    thread = threading.Thread(target=call_slowly)
    thread.start()
    inside.wait()

    def ask(_: int) -> bool:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # ends a child that waits for ever
        return bool(llvm.get_default_triple())

    in_children(1, ask)
    thread.join()


class Squares(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        x, out = torch.full((200,), float(index)), torch.empty(200)
        power[(4,)](x, out, 200, EXPONENT=2, BLOCK=64)
        return out


def test_the_workers_of_a_data_loader_launch_kernels():
    assert check(2)
    batches = torch.cat(list(DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context="fork")))
    assert torch.equal(batches, (torch.arange(6.0) ** 2)[:, None].expand(6, 200))


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@triton.jit
def first_waits_for_all_others(arrived, out, EACH: tl.constexpr):
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    total = tl.num_programs(0) * tl.num_programs(1)
    if program == 0:
        while tl.atomic_add(arrived, 0) < total - 1:
            pass
    else:
        tl.atomic_add(arrived, 1)
    i = program * EACH + tl.arange(0, EACH)
    tl.store(out + i, tl.load(out + i) + i)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("grid", [(2,), (40,), (7, 5)])
def test_a_thread_goes_on_with_what_another_has_not_begun(grid):
    # With few programs a piece is one of them, so that the one who waits holds no other back.
    n = 16 * int(torch.tensor(grid).prod())
    arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(n, dtype=torch.int64)
    with deadline(20):
        first_waits_for_all_others[grid](arrived, out, EACH=16)
    assert torch.equal(out, torch.arange(n))  # each program ran once


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("programs", [2, 3, 63, 64, 65, 1000])
def test_every_program_runs_once_however_ranges_are_divided(programs):
    @triton.jit
    def count(out, EACH: tl.constexpr):
        i = tl.program_id(0) * EACH + tl.arange(0, EACH)
        tl.store(out + i, tl.load(out + i) + 1)

    counts = torch.zeros(programs * 2048, dtype=torch.int32)
    for _ in range(20):
        count[(programs,)](counts, EACH=2048)
    assert (counts == 20).all()
