"""KasminaCommand: what may be asked of a seed over the bus, and the answer."""

from __future__ import annotations

import enum
from typing import Annotated

from pydantic import Field, model_validator

from esper_triton.contracts.envelope import Message
from esper_triton.contracts.manifest import ArtifactId

__all__ = ["CommandKind", "CommandResult", "CommandStatus", "KasminaCommand"]


class CommandKind(enum.StrEnum):
    """What a command asks for. `rollback` takes a seed out at once and locks its slot; a `GrowthHook` then takes the
    whole run back to its last checkpoint."""

    REQUEST_GERMINATION = "request_germination"
    CANCEL = "cancel"
    ADVANCE = "advance"
    SET_ALPHA = "set_alpha"
    CULL = "cull"
    UNLOAD = "unload"
    RESET = "reset"
    ROLLBACK = "rollback"


class KasminaCommand(Message):
    """One command to one seed, carried out at the next step boundary, once for each `command_id`.

    Attributes:
        model: the name under which the model is connected to the bus. layer, seed: as in `model.kasmina_layers`.
        artifact_id: what `request_germination` loads.
        alpha: what `set_alpha` sets, in [0, 1].
        target: the state that `advance` moves to; by default the one that follows.
        strategy: the schedule of a ramp that `advance` begins, as `linear:1000` (steps); the policy's by default.
        force: `reset` opens the slot during its embargo and after a rollback too.
        reason: why it is given, in words for people.
        tags: what the artifact was selected for; noted, and not looked at.
        deadline: seconds since 1970 after which the command is not carried out any more.
    """

    command_id: Annotated[str, Field(min_length=1, max_length=200)]
    layer: str
    seed: Annotated[int, Field(ge=0)]
    command: CommandKind
    model: str = "model"
    artifact_id: ArtifactId | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    target: str | None = None
    strategy: str | None = None
    force: bool = False
    reason: str = ""
    tags: tuple[str, ...] = ()
    deadline: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> KasminaCommand:
        for kind, name in ((CommandKind.REQUEST_GERMINATION, "artifact_id"), (CommandKind.SET_ALPHA, "alpha")):
            if self.command is kind and getattr(self, name) is None:
                raise ValueError(f"{kind} needs {name}")
        return self


class CommandStatus(enum.StrEnum):
    """What became of a command. REFUSED: nothing was changed. FAILED: it was begun and did not succeed, as a load that
    culls its seed. EXPIRED: its deadline was over before it began."""

    APPLIED = "applied"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"


class CommandResult(Message):
    """The answer to a command: `state` is the seed's afterwards, null where there is no such seed; `step` counts the
    boundaries of its layer."""

    command_id: str
    model: str
    status: CommandStatus
    layer: str | None = None
    seed: int | None = None
    state: str | None = None
    step: int | None = None
    reason: str | None = None
