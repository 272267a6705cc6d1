"""Growing under Hugging Face's Trainer. Needs the extra `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_triton.contracts.errors import CheckpointError
from esper_triton.model import GrowthHook, MorphableModel, attach, load_esper_state_dict
from esper_triton.model.optim import attachment_of

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "esper_triton.huggingface needs transformers: pip install 'esper-triton[transformers]'", name=error.name
    ) from error

__all__ = ["GrowthCallback"]

_FILE = "esper.pt"


class GrowthCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked at by mypy
    """A `GrowthHook` for the wrapped model that a Trainer trains.

    The loss that is watched is the one that the model gives with its output. The Trainer's checkpoints have what the
    hook needs, in a file `esper.pt`; before a run is resumed, `restore` must have put the seeds in place. An epoch ends
    for the hook when the next one begins, so that the Trainer has evaluated.

    Args:
        metric: of the Trainer's evaluation, as `eval_loss`, for the controller; by default what `validate` gives.
        options: of `GrowthHook`, all but `schedulers`.

    Attributes:
        hook: from the training's start on.

    `on_train_begin` raises ValueError for a model that is not wrapped, and for training in more than one process.
    """

    def __init__(self, *, metric: str | None = None, **options: Any) -> None:
        self.hook: GrowthHook | None = None
        self._metric, self._options = metric, options
        self._saved: Mapping[str, Any] | None = None
        self._evaluated: float | None = None
        self._over = 0
        self._losses: list[Tensor] = []
        self._listening: Any = None

    def restore(self, model: nn.Module, optimizer: Optimizer, checkpoint: str | Path) -> None:
        """Puts the seeds of one of the Trainer's checkpoints into the model, and their groups into the optimizer, which
        is then the one to give to the Trainer, since it loads their moments before any callback is asked:

            callback.restore(model, optimizer, "out/checkpoint-500")
            Trainer(model, args, optimizers=(optimizer, None), callbacks=[callback], ...).train(
                resume_from_checkpoint="out/checkpoint-500"
            )

        Raises CheckpointError, with no seed changed, and FileNotFoundError.
        """
        path = Path(checkpoint) / _FILE
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(saved, dict) or "esper" not in saved:
            raise CheckpointError(f"{path} has no section of seeds")
        if attachment_of(optimizer) is None:
            attach(optimizer, model, schedulers=[])
        load_esper_state_dict(model, saved["esper"], optimizer)
        self._saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer and its scheduler are there, with what a checkpoint had of them."""
        if args.world_size > 1:
            raise ValueError(
                f"training in {args.world_size} processes: this callback knows one; "
                "in a loop of your own GrowthHook takes replicas"
            )
        model = kwargs["model"]
        if not isinstance(model, MorphableModel):
            raise ValueError(f"{type(model).__name__} is not wrapped; esper_triton.wrap(model, ...) before the Trainer")
        optimizer, scheduler = _bare(kwargs["optimizer"], "optimizer"), _bare(kwargs["lr_scheduler"], "scheduler")
        schedulers = [] if scheduler is None else [scheduler]
        self._close()  # a training that ended with an exception has told nobody
        attachment = attachment_of(optimizer)
        if attachment is not None:
            for one in schedulers:
                attachment.follow(one)
        self.hook = GrowthHook(model, optimizer, schedulers=schedulers, **self._options)
        self._evaluated, self._losses = None, []
        if self._saved is not None:
            self.hook.load_state_dict(self._saved)
            self._evaluated = self._saved.get("evaluated")
            self._saved = None
        # Whole epochs and no others: in the last step of one the Trainer adds n / n, which is 1 exactly, and a step
        # before it less, so there is nothing to round.
        self._over = int(state.epoch or 0)
        self._listening = model.register_forward_hook(self._listen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer and the scheduler have stepped."""
        assert self.hook is not None
        losses, self._losses = self._losses, []
        self.hook.step(torch.stack(losses).mean() if losses else None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps the metric for the end of the epoch."""
        value = kwargs.get("metrics", {}).get(self._metric)
        self._evaluated = self._evaluated if value is None else float(value)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The epoch before is over, its evaluation included. Counted, since one that was told to stop ends at a
        fraction of `state.epoch`."""
        self._end_epochs(self._over)
        self._over += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the hook's state into the Trainer's checkpoint."""
        assert self.hook is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        unfinished = folder / f".{_FILE}"
        torch.save({**self.hook.state_dict(), "evaluated": self._evaluated}, unfinished)
        unfinished.replace(folder / _FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last epoch is over, unless training was stopped within it. Leaves nothing in the model or the optimizer;
        `hook` can still be read."""
        assert self.hook is not None
        self._end_epochs(self._over if control.should_epoch_stop else int(state.epoch or 0))
        self._close()

    def _close(self) -> None:
        if self.hook is not None:
            self._listening.remove()
            self.hook.close()

    def _end_epochs(self, until: int) -> None:
        assert self.hook is not None
        while self.hook.epoch < until:
            self.hook.epoch_end(self.hook.epoch, self._evaluated)
            self._evaluated = None

    def _listen(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and torch.is_grad_enabled():
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.dim() == 0:
                self._losses.append(loss.detach())


def _bare(wrapped: Any, attribute: str) -> Any:
    """What accelerate has wrapped."""
    return getattr(wrapped, attribute, wrapped) if type(wrapped).__module__.startswith("accelerate") else wrapped
