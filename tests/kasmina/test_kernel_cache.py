from __future__ import annotations

import gc
import threading
from typing import cast

import pytest

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina.cache import CacheKey, KernelCache
from esper_triton.kasmina.launcher import KernelProgram


class Program:
    """As much of a program as the cache looks at."""

    def __init__(self, code_bytes: int = 10) -> None:
        self.code_bytes = code_bytes


class Holder:
    pass


def key(name: str) -> CacheKey:
    return CacheKey(name, "float32x64", "cpu")


def load(cache: KernelCache, name: str, holder: object, code_bytes: int = 10) -> KernelProgram:
    return cache.load(key(name), lambda: cast(KernelProgram, Program(code_bytes)), holder)


def test_a_second_load_is_a_hit_and_gives_the_same_program() -> None:
    cache, holder = KernelCache(), Holder()
    first = load(cache, "a", holder)
    assert load(cache, "a", holder) is first
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.bytes, stats.pinned) == (1, 1, 1, 10, 1)


@pytest.mark.parametrize("other", [key("b"), CacheKey("a", "float16x64", "cpu"), CacheKey("a", "float32x64", "cuda:0")])
def test_another_digest_specialisation_or_device_is_another_entry(other: CacheKey) -> None:
    cache, holder = KernelCache(), Holder()
    load(cache, "a", holder)
    cache.load(other, lambda: cast(KernelProgram, Program()), holder)
    assert (cache.stats().hits, cache.stats().misses, cache.stats().entries) == (0, 2, 2)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache, holder = KernelCache(max_entries=2), Holder()
    programs = {name: load(cache, name, holder) for name in "ab"}
    for name in "ab":
        cache.unpin(key(name), holder)
    assert load(cache, "a", holder) is programs["a"]
    cache.unpin(key("a"), holder)
    load(cache, "c", holder)
    assert cache.stats().evictions == 1
    assert load(cache, "a", holder) is programs["a"]
    assert load(cache, "b", holder) is not programs["b"]


def test_the_bound_on_bytes_evicts_too() -> None:
    cache, holder = KernelCache(max_bytes=100), Holder()
    for name in "abc":
        load(cache, name, holder, code_bytes=40)
        cache.unpin(key(name), holder)
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.evictions) == (2, 80, 1)


def test_pinned_entries_are_never_evicted_even_over_the_bounds() -> None:
    cache, holder = KernelCache(max_entries=1, max_bytes=1), Holder()
    for name in "abc":
        load(cache, name, holder)
    assert (cache.stats().entries, cache.stats().pinned, cache.stats().evictions) == (3, 3, 0)


def test_an_entry_is_pinned_until_its_last_holder_lets_go() -> None:
    cache, first, second = KernelCache(), Holder(), Holder()
    load(cache, "a", first)
    load(cache, "a", second)
    cache.unpin(key("a"), first)
    assert cache.stats().pinned == 1
    cache.unpin(key("a"), second)
    assert cache.stats().pinned == 0


def test_a_holder_that_is_gone_pins_nothing() -> None:
    cache, holder = KernelCache(), Holder()
    load(cache, "a", holder)
    del holder
    gc.collect()
    assert (cache.stats().entries, cache.stats().pinned) == (1, 0)


def test_a_load_that_fails_leaves_nothing_behind() -> None:
    cache = KernelCache()

    def broken() -> KernelProgram:
        raise OSError("no such code")

    with pytest.raises(OSError, match="no such code"):
        cache.load(key("a"), broken, Holder())
    assert cache.stats().entries == 0


def test_threads_that_miss_together_all_get_the_program_that_is_kept() -> None:
    cache, holder, barrier = KernelCache(), Holder(), threading.Barrier(8)
    got: list[KernelProgram] = []

    def loader() -> KernelProgram:
        barrier.wait(timeout=10)  # every thread is in its load at once: none holds the lock
        return cast(KernelProgram, Program())

    threads = [threading.Thread(target=lambda: got.append(cache.load(key("a"), loader, holder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    assert (cache.stats().misses, cache.stats().entries) == (8, 1)


def test_an_artifact_that_failed_in_three_layers_is_banned_for_thirty_seconds() -> None:
    now = [0.0]
    cache = KernelCache(clock=lambda: now[0])
    for layer in (1, 1, 1, 2):  # the same layer again is not another layer
        cache.record_failure("a", layer)
    cache.check_not_banned("a")
    cache.record_failure("a", 3)
    with pytest.raises(ArtifactRefused, match="banned in this process for another 30 s"):
        cache.check_not_banned("a")
    cache.check_not_banned("b")
    now[0] = 30.0
    cache.check_not_banned("a")
    cache.record_failure("a", 1)  # half-open: one more failure is enough
    with pytest.raises(ArtifactRefused):
        cache.check_not_banned("a")
