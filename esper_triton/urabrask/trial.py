"""One call of an artifact, judged. Whatever goes wrong is a finding about the artifact, not an exception."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from esper_triton.contracts.report import CaseRecord, CheckRecord
from esper_triton.urabrask.arena import TooLarge
from esper_triton.urabrask.draws import call_of, dropout_seed_of, extents_of_case, tensors_of
from esper_triton.urabrask.judging import Miss, judge, same_bits
from esper_triton.urabrask.oracle import Answer, Oracle, Question
from esper_triton.urabrask.sandbox import Died, Failed, Runner
from esper_triton.urabrask.subject import Outcome, Subject

__all__ = ["CheckLog", "Finding", "Trial", "broken"]

_MOST_FAILURES = 20  # a kernel that is wrong is wrong in every case; the first ones show how
_MOST_JUDGED = 3  # calls of the same numbers whose results are kept
_ELSEWHERE = "memory that is no result's"
Finding = tuple[CaseRecord, Miss]


class CheckLog:
    """What one kind of check has found so far. `findings` are the failed cases, the first few; `failed` counts all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases = self.failed = 0
        self.worst: dict[str, float] = {}
        self.findings: list[Finding] = []
        self.remarks: list[str] = []
        self.skipped: str | None = None
        self.seconds = 0.0

    def note(self, case: CaseRecord, misses: list[Miss]) -> bool:
        """Counts a case. Whether it passed."""
        self.cases += 1
        passed = True
        for miss in misses:
            self.worst[miss.name] = max(self.worst.get(miss.name, 0.0), miss.ratio)
            if not miss.ratio <= 1.0:
                passed = False
                self.failed += 1
                if len(self.findings) < _MOST_FAILURES:
                    self.findings.append((case, miss))
        return passed

    def remark(self, text: str) -> None:
        """A failure that is of no case."""
        self.failed += 1
        self.remarks.append(text)

    @contextmanager
    def timed(self) -> Iterator[CheckLog]:
        """Counts the seconds that are spent inside."""
        began = time.perf_counter()
        try:
            yield self
        finally:
            self.seconds += time.perf_counter() - began

    @property
    def failures(self) -> tuple[str, ...]:
        """In words."""
        return (*self.remarks, *(f"{case}: {miss}" for case, miss in self.findings))[:_MOST_FAILURES]

    def record(self) -> CheckRecord:
        """For the report."""
        return CheckRecord(
            name=self.name,
            cases=self.cases,
            worst=max(self.worst.values()) if self.worst else None,
            failures=self.failures,
            skipped=self.skipped,
            seconds=round(self.seconds, 3),
        )


class Trial:
    """An artifact with what knows its answers and what runs it."""

    def __init__(self, subject: Subject, oracle: Oracle, runner: Runner) -> None:
        self.subject, self.oracle, self.runner = subject, oracle, runner
        self._answers: dict[tuple[object, ...], Answer] = {}
        self._judged: dict[tuple[object, ...], tuple[Outcome, list[Miss]]] = {}

    def tensors(self, case: CaseRecord) -> dict[str, Tensor]:
        """The case's numbers."""
        return tensors_of(self.subject.manifest, case, self.subject)

    def answer(self, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Answer:
        """What the reference says of these numbers; the last answer is kept for what differs in alpha and strides."""
        key = _numbers_of(case)
        if key not in self._answers:
            self._answers = {key: self.oracle.answer(self.question(case, tensors))}
        return self._answers[key]

    def judge(self, case: CaseRecord, tensors: Mapping[str, Tensor], outcome: Outcome) -> list[Miss]:
        """Each result against the reference. Bits that were judged before, of the same numbers and alpha, are what
        they were found to be then."""
        if _numbers_of(case) not in self._answers:
            self._judged.clear()
        key = (*_numbers_of(case), case.alpha)
        before = self._judged.get(key)
        if before is not None and all(same_bits(v, before[0].results[n]) for n, v in outcome.results.items()):
            return before[1]
        answer = self.answer(case, tensors)
        misses = list(judge(outcome, answer, case, tensors, self.subject.dtype, self.subject.terms_added))
        if len(self._judged) < _MOST_JUDGED:
            self._judged.setdefault(key, (outcome, misses))
        return misses

    def judged(self, case: CaseRecord) -> Outcome | None:
        """The results of a call with these numbers and alpha that was judged, if it was and they are still kept."""
        found = self._judged.get((*_numbers_of(case), case.alpha))
        return None if found is None else found[0]

    def question(self, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Question:
        """What the reference is asked."""
        return Question(
            extents=extents_of_case(case),
            inputs={name: tensors[name] for name in self.subject.program.inputs},
            parameters={name: tensors[name] for name in self.subject.manifest.parameters},
            grad_k=tensors["grad_out"],
            training=case.training,
            dropout_seed=dropout_seed_of(case),
            seed=case.seed,
        )

    def run(self, case: CaseRecord, tensors: Mapping[str, Tensor], *, dropout_seed: int | None = None) -> Outcome:
        """The kernels' results. Raises Died, Failed, TooLarge, ValueError."""
        call = call_of(self.subject.manifest, self.subject, case, tensors)
        if dropout_seed is not None:
            call = dataclasses.replace(call, dropout_seed=dropout_seed)
        placed = self.subject.place(call, self.runner.arena)
        self.runner.run(placed.forward + placed.backward, case.threads)
        return self.subject.outcome(placed, self.runner.arena.snapshot("after"))

    def check(self, case: CaseRecord, tensors: Mapping[str, Tensor] | None = None) -> list[Miss]:
        """Everything that is demanded of one call."""
        tensors = self.tensors(case) if tensors is None else tensors
        try:
            return list(self._check(case, tensors))
        except (Died, Failed, TooLarge, ValueError) as error:
            return [broken("the call", f"it {error}" if isinstance(error, Died) else f"{error}")]

    def check_memory(self, case: CaseRecord) -> list[Miss]:
        """Of one call, only that it ends well and leaves alone what is no result's."""
        try:
            trespass = self.run(case, self.tensors(case)).trespass
        except (Died, Failed, TooLarge, ValueError) as error:
            return [broken("the call", f"it {error}" if isinstance(error, Died) else f"{error}")]
        return [broken(_ELSEWHERE, trespass) if trespass else Miss(_ELSEWHERE, 0.0)]

    def _check(self, case: CaseRecord, tensors: Mapping[str, Tensor]) -> Iterator[Miss]:
        outcome = self.run(case, tensors)
        yield broken(_ELSEWHERE, outcome.trespass) if outcome.trespass else Miss(_ELSEWHERE, 0.0)
        if case.alpha == 0.0:
            yield from self._silent(outcome, tensors)
            return
        if case.training and self.subject.program.follows_mode:
            if case.values == "normal":
                yield from _finite(outcome)
            if not self.oracle.knows_dropout:
                return
        yield from self.judge(case, tensors, outcome)

    def _silent(self, outcome: Outcome, tensors: Mapping[str, Tensor]) -> Iterator[Miss]:
        """Alpha 0: the host's output and its gradient to the bit, and nothing for anybody else."""
        exact = {"out": tensors["h"], "grad_h": tensors["grad_out"]}
        for name, value in outcome.results.items():
            label = f"{name} at alpha 0"
            if name in exact:
                right = same_bits(value, exact[name])
                yield Miss(label, 0.0) if right else broken(label, f"{label} is not the host's to the bit")
            else:
                yield Miss(label, 0.0) if not value.count_nonzero() else broken(label, f"{label} is not zero")


def _numbers_of(case: CaseRecord) -> tuple[object, ...]:
    """What an answer depends on; cases that have it in common differ in alpha, strides, addresses and threads."""
    return (extents_of_case(case), case.values, case.seed, case.training)


def _finite(outcome: Outcome) -> Iterator[Miss]:
    for name, value in outcome.results.items():
        label = f"{name} in training"
        right = bool(value.isfinite().all())
        yield Miss(label, 0.0) if right else broken(label, f"{label} is not finite")


def broken(name: str, says: str) -> Miss:
    """A demand without a tolerance that was not met."""
    return Miss(name, torch.inf, says=says)
