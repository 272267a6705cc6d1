"""The hand-over: nothing lost that must not be, and everything else counted."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE
from esper_triton.oona.lanes import Lane, Tally


def leave(lane: Lane, payload: object) -> None:
    """As `Oona.publish` does."""
    lane.buffer.append((payload, 0.0, None, None, None))
    if len(lane.buffer) > lane.bound:
        lane.drop_oldest()


@given(bound=st.integers(1, 5), steps=st.lists(st.one_of(st.none(), st.integers(1, 7)), max_size=30))
def test_the_newest_telemetry_stays_and_numbers_tell_what_is_missing(bound: int, steps: list[int | None]) -> None:
    """None takes everything there is, a number leaves as many."""
    lane, left, expected = Lane(HEALTH, bound), 0, []
    taken: list[tuple[int, object]] = []
    for step in [*steps, None]:
        if step is None:
            while (found := lane.take()) is not None:
                taken.append((found[0], found[1][0]))
        else:
            for _ in range(step):
                leave(lane, left)
                expected.append(left)
                left += 1
            # Of what has not been taken, all but the newest `bound`.
            waiting = [n for n in expected if not any(n == payload for _, payload in taken)]
            expected = [n for n in expected if n not in waiting[: max(0, len(waiting) - bound)]]
    assert [payload for _, payload in taken] == expected
    assert all(sequence == payload for sequence, payload in taken)
    assert lane.dropped.read() == left - len(taken)


def test_numbers_of_what_is_kept_have_no_holes_where_something_was_no_message() -> None:
    lane = Lane(LIFECYCLE, 10)
    for k in range(4):
        leave(lane, k)
    assert lane.take()[0] == 0
    assert lane.take()[0] == 1
    lane.void()
    assert [lane.take()[0], lane.take()[0]] == [1, 2]
    assert lane.refused.read() == 1


def test_drops_are_counted_exactly_while_threads_publish_and_one_takes() -> None:
    lane, threads, each = Lane(HEALTH, 16), 4, 5000
    taken: list[tuple[int, tuple[int, int]]] = []
    done = threading.Event()

    def publish(number: int) -> None:
        for k in range(each):
            leave(lane, (number, k))

    def take() -> None:
        while not done.is_set() or lane.buffer:
            found = lane.take()
            if found is not None:
                taken.append((found[0], found[1][0]))

    publishers = [threading.Thread(target=publish, args=(number,)) for number in range(threads)]
    taker = threading.Thread(target=take)
    for thread in [taker, *publishers]:
        thread.start()
    for thread in publishers:
        thread.join()
    done.set()
    taker.join()
    assert len(taken) + lane.dropped.read() == threads * each
    sequences = [sequence for sequence, _ in taken]
    assert sequences == sorted(set(sequences))
    for number in range(threads):
        own = [k for _, (n, k) in taken if n == number]
        assert own == sorted(set(own))


@given(adds=st.lists(st.integers(0, 20), max_size=8))
def test_a_tally_is_not_changed_by_reading_it(adds: list[int]) -> None:
    tally, total = Tally(), 0
    for count in adds:
        for _ in range(count):
            tally.add()
        total += count
        assert tally.read() == total
        assert tally.read() == total
