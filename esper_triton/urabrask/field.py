"""What training tells of kernels that were proven: one that fails there loses its status, and models are told."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.errors import ArtifactRefused, EsperError, MalformedMessage
from esper_triton.contracts.events import FieldReport, KernelCharacterized
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.report import ValidationReport
from esper_triton.oona import Oona
from esper_triton.urabrask.verdict import read_report
from esper_triton.urza import Artifact, Urza

__all__ = ["FieldWatch", "demote"]

GROUP = "urabrask-field"
_POLL_S = 0.25
_KEPT = 100  # reports of one artifact, in its report
_log = logging.getLogger("esper_triton.urabrask")


def demote(reports: list[FieldReport], store: Urza) -> tuple[Artifact, ValidationReport | None]:
    """A VALIDATED artifact becomes REJECTED, for faults in training, which its report has from then on beside what the
    proof had found. One with another status is left as it is; the report is None then.

    Raises as `Urza.set_status` does, ArtifactRefused where it was stored without a report that can be read.
    """
    artifact = store.get(reports[0].artifact_id)
    if artifact.status is not KernelStatus.VALIDATED:
        return artifact, None
    told = tuple(_in_words(report) for report in reports[:_KEPT])
    before = read_report(artifact.id, store)
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

    A verdict goes out on `validation.kernel.characterized`, by which connected models take the kernel out of their
    seeds (see `model.remote`).

    Args:
        faults: so many different seeds have to fault before an artifact is demoted. With 1, whoever may publish reports
            can have any artifact rejected; on a bus that is shared with others, more is prudent.
    """

    def __init__(self, bus: Oona, store: Urza, *, faults: int = 1) -> None:
        if faults < 1:
            raise ValueError(f"faults is {faults}, expected at least 1")
        self._bus, self._store, self._faults = bus, store, faults
        self._seen: dict[str, dict[tuple[str, str, int], FieldReport]] = defaultdict(dict)
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
        """One report; what it led to, None where it changes nothing. Raises as `demote` does."""
        if report.outcome != "FAULTED":
            return None
        seen = self._seen[report.artifact_id]
        seen[report.model, report.layer, report.seed] = report
        if len(seen) < self._faults:
            return None
        try:
            artifact, verdict = demote(list(seen.values()), self._store)
        except ArtifactRefused:
            del self._seen[report.artifact_id]
            raise
        del self._seen[report.artifact_id]
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
