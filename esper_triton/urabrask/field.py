"""What training tells of kernels that were proven: one that fails there is tried again, and loses its status where it
fails again; models are told."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

import torch

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.errors import EsperError, MalformedMessage
from esper_triton.contracts.events import FieldReport, KernelCharacterized
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.report import Level, ValidationReport
from esper_triton.oona import Oona
from esper_triton.tezzeret.pipelines import device_of
from esper_triton.urabrask.gauntlet import examine
from esper_triton.urabrask.verdict import read_report
from esper_triton.urza import Artifact, Urza
from esper_triton.urza.designs import blueprint_of

__all__ = ["FieldWatch", "demote"]

GROUP = "urabrask-field"
_POLL_S = 0.25
_KEPT = 100  # reports of one artifact, in its report
_REMEMBERED = 1000  # artifacts with reports
_log = logging.getLogger("esper_triton.urabrask")


def demote(
    reports: list[FieldReport], store: Urza, found: ValidationReport | None = None
) -> tuple[Artifact, ValidationReport | None]:
    """A VALIDATED artifact becomes REJECTED, for faults in training, which its report has from then on beside what the
    proof had found, or `found`, a later one. One with another status is left as it is; the report is None then.

    Raises as `Urza.set_status` does, ArtifactRefused where it was stored without a report that can be read.
    """
    artifact = store.get(reports[0].artifact_id)
    if artifact.status is not KernelStatus.VALIDATED:
        return artifact, None
    told = tuple(_in_words(report) for report in reports[:_KEPT])
    before = read_report(artifact.id, store) if found is None else found
    report = before.model_copy(
        update={
            "verdict": "REJECTED",
            "reasons": (f"it failed in training: {told[0]}", *before.reasons),
            "field_reports": (*before.field_reports, *told),
        }
    )
    return store.set_status(artifact.id, KernelStatus.REJECTED, report.model_dump_json(indent=1).encode()), report


def _in_words(report: FieldReport) -> str:
    what = f"{report.fault or 'fault'} in seed {report.seed} of layer {report.layer!r} of model {report.model!r}"
    return f"{what}: {report.message}" if report.message else what


class FieldWatch:
    """Listens to `innovation.field_reports` and demotes artifacts that fault. Watches of one store share the reports.

    A report is a reason to look, and proves nothing: whoever may publish can say what he likes, under any name, and
    values that are not finite may come of parameters that have run away. So the artifact goes through the gauntlet
    again, with other numbers, and is REJECTED where it fails, with the reports beside what was found. Where it passes,
    it stays as it is: the model that reported has put its seed out of use by itself.

    A verdict goes out on `validation.kernel.characterized`, by which connected models take the kernel out of their
    seeds (see `model.remote`).

    Args:
        level: at which an artifact is tried again. again_s: seconds from one trial of an artifact to the next at least,
            so that nobody can keep the watch busy with it.
        faults: where given, the word of so many different seeds is enough, whatever a trial finds. For a bus whose
            every publisher is trusted.
    """

    def __init__(
        self, bus: Oona, store: Urza, *, level: Level = "fast", again_s: float = 3600.0, faults: int | None = None
    ) -> None:
        if faults is not None and faults < 1:
            raise ValueError(f"faults is {faults}, expected at least 1")
        if not again_s >= 0:
            raise ValueError(f"again_s is {again_s}, expected seconds")
        self._bus, self._store, self._faults = bus, store, faults
        self._level: Level = level
        self._again_s = again_s
        # By artifact, the last one told of at the end: what its seeds have told, and when it may be tried again.
        self._seen: OrderedDict[str, dict[tuple[str, str, int], FieldReport]] = OrderedDict()
        self._due: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to listen, on a thread of its own. Raises BusUnavailable from a hub that refuses, RuntimeError where
        it was started before."""
        if self._thread is not None:
            raise RuntimeError("the watch was started before")
        subscription = self._bus.subscribe(topics.FIELD_REPORTS, GROUP)

        def listen() -> None:
            with subscription:
                while not self._stopping.is_set():
                    delivery = subscription.get(_POLL_S)
                    if delivery is None:
                        continue
                    try:
                        message = delivery.parse()
                        assert isinstance(message, FieldReport)
                        self.take(message)
                    except MalformedMessage as error:
                        _log.warning("a field report that is none: %s", error)
                    except EsperError as error:  # the store may be away; what is lost is one report
                        _log.warning("a field report could not be followed up: %s", error)
                    subscription.ack(delivery)

        self._thread = threading.Thread(target=listen, name="esper-field-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it, and waits for that."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def __enter__(self) -> FieldWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def take(self, report: FieldReport) -> ValidationReport | None:
        """One report; what it led to, None where it changes nothing. Raises as `demote`, `Urza.load` and `examine`
        do."""
        if report.outcome != "FAULTED":
            return None
        seen = self._seen.setdefault(report.artifact_id, {})
        self._seen.move_to_end(report.artifact_id)
        if len(seen) < _KEPT:
            seen[report.model, report.layer, report.seed] = report
        while len(self._seen) > _REMEMBERED:
            forgotten, _ = self._seen.popitem(last=False)
            self._due.pop(forgotten, None)
        found: ValidationReport | None = None
        if self._faults is None or len(seen) < self._faults:
            found = self._tried_again(report)
            if found is None:
                return None
        try:
            artifact, verdict = demote(list(seen.values()), self._store, found)
        finally:
            del self._seen[report.artifact_id]
            self._due.pop(report.artifact_id, None)
        if verdict is not None:
            self._bus.publish(
                topics.CHARACTERIZED,
                KernelCharacterized(
                    artifact_id=artifact.id,
                    manifest_digest=artifact.digest,
                    status=artifact.status,
                    reasons=verdict.reasons,
                    tags=verdict.tags,
                ),
            )
        return verdict

    def _tried_again(self, report: FieldReport) -> ValidationReport | None:
        """What was found wrong with a VALIDATED artifact that was not tried a short time ago; None where nothing was
        found, or looked for."""
        artifact_id = report.artifact_id
        if time.monotonic() < self._due.get(artifact_id, 0.0):
            return None
        if self._store.get(artifact_id).status is not KernelStatus.VALIDATED:
            return None
        artifact, blobs = self._store.load(artifact_id)
        self._due[artifact_id] = time.monotonic() + self._again_s

        def tell(what: str, part: float) -> None:
            if self._stopping.is_set():
                raise _Stopped

        device = device_of(artifact.manifest.target) or torch.device("cpu")
        try:
            found = examine(
                artifact.manifest,
                blobs,
                blueprint_of(artifact.manifest, blobs),
                level=self._level,
                device=device,
                tell=tell,
            )
        except _Stopped:
            return None
        if found.verdict == "REJECTED":
            return found
        _log.warning("%s was tried again, and nothing was found: %s", artifact_id, _in_words(report))
        return None


class _Stopped(Exception):
    """The watch ends while it tries an artifact."""
