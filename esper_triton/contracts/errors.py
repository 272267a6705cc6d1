"""The one hierarchy of errors that Esper raises on purpose.

Every message names the object, what was found, what was expected and, where there is one, the nearest valid choice.
The CPU backend (`esper_triton.cpu`) is usable without Esper and has its own two errors in `esper_triton.cpu.errors`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = [
    "ArchiveRefused",
    "ArtifactNotFound",
    "ArtifactRefused",
    "BlueprintError",
    "BusUnavailable",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "CorruptObject",
    "EsperError",
    "InvalidCommit",
    "InvalidTransition",
    "LoadDeadlineExceeded",
    "LoadLost",
    "MalformedMessage",
    "NonFiniteOutput",
    "NotAuthorized",
    "OutputDrifted",
    "ProofFailed",
    "ProofUnavailable",
    "ReplicaFailed",
    "SlotEmbargoed",
    "StateCorruption",
    "StoreUnavailable",
    "TrainingDiverged",
    "UnknownTarget",
    "UntrustedArtifact",
    "error_named",
    "nearest",
]


class EsperError(Exception):
    """Base of every error that Esper raises on purpose."""


class BlueprintError(EsperError, ValueError):
    """A blueprint, or the dims and dtype asked of it, is not valid. The message lists every fault at once."""


class UnknownTarget(EsperError, ValueError):
    """A compile target is not of the form `cpu`, `cuda:<capability>` or `hip:<gfx name>`."""


class CompileError(EsperError, RuntimeError):
    """A kernel could not be compiled; the compiler's own error is the `__cause__`."""


class ProofFailed(EsperError, RuntimeError):
    """A compiled artifact did not match its float64 reference; it was stored as REJECTED."""


class ProofUnavailable(EsperError, RuntimeError):
    """An artifact cannot be put to the proof here: no sandbox can be started. Its status is as it was."""


class StoreUnavailable(EsperError, OSError):
    """The directory of a store cannot be created, read or written."""


class InvalidCommit(EsperError, ValueError):
    """A commit or a change of status that a store does not take: it does not fit together, or is not allowed. Nothing
    was written."""


class ArtifactNotFound(EsperError, KeyError):
    """No committed artifact has this id."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class ConfigError(EsperError, ValueError):
    """A configuration file says something that it cannot. The message lists every fault at once."""


class CorruptObject(EsperError, RuntimeError):
    """The bytes of a stored object do not have the SHA-256 that names it; it has been moved to quarantine."""


class ArtifactRefused(EsperError, RuntimeError):
    """An intact artifact may not run here: its status, target, toolchain, dims or dtype does not fit (law 4)."""


class UntrustedArtifact(ArtifactRefused):
    """An intact artifact is not signed by a key that the store's trust policy names for what it claims to be."""


class NotAuthorized(EsperError, PermissionError):
    """A change must be signed by a role whose key this process may not use or does not have. Nothing was changed."""


class ArchiveRefused(EsperError, ValueError):
    """An archive to import is not one, is damaged, or has entries that none has. Nothing of it was stored."""


class CheckpointError(EsperError, ValueError):
    """A checkpoint does not fit the model, the optimizer or the store, or is damaged. The message lists every fault at
    once. Nothing was changed."""


class InvalidTransition(EsperError, RuntimeError):
    """A seed was asked for a move that the lifecycle table does not have. Nothing was changed.

    Attributes:
        layer: qualified name of the layer. seed: index of the seed. source, target: state names.
        allowed: names of the states that could have been asked for.
    """

    def __init__(self, layer: str, seed: int, source: str, target: str, allowed: Iterable[str]) -> None:
        self.layer, self.seed, self.source, self.target = layer, seed, source, target
        self.allowed = tuple(allowed)
        moves = ", ".join(self.allowed) if self.allowed else "nothing; the state is final"
        super().__init__(f"seed {seed} of layer {layer!r} cannot go from {source} to {target}; allowed: {moves}")


class ReplicaFailed(EsperError, RuntimeError):
    """Another replica could not load or run a kernel, so this one does not either."""


class SlotEmbargoed(EsperError, RuntimeError):
    """A slot whose last occupant was culled does not take another one yet. Nothing was changed.

    Attributes:
        layer: qualified name of the layer. seed: index of the seed. opens_at: the epoch from which it takes one.
    """

    def __init__(self, layer: str, seed: int, epoch: int, opens_at: int) -> None:
        self.layer, self.seed, self.opens_at = layer, seed, opens_at
        super().__init__(
            f"seed {seed} of layer {layer!r} was culled and takes no kernel before epoch {opens_at} (now {epoch}); "
            "unload_kernel or reset_seed(force=True) opens it at once"
        )


class LoadDeadlineExceeded(EsperError, TimeoutError):
    """A background load took longer than its deadline; the seed was culled and the load's result is void."""


class LoadLost(EsperError, RuntimeError):
    """A background load that this process does not finish: it was forked meanwhile, or is ending."""


class BusUnavailable(EsperError, ConnectionError):
    """The hub or server of a bus cannot be reached, does not answer in time, or refuses this token."""


class MalformedMessage(EsperError, ValueError):
    """Bytes or values that are no message of the bus, or not one of the topic's model."""


class NonFiniteOutput(EsperError, ArithmeticError):
    """A seed's kernel returned values that are not finite where the host's were."""


class OutputDrifted(EsperError, ArithmeticError):
    """A seed's kernel, with the parameters that it has by now, is further from what its blueprint says than the prover
    allows."""


class TrainingDiverged(EsperError, ArithmeticError):
    """The loss of a run diverges, and going back to the last checkpoint has not helped, or there is none."""


class StateCorruption(EsperError, RuntimeError):
    """The arrays of layers' state are not those that the last commit wrote.

    Attributes:
        layers: by qualified name of each damaged layer, the names of the arrays that differ.
    """

    def __init__(self, layers: Mapping[str, Iterable[str]]) -> None:
        self.layers = {name: tuple(arrays) for name, arrays in layers.items()}
        shown = "; ".join(f"layer {name!r}: {', '.join(arrays)}" for name, arrays in self.layers.items())
        super().__init__(
            f"state arrays differ from the last commit ({shown}); roll back to the last checkpoint, or, if nothing "
            "else can have been damaged, write the arrays anew from the host's records with model.restore_state()"
        )


def error_named(kind: str, message: str) -> EsperError | None:
    """The error of this hierarchy that a class's name and a message stand for, as they come from another process; None
    where there is no such class, or it is not made of a message alone."""
    known = globals().get(kind)
    if not isinstance(known, type) or not issubclass(known, EsperError):
        return None
    try:
        return known(message)
    except TypeError:
        return None


def nearest(name: str, candidates: Iterable[str], *, limit: int = 3) -> str:
    """A phrase such as `; did you mean 'fc1' or 'fc2'?` for the end of a message, or the list of what there is."""
    known = sorted(set(candidates))
    if not known:
        return ""
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(c) for c in known[:8])
    return f"; known: {shown}" + (f" and {len(known) - 8} more" if len(known) > 8 else "")
