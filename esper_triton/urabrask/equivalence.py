"""Calls against what they should come to: of an artifact against its reference, and of a reference against a layer."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from esper_triton.contracts.manifest import Manifest
from esper_triton.contracts.report import CaseRecord, CheckRecord, Counterexample
from esper_triton.urabrask.draws import A_TURN, cases, variants_of
from esper_triton.urabrask.judging import Miss
from esper_triton.urabrask.oracle import K, LocalOracle, warm_up
from esper_triton.urabrask.sandbox import Died, Failed, Limits, Runner, Sandbox
from esper_triton.urabrask.shrinking import shrink
from esper_triton.urabrask.subject import Subject
from esper_triton.urabrask.threads import one_thread
from esper_triton.urabrask.trial import CheckLog, Trial, broken

__all__ = ["check_equivalence", "check_layer", "compare_with", "hung"]

_MOST_OVER = 4
_A_GROUP = 4  # cases, of a layer that is not wide
_MOST_DEATHS = 3
_MOST_FAILED = 12
_EXACT = 1e-9  # of float64, for sums in another order

Seen = Callable[[CaseRecord, Mapping[str, Tensor]], None]


def check_equivalence(
    trial: Trial,
    log: CheckLog,
    seed: int,
    *,
    groups: int,
    seconds: float,
    tell: Callable[[float], None] = lambda _: None,
    seen: Seen = lambda *_: None,
) -> None:
    """Draws cases, about four a group, until there are as many as in so many `groups`, or `seconds` are over, or enough
    has failed. Of a wide layer, groups are of more cases, and fewer.

    The seconds are this thread's own, so that a busy machine proves as much as an idle one, and numbers of every kind
    are drawn in any case; where that takes four times the seconds by the clock, drawing ends, and `log.skipped` says
    so.

    `tell` is told the part that is done; `seen` each ordinary case that has passed, while all have.
    """
    groups = max(min(groups, A_TURN + 1), groups * _A_GROUP // (_A_GROUP + variants_of(trial.subject)))
    warm_up()  # or the first answer would take the time of many
    deaths = 0
    began, worked = time.monotonic(), time.thread_time()
    for number, group in enumerate(itertools.islice(cases(trial.subject, seed), groups)):
        spent, took = time.thread_time() - worked, time.monotonic() - began
        if number >= A_TURN and (spent > seconds or took > _MOST_OVER * seconds):
            return
        if number and took > _MOST_OVER * seconds:
            log.skipped = f"{took:.0f} s were enough for {log.cases} cases, and not for numbers of every kind"
            return
        tell(min(1.0, max(number / groups, spent / seconds)))
        drawn = {case.parameters: trial.tensors(case) for case in {case.parameters: case for case in group}.values()}
        for case in group:
            misses = trial.check(case, drawn[case.parameters])
            passed = log.note(case, misses)
            deaths += any(miss.name == "the call" and not miss.ratio <= 1 for miss in misses)
            if not passed and (log.failed >= _MOST_FAILED or deaths >= _MOST_DEATHS or hung(misses)):
                return
        if group[0].values == "normal" and not group[0].training and not log.failed:
            seen(group[0], drawn["drawn"])


def hung(misses: Sequence[Miss]) -> bool:
    """Whether a call had to be stopped: it would be again, and take as long."""
    return any("did not end" in miss.says for miss in misses)


def check_layer(trial: Trial, log: CheckLog, layer: LocalOracle, seed: int, groups: int) -> None:
    """The reference, and all its gradients, against a layer of PyTorch's, both in float64."""
    ordinary = (group[0] for group in cases(trial.subject, seed) if group[0].values == "normal")
    for case in itertools.islice(ordinary, groups):
        case = case.model_copy(update={"training": False})
        question = trial.question(case, trial.tensors(case))
        ours, theirs = trial.oracle.exact(question), layer.exact(question)
        misses = []
        for name, value in ours.items():
            size = float(theirs[name].abs().max()) if value.numel() else 0.0
            error = float((value - theirs[name]).abs().max()) if value.numel() else 0.0
            label = "k of the layer" if name == K else f"{name} of the layer"
            ratio = error / (_EXACT * max(size, 1e-30))
            says = f"{label} that it is said to equal is off by {error:.3g} where the largest is {size:.3g}"
            misses.append(Miss(label, ratio) if ratio <= 1 else broken(label, says))
        if not log.note(case, misses):
            return


def compare_with(
    reference: Callable[..., Tensor],
    manifest: Manifest,
    blobs: Mapping[str, bytes],
    *,
    runner: Runner | None = None,
    seed: int | None = None,
    groups: int = 50,
    seconds: float = 60.0,
) -> tuple[CheckRecord, Counterexample | None]:
    """An artifact's kernels, out of no store, against any torch function of inputs and parameters by keyword (see
    `layers.module_reference` for a module). Nothing is kept anywhere.

    Args:
        blobs: the artifact's, by SHA-256. runner: what runs the kernels; by default a sandbox that ends with the call.
        seed: of what is drawn; a new one where it is not given. groups, seconds: how much.

    Returns what was found, with the simplest call that fails where one does. Raises ArtifactRefused where the launch
    plan is not consistent, ProofUnavailable where no sandbox can be started.
    """
    subject = Subject(manifest)
    oracle = LocalOracle(reference, subject.layout, subject.dtype)
    seed = secrets.randbits(48) if seed is None else seed
    log = CheckLog("equivalence")
    box = Sandbox.of_kernels(manifest, blobs, Limits()) if runner is None else None
    try:
        trial = Trial(subject, oracle, runner or box)  # type: ignore[arg-type]  # one of them is there
        if box is not None:
            try:
                box.start()
            except (Died, Failed) as error:
                log.remark(f"its binaries cannot be loaded: {error}")
                return log.record(), None
        with one_thread(), torch.inference_mode(False), torch.enable_grad(), log.timed():
            check_equivalence(trial, log, seed, groups=groups, seconds=seconds)
        if not log.findings:
            return log.record(), None
        case, miss = log.findings[0]
        if hung([miss]):
            return log.record(), Counterexample(case=case, what=str(miss))
        with one_thread(), torch.inference_mode(False), torch.enable_grad():
            return log.record(), shrink(trial, case, miss, seconds / 2)
    finally:
        if box is not None:
            box.close()
