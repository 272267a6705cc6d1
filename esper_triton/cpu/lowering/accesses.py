"""In which forms the loads, stores and atomics of a kernel were emitted, for whoever asks (`lower(..., record=...)`).

Told by the code that emits them, at the moment it does: nothing here is worked out a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_triton.cpu.mlir import Operation

# Operations that access the memory of the kernel's arguments, by what they are called.
OPERATIONS = {
    "tt.load": "load", "tt.store": "store", "tt.atomic_rmw": "atomic", "tt.atomic_cas": "atomic",
    "tt.atomic_load": "atomic", "tt.atomic_store": "atomic", "tt.atomic_poll": "atomic",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One of the forms in which an access was emitted.

    Attributes:
        layout: `scalar` (one element), `contiguous` (a vector of neighbours), `adjacent` (the same, where the addresses
            turn out to be neighbours when the kernel runs), `strided` (a constant step apart), `gathered` or
            `scattered` (any addresses), `one by one` (an atomic for each lane).
        mask: empty where all lanes are accessed, `whole` under one condition for all lanes, `prefix` where the first
            lanes of neighbours are on, `lanes` where each lane is asked for itself.
        stride: elements from one lane to the next of a `strided` access, negative where they run backwards; a fraction
            where it is no multiple of the element; None for other layouts.
        turned: loaded in a square block that is transposed in registers.
        streamed: stored past the caches where the launch writes more than they hold.
    """

    layout: str
    mask: str = ""
    stride: int | float | None = None
    turned: bool = False
    streamed: bool = False

    def __str__(self) -> str:
        masks = {"whole": ", under one condition", "prefix": ", masked (prefix)", "lanes": ", masked lane by lane"}
        name = "contiguous where adjacent" if self.layout == "adjacent" else self.layout
        return "".join(
            (
                name,
                "" if self.stride is None else f" {self.stride:g}",
                masks.get(self.mask, ""),
                ", block turned" if self.turned else "",
                ", past the caches" if self.streamed else "",
            )
        )


Record = Callable[[Operation, Form], None]
