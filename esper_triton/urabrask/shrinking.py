"""From a call that fails to the simplest one like it that does."""

from __future__ import annotations

import time
from collections.abc import Iterator

from esper_triton.contracts.report import CaseRecord, Counterexample
from esper_triton.urabrask.judging import Miss
from esper_triton.urabrask.trial import Trial

__all__ = ["shrink"]

_MOST_TRIES = 80


def shrink(trial: Trial, case: CaseRecord, miss: Miss, seconds: float) -> Counterexample:
    """Fewer rows and simpler numbers, strides and alpha, one after the other, as long as something fails and time is
    left. Dims stay: they are the artifact's."""
    end = time.monotonic() + seconds
    tried = 0
    moved = True
    while moved and tried < _MOST_TRIES:
        moved = False
        for candidate in _simpler(case):
            if tried >= _MOST_TRIES or time.monotonic() > end:
                break
            tried += 1
            failed = [found for found in trial.check(candidate) if not found.ratio <= 1.0]
            if failed:
                case, moved = candidate, True
                miss = next((found for found in failed if found.name == miss.name), failed[0])
                break
    is_element = miss.index is not None and not miss.says
    return Counterexample(
        case=case,
        what=str(miss),
        tensor=miss.name if is_element else None,
        index=miss.index if is_element else None,
        found=miss.found if is_element else None,
        expected=miss.expected if is_element else None,
        tolerance=miss.tolerance if is_element else None,
        tried=tried,
    )


def _simpler(case: CaseRecord) -> Iterator[CaseRecord]:
    def changed(**fields: object) -> CaseRecord:
        return case.model_copy(update=fields)

    if case.gaps:
        yield changed(gaps={})
        if len(case.gaps) > 1:
            for name in case.gaps:
                yield changed(gaps={name: case.gaps[name]})
    if case.threads != "one":
        yield changed(threads="one")
    if case.shift:
        yield changed(shift=0)
    if case.training:
        yield changed(training=False)
    if case.parameters == "drawn" and case.values not in ("normal", "equal"):
        yield changed(values="normal")
    if case.alpha not in (0.0, 1.0):
        yield changed(alpha=1.0)
    for batch in _fewer(case.batch):
        yield changed(batch=batch, rows=batch * case.length)
    if case.image_height:
        for height in _fewer(case.image_height):
            length = height * case.image_width
            yield changed(image_height=height, length=length, rows=case.batch * length)
        for width in _fewer(case.image_width):
            length = case.image_height * width
            yield changed(image_width=width, length=length, rows=case.batch * length)
    elif case.length > 1:
        for length in _fewer(case.length):
            yield changed(length=length, rows=case.batch * length)


def _fewer(count: int) -> Iterator[int]:
    """Few first, so that what fails everywhere is found failing on one; then half, then one less."""
    yield from dict.fromkeys(n for n in (1, 2, count // 2, count * 3 // 4, count - 1) if 0 < n < count)
