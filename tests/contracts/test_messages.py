"""Envelopes and payloads: what they take, and what a reader of another version is told."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper_triton.contracts.envelope import TOPICS, Envelope, is_telemetry, topics_matching
from esper_triton.contracts.errors import MalformedMessage
from esper_triton.contracts.health import HealthFrame
from esper_triton.oona.wire import MODELS, pack, parse, unpack, unpack_frame

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=15,
)
ids = st.text(min_size=1, max_size=20)


@given(
    st.builds(
        Envelope,
        event_id=ids,
        topic=st.sampled_from(TOPICS),
        sender_id=ids,
        sequence=st.integers(0, 2**63),
        timestamp=st.floats(0, 1e11),
        trace_id=st.none() | ids,
        in_reply_to=st.none() | ids,
        payload=st.dictionaries(st.text(max_size=9), plain, max_size=5),
    )
)
def test_a_message_is_the_same_after_its_way_over_the_wire(envelope: Envelope) -> None:
    assert unpack(pack(envelope.model_dump())) == envelope


@given(st.binary(max_size=300))
def test_bytes_are_a_message_or_refused_as_one(content: bytes) -> None:
    for read in (unpack, unpack_frame):
        with pytest.raises(MalformedMessage):
            read(content)


def test_a_message_that_nests_without_end_is_refused() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(MalformedMessage, match="not msgpack"):
        unpack(deep)


@pytest.mark.parametrize("version", ["2.0", "10.3", "x.1", ""])
def test_a_newer_major_version_is_refused_and_a_newer_minor_is_read(version: str) -> None:
    fields = {"event_id": "e", "topic": TOPICS[0], "sender_id": "s", "sequence": 0, "timestamp": 0.0, "payload": {}}
    assert unpack(msgpack.packb({**fields, "schema_version": "1.9"})).schema_version == "1.9"
    with pytest.raises(MalformedMessage, match="schema_version"):
        unpack(msgpack.packb({**fields, "schema_version": version}))


def test_every_topic_has_a_model_and_telemetry_alone_may_be_dropped() -> None:
    assert set(MODELS) == set(TOPICS)
    assert [topic for topic in TOPICS if is_telemetry(topic)] == ["telemetry.seed.health"]
    assert topics_matching("compilation.*") == (
        "compilation.blueprint.submitted",
        "compilation.kernel.ready",
        "compilation.blueprint.failed",
    )


FRAME = {
    "model": "m",
    "timestamp": 1.0,
    "layers": ["a", "b"],
    "epochs": [0, 1],
    "steps": [5, 6],
    "layer": [0, 0, 1],
    "seed": [0, 1, 0],
    "chunk_start": [0, 4, 0],
    "chunk_stop": [4, 8, 8],
    "state": ["DORMANT", "GRAFTING", "DORMANT"],
    "alpha": [0.0, 0.5, 0.0],
    "error_count": [0, 2, 0],
    "is_ready_for_transition": [False, True, False],
    "execution_latency_us": [None, 3.5, None],
}


def test_a_health_frame_gives_each_seed_its_own() -> None:
    signals = list(HealthFrame.model_validate(FRAME).signals())
    assert [(s.layer, s.seed, s.chunk, s.epoch, s.step) for s in signals] == [
        ("a", 0, (0, 4), 0, 5),
        ("a", 1, (4, 8), 0, 5),
        ("b", 0, (0, 8), 1, 6),
    ]
    assert [s.execution_latency_us for s in signals] == [None, 3.5, None]
    assert {s.health_score for s in signals} == {None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": [0.0]}, "alpha has 1 entries, expected 3"),
        ({"steps": [1]}, "steps has 1 entries, expected 2"),
        ({"layer": [0, 0, 2]}, "layer has 2, expected positions in the 2 layers"),
        ({"health_score": [0.5, 1.5, None]}, "less than or equal to 1"),
    ],
)
def test_a_health_frame_whose_columns_do_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HealthFrame.model_validate(FRAME | change)
    envelope = Envelope(event_id="e", topic=TOPICS[0], sender_id="s", sequence=0, timestamp=0.0, payload=FRAME | change)
    with pytest.raises(MalformedMessage, match=said):
        parse(envelope)
