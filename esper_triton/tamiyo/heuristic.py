"""The controller that ships: it grows the layer that the loss asks for most of what its weights cannot give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper_triton.contracts.arguments import check_at_least, check_names, refuse
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.commands import CommandKind, CommandStatus, KasminaCommand
from esper_triton.contracts.errors import EsperError, nearest
from esper_triton.contracts.graph import X_DIM
from esper_triton.contracts.query import KernelMatch, KernelQuery
from esper_triton.contracts.record import Tag
from esper_triton.contracts.system import LayerForm, LayerGradients, SystemState
from esper_triton.urza import Urza

__all__ = ["Heuristic"]

_FREE = ("DORMANT", "CANCELLED", "CULLED")
_UNDER_WAY = ("GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")
_MOST = 10_000  # kernels that are looked at for one layer
_REFUSED = (CommandStatus.REFUSED, CommandStatus.FAILED, CommandStatus.EXPIRED)


@dataclass(frozen=True)
class _Slot:
    """A seed that takes an artifact now, in columns [start, stop) of a layer with these gradients."""

    position: int
    form: LayerForm
    gradients: LayerGradients | None
    seed: int
    width: int

    @property
    def reach(self) -> float:
        """The bottleneck, as far as a kernel can do anything about it: of `rank` numbers a row it is taken to fill as
        many of the columns."""
        assert self.gradients is not None
        rank = self.gradients.rank
        return self.gradients.bottleneck * math.sqrt(1.0 if rank is None else min(rank / self.width, 1.0))

    def __str__(self) -> str:
        assert self.gradients is not None
        of = self.gradients.bottleneck
        if self.reach == of:
            return f"{of:.4g}"
        sees = f"{self.gradients.rank} number{'s' * (self.gradients.rank != 1)}"
        return f"{self.reach:.4g} of {of:.4g}, as a kernel sees {sees} for {self.width} features"


@dataclass
class _Trial:
    """An artifact in a seed, from the command on until it has become part of the model or has gone."""

    layer: str
    seed: int
    artifact_id: str
    blueprint: str
    command_id: str


class Heuristic:
    """Tries one seed at a time, where `LayerGradients.bottleneck` is largest, as far as a kernel can reach it.

    When no seed is under way, the layers with a free slot are looked at in the order of their bottleneck, times
    `sqrt(rank / width)` where a layer's input has fewer independent numbers than the seed has features: a kernel behind
    a layer of one unit sees one number, whatever the loss asks there. Urza is asked for validated kernels of the
    layer's dtype and target that fit its widths; those without parameters to learn and those that are affine, which a
    layer's own weights could do as well, are left out. Of these, designs that have become part of the model more often,
    by tries (of none, one half), come first, and then Urza's order: preferred tags, the fastest, the newest. The seed
    then makes its way through the gates of its layer's policy; this controller only begins.

    A seed that this controller has begun and whose kernel fails is culled; one that somebody else has begun is left to
    him. A layer whose seed was culled or rolled back is left alone for `embargo_epochs`, and the artifact is not tried
    there again. What it decided and why stands in the commands' `reason`, and why it decides nothing in `explanation`.

    Decides by nothing that depends on time or chance, so a run with the same data decides the same.

    Args:
        urza: the store that the model was wrapped with.
        warmup_epochs: epochs before the first seed.
        plateau_epochs: seeds only where the validation metric has not become better than before for as many epochs; 0
            asks for none, and so does a run without a metric.
        embargo_epochs: see above.
        max_seeds: that become part of the model, all layers together; None for no limit.
        blueprints: names of the only designs to try; empty for all.
        required, preferred, excluded: tags of kernels, as in `KernelQuery`.
        max_latency_us: of a kernel, as it was proven.

    A name or a tag that no kernel has is no error, as one that has it may yet be compiled; `explanation` names it.

    Raises TypeError for an argument of the wrong kind, ValueError for a negative number and for what cannot be a tag.

    Attributes:
        explanation: of the last step, in words.
    """

    def __init__(
        self,
        urza: Urza,
        *,
        warmup_epochs: int = 1,
        plateau_epochs: int = 2,
        embargo_epochs: int = 5,
        max_seeds: int | None = None,
        blueprints: Sequence[str] = (),
        required: Sequence[Tag] = (),
        preferred: Sequence[Tag] = (),
        excluded: Sequence[Tag] = (),
        max_latency_us: float | None = None,
    ) -> None:
        if not isinstance(urza, Urza):
            raise refuse("urza", urza, "the store that the model was wrapped with, an esper.Urza")
        counts = {"warmup_epochs": warmup_epochs, "plateau_epochs": plateau_epochs, "embargo_epochs": embargo_epochs}
        if max_seeds is not None:
            counts["max_seeds"] = max_seeds
        check_at_least(dict.fromkeys(counts, 0), counts)
        names = {"blueprints": blueprints, "required": required, "preferred": preferred, "excluded": excluded}
        for argument, given in names.items():
            check_names(argument, given)
        self._urza = urza
        self._warmup_epochs, self._plateau_epochs, self._embargo_epochs = warmup_epochs, plateau_epochs, embargo_epochs
        self._max_seeds, self._blueprints = max_seeds, frozenset(blueprints)
        self._query = KernelQuery(
            required=tuple(required),
            preferred=tuple(preferred),
            excluded=tuple(excluded),
            max_latency_us=max_latency_us,
        )
        self._designs: dict[str, Blueprint | None] = {}  # by id; None for one that cannot be had
        self._trial: _Trial | None = None
        self._opens_at: dict[str, int] = {}  # by layer, the epoch from which it is tried again
        self._failed: set[tuple[str, str]] = set()  # layer and artifact
        self._record: dict[str, tuple[int, int]] = {}  # by blueprint: how often it stayed, of how many tries
        self._commands = 0
        self._since = 0  # gradients of before this step are of another model
        self._needs_gradients = False
        self._asked_in = 0  # the epoch in which it began to need them
        self._asks_from = 0  # the epoch from which it may, after they could not be had
        self.explanation = "not asked yet"

    @property
    def needs_gradients(self) -> bool:
        """Whether it waits for them to decide; nothing is measured while it has nothing to decide."""
        return self._needs_gradients

    def step(self, state: SystemState) -> list[KasminaCommand]:
        """At most one command: `request_germination`, or `cull` for a seed of its own whose kernel has failed."""
        asked, self._needs_gradients = self._needs_gradients, False
        broken = self._take_in(state)
        command, self.explanation = self._decide(state, asked) if broken is None else broken
        if not self._needs_gradients:
            self._since = state.step
        elif not asked:
            self._asked_in = state.epoch
        return [] if command is None else [command]

    def state_dict(self) -> dict[str, Any]:
        """What has been tried, and what became of it."""
        return {
            "trial": None if self._trial is None else dict(vars(self._trial)),
            "opens_at": dict(self._opens_at),
            "failed": sorted(map(list, self._failed)),
            "record": {name: list(record) for name, record in self._record.items()},
            "commands": self._commands,
            "since": self._since,
            "needs_gradients": self._needs_gradients,
            "asked_in": self._asked_in,
            "asks_from": self._asks_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been."""
        self._trial = None if state["trial"] is None else _Trial(**state["trial"])
        self._opens_at = dict(state["opens_at"])
        self._failed = {(layer, artifact) for layer, artifact in state["failed"]}
        self._record = {name: (stayed, tries) for name, (stayed, tries) in state["record"].items()}
        self._commands = state["commands"]
        # The release before knew none of these.
        self._since, self._needs_gradients = state.get("since", 0), state.get("needs_gradients", False)
        self._asked_in, self._asks_from = state.get("asked_in", 0), state.get("asks_from", 0)

    # ---- what became of the last trial

    def _take_in(self, state: SystemState) -> tuple[KasminaCommand, str] | None:
        """Looks at the trial under way; what there is to do at once, if its kernel has failed."""
        trial = self._trial
        if trial is None:
            return None
        for result in state.results:
            if result.command_id == trial.command_id and result.status in _REFUSED:
                self._end(trial, state.epoch, stayed=False)
                return None
        at = self._position(state, trial)
        if at is None:  # the layer is not there any more
            self._trial = None
        elif state.seeds.state[at] == "FOSSILIZED":
            self._end(trial, state.epoch, stayed=True)
        elif state.seeds.state[at] == "ERROR_RECOVERY":
            self._end(trial, state.epoch, stayed=False)
            reason = (
                f"the kernel of seed {trial.seed} of layer {trial.layer!r} has failed while it ran (errors: "
                f"{state.seeds.error_count[at]}), and is not loaded again"
            )
            return self._command(state, CommandKind.CULL, trial.layer, trial.seed, reason), reason
        elif state.seeds.state[at] not in _UNDER_WAY or state.artifacts[at] != trial.artifact_id:
            self._end(trial, state.epoch, stayed=False)
        return None

    def _command(
        self, state: SystemState, kind: CommandKind, layer: str, seed: int, reason: str, **fields: Any
    ) -> KasminaCommand:
        self._commands += 1
        name = f"heuristic-{self._commands}-{state.step}"
        return KasminaCommand(command_id=name, layer=layer, seed=seed, command=kind, reason=reason, **fields)

    def _position(self, state: SystemState, trial: _Trial) -> int | None:
        names = state.seeds.layers
        for k, (layer, seed) in enumerate(zip(state.seeds.layer, state.seeds.seed, strict=True)):
            if seed == trial.seed and names[layer] == trial.layer:
                return k
        return None

    def _end(self, trial: _Trial, epoch: int, *, stayed: bool) -> None:
        before, tries = self._record.get(trial.blueprint, (0, 0))
        self._record[trial.blueprint] = before + stayed, tries + 1
        self._trial = None
        if not stayed:
            self._failed.add((trial.layer, trial.artifact_id))
            self._opens_at[trial.layer] = epoch + self._embargo_epochs

    # ---- what next

    def _decide(self, state: SystemState, asked: bool) -> tuple[KasminaCommand | None, str]:
        if state.epoch < self._warmup_epochs:
            return None, f"waits for epoch {self._warmup_epochs} (warmup_epochs); it is {state.epoch}"
        seeds = state.seeds
        counted = set(seeds.state)
        if not counted.isdisjoint(_UNDER_WAY):
            at = next(k for k, name in enumerate(seeds.state) if name in _UNDER_WAY)
            who = f"seed {seeds.seed[at]} of layer {seeds.layers[seeds.layer[at]]!r}"
            return None, f"waits for {who}, which is in {seeds.state[at]}: one at a time"
        if self._max_seeds is not None and seeds.state.count("FOSSILIZED") >= self._max_seeds:
            return None, f"{self._max_seeds} seeds are part of the model (max_seeds)"
        waiting = self._improving(state)
        if waiting:
            return None, waiting
        slots = list(self._free(state))
        if not slots:
            return None, "no layer has a free slot that is not embargoed"
        choices, why_not = self._choices(slots)
        if not choices:
            unknown, hopeless = self._unknown({(slot.form.dtype, slot.form.target) for slot in slots})
            return None, "; ".join(unknown if hopeless else [f"no kernel fits: {why_not}", *unknown])
        fresh = [s for s in slots if s.gradients is not None and s.gradients.step >= self._since]
        ranked = sorted(fresh, key=lambda slot: (-slot.reach, slot.position))
        for slot in ranked:
            if slot.position in choices:
                return self._germination(state, slot, choices[slot.position], ranked)
        return None, self._ask(state, asked, [slot.form.name for slot in slots if slot.position in choices])

    def _ask(self, state: SystemState, asked: bool, layers: Sequence[str]) -> str:
        """Needs gradients from now on, unless the layers that count have shown that they have none to give."""
        which = f"layer {layers[0]!r}" if len(layers) == 1 else f"{len(layers)} layers"
        in_vain = any(g is not None and g.step >= self._since for g in state.gradients)
        if asked and (in_vain or state.epoch > self._asked_in + 1):
            self._asks_from = state.epoch + max(self._embargo_epochs, 1)
        if state.epoch < self._asks_from:
            return (
                f"what the loss asks of {which} that a kernel fits could not be measured (of Linear layers and "
                f"convolutions it can, outside of compiled graphs); waits for epoch {self._asks_from} to try again"
            )
        self._needs_gradients = True
        return f"waits for what the loss asks of {which} to be measured"

    def _unknown(self, kinds: Collection[tuple[str | None, str | None]]) -> tuple[list[str], bool]:
        """In words, the names and tags asked for that no validated kernel for these dtypes and targets has; and whether
        for the lack of them there cannot be any that fits."""
        query = self._query
        asked = {
            "blueprints": self._blueprints,
            "required": query.required,
            "preferred": query.preferred,
            "excluded": query.excluded,
        }
        there = sorted((dtype, target) for dtype, target in kinds if dtype is not None and target is not None)
        if not there or not any(asked.values()):
            return [], False
        kernels = [k for dtype, target in there for k in self._urza.query(dtype=dtype, target=target, limit=_MOST)]
        names, tags = {k.blueprint_name for k in kernels}, {tag for k in kernels for tag in k.tags}
        whose = "no validated kernel for " + " or ".join(f"{dtype} on {target}" for dtype, target in there)
        said = []
        for argument, wanted in asked.items():
            known, has = (names, "is named") if argument == "blueprints" else (tags, "has the tag")
            for name in sorted(set(wanted) - known):
                said.append(f"{whose} {has} {name!r} ({argument}){nearest(name, known)}")
        hopeless = names.isdisjoint(self._blueprints) if self._blueprints else False
        return said, hopeless or not tags.issuperset(query.required)

    def _improving(self, state: SystemState) -> str:
        """Why the host is left to itself; empty where its metric is on a plateau."""
        measured = [metric for metric in state.metrics if metric is not None]
        if not self._plateau_epochs or not measured:
            return ""
        if len(measured) <= self._plateau_epochs:
            wanted = self._plateau_epochs + 1
            return f"waits for {wanted} epochs with a metric, to see a plateau; there are {len(measured)}"
        best = min if state.lower_is_better else max
        before, lately = best(measured[: -self._plateau_epochs]), best(measured[-self._plateau_epochs :])
        if before != lately and best(before, lately) == lately:
            return (
                f"the metric is still getting better: {lately:.6g} in the last {self._plateau_epochs} epochs, "
                f"{before:.6g} before"
            )
        return ""

    def _free(self, state: SystemState) -> Iterator[_Slot]:
        """The first free slot of each layer."""
        seeds = state.seeds
        of_layer = itertools.groupby(range(len(seeds.seed)), key=seeds.layer.__getitem__)
        for position, members in of_layer:
            form, gradients = state.layers[position], state.gradients[position]
            if state.epoch < self._opens_at.get(form.name, 0):
                continue
            for k in members:
                name = seeds.state[k]
                if name in _FREE and (name != "CULLED" or state.epoch >= state.opens_at[k]):
                    yield _Slot(position, form, gradients, seeds.seed[k], seeds.chunk_stop[k] - seeds.chunk_start[k])
                    break

    def _choices(self, slots: Sequence[_Slot]) -> tuple[dict[int, KernelMatch], str]:
        """What to try in each slot, by position, where there is something, and else why there is nothing."""
        found: dict[tuple[object, ...], tuple[int, list[KernelMatch]]] = {}  # layers of one form are asked for once
        choices: dict[int, KernelMatch] = {}
        reasons: dict[str, str] = {}  # each with the first layer that it is true of
        for slot in slots:
            form = slot.form
            key = (form.dtype, form.target, slot.width, form.x_width, form.may_be_image)
            if key not in found:
                found[key] = self._fitting(slot)
            count, fitting = found[key]
            untried = [match for match in fitting if (form.name, match.id) not in self._failed]
            if untried:
                choices[slot.position] = min(untried, key=lambda match: -self._promise(match.blueprint_id))
            elif form.dtype is None or form.target is None:
                reasons.setdefault("no kernel is for its dtype or device", form.name)
            else:
                why = f"of {count} validated kernels for {form.dtype} on {form.target} {len(fitting) or 'none'} fit "
                why += f"{slot.width} features" + (", and all of these have failed here" if fitting else "")
                reasons.setdefault(why, form.name)
        return choices, "; ".join(f"{name!r}: {why}" for why, name in reasons.items())

    def _fitting(self, slot: _Slot) -> tuple[int, list[KernelMatch]]:
        """How many kernels there are for a layer's dtype and target, and those of them that fit."""
        form = slot.form
        if form.dtype is None or form.target is None:
            return 0, []
        query = self._query.model_copy(update={"dtype": form.dtype, "target": form.target, "limit": _MOST})
        found = self._urza.query(query)
        return len(found), [match for match in found if self._fits(match, slot)]

    def _promise(self, blueprint_id: str) -> float:
        stayed, tries = self._record.get(blueprint_id, (0, 0))
        return (stayed + 1) / (tries + 2)

    def _fits(self, match: KernelMatch, slot: _Slot) -> bool:
        if self._blueprints and match.blueprint_name not in self._blueprints:
            return False
        if slot.width not in match.dims.values():
            return False
        design = self._design(match)
        if design is None or not design.parameters or design.affine:
            return False
        if match.dims.get(design.feature_dim) != slot.width:
            return False
        if design.layout == "image" and not slot.form.may_be_image:
            return False
        x_dim = X_DIM if X_DIM in design.dims else design.feature_dim
        return "x" not in design.inputs or match.dims.get(x_dim) == slot.form.x_width

    def _design(self, match: KernelMatch) -> Blueprint | None:
        if match.blueprint_id not in self._designs:
            try:
                self._designs[match.blueprint_id] = self._urza.blueprint(match.id)
            except EsperError:  # damaged, not trusted, or gone: nothing to try
                self._designs[match.blueprint_id] = None
        return self._designs[match.blueprint_id]

    def _germination(
        self, state: SystemState, slot: _Slot, match: KernelMatch, slots: Sequence[_Slot]
    ) -> tuple[KasminaCommand, str]:
        gradients, name = slot.gradients, slot.form.name
        assert gradients is not None
        rivals = [other for other in slots if other is not slot][:1]
        reason = (
            f"layer {name!r} has the largest bottleneck, {slot}"
            if slot is slots[0]
            else f"layer {name!r} has the largest bottleneck of those that a kernel fits, {slot}"
        )
        if rivals:
            reason += f" (then {rivals[0].form.name!r}, {rivals[0]})"
        stayed, tries = self._record.get(match.blueprint_id, (0, 0))
        reason += (
            f": {gradients.unexpressed:.0%} of what the loss asks of its output its weights cannot give. "
            f"{match.blueprint_name} ({', '.join(f'{n}={size}' for n, size in match.dims.items())}) fits its "
            f"{slot.width} features; it has stayed in {stayed} of {tries} tries so far"
        )
        for unknown in self._unknown({(slot.form.dtype, slot.form.target)})[0]:
            reason += f"; {unknown}"
        command = self._command(
            state,
            CommandKind.REQUEST_GERMINATION,
            name,
            slot.seed,
            reason,
            artifact_id=match.id,
            tags=match.tags,
        )
        self._trial = _Trial(name, slot.seed, match.id, match.blueprint_id, command.command_id)
        return command, reason
