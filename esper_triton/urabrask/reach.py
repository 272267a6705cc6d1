"""Addresses beyond 2^31 elements: rows so far apart that an offset of 32 bits comes out wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from esper_triton.contracts.report import CaseRecord
from esper_triton.urabrask.arena import Arena, Region, Snapshot, TooLarge, poison
from esper_triton.urabrask.draws import call_of
from esper_triton.urabrask.sandbox import Died, Failed, Limits, Sandbox
from esper_triton.urabrask.subject import Outcome
from esper_triton.urabrask.trial import CheckLog, Trial, broken

__all__ = ["check_reach"]

_FAR = (1 << 30) + 8  # elements from one row to the next: the third begins beyond 2^31
_ROWS = 3


class _SparseArena(Arena):
    """An arena of tensors with wide gaps, of which only the rows and what is next to them are ever touched."""

    def place(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        row_stride: int | None = None,
        shift: int = 0,
    ) -> Region:
        if row_stride is None or row_stride < _FAR:
            return super().place(name, shape, dtype, row_stride=row_stride, shift=shift)
        rows, width = shape
        around = 4096
        offset = -(-(self._end + around) // 64) * 64
        span = ((rows - 1) * row_stride + width) * dtype.itemsize
        if offset + span + around > self.size_bytes:
            raise TooLarge(f"{name} spans {span} bytes")
        for row in range(rows):
            at = offset + row * row_stride * dtype.itemsize
            poison(self.memory[at - around : at + width * dtype.itemsize + around])
        self._end = offset + span + around
        return Region(name, offset, span, tuple(shape), (row_stride, 1), dtype)

    def snapshot(self, buffer: str | None = None) -> Snapshot:
        """The memory itself: a copy would be all of it."""
        return Snapshot(self.memory, 0)


def check_reach(trial: Trial, log: CheckLog, start: Callable[[Limits], Sandbox], seed: int) -> None:
    """A call of three rows for each tensor that has a row stride, with that one's rows 2^30 elements apart.

    Raises nothing; where memory for it cannot be mapped, `log.skipped` says so.
    """
    subject = trial.subject
    if subject.layout != "rows":
        log.skipped = "items of several positions are contiguous here"
        return
    spread = (_ROWS * _FAR * subject.dtype.itemsize) + (64 << 20)
    try:
        arena = _SparseArena(spread + (256 << 20))
    except (OSError, OverflowError) as error:
        log.skipped = f"{spread} bytes of addresses cannot be had: {error}"
        return
    with start(Limits(memory_bytes=2 << 30, tensor_bytes=1 << 20)) as box, closing(arena):
        box.arena.close()
        box.arena = arena
        for name in (*subject.reads, "out", "grad_out"):
            case = CaseRecord(
                rows=_ROWS,
                batch=_ROWS,
                length=1,
                values="normal",
                seed=seed,
                alpha=0.75,
                gaps={name: _FAR - (subject.widths.get(name) or subject.width)},
            )
            tensors = trial.tensors(case)
            try:
                placed = subject.place(call_of(subject.manifest, subject, case, tensors), arena)
                box.run(placed.forward + placed.backward)
                regions = placed.regions
                # Copies, since the next call's results come where these are.
                found = {n: regions[n].view(arena.memory).to(subject.dtype, copy=True) for n in placed.results}
                passed = log.note(case, trial.judge(case, tensors, Outcome(found, None)))
            except (Died, Failed, TooLarge, ValueError) as error:
                passed = log.note(case, [broken("the call", f"it {error}" if isinstance(error, Died) else f"{error}")])
            if not passed:
                return
