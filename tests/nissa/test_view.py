"""What is known of models, seeds and jobs, from messages alone."""

from __future__ import annotations

import numpy as np
from messages import ARTIFACT, CUDA, frame, move, one_of_everything, tell

from esper_triton.contracts.events import CompileFailed, CompileRequest, EpochEvent, KernelReady
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.nissa.details import seed_detail
from esper_triton.nissa.live import overview
from esper_triton.nissa.metrics import Metrics
from esper_triton.nissa.view import ACTIVE, STATES, View
from esper_triton.oona.wire import MODELS


def test_states_are_those_of_the_lifecycle() -> None:
    assert [state.name for state in SeedLifecycleState] == list(STATES)
    assert [state.value for state in SeedLifecycleState] == list(range(len(STATES)))
    assert {state.value for state in SeedLifecycleState if state.is_active} == ACTIVE


def test_a_frame_sets_every_seed_and_a_move_between_frames_one() -> None:
    view = View()
    tell(view, frame(["DORMANT", "TRAINING", "GRAFTING", "DORMANT"], layers=2, alpha=[0, 0, 0.5, 0]))
    model = view.models["m"]
    assert model.counts() == {"DORMANT": 2, "TRAINING": 1, "GRAFTING": 1}
    tell(view, move("TRAINING", "CULLED", layer="layers.0", seed=1))
    tell(view, move("TRAINING", "CULLED", layer="nowhere", seed=1))
    assert model.counts() == {"DORMANT": 2, "GRAFTING": 1, "CULLED": 1}
    assert [entry.failure for entry in view.entries] == [True, True]
    tell(view, frame(["DORMANT"] * 4, layers=2, at=900.0))  # older than what is known
    assert model.counts() == {"DORMANT": 2, "GRAFTING": 1, "CULLED": 1}
    tell(view, frame(["DORMANT"] * 3 + ["SPROUTING"], layers=2, at=1001.0))  # of a newer release
    assert model.counts() == {"DORMANT": 3, "UNKNOWN": 1}


def test_a_move_that_comes_before_an_older_frame_is_not_undone_by_it() -> None:
    view = View()
    tell(view, move("TRAINING", "GRAFTING", seed=1), at=1002.0)
    tell(view, move("DORMANT", "GERMINATED", seed=0), at=1000.5)
    tell(view, frame(["TRAINING", "TRAINING"], at=1001.0))
    assert view.models["m"].counts() == {"TRAINING": 1, "GRAFTING": 1}
    tell(view, move("LOADING", "TRAINING", seed=1), at=1000.7)  # of the past: a log that is read from its beginning
    assert view.models["m"].counts() == {"TRAINING": 1, "GRAFTING": 1}
    tell(view, frame(["TRAINING", "TRAINING"], at=1003.0))
    assert view.models["m"].counts() == {"TRAINING": 2}


def test_a_seed_is_followed_over_time_and_by_what_it_met() -> None:
    view = View()
    for k in range(5):
        tell(view, frame(["GRAFTING", "DORMANT"], at=1000.0 + k, alpha=[k / 4, 0], health=[0.5 + k / 10, None]))
    tell(view, move("TRAINING", "GRAFTING"), at=1000.0, trace_id="t")
    detail = seed_detail(view, "m", "layers.0", 0)
    assert detail is not None
    assert detail["history"] == {
        "at": [1000.0, 1001.0, 1002.0, 1003.0, 1004.0],
        "alpha": [0.0, 0.25, 0.5, 0.75, 1.0],
        "health": [0.5, 0.6, 0.7, 0.8, 0.9],
    }
    assert (detail["signal"]["state"], detail["signal"]["alpha"], detail["signal"]["chunk"]) == (4, 1.0, [0, 8])
    assert detail["signal"]["execution_latency_us"] is None  # not measured, and so not told
    assert detail["artifact_id"] == ARTIFACT
    assert [(entry["text"], entry["trace_id"]) for entry in detail["entries"]] == [("TRAINING to GRAFTING", "t")]
    assert seed_detail(view, "m", "layers.0", 1)["history"]["health"] == [None] * 5
    assert seed_detail(view, "m", "layers.0", 2) is None
    assert seed_detail(view, "other", "layers.0", 0) is None


def test_what_was_measured_of_a_seed_is_in_its_detail() -> None:
    columns = {
        "execution_latency_us": (12.5, None),
        "kernel_load_latency_us": (1234.5, None),
        "activation_variance": (0.75, None),
        "dead_neuron_ratio": (0.125, None),
        "avg_correlation": (0.3, None),
    }
    view = View()
    tell(view, frame(["GRAFTING", "DORMANT"]).model_copy(update=columns))
    for seed in range(2):
        detail = seed_detail(view, "m", "layers.0", seed)
        assert detail is not None
        assert {name: detail["signal"][name] for name in columns} == {name: c[seed] for name, c in columns.items()}


def test_a_seed_that_goes_on_with_another_kernel_has_made_no_move() -> None:
    other = "0123456789ab-cpu-standard-000000000000"
    metrics = Metrics()
    view = View(metrics)
    tell(view, frame(["GRAFTING", "DORMANT"]))
    tell(view, move("GRAFTING", "GRAFTING").model_copy(update={"artifact_id": other}), at=1001.0)
    detail = seed_detail(view, "m", "layers.0", 0)
    assert detail is not None
    assert (detail["signal"]["state"], detail["artifact_id"]) == (4, other)
    assert [entry["text"] for entry in detail["entries"]] == [f"goes on in GRAFTING with {other}"]
    assert b"esper_seed_transitions_total{" not in metrics.text()


def test_a_compile_is_followed_from_its_request_to_the_last_of_its_artifacts() -> None:
    view = View()
    request = CompileRequest(
        blueprint='{"name":"adapter","ops":[{"name":"v0"}]}', dtype="float32", targets=(CUDA, CUDA), model="m"
    )
    tell(view, request, at=10.0, event_id="job", trace_id="t")
    (job,) = view.jobs.values()
    assert (job.what, job.targets, job.outcome, job.trace_id) == ("adapter", ("cuda90", "cuda90"), "waiting", "t")
    ready = KernelReady(artifact_id=ARTIFACT, manifest_digest="0" * 64, status=KernelStatus.VALIDATED, part=1, parts=2)
    tell(view, ready, at=11.0, in_reply_to="job")
    assert view.waiting() == (1, 0)
    tell(view, ready.model_copy(update={"part": 0}), at=12.5, in_reply_to="job")
    tell(view, CompileFailed(error="CompileError", message="late"), at=13.0, in_reply_to="job")  # of a second worker
    assert (job.outcome, job.answered_at, view.waiting()) == ("ready", 12.5, (0, 0))
    for text in ("[" * 100_000, "{}", "no", '{"name": 3}'):  # what anybody may send
        tell(view, CompileRequest(blueprint=text, dtype="float32", targets=(CUDA,)))
    assert [job.what for job in view.jobs.values()][1:] == ["what is no blueprint"] * 3 + ["3"]


def test_messages_of_every_topic_are_taken() -> None:
    view = View()
    one_of_everything(view)
    assert set(view._takers) == set(MODELS.values())
    kinds = {entry.kind for entry in view.entries}
    assert kinds == {"lifecycle", "epoch", "compile", "proof", "report", "command", "store"}


def test_what_is_kept_is_bounded() -> None:
    view = View()
    for k in range(6000):
        tell(view, EpochEvent(model=f"model {k}", epoch=k, seeds_by_state={}))
    for _ in range(600):
        tell(view, CompileRequest(blueprint="x", dtype="float32", targets=(CUDA,)))
    assert (len(view.models), len(view.entries), len(view.jobs)) == (64, 5000, 500)
    assert [entry.number for entry in view.entries_after(6597)] == [6598, 6599, 6600]
    assert len(view.entries_after(0, limit=7)) == 7


def test_an_overview_has_what_a_script_asks_for() -> None:
    view = View()
    one_of_everything(view)
    found = overview(view)
    model = found["models"]["m"]
    assert model["seeds_by_state"] == {"FOSSILIZED": 1, "DORMANT": 1, "CULLED": 2}  # one was culled since the frame
    assert (model["epoch"], model["step"], model["faults"], model["cache"]["bytes"]) == (3, 70, 3, 4096)
    assert [(one["seed"], one["state"], one["alpha"]) for one in model["active"]] == [(1, "FOSSILIZED", 1.0)]
    assert (model["active_alpha_mean"], round(model["active_health_mean"], 5)) == (0.625, 0.7)
    assert found["compile"]["waiting"] == 1
    assert [job["outcome"] for job in found["compile"]["jobs"]] == ["ready", "failed", "waiting"]
    assert [entry["kind"] for entry in found["failures"]] == ["lifecycle", "compile", "proof", "command", "store"]
    assert found["bus"]["groups"]["tezzeret"] == {"lag": 4, "held": 2}
    assert "~own" not in found["bus"]["groups"]


def test_ten_thousand_seeds_have_their_places() -> None:
    view = View()
    states = [STATES[k % len(STATES)] for k in range(10_000)]
    for k in range(3):
        tell(view, frame(states, layers=500, at=1000.0 + k, alpha=[k / 4] * 10_000))
    model = view.models["m"]
    assert sum(model.counts().values()) == 10_000
    place = model.place("layers.499", 19)
    assert place == 9999
    assert np.array_equal(model.alphas.column(place)[1], [0.0, 0.25, 0.5])
