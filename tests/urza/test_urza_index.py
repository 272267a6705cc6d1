"""Questions to a store: the right answers in the right order, from an index that anyone may delete or damage."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper_triton.contracts.errors import ArtifactNotFound
from esper_triton.contracts.manifest import KernelStatus, TargetSpec
from esper_triton.contracts.query import KernelMatch, KernelQuery
from esper_triton.contracts.record import Figures
from esper_triton.urza import Event, Urza
from esper_triton.urza import index as index_module

CUDA = TargetSpec(backend="cuda", arch="90")
BLUEPRINTS = ("00000000000a", "00000000000b")
TAGS = ("high_speed", "medium_speed", "low_speed", "high_memory", "numerically_stable")


def artifact_id(number: int, blueprint: str = BLUEPRINTS[0], target: str = "cpu") -> str:
    return f"{blueprint}-{target}-standard-{number:012x}"


def without_uses(matches: list[KernelMatch]) -> list[KernelMatch]:
    return [match.model_copy(update={"uses": 0}) for match in matches]


def files_of_the_index(urza: Urza) -> list[Path]:
    return sorted((urza.root / "index").iterdir())


@pytest.fixture
def filled(urza, make_artifact):
    """Five artifacts: four VALIDATED ones of two blueprints, of which one is for a GPU, and a REJECTED one."""
    for number, (blueprint, target, latency_us, tags, dims) in enumerate(
        [
            (BLUEPRINTS[0], None, 30.0, ["medium_speed"], {"d": 64, "r": 16}),
            (BLUEPRINTS[0], None, 10.0, ["high_speed", "high_memory"], {"d": 64, "r": 8}),
            (BLUEPRINTS[1], CUDA, 20.0, ["high_speed"], {"d": 6}),
            (BLUEPRINTS[1], None, None, [], {"d": 64}),
            (BLUEPRINTS[1], None, 1.0, [], {"d": 64}),
        ]
    ):
        label = "cpu" if target is None else target.label
        manifest, blobs = make_artifact(
            artifact_id(number, blueprint, label),
            dims=dims,
            created_at=f"2025-01-0{number + 1}T00:00:00+00:00",
            **({} if target is None else {"target": target}),
        )
        urza.commit(manifest, blobs)
        figures = Figures(latency_us=latency_us, memory_bytes=None if number == 3 else 1000 * number)
        status = KernelStatus.REJECTED if number == 4 else KernelStatus.VALIDATED
        urza.set_status(manifest.id, status, tags=tags, figures=figures)
    return urza


@pytest.mark.parametrize(
    ("conditions", "numbers"),
    [
        ({}, [1, 2, 0, 3]),
        ({"limit": 2}, [1, 2]),
        ({"blueprint_id": BLUEPRINTS[0] + "0" * 52}, [1, 0]),
        ({"target": "cpu"}, [1, 0, 3]),
        ({"target": "cuda90"}, [2]),
        ({"target": "cuda80"}, []),
        ({"dtype": "float32", "dims": {"d": 64}}, [1, 0, 3]),
        ({"dims": {"d": 6}}, [2]),
        ({"dims": {"d": 64, "r": 16}}, [0]),
        ({"dims": {"r": 64}}, []),
        ({"dtype": "float16"}, []),
        ({"required": ["high_speed"]}, [1, 2]),
        ({"required": ["high_speed", "high_memory"]}, [1]),
        ({"required": ["speed"]}, []),
        ({"excluded": ["high_memory"]}, [2, 0, 3]),
        ({"preferred": ["medium_speed"]}, [0, 1, 2, 3]),
        ({"preferred": ["high_speed", "high_memory"], "target": "cpu"}, [1, 0, 3]),
        ({"max_latency_us": 20.0}, [1, 2]),
        ({"max_memory_bytes": 1000}, [1, 0]),
        ({"statuses": ["REJECTED"]}, [4]),
        ({"statuses": list(KernelStatus)}, [4, 1, 2, 0, 3]),
        ({"statuses": []}, []),
    ],
    ids=str,
)
def test_a_question_is_answered_by_what_fits_the_best_first(filled, conditions, numbers):
    assert [int(match.id[-12:], 16) for match in filled.query(**conditions)] == numbers
    assert filled.query(KernelQuery(**conditions)) == filled.query(**conditions)


def test_an_answer_says_what_the_store_says(filled):
    filled.load(artifact_id(1))
    filled.load(artifact_id(1))
    [match] = filled.query(max_latency_us=10.0)
    artifact, blobs = filled.load(match.id)
    assert match == KernelMatch(
        id=artifact.id,
        digest=artifact.digest,
        blueprint_id=artifact.manifest.blueprint_id,
        blueprint_name="adapter",
        target="cpu",
        pipeline="standard",
        dtype="float32",
        dims={"d": 64, "r": 8},
        status=KernelStatus.VALIDATED,
        tags=("high_speed", "high_memory"),
        figures=Figures(latency_us=10.0, memory_bytes=1000),
        created_at="2025-01-02T00:00:00+00:00",
        compile_seconds=0.5,
        size_bytes=len(artifact.manifest.canonical_bytes()) + sum(map(len, blobs.values())),
        uses=2,
    )
    assert filled.match(match.id) == match.model_copy(update={"uses": 3})
    assert filled.match(artifact_id(99)) is None


def test_a_condition_that_there_is_none_is_refused(filled):
    with pytest.raises(ValidationError, match="colour"):
        filled.query(colour="red")
    with pytest.raises(ValidationError, match="limit"):
        filled.query(limit=0)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_answers_are_those_of_a_loop_over_everything(filled, data):
    draw = data.draw
    query = KernelQuery(
        blueprint_id=draw(st.none() | st.sampled_from([one + "0" * 52 for one in BLUEPRINTS])),
        target=draw(st.sampled_from([None, "cpu", "cuda90"])),
        dims=draw(st.dictionaries(st.sampled_from("dr"), st.sampled_from([6, 8, 64]), max_size=2)),
        statuses=tuple(draw(st.sets(st.sampled_from(list(KernelStatus))))),
        required=tuple(draw(st.sets(st.sampled_from(TAGS), max_size=1))),
        preferred=tuple(draw(st.sets(st.sampled_from(TAGS), max_size=3))),
        excluded=tuple(draw(st.sets(st.sampled_from(TAGS), max_size=2))),
        max_latency_us=draw(st.none() | st.floats(0, 40)),
        max_memory_bytes=draw(st.none() | st.integers(0, 4000)),
        limit=draw(st.integers(1, 6)),
    )
    expected = []
    for one in filled.ids():
        manifest, record = filled.get(one).manifest, filled.record(one)
        latency, memory = record.figures.latency_us, record.figures.memory_bytes
        if (
            query.blueprint_id in (None, manifest.blueprint_id)
            and query.target in (None, manifest.target.label)
            and query.dims.items() <= manifest.dims.items()
            and manifest.status in query.statuses
            and set(query.required) <= set(record.tags)
            and not set(query.excluded) & set(record.tags)
            and (query.max_latency_us is None or (latency is not None and latency <= query.max_latency_us))
            and (query.max_memory_bytes is None or (memory is not None and memory <= query.max_memory_bytes))
        ):
            liked = len(set(query.preferred) & set(record.tags))
            expected.append((-liked, latency is None, latency or 0.0, one))
    assert [match.id for match in filled.query(query)] == [one for *_, one in sorted(expected)][: query.limit]


def test_the_index_can_be_deleted_and_loses_nothing_but_the_counts_of_uses(filled):
    filled.load(artifact_id(1))
    everything = filled.query(statuses=list(KernelStatus))
    history = filled.history(BLUEPRINTS[0])
    assert len(history) == 4
    filled.close()
    shutil.rmtree(filled.root / "index")
    other = Urza(filled.root)
    assert other.query(statuses=list(KernelStatus)) == without_uses(everything)
    assert other.history(BLUEPRINTS[0]) == history
    # under an open one
    shutil.rmtree(filled.root / "index")
    assert other.query(statuses=list(KernelStatus)) == without_uses(everything)
    assert other.rebuild_index() == 5
    assert other.query(statuses=list(KernelStatus)) == without_uses(everything)
    other.close()


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but as long as one" * 1000)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE artifacts (name TEXT)")
        database.execute("PRAGMA user_version = 999")
    database.close()


def no_columns(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE uses")
    database.close()


def linked(path: Path) -> None:
    outside = path.parent.parent.parent / "outside.sqlite3"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("damage", [garbage, truncated, other_tables, no_columns, linked, Path.unlink])
def test_a_damaged_index_is_made_again(filled, make_artifact, damage):
    everything = without_uses(filled.query(statuses=list(KernelStatus)))
    filled.close()
    for path in files_of_the_index(filled)[1:]:
        path.unlink()
    damage(filled.root / "index" / "artifacts.sqlite3")
    other = Urza(filled.root)
    assert other.query(statuses=list(KernelStatus)) == everything
    other.commit(*make_artifact(artifact_id(77)))
    assert len(other.query(statuses=list(KernelStatus))) == 6
    assert not (filled.root / "index" / "artifacts.sqlite3").is_symlink()
    other.close()


def test_what_another_process_changes_is_in_the_next_answer(filled, make_artifact):
    other = Urza(filled.root)
    assert len(other.query()) == 4
    filled.reject(artifact_id(1))
    assert [match.id[-1] for match in other.query()] == ["2", "0", "3"]
    filled.commit(*make_artifact(artifact_id(9)))
    filled.promote(artifact_id(9))
    assert len(other.query()) == 4
    other.close()


def test_a_change_that_is_in_the_log_and_not_yet_made_is_not_missed(filled, make_artifact, monkeypatch):
    other = Urza(filled.root)
    seen = []
    write = filled._directory.write

    def asked_in_between(parts, content, **options):
        if parts[0] == "refs":
            seen.append([match.id for match in other.query(statuses=["ARCHIVED"])])
        write(parts, content, **options)

    monkeypatch.setattr(filled._directory, "write", asked_in_between)
    filled.archive(artifact_id(1))
    assert seen == [[]]
    assert [match.id for match in other.query(statuses=["ARCHIVED"])] == [artifact_id(1)]
    other.close()


def test_a_log_that_is_not_the_one_the_index_followed_makes_it_anew(filled):
    everything = without_uses(filled.query(statuses=list(KernelStatus)))
    log = filled.root / "audit.log"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[2:]))
    (filled.root / "refs" / artifact_id(1)).unlink()
    assert without_uses(filled.query(statuses=list(KernelStatus))) == [
        match for match in everything if match.id != artifact_id(1)
    ]


def test_a_line_of_a_newer_release_makes_the_index_look_at_everything(filled):
    assert len(filled.query()) == 4
    last = json.loads((filled.root / "audit.log").read_bytes().splitlines()[-1])
    with open(filled.root / "audit.log", "a") as log:
        log.write(json.dumps(last | {"schema_version": "2.9", "what": "moved", "colour": "red"}) + "\n")
    (filled.root / "refs" / artifact_id(1)).unlink()
    assert [match.id[-1] for match in filled.query()] == ["2", "0", "3"]


def test_history_tells_every_change_of_an_artifact_in_order(filled):
    filled.archive(artifact_id(1))
    changes = filled.history(artifact_id(1))
    assert [(change.what, change.source, change.target, change.role) for change in changes] == [
        ("committed", None, "PENDING_BENCHMARKING", "forge"),
        ("status", "PENDING_BENCHMARKING", "VALIDATED", "prover"),
        ("status", "VALIDATED", "ARCHIVED", "prover"),
    ]
    assert changes[-1].manifest == filled.get(artifact_id(1)).digest
    assert {change.artifact_id for change in filled.history(BLUEPRINTS[0])} == {artifact_id(0), artifact_id(1)}
    assert filled.history(BLUEPRINTS[0] + "0" * 52) == filled.history(BLUEPRINTS[0])
    assert filled.history("f" * 64) == []


def test_a_store_that_is_not_there_has_nothing_and_asking_does_not_make_it(tmp_path):
    urza = Urza(tmp_path / "none")
    assert urza.query() == []
    assert urza.history("0" * 64) == []
    assert list(tmp_path.iterdir()) == []


def test_on_a_network_file_system_the_index_is_in_memory(filled, monkeypatch):
    events: list[Event] = []
    monkeypatch.setattr(index_module, "on_network", lambda folder: True)
    other = Urza(filled.root)
    other.on_event(events.append)

    assert len(other.query()) == 4
    assert len(other.query()) == 4
    assert not (filled.root / "index").exists()
    assert [event.message for event in events] == ["the store is on a network file system; it is kept in memory"]


def test_a_question_after_a_fork_has_its_own_connection(filled):
    code = (
        "import os, sys\n"
        "from esper_triton.urza import Urza\n"
        "urza = Urza(sys.argv[1])\n"
        "assert len(urza.query()) == 4\n"
        "child = os.fork()\n"
        "answer = len(urza.query())\n"
        "if not child: os._exit(answer)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * 10 + answer)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(filled.root)], check=False).returncode == 44


def test_an_artifact_that_is_gone_is_in_no_answer(filled):
    filled.gc(0)
    assert filled.query(statuses=list(KernelStatus)) == []
    with pytest.raises(ArtifactNotFound):
        filled.get(artifact_id(1))
    assert [change.what for change in filled.history(artifact_id(1))] == ["committed", "status", "removed"]
