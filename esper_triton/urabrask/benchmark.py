"""How fast the kernels are, beside eager PyTorch and torch.compile: in turn, until it is known or time is up."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_triton.contracts.report import CaseRecord, Latency, RowsBenchmark
from esper_triton.urabrask.draws import call_of, extents_of_case
from esper_triton.urabrask.eager import graph_of
from esper_triton.urabrask.oracle import LocalOracle, in_layout
from esper_triton.urabrask.sandbox import Runner
from esper_triton.urabrask.subject import Subject
from esper_triton.urabrask.trial import Trial

__all__ = ["ROWS", "benchmark", "bytes_needed", "latency_of", "median_interval"]

ROWS = (32, 512, 4096)
"""Rows of a call that are measured: few, a usual batch, and a long one."""
_POSITIONS = {32: (1, 32, 4, 8), 512: (2, 256, 16, 16), 4096: (16, 256, 16, 16)}  # batch, length, height, width
_LARGEST_TENSOR = 1 << 24  # elements of an activation; calls with longer ones are left out
_SAMPLE_NS = 100_000  # a sample repeats a call until it takes about as long
_LARGEST_PRODUCTS = 1 << 33  # rows times elements of parameters
_PRODUCTS_A_S, _ELEMENTS_A_S = 1 << 33, 1 << 24  # of the time that there is
_SLOW_NS = 100_000_000  # a call that takes longer is measured one at a time
_A_ROUND = 5
_ROOM_BYTES = 1 << 20  # for what lies around tensors
_LEAST_SAMPLES = 30
_MOST_SAMPLES = 2000
_CLOSE = 0.05
_BINS = 24


def benchmark(
    trial: Trial, seconds: float, *, compiled_rows: Sequence[int] = (), seed: int = 0
) -> tuple[tuple[RowsBenchmark, ...], list[str]]:
    """Figures for three row counts in about `seconds` (compiles of `torch.compile`, for `compiled_rows`, not counted),
    and remarks on what could not be measured. Raises Died and Failed."""
    subject, found, remarks = trial.subject, [], []
    widest = max(subject.widths.values())
    most, longest = min(_LARGEST_PRODUCTS, seconds * _PRODUCTS_A_S), min(_LARGEST_TENSOR, seconds * _ELEMENTS_A_S)
    counts = [rows for rows in ROWS if rows * widest <= longest and rows * subject.elements <= most]
    counts = counts or [ROWS[0]]
    room = trial.runner.arena.size_bytes - _ROOM_BYTES
    counts = [rows for rows in counts if subject.bytes_of(extents_of_case(_case(subject, rows, seed))) <= room]
    remarks += [f"calls of {rows} rows were not measured, as too large" for rows in ROWS if rows not in counts]
    for rows in counts:
        case = _case(subject, rows, seed)
        tensors = trial.tensors(case)
        eager: tuple[Any, ...] | None = None
        compiled: Any = None
        if isinstance(trial.oracle, LocalOracle):
            try:
                eager = _eager(trial, case, tensors)
                if rows in compiled_rows:
                    compiled = _compiled(eager[0], *eager[1:])
            except Exception as error:  # whatever torch's compilers raise says nothing of the artifact
                remarks.append(f"torch cannot run the reference of {rows} rows: {type(error).__name__}: {error}"[:300])
        functions: dict[str, Callable[[], Any]] = {}
        if eager is not None:
            functions["eager"] = functools.partial(eager[0], *eager[1:])
            if compiled is not None:
                functions["compiled"] = functools.partial(compiled, *eager[1:])
        found.append(_measure(subject, trial.runner, case, tensors, functions, seconds / len(counts)))
    if not isinstance(trial.oracle, LocalOracle):
        remarks.append("eager PyTorch was not measured: the reference is code that came with the blueprint")
    return tuple(found), remarks


def bytes_needed(subject: Subject) -> int:
    """Of memory for the tensors of what is measured, where that can be had. Raises ValueError as `Subject.bytes_of`."""
    widest = max(subject.widths.values())
    rows = max((rows for rows in ROWS if rows * widest <= _LARGEST_TENSOR), default=ROWS[0])
    return subject.bytes_of(extents_of_case(_case(subject, rows, 0))) + 2 * _ROOM_BYTES


def _case(subject: Subject, rows: int, seed: int) -> CaseRecord:
    batch, length, height, width = _POSITIONS[rows]
    sizes: dict[str, int] = {
        "rows": {"batch": rows, "length": 1},
        "sequence": {"batch": batch, "length": length},
        "image": {"batch": batch, "length": length, "image_height": height, "image_width": width},
    }[subject.layout]
    return CaseRecord.model_validate(
        {"rows": rows, **sizes, "values": "normal", "seed": seed, "alpha": 0.5, "threads": "usual"}
    )


def _measure(
    subject: Subject,
    runner: Runner,
    case: CaseRecord,
    tensors: dict[str, Tensor],
    others: dict[str, Callable[[], Any]],
    seconds: float,
) -> RowsBenchmark:
    placed = subject.place(call_of(subject.manifest, subject, case, tensors), runner.arena)
    sides: dict[str, Callable[[int], list[int]]] = {}

    def paced(measure: Callable[[int, int], list[int]]) -> Callable[[int], list[int]]:
        """Samples that take long enough to be measured, and not so long that they hold the others up."""
        measure(1, 1)  # first touch of memory
        took = max(1, *measure(1, 1))
        if took > _SLOW_NS:
            return lambda samples: measure(1, 1)
        inner = max(1, min(1000, _SAMPLE_NS // max(took, *measure(2, 1))))
        return lambda samples: measure(samples, inner)

    sides["kernel"] = paced(lambda samples, inner: runner.time(placed.forward, samples, inner))
    if placed.backward:
        sides["backward"] = paced(lambda samples, inner: runner.time(placed.backward, samples, inner))
    with torch.no_grad():
        for name, function in others.items():
            sides[name] = paced(functools.partial(_timed, function))
        samples: dict[str, list[int]] = {name: [] for name in sides}
        end = time.perf_counter() + seconds
        while True:
            for name, side in sides.items():
                samples[name] += side(_A_ROUND)
            interval = median_interval(samples["kernel"])
            enough = len(samples["kernel"]) >= _LEAST_SAMPLES and interval < _CLOSE
            if enough or time.perf_counter() >= end or len(samples["kernel"]) >= _MOST_SAMPLES:
                break
    latencies = {name: latency_of(values) for name, values in samples.items()}
    return RowsBenchmark(
        rows=case.rows,
        kernel=latencies["kernel"],
        backward=latencies.get("backward"),
        eager=latencies.get("eager"),
        compiled=latencies.get("compiled"),
        interval=interval if math.isfinite(interval) else 1.0,
        converged=enough,
        throughput_rows_per_s=case.rows * 1e6 / max(latencies["kernel"].p50_us, 1e-3),
        tensor_bytes=sum(region.size_bytes for region in placed.regions.values()),
    )


def _timed(function: Callable[[], Any], samples: int, inner: int) -> list[int]:
    found = []
    for _ in range(samples):
        began = time.perf_counter_ns()
        for _ in range(inner):
            function()
        found.append((time.perf_counter_ns() - began) // inner)
    return found


def _eager(trial: Trial, case: CaseRecord, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """The reference and its blend in the layer's dtype as a graph of torch's operations, and then what it takes."""
    oracle, subject = trial.oracle, trial.subject
    assert isinstance(oracle, LocalOracle)
    question = trial.question(case, tensors)
    names = list(dict.fromkeys(("h", *question.inputs, *question.parameters)))

    def blended(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        inputs = {name: in_layout(given[name], oracle.layout, question.extents) for name in question.inputs}
        k = oracle.reference(**inputs, **{name: given[name] for name in question.parameters})
        h = given["h"]
        out: Tensor = h + case.alpha * (k.reshape(h.shape) - h)
        return out

    given = [tensors[name].to(subject.dtype) for name in names]
    with torch.no_grad():
        return graph_of(blended, *given), *given


def _compiled(graph: Any, *given: Tensor) -> Any:
    function = torch.compile(graph, fullgraph=True, dynamic=False)
    with torch.no_grad():
        function(*given)  # type: ignore[no-untyped-call]  # here it compiles
    return function


def median_interval(samples: Sequence[int]) -> float:
    """Half the 95 % confidence interval of the median, as a part of it: by the order statistics between which it lies,
    whatever the distribution is. Infinite for fewer than six."""
    if len(samples) < 6:
        return math.inf
    ordered = sorted(samples)
    half = 0.98 * math.sqrt(len(ordered))  # 1.96 standard deviations of a binomial count with p = 1/2
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return (ordered[high] - ordered[low]) / 2 / max(1.0, statistics.median(ordered))


def latency_of(samples: Sequence[int]) -> Latency:
    """What is reported of samples in nanoseconds. The histogram ends at the 99th percentile."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    low, high = ordered[0], max(p99, ordered[0] + 1)
    counts = [0] * _BINS
    for value in ordered:
        if value <= high:
            counts[min(_BINS - 1, (value - low) * _BINS // (high - low))] += 1
    return Latency(
        mean_us=statistics.fmean(ordered) / 1000,
        p50_us=statistics.median(ordered) / 1000,
        p99_us=p99 / 1000,
        samples=len(ordered),
        low_us=low / 1000,
        high_us=high / 1000,
        histogram=tuple(counts),
    )
