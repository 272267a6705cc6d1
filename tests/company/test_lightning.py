"""Growing under Lightning's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from seeding import copy_artifact
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper_triton as esper
from esper_triton.kasmina.gates import Policy, ReconstructionGate
from esper_triton.kasmina.schedules import linear
from esper_triton.lightning import GrowthCallback
from esper_triton.model import Rollback
from esper_triton.urza import Urza

D, BATCHES = 16, 6
S = esper.SeedLifecycleState
QUICK = Policy(
    to_grafting=ReconstructionGate(max_steps=3), schedule=linear(8), stabilization_steps=2, fine_tuning_steps=4
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning says what one might do better


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(f"lightning.pytorch{part}") for part in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def kernels(store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]) -> Urza:
    copy_artifact(adapter_store, store, adapter_for(D, 4))
    return store


class Module(pl.LightningModule):
    """The wrapped net, and a layer beside it."""

    def __init__(self, store: Urza) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = esper.wrap(
            nn.Sequential(nn.Linear(6, D), nn.Tanh()), ["0"], urza=store, seeds_per_layer=1, policy=QUICK
        )
        self.head = nn.Linear(D, 1)
        self.factor = 1.0
        self.epochs_with_rate: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = (self.head(self.net(x)) - y).square().mean() * self.factor
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("val_loss", (self.head(self.net(x)) - y).square().mean())

    def on_train_epoch_start(self) -> None:
        self.epochs_with_rate.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def batches() -> DataLoader[Any]:
    x = torch.randn(32 * BATCHES, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.sin(3 * x[:, :1] * x[:, 1:2])), batch_size=32)


class Resumable:
    """The same batches, from a loader that can say where it is."""

    def __init__(self) -> None:
        self.start, self.given = 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for self.given, batch in enumerate(batches(), 1):
            if self.given > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"] % BATCHES


def growing(module: Module, store: Urza) -> GrowthCallback:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))

    def validate(net: nn.Module) -> float:
        return float((module.head(net(x)) - torch.sin(3 * x[:, :1] * x[:, 1:2])).square().mean())

    controller = esper.Heuristic(store, warmup_epochs=1, plateau_epochs=0)
    return GrowthCallback(controller=controller, validate=validate, measure_every=3)


def fit(
    module: Module,
    callbacks: list[pl.Callback],
    folder: Path,
    epochs: int,
    *,
    loader: Any = None,
    resume: Path | None = None,
    **options: Any,
) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches() if loader is None else loader, batches(), ckpt_path=resume)


def assert_same(module: Module, other: Module) -> None:
    mine = [*module.state_dict().values(), *esper.seed_parameters(module)]
    others = [*other.state_dict().values(), *esper.seed_parameters(other)]
    assert len(list(esper.seed_parameters(module))) == 4
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_a_seed_goes_its_way_under_the_trainer(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    entered: list[S] = []
    module.net.kasmina_layers["0"].on_transition(lambda event: entered.append(event.target))
    callback = growing(module, kernels)
    fit(module, [callback], tmp_path, 7)
    assert entered[2:6] == [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING]
    assert entered[6] in (S.FINE_TUNING, S.CULLED)
    assert callback.hook is not None
    assert callback.hook.steps == 7 * BATCHES
    assert callback.hook.epoch == 7
    assert len(callback.hook.metrics) == 7
    assert module.epochs_with_rate == pytest.approx([0.02 * 0.9**k for k in range(7)])
    assert len(module.net[0]._kasmina.observers) == 1  # the test's own


def test_a_fit_that_is_resumed_goes_on_with_its_seeds(kernels: Urza, tmp_path: Path) -> None:
    whole, half, rest = Module(kernels), Module(kernels), Module(kernels)
    fit(whole, [growing(whole, kernels)], tmp_path / "whole", 3)
    fit(half, [growing(half, kernels)], tmp_path / "half", 2)
    (saved,) = (tmp_path / "half").rglob("*.ckpt")
    fit(rest, [growing(rest, kernels)], tmp_path / "rest", 3, resume=saved)
    assert_same(whole, rest)


def test_a_fit_that_is_resumed_within_an_epoch_ends_it_where_the_whole_one_does(kernels: Urza, tmp_path: Path) -> None:
    whole = Module(kernels)
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callback = growing(whole, kernels)
    fit(whole, [callback, every_step], tmp_path, 3, loader=Resumable())
    assert callback.hook is not None
    for step in (BATCHES + 1, 2 * BATCHES, 2 * BATCHES + 1, 3 * BATCHES - 1, 3 * BATCHES):  # the last ends at once
        rest = Module(kernels)
        resumed = growing(rest, kernels)
        fit(rest, [resumed], tmp_path, 3, loader=Resumable(), resume=tmp_path / f"step={step}.ckpt")
        assert_same(whole, rest)
        assert resumed.hook is not None
        assert resumed.hook.metrics == callback.hook.metrics


def test_a_seed_that_makes_the_loss_diverge_is_locked_and_all_goes_back(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    callback = growing(module, kernels)
    after: dict[int, list[Tensor]] = {}  # by the hook's steps, what the module has beside the wrapped model too
    spoiled: list[int] = []

    class Spoiler(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            grafting = module.net.kasmina_layers["0"].seed_state(0) is S.GRAFTING
            module.factor = float("nan") if grafting and not spoiled else 1.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert callback.hook is not None
            now = [value.clone() for value in module.state_dict().values()]
            if module.factor != 1.0:
                spoiled.append(callback.hook.steps)
                (rollback,) = callback.hook.rollbacks
                assert all(torch.equal(a, b) for a, b in zip(now, after[rollback.checkpoint_step], strict=True))
            after[callback.hook.steps] = now

    fit(module, [callback, Spoiler()], tmp_path, 5, enable_checkpointing=False)
    assert callback.hook is not None
    (step,) = spoiled
    assert callback.hook.rollbacks == [
        Rollback(reason="the loss is nan", step=step, checkpoint_step=BATCHES, layer="0", seed=0)
    ]
    assert module.net.kasmina_layers["0"].seed_state(0) is S.ROLLED_BACK
    assert callback.hook.steps == 5 * BATCHES
    assert all(value.isfinite().all() for value in after[5 * BATCHES])
    assert not torch.equal(after[5 * BATCHES][0], after[BATCHES][0])


@pytest.mark.parametrize(  # the mean of an epoch's losses is there at its end only
    ("monitor", "at_epoch_end"), [("train_loss", True), ("val_loss", True), ("val_loss", False)]
)
def test_a_logged_metric_is_what_the_controller_sees(
    kernels: Urza, tmp_path: Path, monitor: str, at_epoch_end: bool
) -> None:
    callback, first, second = (GrowthCallback(monitor=monitor) for _ in range(3))

    def run(name: str, callback: GrowthCallback, epochs: int, resume: Path | None = None) -> None:
        checkpoints = ModelCheckpoint(tmp_path / name, save_on_train_epoch_end=at_epoch_end)
        fit(Module(kernels), [callback, checkpoints], tmp_path, epochs, resume=resume, num_sanity_val_steps=1)

    run("whole", callback, 3)
    assert callback.hook is not None
    assert all(metric is not None and metric > 0 for metric in callback.hook.metrics)
    run("half", first, 2)
    (saved,) = (tmp_path / "half").rglob("*.ckpt")
    run("rest", second, 3, saved)
    assert second.hook is not None
    assert second.hook.metrics == callback.hook.metrics


def test_a_fit_that_ended_with_an_exception_leaves_nothing(kernels: Urza, tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no more")

    module = Module(kernels)
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, [growing(module, kernels), Fails()], tmp_path, 1)
    again = growing(module, kernels)
    fit(module, [again], tmp_path, 1)
    assert again.hook is not None
    assert again.hook.steps == BATCHES


def test_modules_without_one_wrapped_model_are_refused(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    esper.unwrap(module)
    with pytest.raises(ValueError, match="Module has 0 wrapped models, one is expected"):
        fit(module, [GrowthCallback()], tmp_path, 1)
