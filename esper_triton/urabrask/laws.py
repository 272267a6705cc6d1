"""Relations that hold between calls, whatever is computed: among items, between launches, and of affine kernels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from esper_triton.contracts.report import CaseRecord
from esper_triton.urabrask.arena import TooLarge
from esper_triton.urabrask.draws import cases, dropout_seed_of
from esper_triton.urabrask.judging import Expected, Miss, compare, expected, same_bits
from esper_triton.urabrask.sandbox import Died, Failed
from esper_triton.urabrask.subject import Outcome
from esper_triton.urabrask.trial import CheckLog, Trial, broken

__all__ = ["check_determinism", "check_relations"]

_REPEATS = 3
_MOST_SMALL = 50


def check_relations(trial: Trial, log: CheckLog, seed: int, groups: int, seconds: float) -> None:
    """Permuting rows (items, where they have positions) permutes outputs; more rows after them, with anything in it,
    change nothing; half a batch gives half the rows; an affine k of 2x is 2 k(x) - k(0).

    Results are compared with each other, and may differ by what two right results may. After `seconds` no new numbers
    are drawn.
    """
    end = time.monotonic() + seconds
    for case in itertools.islice(_ordinary(trial, seed), groups):
        tensors = trial.tensors(case)
        try:
            wanted = expected(
                trial.answer(case, tensors), case, tensors, trial.subject.dtype, trial.subject.terms_added
            )
            base = trial.run(case, tensors)
            for misses in _relations(trial, case, tensors, base, wanted):
                log.note(case, misses)
            if time.monotonic() > end:
                return
        except (Died, Failed, TooLarge, ValueError) as error:
            log.note(case, [broken("the call", f"it {error}" if isinstance(error, Died) else f"{error}")])
            return


def _ordinary(trial: Trial, seed: int) -> Iterator[CaseRecord]:
    for group in cases(trial.subject, seed):
        case = group[1]
        if case.values == "normal" and case.batch > 1:
            yield case.model_copy(update={"training": False, "threads": "one"})


def _relations(
    trial: Trial,
    case: CaseRecord,
    tensors: Mapping[str, Tensor],
    base: Outcome,
    wanted: Mapping[str, Expected],
) -> Iterator[list[Miss]]:
    by_item = [name for name in base.results if name in ("out", "grad_h", "grad_x")]

    def against(
        label: str, result: Outcome, taken: Callable[[Tensor], Tensor], names: list[str] = by_item
    ) -> list[Miss]:
        misses = []
        for name in names:
            value, tolerance = taken(base.results[name]).double(), taken(wanted[name].tolerance)
            found = compare(name, result.results[name][: len(value)], Expected(value, 2 * tolerance))
            text = f"{name} {label}: {found}"
            misses.append(Miss(f"{name} {label}", found.ratio, found.index, found.found, found.expected, says=text))
        return misses

    def rows_of(items: Tensor) -> Tensor:
        return (items[:, None] * case.length + torch.arange(case.length)).flatten()

    def with_rows(rows: Tensor) -> dict[str, Tensor]:
        return {n: t[rows] if n in ("h", "x", "grad_out") else t for n, t in tensors.items()}

    generator = torch.Generator().manual_seed(case.seed)
    order = rows_of(torch.randperm(case.batch, generator=generator))
    permuted = trial.run(case, with_rows(order))
    yield against("of permuted rows", permuted, lambda value: value[order])
    # Sums over rows do not know the order of these.
    sums = [name for name in base.results if name not in by_item]
    yield against("of permuted rows", permuted, lambda value: value, sums)

    half = case.batch // 2
    first = rows_of(torch.arange(half))
    yield against("of half the rows", trial.run(_of_items(case, half), with_rows(first)), lambda value: value[first])

    more = case.batch + max(1, case.batch // 3)
    added = (more - case.batch) * case.length
    padded = {
        name: torch.cat([value, torch.full((added, value.shape[1]), torch.nan, dtype=value.dtype)])
        if name in ("h", "x", "grad_out")
        else value
        for name, value in tensors.items()
    }
    yield against("with more rows after them", trial.run(_of_items(case, more), padded), lambda value: value)

    if trial.subject.manifest.affine:
        yield [_doubled(trial, case, tensors)]


def _doubled(trial: Trial, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Miss:
    """k(2x) + k(0) against 2 k(x), at alpha 1."""
    whole = case.model_copy(update={"alpha": 1.0})

    def scaled(by: float) -> dict[str, Tensor]:
        return {n: t * by if n in ("h", "x") else t for n, t in tensors.items()}

    # k(2x) is off by at most twice what k(x) is, and k(0) by less; they are compared with 2 k(x).
    wanted = expected(trial.answer(whole, tensors), whole, tensors, trial.subject.dtype, trial.subject.terms_added)[
        "out"
    ]
    results = {by: trial.run(whole, scaled(by)).results["out"].double() for by in (0.0, 1.0, 2.0)}
    tolerance = 5 * wanted.tolerance
    found = compare("out", results[2.0] + results[0.0], Expected(2 * results[1.0], tolerance))
    return Miss("k(2x)", found.ratio, found.index, says=f"k(2x) + k(0) is not 2 k(x): {found}")


def _of_items(case: CaseRecord, batch: int) -> CaseRecord:
    return case.model_copy(update={"batch": batch, "rows": batch * case.length})


def check_determinism(trial: Trial, log: CheckLog, seed: int, groups: int, *, is_claimed: bool) -> None:
    """The same call again, on one thread and on two, gives the same bits, where the artifact claims so; in training
    mode so does the same dropout seed, and another gives something else."""
    done = 0
    drawn_anew = not trial.subject.program.draws
    for group in cases(trial.subject, seed):
        case = group[1]
        # Of a few elements another seed may drop the same: one call at least is of more.
        if done >= groups and (drawn_anew or done >= groups + _MOST_SMALL):
            return
        if case.values != "normal":
            continue
        done += 1
        tensors = trial.tensors(case)
        modes = (False, True) if trial.subject.program.follows_mode else (False,)
        for training in modes:
            call = case.model_copy(update={"training": training})
            try:
                misses = list(_repeated(trial, call, tensors)) if is_claimed else []
                if training and trial.subject.program.draws and case.rows * trial.subject.width >= 64:
                    misses.append(_drawn_anew(trial, call, tensors))
                    drawn_anew = True
            except (Died, Failed, TooLarge, ValueError) as error:
                misses = [broken("the call", f"it {error}" if isinstance(error, Died) else f"{error}")]
            if not log.note(call, misses):
                return


def _repeated(trial: Trial, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Iterator[Miss]:
    first = trial.run(case.model_copy(update={"threads": "one"}), tensors)
    for threads in ("one", "two"):
        for _ in range(_REPEATS if threads == "two" else 1):
            again = trial.run(case.model_copy(update={"threads": threads}), tensors)
            for name, value in again.results.items():
                label = f"{name} again, on {threads}"
                right = same_bits(value, first.results[name])
                yield Miss(label, 0.0) if right else broken(label, f"{label} threads, has other bits")


def _drawn_anew(trial: Trial, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Miss:
    first = trial.run(case, tensors).results["out"]
    other = trial.run(case, tensors, dropout_seed=dropout_seed_of(case) ^ 0x5DEECE66D).results["out"]
    label = "out of another dropout seed"
    return Miss(label, 0.0) if not same_bits(first, other) else broken(label, f"{label} has the same bits")
