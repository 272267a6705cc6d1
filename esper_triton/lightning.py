"""Growing under Lightning's Trainer. Needs the extra `lightning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esper_triton.model import GrowthHook, MorphableModel

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "esper_triton.lightning needs Lightning: pip install 'esper-triton[lightning]'", name=error.name
    ) from error

__all__ = ["GrowthCallback"]


class GrowthCallback(Callback):  # type: ignore[misc]  # Lightning is not looked at by mypy
    """A `GrowthHook` for the wrapped model that a LightningModule is, or has as one of its modules.

    Lightning's own checkpoints have what the hook needs: `trainer.fit(module, ckpt_path=...)` goes on with the seeds,
    and `checkpoints=` is for what there is to go back to. Lightning saves no random streams, and the place within an
    epoch only of a loader with `state_dict` and `load_state_dict`; with any other it takes an interrupted epoch's first
    batches once more. An epoch ends for the hook when the next one begins, so that its schedulers have stepped.

    Args:
        monitor: the name of a logged metric, as `val_loss`, for the controller; by default what `validate` gives.
        options: of `GrowthHook`, all but `schedulers`.

    Attributes:
        hook: from the fit's start on.

    `on_fit_start` raises ValueError for a module without exactly one wrapped model or one optimizer, and for training
    in more than one process.
    """

    def __init__(self, *, monitor: str | None = None, **options: Any) -> None:
        self.hook: GrowthHook | None = None
        self._monitor, self._options = monitor, options
        self._saved: Mapping[str, Any] | None = None
        self._monitored: float | None = None  # of this epoch, as far as it is known before Lightning has ended it

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer exists, and its saved state has not been loaded yet."""
        if trainer.world_size > 1:
            raise ValueError(
                f"training in {trainer.world_size} processes: this callback knows one; "
                "in a loop of your own GrowthHook takes replicas"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, one is expected")
        model = _wrapped_model(pl_module)
        options = dict(self._options)
        if model is not pl_module:  # what else it has must go back too
            options["carry"] = {"lightning_module": pl_module} | dict(options.get("carry") or {})
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.hook = GrowthHook(model, trainer.optimizers[0], schedulers=schedulers, **options)
        self._monitored = None
        if self._saved is not None:
            self.hook.load_state_dict(self._saved)
            self._monitored = self._saved.get("monitored")
            self._saved = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint of an epoch's end is taken before the next one begins, and Lightning does not begin that one
        again."""
        self._end_epochs(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """At the end of the closure that Lightning gives to the optimizer."""
        assert self.hook is not None
        self.hook.train_seeds()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step, or a part of one whose gradients are accumulated."""
        assert self.hook is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.hook.step(loss if isinstance(loss, Tensor) else None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch before is over, its schedulers' steps included."""
        self._end_epochs(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """So is the last one, unless training was stopped within it."""
        self._end_epochs(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing in the model or the optimizer. `hook` can still be read."""
        if self.hook is not None:
            self.hook.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call then: the module can be fitted again."""
        self.teardown(trainer, pl_module, "fit")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint may be taken now, and a fit that goes on from it does not validate again."""
        if not trainer.sanity_checking:
            self._monitored = self._metric(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning does not keep: the metric of an epoch whose end is still to come for the hook."""
        if self.hook is not None:
            over = self.hook.epoch < trainer.fit_loop.epoch_progress.current.processed
            checkpoint["callbacks"][self.state_key]["monitored"] = self._metric(trainer) if over else self._monitored

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {} if self.hook is None else self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of Lightning's checkpoint, before the fit begins."""
        self._saved = state_dict or None

    def _end_epochs(self, trainer: Trainer) -> None:
        """All that Lightning has trained to their end. (Its `current_epoch` counts an epoch a little later.)"""
        assert self.hook is not None
        while self.hook.epoch < trainer.fit_loop.epoch_progress.current.processed:
            metric, self._monitored = self._metric(trainer), None
            self.hook.epoch_end(self.hook.epoch, metric)

    def _metric(self, trainer: Trainer) -> float | None:
        if self._monitor is None:
            return None
        value = trainer.callback_metrics.get(self._monitor)
        return self._monitored if value is None else float(value)


def _wrapped_model(module: nn.Module) -> MorphableModel:
    found = [m for m in module.modules() if isinstance(m, MorphableModel)]
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} has {len(found)} wrapped models, one is expected; esper_triton.wrap(...) what it "
            "trains before the fit"
        )
    return found[0]
