"""What a training hook decides by, agreed on by all ranks of a replicated model; a process alone agrees with itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from esper_triton.contracts.errors import ReplicaFailed
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.model.distributed import Replicas

__all__ = ["Agreement", "Alone", "Ranks", "agreement_of"]

T = TypeVar("T")


class Agreement(Protocol):
    """Every method is a collective: all ranks call it, at the same place.

    Attributes:
        rank: of this process. size: how many there are.
    """

    rank: int
    size: int

    def mean(self, value: float) -> float:
        """The mean over the ranks, the same to the bit on each."""

    def first(self, value: T) -> T:
        """What the first rank gave."""

    def everyones(self, value: T) -> list[T]:
        """What each rank gave, in their order."""

    def together(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """What is done inside succeeds on every rank, or raises on every rank: ReplicaFailed where it was another."""

    def average_gradients(self) -> None:
        """Of the seeds' parameters."""

    def forget_loads(self) -> None:
        """Loads that are under way are nobody's any more."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def mean(self, value: float) -> float:
        return value

    def first(self, value: T) -> T:
        return value

    def everyones(self, value: T) -> list[T]:
        return [value]

    def together(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def average_gradients(self) -> None:
        pass

    def forget_loads(self) -> None:
        pass


class Ranks:
    """The ranks of a model's replicas."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.rank, self.size = replicas.rank, replicas.size

    def mean(self, value: float) -> float:
        device = self._replicas.layers[0].state.storage.device
        total = torch.tensor([value], device=device)
        dist.all_reduce(total, group=self._replicas.group)
        return float(total) / self.size

    def first(self, value: T) -> T:
        return self.everyones(value if self.rank == 0 else None)[0]  # type: ignore[return-value]  # the first's own

    def everyones(self, value: T) -> list[T]:
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value, group=self._replicas.group)
        return said

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.everyones(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, fault in enumerate(said):
            if fault is not None:
                raise ReplicaFailed(f"rank {rank} could not {doing}: {fault}")

    def average_gradients(self) -> None:
        self._replicas.all_reduce_gradients()

    def forget_loads(self) -> None:
        self._replicas.forget_loads()


def agreement_of(layers: Iterable[KasminaLayer]) -> Agreement:
    """Among the replicas of the model that these are all layers of."""
    replicas = next((layer._kasmina.replicas for layer in layers), None)
    return Ranks(replicas) if isinstance(replicas, Replicas) else Alone()
