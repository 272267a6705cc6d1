"""The gauntlet: everything that is done with an artifact before it may run in a model, and the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import ArtifactRefused, BlueprintError
from esper_triton.contracts.manifest import Manifest
from esper_triton.contracts.report import (
    CaseRecord,
    Counterexample,
    Environment,
    Level,
    RowsBenchmark,
    ValidationReport,
)
from esper_triton.urabrask.benchmark import benchmark, bytes_needed
from esper_triton.urabrask.draws import cases
from esper_triton.urabrask.equivalence import check_equivalence, check_layer, hung
from esper_triton.urabrask.gradients import check_affine, check_gradients
from esper_triton.urabrask.laws import check_determinism, check_relations
from esper_triton.urabrask.layers import layer_reference
from esper_triton.urabrask.local import LocalRunner
from esper_triton.urabrask.oracle import K, LocalOracle, Oracle, RemoteOracle
from esper_triton.urabrask.reach import check_reach
from esper_triton.urabrask.sandbox import Died, Failed, Limits, Runner, Sandbox
from esper_triton.urabrask.shrinking import shrink
from esper_triton.urabrask.static import static_faults
from esper_triton.urabrask.subject import Subject
from esper_triton.urabrask.threads import one_thread, usual_threads
from esper_triton.urabrask.trial import CheckLog, Trial

__all__ = ["LEVELS", "Plan", "Policy", "Progress", "examine"]

Policy = Literal["strict", "static-ok"]
"""What becomes of an artifact for a GPU that is not here: `strict` leaves it PENDING_HARDWARE; with `static-ok` it is
VALIDATED where its binaries are right as far as they can be read, and its Triton IR, compiled for this CPU, is proven.
"""
Progress = Callable[[str, float], None]
"""Told what is being done, in words, and the part of the work that is done, from 0 to 1."""

_CPU = torch.device("cpu")
_OUT_OF_BOUNDS = ("OutOfBounds", "WriteRace", "that are no result's were written", "touched memory")
_LEAST_BYTES = 32 << 20
_CHECKED_PRODUCTS = 1 << 26  # of a call whose every access is checked
_MANY_ELEMENTS = 1 << 18  # of parameters, from which on a reference gains by threads
_BITS = 48


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of everything a level does. `groups` are of about four cases each; `seconds` ends the drawing of cases
    where it is slow, `benchmark_s` is for measuring."""

    groups: int
    seconds: float
    relations: int
    repeats: int
    checked: int
    reach: bool
    benchmark_s: float
    compiled_rows: tuple[int, ...]
    wall_s: float


LEVELS: dict[Level, Plan] = {
    "fast": Plan(
        groups=49,
        seconds=3.0,
        relations=3,
        repeats=3,
        checked=6,
        reach=False,
        benchmark_s=0.3,
        compiled_rows=(),
        wall_s=10.0,
    ),
    "standard": Plan(
        groups=300,
        seconds=12.0,
        relations=12,
        repeats=12,
        checked=24,
        reach=True,
        benchmark_s=3.0,
        compiled_rows=(512,),
        wall_s=20.0,
    ),
    "thorough": Plan(
        groups=1 << 20,
        seconds=240.0,
        relations=100,
        repeats=100,
        checked=200,
        reach=True,
        benchmark_s=30.0,
        compiled_rows=(32, 512, 4096),
        wall_s=60.0,
    ),
}


class _Examination:
    """One run of the gauntlet."""

    def __init__(
        self,
        manifest: Manifest,
        blobs: Mapping[str, bytes],
        blueprint: Blueprint,
        plan: Plan,
        seed: int,
        device: torch.device,
        limits: Limits,
        tell: Progress,
    ) -> None:
        self.manifest, self.blobs, self.blueprint = manifest, blobs, blueprint
        self.plan, self.seed, self.device, self.limits, self.tell = plan, seed, device, limits, tell
        self.logs: list[CheckLog] = []
        self.remarks: list[str] = []
        self.benchmarks: tuple[RowsBenchmark, ...] = ()
        self.counterexample: Counterexample | None = None
        self.drift: float | None = None
        self.sandbox = "process"
        self.degraded: str | None = None
        self.peak_bytes = 0
        self._stack = contextlib.ExitStack()

    def log(self, name: str, part: float) -> CheckLog:
        self.tell(name, part)
        self.logs.append(CheckLog(name))
        return self.logs[-1]

    @property
    def failed(self) -> bool:
        return any(log.failed for log in self.logs)

    def run(self) -> None:
        """Every check, until one has shown that the artifact is not to be run any more."""
        with self._stack:
            with self.log("static", 0.0).timed() as log:
                for fault in static_faults(self.manifest, self.blobs):
                    log.remark(fault)
                log.cases = len(self.manifest.kernels)
                try:
                    subject = Subject(self.manifest)
                    needed = max(_LEAST_BYTES, bytes_needed(subject))
                except (ArtifactRefused, ValueError, KeyError) as error:
                    log.remark(f"its launch plan is not consistent: {error}")
            if self.failed:
                return
            # Addresses are limited where a process is.
            self.limits = dataclasses.replace(self.limits, tensor_bytes=min(needed, self.limits.tensor_bytes))
            self._dynamic(subject)

    def _dynamic(self, subject: Subject) -> None:
        oracle = self._oracle()
        here = self.manifest.target.backend == "cpu" or self.device.type == "cuda"
        checked = self._sandbox(Sandbox.of_checked)
        checked.begin()  # it compiles while the others work
        runner: Runner = self._runner() if here else checked
        try:
            self._gauntlet(Trial(subject, oracle, runner), Trial(subject, oracle, checked), here=here)
        finally:
            self._account(runner, checked)

    def _gauntlet(self, trial: Trial, in_checked: Trial, *, here: bool) -> None:
        runner, checked = trial.runner, in_checked.runner
        if not self._load("load binaries", runner, "its binaries"):
            return
        self._equivalence(trial)
        # A wrong result may come of a wrong access, which says more.
        if runner is checked or self._load("load IR", checked, "its Triton IR with checks of every access"):
            self._accesses(in_checked)
        if not self.failed:
            self._of_the_reference(trial)
        if not self.failed:
            with self.log("relations", 0.62).timed() as log:
                check_relations(trial, log, self.seed + 1, self.plan.relations, self.plan.seconds / 3)
        if not self.failed:
            with self.log("determinism", 0.68).timed() as log:
                is_claimed = not self._adds_atomically()
                check_determinism(trial, log, self.seed + 2, self.plan.repeats, is_claimed=is_claimed)
                if not is_claimed:
                    log.skipped = "it adds by atomic operations, in no fixed order: only dropout was checked"
        if not self.failed and self.plan.reach and here and self.device.type == "cpu":
            with self.log("reach", 0.76).timed() as log:
                check_reach(
                    trial,
                    log,
                    lambda limits: Sandbox.of_kernels(self.manifest, self.blobs, limits),
                    self.seed + 3,
                )
        self._shrink(trial)
        if not self.failed and here:
            self._benchmark(trial)

    def _load(self, name: str, box: Runner, what: str) -> bool:
        """Waits for a cell that loads or compiles what it was given. Whether it could."""
        if not isinstance(box, Sandbox):  # what runs here is loaded
            return True
        with self.log(name, 0.02).timed() as log:
            log.cases = 1
            try:
                box.start()
            except (Died, Failed) as error:
                if self.device.type == "cuda" and "UnsupportedOperation" in str(error):
                    log.skipped = f"the CPU backend does not have all that it uses: {error}"
                    return False
                log.remark(f"{what} cannot be loaded: {_text(error)}")
        return not log.failed

    def _accesses(self, trial: Trial) -> None:
        """With the sanitizer: every access, and that no two programs store to one element."""
        with self.log("accesses", 0.55).timed() as log:
            drawn = cases(trial.subject, self.seed, most_products=_CHECKED_PRODUCTS)
            for group in itertools.islice(drawn, self.plan.checked):
                case = group[1].model_copy(update={"threads": "one"})
                if not log.note(case, trial.check_memory(case)):
                    return

    def _equivalence(self, trial: Trial) -> None:
        """Against the reference in float64, forward and backward, and law 2's ends."""
        with self.log("equivalence", 0.1).timed() as log:
            check_equivalence(
                trial,
                log,
                self.seed,
                groups=self.plan.groups,
                seconds=self.plan.seconds,
                tell=lambda part: self.tell("equivalence", 0.1 + 0.45 * part),
                seen=lambda case, tensors: self._note_drift(trial, case, tensors),
            )
        self.remarks += [log.skipped] if log.skipped else []

    def _note_drift(self, trial: Trial, case: CaseRecord, tensors: Mapping[str, torch.Tensor]) -> None:
        """The largest error of `out` at alpha 1, of ordinary numbers, as a part of its largest element."""
        exact, outcome = trial.answer(case, tensors).exact[K], trial.judged(case)
        largest = float(exact.abs().max())
        if outcome is not None and largest > 0:
            out = outcome.results["out"].double()
            self.drift = max(self.drift or 0.0, float((out - exact).abs().max()) / largest)

    def _of_the_reference(self, trial: Trial) -> None:
        with self.log("gradients", 0.58).timed() as log:
            if trial.subject.program.has_backward:
                check_gradients(trial, log, self.seed + 4)
            else:
                log.skipped = "it has no backward"
        if self.blueprint.equivalent_to:
            with self.log("layer", 0.6).timed() as log:
                named = self.blueprint.equivalent_to
                try:
                    reference = layer_reference(self.blueprint, self.manifest)
                except (ValueError, KeyError, StopIteration) as error:
                    log.remark(f"it is said to equal {named}, and cannot: {error}")
                    return
                if reference is None:
                    log.skipped = f"{named} is no layer that is known here"
                else:
                    layer = LocalOracle(reference, trial.subject.layout, trial.subject.dtype)
                    check_layer(trial, log, layer, self.seed + 6, 2)
        if self.manifest.affine:
            with self.log("affine", 0.61).timed() as log:
                check_affine(trial, log, self.seed + 5)

    def _shrink(self, trial: Trial) -> None:
        # What the sanitizer alone has found shows with its cell, which is not the one that this is tried in.
        found = next(
            ((case, miss) for log in self.logs for case, miss in log.findings if log.name == "equivalence"), None
        )
        other = next(((case, miss) for log in self.logs for case, miss in log.findings), None)
        if found is None:
            if other is not None:
                self.counterexample = Counterexample(case=other[0], what=str(other[1]))
            return
        case, miss = found
        if hung([miss]):  # each try would hang as long
            self.counterexample = Counterexample(case=case, what=str(miss))
            return
        self.tell("looking for a simpler case", 0.8)
        self.counterexample = shrink(trial, case, miss, self.plan.seconds / 2)

    def _benchmark(self, trial: Trial) -> None:
        with self.log("benchmark", 0.85).timed() as log:
            try:
                with usual_threads():
                    self.benchmarks, remarks = benchmark(
                        trial, self.plan.benchmark_s, compiled_rows=self.plan.compiled_rows, seed=self.seed
                    )
            except (Died, Failed) as error:
                log.remark(f"while it was measured, {_text(error)}")
                return
            self.remarks += remarks
            log.cases = len(self.benchmarks)

    def _account(self, *runners: Runner) -> None:
        for box in runners:
            if isinstance(box, Sandbox):
                box.stop()
                self.peak_bytes = max(self.peak_bytes, box.peak_bytes)
                self.degraded = self.degraded or box.degraded or None

    def _adds_atomically(self) -> bool:
        """Whether a kernel adds floating-point numbers in memory, in whatever order programs come to it."""
        return any(
            b"atomic_rmw fadd" in self.blobs[record.ttir] or b"atomic_rmw_op = 5" in self.blobs[record.ttir]
            for record in self.manifest.kernels.values()
        )

    def _sandbox(self, make: Callable[..., Sandbox]) -> Sandbox:
        return self._stack.enter_context(make(self.manifest, self.blobs, self.limits))

    def _runner(self) -> Runner:
        if self.device.type == "cpu":
            return self._sandbox(Sandbox.of_kernels)
        self.sandbox, self.degraded = "none", "on a GPU, kernels run in the process that proves them"
        runner = LocalRunner(self.manifest, self.blobs, self.device, self.limits)
        return self._stack.enter_context(contextlib.closing(runner))

    def _oracle(self) -> Oracle:
        """A graph is evaluated here; a source brings Python of its own, which is run as its kernels are."""
        if self.blueprint.ops:
            return LocalOracle.of_blueprint(self.blueprint, self.manifest.dims, self.manifest.dtype)
        return self._stack.enter_context(RemoteOracle.of_blueprint(self.blueprint, self.manifest, self.limits))


def examine(
    manifest: Manifest,
    blobs: Mapping[str, bytes],
    blueprint: Blueprint,
    *,
    level: Level = "fast",
    seed: int | None = None,
    seconds: float | None = None,
    device: torch.device = _CPU,
    policy: Policy = "strict",
    limits: Limits | None = None,
    tell: Progress = lambda *_: None,
) -> ValidationReport:
    """Tries an artifact and says what came of it; changes nothing anywhere.

    Args:
        blobs: the artifact's, by SHA-256. blueprint: what it was made from.
        level: `fast` (200 cases and the laws, some seconds), `standard` (about 30 s) or `thorough`.
        seed: of everything that is drawn; by default a new one, which the report has.
        seconds: how long cases are drawn, where not as long as the level says; figures take a quarter of that at most.
        device: where it runs; for a GPU's artifact and the CPU, its Triton IR is proven compiled for the CPU.
        policy: what becomes of an artifact whose GPU is not here.
        limits: of the sandbox. tell: is told how far it is.

    Raises ArtifactRefused where the blueprint is another one's, and ProofUnavailable where no sandbox can be started.
    """
    if blueprint.id != manifest.blueprint_id:
        raise ArtifactRefused(
            f"artifact {manifest.id} was not made from blueprint {blueprint.name!r} ({blueprint.id[:12]}), but from "
            f"{manifest.blueprint_name!r} ({manifest.blueprint_id[:12]})"
        )
    plan = LEVELS[level]
    if seconds is not None:
        benchmark_s = min(plan.benchmark_s, seconds / 4)
        plan = dataclasses.replace(plan, seconds=seconds, groups=1 << 20, benchmark_s=benchmark_s)
    seed = secrets.randbits(_BITS) if seed is None else seed
    began = time.perf_counter()
    run = _Examination(manifest, blobs, blueprint, plan, seed, device, limits or Limits(wall_s=plan.wall_s), tell)
    elements = sum(math.prod(record.shape) for record in manifest.parameters.values())
    alone = one_thread() if elements < _MANY_ELEMENTS else contextlib.nullcontext()
    # Within a mode every call of torch takes longer; it is entered where tensors would be made elsewhere without it.
    here = contextlib.nullcontext() if torch.get_default_device() == _CPU else _CPU
    with alone, here, torch.inference_mode(False), torch.enable_grad():
        try:
            run.run()
        except BlueprintError as error:
            run.logs[-1].remark(f"the blueprint's reference cannot be evaluated: {error}")
    return _report(run, level, policy, time.perf_counter() - began)


def _report(run: _Examination, level: Level, policy: Policy, seconds: float) -> ValidationReport:
    manifest = run.manifest
    failures = [failure for log in run.logs for failure in log.failures]
    worst: dict[str, float] = {}
    for log in run.logs:
        for name, ratio in log.worst.items():
            worst[name] = max(worst.get(name, 0.0), ratio)
    is_here = manifest.target.backend == "cpu" or run.device.type == "cuda"
    verdict: Literal["VALIDATED", "REJECTED", "PENDING_HARDWARE"]
    if failures:
        # What was done says more than what came of it.
        logs = sorted(run.logs, key=lambda log: log.name != "accesses")
        verdict, reasons = "REJECTED", [f"{log.name}: {log.failures[0]}" for log in logs if log.failures]
    elif is_here:
        verdict, reasons = "VALIDATED", ["every check passed"]
    elif policy == "static-ok":
        verdict = "VALIDATED"
        reasons = ["its GPU is not here: its binaries were read, and its Triton IR was proven compiled for this CPU"]
    else:
        verdict = "PENDING_HARDWARE"
        reasons = ["its GPU is not here, and the policy is 'strict'; what could be checked without it passed"]
    measured = [ratio for ratio in worst.values() if ratio > 0]
    return ValidationReport(
        artifact_id=manifest.id,
        blueprint_id=manifest.blueprint_id,
        blueprint_name=manifest.blueprint_name,
        level=level,
        seed=run.seed,
        verdict=verdict,
        reasons=(*reasons, *run.remarks),
        cases=sum(log.cases for log in run.logs if log.name in ("accesses", "equivalence", "relations", "determinism")),
        worst=worst,
        checks=tuple(log.record() for log in run.logs),
        counterexample=run.counterexample,
        out_of_bounds=tuple(failure for failure in failures if any(words in failure for words in _OUT_OF_BOUNDS)),
        drift=run.drift,
        risk_score=min(1.0, max(measured)) if measured else None,
        benchmarks=run.benchmarks,
        memory_bytes_peak=max((one.tensor_bytes for one in run.benchmarks), default=None),
        environment=_environment(run),
        seconds=round(seconds, 3),
    )


def _environment(run: _Examination) -> Environment:
    import triton

    from esper_triton.cpu.host import cpu_name

    return Environment(
        device=str(run.device),
        processor=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=str(torch.__version__),
        triton=triton.__version__,
        sandbox=run.sandbox,
        degraded=run.degraded,
    )


def _text(error: Exception) -> str:
    return f"it {error}" if isinstance(error, Died) else f"{error}"
