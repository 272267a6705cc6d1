"""GrowthHook: growing in a training loop of one's own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper_triton.contracts.arguments import number
from esper_triton.contracts.commands import CommandResult
from esper_triton.contracts.errors import CheckpointError, StateCorruption, TrainingDiverged
from esper_triton.contracts.system import SystemState
from esper_triton.kasmina.boundary import lock_seed
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.model.agreement import Agreement, Alone, agreement_of
from esper_triton.model.arguments import check_arguments, check_belongs, measuring
from esper_triton.model.bottleneck import GradientProbe
from esper_triton.model.checkpoint import esper_state_dict, prepare
from esper_triton.model.checkpoints import Checkpoints, DirectoryCheckpoints, MemoryCheckpoint, checkpoints_in
from esper_triton.model.commanding import carry_out
from esper_triton.model.divergence import LossWatch, Rollback
from esper_triton.model.evaluation import undisturbed
from esper_triton.model.morphable import MorphableModel, end_step_of, seed_parameters
from esper_triton.model.optim import attach, attachment_of
from esper_triton.model.run_state import SCHEMA_VERSION, RunState, check_version
from esper_triton.model.system import SystemReader
from esper_triton.tamiyo.controller import Controller, commands_of, load_state_into, measures_gradients, state_of

__all__ = ["GrowthHook"]

_S = SeedLifecycleState
_UNSETTLING = (_S.GRAFTING, _S.FINE_TUNING)  # from here on a seed changes what the model computes
_log = logging.getLogger("esper_triton.model")


class GrowthHook:
    """What a training loop of one's own calls to grow its model:

        hook = esper.GrowthHook(
            model, optimizer, schedulers=[scheduler], controller=controller, validate=validate, checkpoints="run"
        )
        for epoch in range(hook.resume(), epochs):
            for x, y in batches:
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                hook.step(loss)
            scheduler.step()
            hook.epoch_end(epoch)  # last in the epoch: the checkpoint is the state that the next one begins with

    **step** is the boundary: requests of every origin take effect, ramps of alpha advance, and with `auto_advance`
    seeds that are done with a stage make their next move through the gates of their layer's policy. Seeds in TRAINING
    learn within `optimizer.step()`, before it: their loss is added to no other. A seed that has come to EVALUATING, or
    to the end of FINE_TUNING, is measured on `validate` with its alpha on and off; one that stays undecided is measured
    again at the end of each epoch, and culled after `undecided_evaluations` times.

    **Going back.** When the loss diverges (see `LossWatch`), the validation metric is not finite, the state arrays are
    damaged, or a seed is rolled back by a command or by a call, everything goes back to the last good checkpoint: the
    model, the seeds, the optimizer, the schedulers, the random streams and what is in `carry`. Epoch, step and the
    controller go on. The seed that is taken to be the cause is locked in ROLLED_BACK: the one that was rolled back, or
    that which was the last to move into GRAFTING or FINE_TUNING, the moves that change what the model computes, of all
    that contribute now and were not permanent already at the checkpoint; for damaged arrays, of the damaged layers, and
    since the checkpoint. After
    `max_rollbacks` times to one checkpoint, TrainingDiverged.

    **Replicas** (`esper.replicate(model)` before this hook is made; the optimizer steps on the model's own parameters,
    the loop calls DDP). Every rank has a hook with the same options and calls the same methods at the same place, and
    all go back together: the loss is the mean over the ranks, damage on one rank is damage on all, the validation
    metric and what a seed does for it are the first rank's, whose controller alone is asked. Seeds' gradients are
    averaged within `optimizer.step()`, before it. Each rank keeps checkpoints of its own, in `rank-0` and so on.

    A good checkpoint is one with finite weights, after a step whose loss was not suspicious. One is taken before the
    first step, and at the end of every `checkpoint_every`-th epoch. Gradients that are accumulated across the end of an
    epoch are part of it, for a run that is resumed; after going back the window of accumulation begins anew, as those
    gradients would be added to a whole window of other data.

    Args:
        model: a wrapped one; if it is to be replicated, it is already. optimizer: of the host's parameters; it is
            attached (`esper.attach`) if it is not yet, for options of the seeds' groups attach it before.
        schedulers: every learning rate scheduler of the optimizer, `[]` for none any more.
        controller: decides which seeds there are; it is asked every `control_every` steps and at the end of each epoch.
        validate: `validate(model)` is the validation metric, called in eval mode without gradients. Without it a seed
            waits in EVALUATING for `model.evaluate_seed`.
        lower_is_better: whether the metric is a loss. repeats: measurements of a pair with a seed on and off.
        checkpoints: a directory for the last `keep` checkpoints; without one the last is kept in memory.
        carry: more state that belongs to the run: by name, what has `state_dict` and `load_state_dict` (a gradient
            scaler, a sampler), or a torch.Generator.
        measure_every: steps between two rounds of measuring gradients (see `GradientProbe`) at the least, while the
            controller needs them; 0 for never.
        divergence: what watches the loss; None for nobody.

    Raises TypeError for an argument of the wrong kind; ValueError for a model that is not wrapped, for options out of
    range, for a model or an optimizer that has a hook already (`close` it first), for an optimizer of another model,
    and for schedulers that were not named; and what `attach` raises. Of replicas, what fails on another rank raises
    ReplicaFailed here.

    Attributes:
        epoch: that is under way, or begins next. steps: of the optimizer so far. metrics: at the end of each epoch.
        rollbacks: in order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedulers: Sequence[LRScheduler] | None = None,
        controller: Controller | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        lower_is_better: bool = True,
        repeats: int = 2,
        checkpoints: str | Path | None = None,
        keep: int = 3,
        checkpoint_every: int = 1,
        carry: Mapping[str, Any] | None = None,
        auto_advance: bool = True,
        undecided_evaluations: int = 3,
        control_every: int = 10,
        measure_every: int = 100,
        divergence: LossWatch | None = LossWatch(),  # noqa: B008  # a description: this hook makes its own of it
        max_rollbacks: int = 3,
    ) -> None:
        check_arguments(
            model=model,
            optimizer=optimizer,
            schedulers=schedulers,
            controller=controller,
            validate=validate,
            checkpoints=checkpoints,
            carry=carry,
            divergence=divergence,
            repeats=repeats,
            keep=keep,
            checkpoint_every=checkpoint_every,
            undecided_evaluations=undecided_evaluations,
            control_every=control_every,
            measure_every=measure_every,
            max_rollbacks=max_rollbacks,
        )
        self._run = RunState(model, optimizer, schedulers or (), carry or {})
        assert isinstance(model, MorphableModel)  # check_arguments has seen to it
        self._layers: dict[str, KasminaLayer] = {layer._kasmina.name: layer for layer in model.kasmina_layers.values()}
        self._distinct = tuple(self._layers.values())
        _check_free(self._distinct, optimizer)
        check_belongs(model, optimizer, schedulers)
        self._ranks: Agreement = agreement_of(self._distinct)
        self.model, self.optimizer, self.controller = model, optimizer, controller
        self.epoch, self.steps = 0, 0
        self.metrics: list[float | None] = []
        self.rollbacks: list[Rollback] = []
        self._validate = None if validate is None else measuring(validate)
        self._lower_is_better, self._repeats = lower_is_better, repeats
        self._auto_advance, self._undecided_limit = auto_advance, undecided_evaluations
        self._checkpoint_every, self._control_every, self._max_rollbacks = (
            checkpoint_every,
            control_every,
            max_rollbacks,
        )
        self._watch = None if divergence is None else divergence.fresh()
        if checkpoints is not None and self._ranks.size > 1:
            checkpoints = Path(checkpoints) / f"rank-{self._ranks.rank}"  # each has random streams and data of its own
        self._store: Checkpoints = (
            MemoryCheckpoint() if checkpoints is None else DirectoryCheckpoints(checkpoints, keep=keep)
        )
        self._probe = GradientProbe(self._layers, measure_every if self._ranks.rank == 0 else 0)
        self._reader = SystemReader(self._layers)
        self._results: list[CommandResult] = []
        self._losses: list[Tensor | float] = []  # since the optimizer's last step
        self._undecided: dict[tuple[str, int], int] = {}
        self._moves = 0
        self._youngest: dict[tuple[str, int], int] = {}  # by seed, the number of its last unsettling move
        self._asked: tuple[str, int] | None = None  # a seed that was rolled back by somebody else
        self._stepped, self._restoring, self._saved = False, False, False
        self._saved_step, self._saved_moves = 0, 0
        self._locked: list[tuple[str, int]] = []  # since the last checkpoint
        attached = attachment_of(optimizer)
        self._attachment = attach(optimizer, model, schedulers=schedulers) if attached is None else None
        self._endings: list[Callable[[], object]] = [
            optimizer.register_step_pre_hook(self._before_optimizer).remove,
            optimizer.register_step_post_hook(self._after_optimizer).remove,
            *(layer.on_transition(self._moved) for layer in self._layers.values()),
        ]

    def __enter__(self) -> GrowthHook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves nothing in the model or the optimizer; detaches it if this hook has attached it. Seeds stay."""
        while self._endings:
            self._endings.pop()()
        self._probe.close()
        self._ranks = Alone()  # nothing here refers to the group of replicas any more
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    # ---- what the loop calls

    def step(self, loss: Tensor | float | None = None) -> Rollback | None:
        """Call it after each `optimizer.step()`, with the loss of the step; with accumulated gradients after each
        backward, if you like: what the optimizer has not stepped on is kept for the average.

        Waits for the device to have computed the loss. Returns what there was to go back for, and raises
        TrainingDiverged where that is no way out.
        """
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if not self._stepped:
            return None
        self._stepped = False
        losses, self._losses = self._losses, []
        self._probe.after_step(self.steps)
        self.steps += 1
        if losses and self._watch is not None:
            reason = self._watch.see(self._ranks.mean(sum(map(float, losses)) / len(losses)))
            if reason is not None:
                return self._go_back(reason)
        end_step_of(self._distinct, auto_advance=self._auto_advance)
        if self._asked is not None:
            return self._go_back("it was asked for", asked=self._asked)
        self._evaluate(again=False)
        if self.steps % self._control_every == 0:
            self._control()
        self._measure()
        return None

    def epoch_end(self, epoch: int, metric: float | None = None) -> Rollback | None:
        """Call it last in each epoch, with its number, after the schedulers' steps. Takes the validation metric (or
        calls `validate`), measures undecided seeds again, checks the state arrays, asks the controller, and takes a
        checkpoint. The next epoch has begun when it returns.

        Returns what there was to go back for, and raises TrainingDiverged where that is no way out, ValueError for a
        negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, found {epoch}")
        if metric is not None:
            metric = number("metric", metric)
        elif self._validate is not None:
            with undisturbed(self.model):
                metric = self._validate(self.model)
        metric = self._ranks.first(metric)
        self.metrics.append(metric)
        self.epoch = epoch + 1
        if metric is not None and not math.isfinite(metric):
            return self._go_back(f"the validation metric is {metric}")
        self._evaluate(again=True)
        damage: tuple[str, tuple[str, ...]] | None = None
        try:
            self.model.epoch_boundary(self.epoch)
        except StateCorruption as error:
            damage = str(error), tuple(error.layers)
        damages = [one for one in self._ranks.everyones(damage) if one is not None]
        if damages:
            return self._go_back(damages[0][0], among={name for _, layers in damages for name in layers})
        if self._asked is not None:
            return self._go_back("it was asked for", asked=self._asked)
        self._control()
        self._measure()  # whoever goes on from the checkpoint begins with this too
        if self.epoch % self._checkpoint_every == 0:
            self.checkpoint()
        return None

    def train_seeds(self) -> float | None:
        """What `optimizer.step()` does before it by itself, for a loop that gives it a closure: call it at the
        closure's end. The loss of the seeds in TRAINING, None where there is none."""
        if all(layer._kasmina.observed is None for layer in self._layers.values()):
            return None
        return self.model.train_seeds()

    def rollback(self, reason: str) -> Rollback:
        """Goes back to the last good checkpoint now. Call it between two steps."""
        return self._go_back(reason)

    def resume(self) -> int:
        """Makes the run what the newest checkpoint of the directory has, and returns the epoch to begin with. Where
        there is none, that is 0, and the first checkpoint is taken. Training then goes on bit for bit as it would have.

        Raises CheckpointError, with nothing changed, for one that does not fit the model or the optimizer.
        """
        state = self._newest()
        if state is None:
            self.checkpoint()
            return self.epoch
        self._restore(state, gradients=True)
        self._take_own(state["growth"])
        self._note_saved()
        return self.epoch

    def checkpoint(self) -> bool:
        """Takes a checkpoint now, between two steps. False, with nothing done, where it would not be a good one. It has
        the gradients that there are: take it where the loop has cleared those that the optimizer has stepped on.

        Raises CheckpointError for a directory with checkpoints of another run, TypeError for state that cannot be
        saved, OSError.
        """
        return self._checkpoint()

    def _checkpoint(self, *, within_step: bool = False) -> bool:
        """Within a step it is that of the time before: without the gradients and losses of the step."""
        self._check_ranks()
        values = (*self.model.parameters(), *seed_parameters(self.model))
        good = self._watch is None or not self._watch.is_suspicious
        good = good and all(bool(value.isfinite().all()) for value in values)
        if not all(self._ranks.everyones(good)):
            return False
        with self._ranks.together("take a checkpoint"):
            if not self._saved and isinstance(self._store, DirectoryCheckpoints):
                found = checkpoints_in(self._store.directory)
                if found:
                    raise CheckpointError(
                        f"{self._store.directory} has {len(found)} checkpoints of another run, up to {found[-1].name}; "
                        "go on with it by hook.resume(), or give another directory"
                    )
            growth = self.state_dict()
            if within_step:
                growth |= {"losses": [], "gradients": growth["gradients"] | {"seen": {}}}
            self._store.save(self._run.read(growth, gradients=not within_step), self.steps)
        self._note_saved()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the loop's own checkpoint lacks, for one that does not use `checkpoints`: the seeds, with their moments
        in the optimizer, this hook's and the controller's state; no gradients. Tensors are the model's own memory.

        To go on, in this order: the model's own `load_state_dict`, this hook's, the optimizer's, the schedulers'.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "esper": esper_state_dict(self.model, self.optimizer),
            "epoch": self.epoch,
            "steps": self.steps,
            "metrics": list(self.metrics),
            "rollbacks": [asdict(rollback) for rollback in self.rollbacks],
            "moves": self._moves,
            "youngest": [[layer, seed, move] for (layer, seed), move in self._youngest.items()],
            "undecided": [[layer, seed, count] for (layer, seed), count in self._undecided.items()],
            "losses": [float(loss) for loss in self._losses],
            "watch": None if self._watch is None else self._watch.state_dict(),
            "gradients": self._probe.state_dict(),
            "results": [result.model_dump(mode="json") for result in self._results],
            "controller": state_of(self.controller),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been; see `state_dict`. Raises CheckpointError, with nothing changed, for what does
        not fit."""
        check_version(state)
        prepared = prepare(self.model, state["esper"], self.optimizer)
        self._restoring = True
        try:
            prepared.apply()
        finally:
            self._restoring = False
        self._take_own(state)

    def system_state(self) -> SystemState:
        """What a controller is given."""
        return self._reader.read(
            epoch=self.epoch,
            step=self.steps,
            gradients=self._probe.results,
            metrics=self.metrics,
            lower_is_better=self._lower_is_better,
            results=self._results,
        )

    # ---- the optimizer's and the layers' calls

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._saved:
            self._checkpoint(within_step=True)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:  # else there has been no forward yet
            self.train_seeds()
            self._ranks.average_gradients()

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def _moved(self, event: Transition) -> None:
        if self._restoring:
            return
        self._undecided.pop((event.layer, event.seed), None)
        if event.target in _UNSETTLING:
            self._moves += 1
            self._youngest[event.layer, event.seed] = self._moves
        elif event.target is _S.ROLLED_BACK:
            self._asked = event.layer, event.seed

    # ---- seeds

    def _evaluate(self, *, again: bool) -> None:
        """Measures the seeds whose stage ends with a measurement; those that are undecided only `again`."""
        if self._validate is None:
            return
        for name, layer in self._layers.items():
            for seed in layer._kasmina.seeds:
                policy = layer._kasmina.policy
                ended = seed.state is _S.FINE_TUNING and seed.stage_steps >= policy.fine_tuning_steps
                if seed.state is not _S.EVALUATING and not ended:
                    continue
                if seed.evaluation is not None and not (
                    again and policy.metric.verdict(seed.evaluation) == "undecided"
                ):
                    continue
                evaluation = self.model.evaluate_seed(
                    name, seed.index, self._validate, repeats=self._repeats, lower_is_better=self._lower_is_better
                )
                if policy.metric.verdict(evaluation) != "undecided":
                    continue
                tries = self._undecided[name, seed.index] = self._undecided.get((name, seed.index), 0) + 1
                if tries >= self._undecided_limit:
                    _say("seed_undecided", layer=name, seed=seed.index, evaluations=tries)
                    KasminaLayer.request_transition(layer, seed.index, _S.CULLED)

    def _measure(self) -> None:
        """Before a step: gradients, if the controller needs them now."""
        self._probe.before_step(self.steps, wanted=measures_gradients(self.controller))

    def _control(self) -> None:
        if self.controller is None or self._ranks.rank != 0:
            return
        if self._ranks.size > 1 and any(len(layer._kasmina.queue) for layer in self._distinct):
            return  # what was asked for last waits for a boundary still, and the seeds do not show it
        state, self._results = self.system_state(), []
        for command in commands_of(self.controller, state):
            result = carry_out(self._layers, command)
            self._results.append(result)
            _say(
                "command",
                command=command.command.value,
                layer=command.layer,
                seed=command.seed,
                reason=command.reason,
                status=result.status.value,
                answer=result.reason,
            )

    # ---- checkpoints, and the way back

    def _check_ranks(self) -> None:
        if agreement_of(self._distinct).size != self._ranks.size:
            raise ValueError(
                f"{type(self.model).__name__} was replicated, or its replicas closed, after this GrowthHook was made: "
                "esper_triton.replicate(model) comes before it, and hook.close() before replicas.close()"
            )

    def _newest(self) -> dict[str, Any] | None:
        """This rank's state of the newest step of which every rank has one that is whole. None where none has any."""
        with self._ranks.together("read its checkpoints"):
            state = self._store.newest()
        while True:
            steps = self._ranks.everyones(None if state is None else int(state["growth"]["steps"]))
            if len(set(steps)) == 1:
                return state
            known = [step for step in steps if step is not None]
            if len(known) < len(steps):
                raise CheckpointError(
                    f"the ranks have no checkpoint of one step in common; their newest are of steps {steps}"
                )
            with self._ranks.together("read its checkpoints"):
                state = self._store.newest(min(known))

    def _restore(self, state: Mapping[str, Any], *, gradients: bool) -> None:
        self._restoring = True
        try:
            with self._ranks.together("go back to its checkpoint"):
                self._run.restore(state, gradients=gradients)
            self._ranks.forget_loads()
        finally:
            self._restoring = False

    def _note_saved(self) -> None:
        self._saved, self._saved_step, self._saved_moves = True, self.steps, self._moves
        self._locked = []

    def _take_own(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.steps, self._moves = state["epoch"], state["steps"], state["moves"]
        self.metrics = list(state["metrics"])
        self.rollbacks = [Rollback(**rollback) for rollback in state["rollbacks"]]
        self._youngest = {(layer, seed): move for layer, seed, move in state["youngest"]}
        self._undecided = {(layer, seed): count for layer, seed, count in state["undecided"]}
        self._results = [CommandResult.model_validate(result) for result in state["results"]]
        self._losses = list(state.get("losses", []))
        if self._watch is not None and state["watch"] is not None:
            self._watch.load_state_dict(state["watch"])
        load_state_into(self.controller, state["controller"])
        self._probe.load_state_dict(state["gradients"])
        self._measure()

    def _go_back(
        self, reason: str, *, among: Collection[str] | None = None, asked: tuple[str, int] | None = None
    ) -> Rollback:
        self._asked = None
        offender = self._offender(among) if asked is None else asked
        if len([r for r in self.rollbacks if r.checkpoint_step == self._saved_step]) >= self._max_rollbacks:
            raise TrainingDiverged(
                f"step {self.steps}: {reason}; the run has gone back to the checkpoint of step {self._saved_step} "
                f"{self._max_rollbacks} times already (max_rollbacks)"
            )
        state = self._newest()
        if state is None:
            raise TrainingDiverged(f"step {self.steps}: {reason}, and there is no checkpoint to go back to")
        self._restore(state, gradients=False)  # the loop's window of accumulation is not the one of then
        self._losses.clear()
        self._probe.close()
        self._undecided.clear()
        if self._watch is not None:
            self._watch.reset()
        if offender is not None:
            self._locked.append(offender)
        self._restoring = True
        try:
            for name, seed in self._locked:
                lock_seed(self._layers[name], seed)
        finally:
            self._restoring = False
        self.model.epoch_boundary(self.epoch)
        rollback = Rollback(
            reason=reason,
            step=self.steps,
            checkpoint_step=self._saved_step,
            layer=None if offender is None else offender[0],
            seed=None if offender is None else offender[1],
        )
        self.rollbacks.append(rollback)
        _say("rollback", **asdict(rollback))
        self._measure()
        return rollback

    def _offender(self, among: Collection[str] | None) -> tuple[str, int] | None:
        found = []
        for (name, index), move in self._youngest.items():
            state, since = self._layers[name]._kasmina.seeds[index].state, move > self._saved_moves
            contributes = state.is_active or state is _S.ERROR_RECOVERY
            if among is None:
                asked = since or state is not _S.FOSSILIZED
            else:
                asked = since and name in among
            if contributes and asked:
                found.append((move, name, index))
        return max(found)[1:] if found else None


def _check_free(layers: Collection[KasminaLayer], optimizer: Optimizer) -> None:
    """Raises ValueError where one has a hook: with two, one step of the optimizer would be two of the layers."""
    of_model = [observer for layer in layers for observer in layer._kasmina.observers]
    for whose, callbacks in (("model", of_model), ("optimizer", optimizer._optimizer_step_pre_hooks.values())):
        if any(isinstance(getattr(callback, "__self__", None), GrowthHook) for callback in callbacks):
            raise ValueError(f"this {whose} has a GrowthHook already; close() that one first")


def _say(event: str, **fields: object) -> None:
    """One line of JSON, for people and machines."""
    _log.info("%s", json.dumps({"event": event, **fields}))
