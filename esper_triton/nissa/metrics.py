"""Prometheus metrics of everything that comes over the bus, with a bounded number of series.

Counters and histograms count from when this process began to watch. What a model's process counts itself (its kernel
cache, errors of its seeds) is shown as it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from esper_triton.contracts import envelope as topics
from esper_triton.contracts import errors
from esper_triton.contracts.commands import CommandResult
from esper_triton.contracts.events import (
    CompileFailed,
    CompileRequest,
    FieldReport,
    KernelCharacterized,
    KernelReady,
    StoreEvent,
    TransitionEvent,
)
from esper_triton.nissa.view import STATES, UNKNOWN, ModelView, View, state_name

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_OTHER = "other"
_GROUPS = {"compile": "tezzeret", "validation": "urabrask"}  # queues, and the workers that share each
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
_LAUNCH_S = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
_PARTS = tuple(k / 10 for k in range(11))
_ERRORS = frozenset(errors.__all__) | {"MemoryError", "OSError", "RuntimeError", "TypeError", "ValueError", "KeyError"}


class _Bounded:
    """The first `limit` names as they are, and every other one as `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name not in self._known and len(self._known) >= self._limit:
            return _OTHER
        self._known.add(name)
        return name


class Metrics:
    """Counts for a View (it is its `counted`) and shows it at `/metrics`.

    The number of series is bounded: by `models` names of models, by the states, errors and topics that there are, and
    by `seed_series` of single seeds, those that contribute to their layer. `esper_seed_series_omitted` says how many
    such seeds have none.
    """

    def __init__(self, *, models: int = 16, groups: int = 32, seed_series: int = 200) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._model, self._group = _Bounded(models), _Bounded(groups)
        self._models, self._seed_series = models, seed_series

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

        self._moves = counter("esper_seed_transitions", "Moves of seeds, by the state they led to.", "model", "target")
        self._errors = counter("esper_seed_errors", "Moves that a fault has caused, by its class.", "model", "reason")
        self._load = histogram("esper_seed_load_seconds", "From LOADING to a kernel that is in place.", "model")
        self._requests = counter("esper_compile_requests", "Requests to compile.", "reason")
        self._failures = counter("esper_compile_failures", "Requests that no artifact came of, by error.", "error")
        self._artifacts = counter("esper_compile_artifacts", "Artifacts that were answered, built or found.", "how")
        self._compile = histogram("esper_compile_seconds", "Time that a build took in its worker.")
        self._waited = histogram("esper_compile_request_seconds", "From a request to its answer.", "outcome")
        self._verdicts = counter("esper_validations", "Verdicts on artifacts.", "verdict")
        self._proof = histogram("esper_validation_seconds", "From a build to its verdict.")
        self._reports = counter("esper_field_reports", "Seeds that came to their end.", "outcome")
        self._stored = counter("esper_store_events", "What has happened to the stores of models.", "kind")
        self._kind = _Bounded(16)
        self._answers = counter("esper_command_results", "Answers to commands.", "status")

    def show(self, view: View) -> None:
        """From now on the registry has what the view shows, too."""
        self.registry.register(_Shown(view, self._group, self._models, self._seed_series))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    # ---- as `view.Counted`

    def moved(self, event: TransitionEvent) -> None:
        """Counts a move, and its error."""
        target = event.target if event.target in STATES else state_name(UNKNOWN)
        self._moves.labels(self._model(event.model), target).inc()
        if event.error is not None:
            self._errors.labels(self._model(event.model), _error(event.error)).inc()

    def loaded(self, model: str, seconds: float) -> None:
        """Observes a load."""
        self._load.labels(self._model(model)).observe(seconds)

    def submitted(self, request: CompileRequest) -> None:
        """Counts a request."""
        self._requests.labels(request.reason).inc()

    def compiled(self, ready: KernelReady, waited_s: float | None) -> None:
        """Counts an artifact, and observes how long it took."""
        self._artifacts.labels("found" if ready.hit else "built").inc()
        if ready.compile_seconds is not None and not ready.hit:
            self._compile.observe(ready.compile_seconds)
        if waited_s is not None:
            self._waited.labels("ready").observe(waited_s)

    def failed(self, failure: CompileFailed, waited_s: float | None) -> None:
        """Counts a failure."""
        self._failures.labels(_error(failure.error)).inc()
        if waited_s is not None:
            self._waited.labels("failed").observe(waited_s)

    def proven(self, verdict: KernelCharacterized, waited_s: float | None) -> None:
        """Counts a verdict."""
        self._verdicts.labels(verdict.status.value).inc()
        if waited_s is not None:
            self._proof.observe(waited_s)

    def reported(self, report: FieldReport) -> None:
        """Counts the end of a seed."""
        self._reports.labels(report.outcome).inc()

    def answered(self, result: CommandResult) -> None:
        """Counts an answer."""
        self._answers.labels(result.status.value).inc()

    def stored(self, event: StoreEvent) -> None:
        """Counts what has happened to a store."""
        self._stored.labels(self._kind(event.kind)).inc()


class _Shown(Collector):
    """What is true now."""

    def __init__(self, view: View, group: _Bounded, models: int, seed_series: int) -> None:
        self._view, self._group, self._most, self._seed_series = view, group, models, seed_series

    def collect(self) -> Iterator[Metric]:
        """Everything, of one moment."""
        with self._view.lock:
            models = list(self._view.models.values())[: self._most]
            server, bus = self._view.server, self._view.bus
            waiting = dict(zip(("compile", "validation"), self._view.waiting(), strict=True))
            found = [*self._models(models), *self._seeds(models), *self._caches(models)]
        yield from found
        yield from self._queues(server, waiting)
        yield from self._bus(server, bus)

    def _models(self, models: Sequence[ModelView]) -> Iterator[Metric]:
        seeds = GaugeMetricFamily("esper_seeds", "Seeds, by state.", labels=["model", "state"])
        epoch = GaugeMetricFamily("esper_model_epoch", "Epoch that has begun.", labels=["model"])
        faults = GaugeMetricFamily("esper_seed_faults", "Faults that the model's seeds have counted.", labels=["model"])
        seen = GaugeMetricFamily(
            "esper_model_health_timestamp_seconds", "When the last health message was made.", labels=["model"]
        )
        alpha = GaugeHistogramMetricFamily("esper_active_seed_alpha_ratio", "Alpha, of active seeds.", labels=["model"])
        health = GaugeHistogramMetricFamily(
            "esper_active_seed_health_ratio", "Health score, of active seeds that have one.", labels=["model"]
        )
        launch = GaugeHistogramMetricFamily(
            "esper_seed_launch_seconds", "Mean time of a forward launch, of seeds that were measured.", labels=["model"]
        )
        for model in models:
            counts = model.counts()
            for name in (*STATES, *(name for name in counts if name not in STATES)):
                seeds.add_metric([model.name, name], counts.get(name, 0))
            if model.epoch is not None:
                epoch.add_metric([model.name], model.epoch)
            if model.frame is not None:
                faults.add_metric([model.name], int(model.errors.sum()))
                seen.add_metric([model.name], model.frame.timestamp)
            active = model.active
            _distribution(alpha, model.name, model.alpha[active], _PARTS)
            _distribution(health, model.name, model.health[active], _PARTS)
            _distribution(launch, model.name, model.latency_us * 1e-6, _LAUNCH_S)
        yield from (seeds, epoch, faults, seen, alpha, health, launch)

    def _seeds(self, models: Sequence[ModelView]) -> Iterator[Metric]:
        labels = ["model", "layer", "seed"]
        alpha = GaugeMetricFamily("esper_seed_alpha_ratio", "Alpha of an active seed.", labels=labels)
        health = GaugeMetricFamily("esper_seed_health_ratio", "Health score of an active seed.", labels=labels)
        omitted = GaugeMetricFamily("esper_seed_series_omitted", "Active seeds that have no series of their own.")
        room, left_out = self._seed_series, 0
        for model in models:
            places = np.flatnonzero(model.active).tolist()
            left_out += max(0, len(places) - room)
            for place in places[:room]:
                names = [model.name, model.layers[int(model.layer[place])], str(int(model.seed[place]))]
                alpha.add_metric(names, float(model.alpha[place]))
                if not np.isnan(model.health[place]):
                    health.add_metric(names, float(model.health[place]))
            room -= min(room, len(places))
        omitted.add_metric([], left_out)
        yield from (alpha, health, omitted)

    def _caches(self, models: Sequence[ModelView]) -> Iterator[Metric]:
        for name, text in (
            ("hits", "Loads that the kernel cache of the model's process had."),
            ("misses", "Loads that it had not."),
            ("evictions", "Kernels that it gave up."),
        ):
            counted = CounterMetricFamily(f"esper_kernel_cache_{name}", text, labels=["model"])
            for model in models:
                if name in model.cache:
                    counted.add_metric([model.name], model.cache[name])
            yield counted
        for name, field, text in (
            ("entries", "entries", "Kernels in the cache."),
            ("size_bytes", "bytes", "Machine code in the cache."),
            ("pinned_entries", "pinned", "Kernels in the cache that seeds use."),
        ):
            gauge = GaugeMetricFamily(f"esper_kernel_cache_{name}", text, labels=["model"])
            for model in models:
                if field in model.cache:
                    gauge.add_metric([model.name], model.cache[field])
            yield gauge

    def _queues(self, server: Mapping[str, object], seen: Mapping[str, int]) -> Iterator[Metric]:
        """As the hub or server counts, whose word includes what came before this process; without one, as seen here."""
        groups = server.get("groups")
        for queue, group in _GROUPS.items():
            jobs = GaugeMetricFamily(f"esper_{queue}_queue_jobs", f"Jobs in the {queue} queue.", labels=["state"])
            of_group = groups.get(group) if isinstance(groups, dict) else None
            if isinstance(of_group, dict):
                jobs.add_metric(["waiting"], of_group.get("lag", 0))
                jobs.add_metric(["running"], of_group.get("held", 0))
            else:
                jobs.add_metric(["waiting"], seen[queue])
                jobs.add_metric(["running"], 0)
            yield jobs

    def _bus(self, server: Mapping[str, object], bus: Mapping[str, object]) -> Iterator[Metric]:
        up = GaugeMetricFamily("esper_bus_up", "Whether the hub or server of the bus answers.")
        up.add_metric([], 1 if server else 0)
        lag = GaugeMetricFamily(
            "esper_bus_group_lag_messages", "Messages that a group has still to read.", labels=["group"]
        )
        sums: dict[str, int] = {}
        groups = server.get("groups")
        for name, one in groups.items() if isinstance(groups, dict) else ():
            if not str(name).startswith("~"):
                label = self._group(str(name))
                sums[label] = sums.get(label, 0) + int(one.get("lag", 0))
        for label, count in sums.items():
            lag.add_metric([label], count)
        gaps = CounterMetricFamily(
            "esper_bus_gap_messages",
            "Messages that never came to the hub: telemetry that senders dropped.",
            labels=["topic"],
        )
        for topic, count in _gaps(server).items():
            gaps.add_metric([topic], count)
        yield from (up, lag, gaps)
        sent = bus.get("sent")
        for what, text in (("sent", "sent"), ("dropped", "dropped, the oldest first"), ("refused", "refused")):
            own = CounterMetricFamily(
                f"esper_bus_{what}_messages", f"Messages of this process that were {text}.", labels=["topic"]
            )
            for topic, counts in sent.items() if isinstance(sent, dict) else ():
                own.add_metric([topic], counts[what])
            yield own


def _gaps(server: Mapping[str, object]) -> dict[str, int]:
    """A hub counts by topic, Redis has a table."""
    by_topic, table = server.get("topics"), server.get("gaps")
    if isinstance(by_topic, dict):
        return {topic: int(one.get("gaps", 0)) for topic, one in by_topic.items() if topic in topics.TOPICS}
    return {topic: int(n) for topic, n in table.items() if topic in topics.TOPICS} if isinstance(table, dict) else {}


def _distribution(
    family: GaugeHistogramMetricFamily, model: str, values: NDArray[np.float32], bounds: Iterable[float]
) -> None:
    known = values[~np.isnan(values)].astype(np.float64)
    if not known.size:
        return
    # A float32 may be a rounding above the bound that it stands for.
    buckets = [(repr(float(bound)), int((known <= bound * (1 + 1e-6) + 1e-12).sum())) for bound in bounds]
    family.add_metric([model], [*buckets, ("+Inf", int(known.size))], float(known.sum()))


def _error(name: str) -> str:
    return name if name in _ERRORS else _OTHER
