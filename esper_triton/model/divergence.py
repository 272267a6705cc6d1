"""Whether a training loss has left the path that it was on, and what was done about it."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LossWatch", "Rollback"]

_FEWEST = 10  # losses before there is a median to speak of


class LossWatch:
    """Finds that a loss diverges: at once where it is not finite, and where it has been too high for `patience` steps
    in a row.

    Too high is above `median + (factor - 1) * max(|median|, mad)`, of the last `window` losses that were not too high:
    for a positive loss that hardly varies, `factor` times its running median. `mad` is their median absolute deviation
    from it, so that a loss around zero, or below, is measured by how much it varies. The first ten losses are taken as
    they are.

    Raises ValueError for options that mean nothing.
    """

    def __init__(self, *, factor: float = 10.0, patience: int = 5, window: int = 100) -> None:
        if not factor > 1.0:
            raise ValueError(f"factor must be above 1, found {factor}")
        if patience < 1 or window < _FEWEST:
            raise ValueError(f"patience >= 1 and window >= {_FEWEST}, found {patience} and {window}")
        self._factor, self._patience, self._window = factor, patience, window
        self._losses: deque[float] = deque()
        self._sorted: list[float] = []  # the same: sorting a hundred at each step would be a third of an idle boundary
        self._suspicious = 0

    def fresh(self) -> LossWatch:
        """Another one with these options, that has seen nothing."""
        return LossWatch(factor=self._factor, patience=self._patience, window=self._window)

    @property
    def is_suspicious(self) -> bool:
        """Whether the last loss was too high."""
        return self._suspicious > 0

    def see(self, loss: float) -> str | None:
        """Takes a step's loss; returns in words why it diverges, None where it does not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self._losses) >= _FEWEST:
            half, odd = divmod(len(self._sorted), 2)
            median = self._sorted[half] if odd else (self._sorted[half - 1] + self._sorted[half]) / 2
            bound = median + (self._factor - 1.0) * abs(median)
            if loss > bound:  # nearly never, and the spread takes longer
                spread = statistics.median(abs(value - median) for value in self._losses)
                bound = max(bound, median + (self._factor - 1.0) * spread)
            if loss > bound:
                self._suspicious += 1
                if self._suspicious < self._patience:
                    return None
                steps = f"{self._suspicious} steps" if self._suspicious > 1 else "1 step"
                return f"the loss is {loss:.6g}, for {steps} above {bound:.6g}; its running median is {median:.6g}"
        self._suspicious = 0
        self._take(loss)
        return None

    def _take(self, loss: float) -> None:
        if len(self._losses) == self._window:
            del self._sorted[bisect.bisect_left(self._sorted, self._losses.popleft())]
        self._losses.append(loss)
        bisect.insort(self._sorted, loss)

    def reset(self) -> None:
        """Forgets every loss."""
        self._losses.clear()
        self._sorted.clear()
        self._suspicious = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"losses": list(self._losses), "suspicious": self._suspicious}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been."""
        self.reset()
        for loss in state["losses"]:
            self._take(loss)
        self._suspicious = state["suspicious"]


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """The run has gone back to its last good checkpoint.

    Attributes:
        reason: in words. step: at which it happened; checkpoint_step: of the checkpoint.
        layer, seed: the one that was locked for it; None where no seed came into question.
    """

    reason: str
    step: int
    checkpoint_step: int
    layer: str | None
    seed: int | None
