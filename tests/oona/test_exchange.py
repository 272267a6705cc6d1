"""Streams and groups, against a model of what each group has still to see."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE, RESULTS
from esper_triton.oona.exchange import Consumer, Exchange, Limits, Place, Taken


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class GroupsMachine(RuleBasedStateMachine):
    """Members come, take, acknowledge and leave. `owed` is what each group has not acknowledged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.exchange = Exchange(Limits(messages=40), Clock())
        self.sequences = {LIFECYCLE: 0, RESULTS: 0}
        self.owed: dict[str, dict[str, list[int]]] = {}
        self.members: list[tuple[Consumer, list[Taken]]] = []

    @rule(topic=st.sampled_from([LIFECYCLE, RESULTS]), again=st.booleans())
    def publish(self, topic: str, again: bool) -> None:
        sequence = self.sequences[topic]
        unread = max((len(owed[topic]) for owed in self.owed.values()), default=0)
        verdict, _ = self.exchange.publish(topic, "s", sequence, sequence, 1)
        if verdict == "full":
            assert unread > 0
            return
        assert verdict == "taken"
        self.sequences[topic] += 1
        for owed in self.owed.values():
            owed[topic].append(sequence)
        if again:
            assert self.exchange.publish(topic, "s", sequence, sequence, 1)[0] == "duplicate"

    @rule(name=st.sampled_from("ab"), window=st.integers(1, 5))
    def join(self, name: str, window: int) -> None:
        group = self.exchange.join(name, [LIFECYCLE, RESULTS])
        self.owed.setdefault(name, {LIFECYCLE: [], RESULTS: []})
        self.members.append((self.exchange.attach(group, window=window), []))

    @precondition(lambda self: self.members)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def take(self, data: st.DataObject, limit: int) -> None:
        member, held = data.draw(st.sampled_from(self.members))
        taken = self.exchange.take(member, limit)
        assert len(held) + len(taken) <= member.window
        everybody = [t.place for m, h in self.members if m.group is member.group for t in h]
        assert not set(everybody) & {t.place for t in taken}
        for topic in (LIFECYCLE, RESULTS):
            in_hand = {
                t.content for m, h in self.members if m.group is member.group for t in h if t.place.topic == topic
            }
            waiting = [n for n in self.owed[member.group.name][topic] if n not in in_hand]
            got = [t.content for t in taken if t.place.topic == topic]
            assert got == waiting[: len(got)]
        held += taken

    @precondition(lambda self: any(held for _, held in self.members))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        member, held = data.draw(st.sampled_from([m for m in self.members if m[1]]))
        taken = held.pop(data.draw(st.integers(0, len(held) - 1)))
        assert self.exchange.ack(member.group, taken.place)
        assert not self.exchange.ack(member.group, taken.place)
        self.owed[member.group.name][taken.place.topic].remove(taken.content)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        k = data.draw(st.integers(0, len(self.members) - 1))
        self.exchange.detach(self.members.pop(k)[0])

    @invariant()
    def nothing_is_lost(self) -> None:
        groups = self.exchange.stats()["groups"]
        for name, owed in self.owed.items():
            assert groups[name]["lag"] + groups[name]["held"] == sum(map(len, owed.values()))
            assert groups[name]["lost"] == 0


TestGroups = GroupsMachine.TestCase
TestGroups.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_telemetry_is_bounded_by_count_bytes_and_age_and_what_a_group_loses_is_counted() -> None:
    clock = Clock()
    limits = Limits(telemetry_messages=5, telemetry_bytes=100, telemetry_age_s=60.0)
    exchange = Exchange(limits, clock)
    member = exchange.attach(exchange.join("g", [HEALTH]), window=100)
    for k in range(8):
        assert exchange.publish(HEALTH, "s", k, k, 10)[0] == "taken"
    assert [t.content for t in exchange.take(member, 100)] == [3, 4, 5, 6, 7]
    assert exchange.stats()["groups"]["g"]["lost"] == 3
    exchange.publish(HEALTH, "s", 8, 8, 90)
    assert exchange.stats()["topics"][HEALTH] == {
        "messages": 2,
        "bytes": 100,
        "trimmed": 7,
        "gaps": 0,
        "duplicates": 0,
    }
    clock.now += 61.0
    assert len(exchange.expire()[0]) == 2
    assert exchange.take(member, 100) == []


def test_what_a_group_has_still_to_read_is_not_trimmed_and_a_full_stream_takes_no_more() -> None:
    exchange = Exchange(Limits(messages=3), Clock())
    group = exchange.join("g", [LIFECYCLE])
    member = exchange.attach(group, window=10)
    assert [exchange.publish(LIFECYCLE, "s", k, k, 1)[0] for k in range(4)] == ["taken", "taken", "taken", "full"]
    taken = exchange.take(member, 10)
    exchange.ack(group, taken[1].place)
    assert exchange.publish(LIFECYCLE, "s", 3, 3, 1)[0] == "full"  # the first one is still owed
    exchange.ack(group, taken[0].place)
    assert exchange.publish(LIFECYCLE, "s", 3, 3, 1)[0] == "taken"
    assert [t.content for t in exchange.take(member, 10)] == [3]


def test_what_a_member_held_when_it_left_comes_first_again_and_says_how_often_it_was_tried() -> None:
    exchange = Exchange(None, Clock())
    group = exchange.join("g", [LIFECYCLE])
    first, second = (exchange.attach(group, window=10) for _ in range(2))
    for k in range(4):
        exchange.publish(LIFECYCLE, "s", k, k, 1)
    exchange.take(first, 2)
    exchange.detach(first)
    assert [(t.content, t.attempt) for t in exchange.take(second, 10)] == [(0, 2), (1, 2), (2, 1), (3, 1)]


def test_a_late_acknowledgement_of_one_taken_for_dead_counts() -> None:
    exchange = Exchange(None, Clock())
    group = exchange.join("g", [LIFECYCLE])
    first, second = (exchange.attach(group, window=10) for _ in range(2))
    exchange.publish(LIFECYCLE, "s", 0, 0, 1)
    place: Place = exchange.take(first, 1)[0].place
    exchange.detach(first)
    assert exchange.ack(group, place)
    assert exchange.take(second, 10) == []


def test_gaps_of_a_sender_are_counted_by_topic() -> None:
    exchange = Exchange(None, Clock())
    for sequence in (4, 5, 9, 9, 7, 10):
        exchange.publish(HEALTH, "s", sequence, None, 1)
    counters = exchange.stats()["topics"][HEALTH]
    assert (counters["gaps"], counters["duplicates"], counters["messages"]) == (3, 2, 4)


def test_the_place_of_a_private_reader_that_does_not_come_back_is_given_up() -> None:
    clock = Clock()
    exchange = Exchange(Limits(absent_s=10.0), clock)
    exchange.detach(exchange.attach(exchange.join("~p", [LIFECYCLE], private=True), window=1))
    exchange.detach(exchange.attach(exchange.join("g", [LIFECYCLE]), window=1))
    clock.now += 11.0
    assert [group.name for group in exchange.expire()[1]] == ["~p"]
    assert list(exchange.groups) == ["g"]


def test_a_group_may_begin_with_the_earliest_that_is_kept() -> None:
    exchange = Exchange(None, Clock())
    for k in range(3):
        exchange.publish(LIFECYCLE, "s", k, k, 1)
    early = exchange.attach(exchange.join("early", [LIFECYCLE], start="earliest"), window=10)
    late = exchange.attach(exchange.join("late", [LIFECYCLE]), window=10)
    assert [t.content for t in exchange.take(early, 10)] == [0, 1, 2]
    assert exchange.take(late, 10) == []
