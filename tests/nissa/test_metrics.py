"""`/metrics`: names, units and values as Prometheus reads them, and how many series there can be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from messages import frame, move, one_of_everything, tell
from prometheus_client.parser import text_string_to_metric_families

from esper_triton.contracts.events import CompileFailed
from esper_triton.nissa.metrics import Metrics
from esper_triton.nissa.view import STATES, View

GRAFANA = Path(__file__).resolve().parents[2] / "docs" / "nissa-grafana.json"
UNITS = ("seconds", "bytes", "ratio", "messages", "entries", "jobs", "total", "epoch", "omitted", "faults", "up")
SERIES = re.compile(r"(esper_[a-z_]+)(\{[^}]*\})?")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(models=3, groups=4, seed_series=5)


@pytest.fixture
def view(metrics: Metrics) -> View:
    view = View(metrics)
    metrics.show(view)
    return view


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels; `_created` is when a counter was made, and nobody's business."""
    families = text_string_to_metric_families(metrics.text().decode())
    found = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}
    assert len(values) == len(found)  # no series twice
    return values


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def test_everything_that_has_happened_is_counted(metrics: Metrics, view: View) -> None:
    one_of_everything(view)
    expected = [
        (1, "esper_seeds", {"model": "m", "state": "FOSSILIZED"}),
        (2, "esper_seeds", {"model": "m", "state": "CULLED"}),
        (0, "esper_seeds", {"model": "m", "state": "TRAINING"}),
        (3, "esper_model_epoch", {"model": "m"}),
        (1000.0, "esper_model_health_timestamp_seconds", {"model": "m"}),
        (3, "esper_seed_faults", {"model": "m"}),
        (1.0, "esper_seed_alpha_ratio", {"model": "m", "layer": "layers.0", "seed": "1"}),
        (pytest.approx(0.9), "esper_seed_health_ratio", {"model": "m", "layer": "layers.0", "seed": "1"}),
        (1, "esper_seed_transitions_total", {"model": "m", "target": "TRAINING"}),
        (1, "esper_seed_errors_total", {"model": "m", "reason": "NonFiniteOutput"}),
        (1, "esper_seed_load_seconds_count", {"model": "m"}),
        (2.5, "esper_seed_load_seconds_sum", {"model": "m"}),
        (1, "esper_seed_launch_seconds_bucket", {"model": "m", "le": "5e-05"}),
        (2, "esper_seed_launch_seconds_bucket", {"model": "m", "le": "0.0001"}),
        (pytest.approx(120e-6), "esper_seed_launch_seconds_gsum", {"model": "m"}),
        (7, "esper_kernel_cache_hits_total", {"model": "m"}),
        (3, "esper_kernel_cache_misses_total", {"model": "m"}),
        (1, "esper_kernel_cache_evictions_total", {"model": "m"}),
        (4096, "esper_kernel_cache_size_bytes", {"model": "m"}),
        (3, "esper_compile_requests_total", {"reason": "submitted"}),
        (1, "esper_compile_artifacts_total", {"how": "built"}),
        (1, "esper_compile_failures_total", {"error": "BlueprintError"}),
        (0.7, "esper_compile_seconds_sum", {}),
        (2.0, "esper_compile_request_seconds_sum", {"outcome": "ready"}),
        (1.0, "esper_compile_request_seconds_sum", {"outcome": "failed"}),
        (4, "esper_compile_queue_jobs", {"state": "waiting"}),
        (2, "esper_compile_queue_jobs", {"state": "running"}),
        (1, "esper_validation_queue_jobs", {"state": "waiting"}),
        (1, "esper_validations_total", {"verdict": "REJECTED"}),
        (4.0, "esper_validation_seconds_sum", {}),
        (1, "esper_field_reports_total", {"outcome": "FOSSILIZED"}),
        (1, "esper_command_results_total", {"status": "refused"}),
        (1, "esper_store_events_total", {"kind": "quarantined"}),
        (1, "esper_bus_up", {}),
        (4, "esper_bus_group_lag_messages", {"group": "tezzeret"}),
        (5, "esper_bus_gap_messages_total", {"topic": "telemetry.seed.health"}),
        (2, "esper_bus_dropped_messages_total", {"topic": "telemetry.seed.health"}),
    ]
    assert [(value(metrics, name, **labels), name) for _, name, labels in expected] == [
        (number, name) for number, name, _ in expected
    ]
    assert value(metrics, "esper_bus_group_lag_messages", group="~own") is None


def test_names_have_their_units_and_every_metric_says_what_it_is(metrics: Metrics, view: View) -> None:
    one_of_everything(view)
    families = list(text_string_to_metric_families(metrics.text().decode()))
    assert len(families) >= 30
    for family in families:
        if family.name.endswith("_created"):
            continue
        assert family.name.startswith("esper_"), family.name
        assert family.documentation.endswith("."), family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
        elif family.name != "esper_seeds":
            stem = re.sub(r"_(gcount|gsum)$", "", family.name)
            assert stem.endswith(UNITS), family.name


def test_the_number_of_series_is_bounded_whatever_comes(metrics: Metrics, view: View) -> None:
    one_of_everything(view)
    for k in range(200):
        model = f"model {k}"
        tell(view, frame(["GRAFTING"] * 100, model=model, layers=10, alpha=[0.5] * 100, health=[0.5] * 100))
        tell(view, move("GRAFTING", "CULLED", model=model, error=f"Error{k}"))
        tell(view, CompileFailed(error=f"Error{k}", message="no"))
    view.server = {"groups": {f"group {k}": {"lag": 1, "held": 0} for k in range(100)}}
    before = len(samples(metrics))
    assert before < 500
    for k in range(200, 400):
        tell(view, move("GRAFTING", f"STATE{k}", model=f"model {k}", error=f"Error{k}"))
    assert len(samples(metrics)) <= before + 2  # a state that there is not, once
    found = samples(metrics)
    assert {dict(labels)["model"] for name, labels in found if name == "esper_seeds"} <= {"m", "model 0", "model 1"}
    assert sum(name == "esper_seed_alpha_ratio" for name, _ in found) == 5
    assert value(metrics, "esper_seed_series_omitted") == 1 + 99 + 99 - 5  # of the three models
    assert value(metrics, "esper_seed_errors_total", model="other", reason="other") > 100
    assert sum(count for (name, _), count in found.items() if name == "esper_bus_group_lag_messages") == 100


def test_without_a_hub_the_queue_is_what_was_seen(metrics: Metrics, view: View) -> None:
    one_of_everything(view)
    view.server = {}
    assert value(metrics, "esper_compile_queue_jobs", state="waiting") == 1
    assert value(metrics, "esper_bus_up") == 0


def test_the_distribution_of_alpha_is_that_of_the_seeds(metrics: Metrics, view: View) -> None:
    tell(view, frame(["GRAFTING"] * 5 + ["DORMANT"], alpha=[0.0, 0.1, 0.3, 0.3, 1.0, 0.0]))
    counts = [value(metrics, "esper_active_seed_alpha_ratio_bucket", model="m", le=repr(k / 10)) for k in range(11)]
    assert counts == [1, 2, 2, 4, 4, 4, 4, 4, 4, 4, 5]
    assert value(metrics, "esper_active_seed_alpha_ratio_gcount", model="m") == 5
    assert value(metrics, "esper_active_seed_health_ratio_gcount", model="m") is None  # nothing was measured
    assert {state for state in STATES if value(metrics, "esper_seeds", model="m", state=state)} == {
        "GRAFTING",
        "DORMANT",
    }


def test_every_query_of_the_grafana_dashboard_is_of_what_is_exported(metrics: Metrics, view: View) -> None:
    one_of_everything(view)
    exported: dict[str, set[str]] = {}
    for name, labels in samples(metrics):
        exported.setdefault(name, set()).update(dict(labels))
    board = json.loads(GRAFANA.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) >= 25
    used = set()
    for query in queries:
        assert query.count("(") == query.count(")")
        names = {match[1] for match in SERIES.finditer(query)}
        assert names
        assert names <= set(exported), f"{query}: not exported: {names - set(exported)}"
        known = set.union(*(exported[name] for name in names))
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        selected = set(re.findall(r"(\w+)=~?\"", query))
        assert grouped | selected <= known, f"{query}: no labels {(grouped | selected) - known}"
        used |= names
    for panel in board["panels"]:
        legend = {label for t in panel["targets"] for label in re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])}
        names = {match[1] for t in panel["targets"] for match in SERIES.finditer(t["expr"])}
        assert legend <= set.union(*(exported[name] for name in names)), panel["title"]
    shown = {re.sub(r"_(bucket|gsum|gcount|sum|count)$", "", name) for name in used}
    everything = {re.sub(r"_(bucket|gsum|gcount|sum|count)$", "", name) for name in exported}
    # What the dashboard leaves out, on purpose.
    assert everything - shown == {
        "esper_seed_series_omitted",
        "esper_active_seed_alpha_ratio",
        "esper_bus_sent_messages_total",
    }
    places = {
        (p["gridPos"]["x"] + x, p["gridPos"]["y"] + y)
        for p in board["panels"]
        for x in range(p["gridPos"]["w"])
        for y in range(p["gridPos"]["h"])
    }
    assert len(places) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in board["panels"])  # no two overlap
