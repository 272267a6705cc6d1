"""Growing under Lightning's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from seeding import copy_artifact
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper_triton as esper
from esper_triton.kasmina.gates import Policy, ReconstructionGate
from esper_triton.kasmina.schedules import linear
from esper_triton.lightning import GrowthCallback
from esper_triton.urza import Urza

D, BATCHES = 16, 6
S = esper.SeedLifecycleState
QUICK = Policy(
    to_grafting=ReconstructionGate(max_steps=3), schedule=linear(4), stabilization_steps=2, fine_tuning_steps=4
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

    def on_train_epoch_start(self) -> None:
        self.epochs_with_rate.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def batches() -> DataLoader[Any]:
    x = torch.randn(32 * BATCHES, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.sin(3 * x[:, :1] * x[:, 1:2])), batch_size=32)


def growing(module: Module, store: Urza) -> GrowthCallback:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))

    def validate(net: nn.Module) -> float:
        return float((module.head(net(x)) - torch.sin(3 * x[:, :1] * x[:, 1:2])).square().mean())

    controller = esper.Heuristic(store, warmup_epochs=1, plateau_epochs=0)
    return GrowthCallback(controller=controller, validate=validate, measure_every=3)


def fit(module: Module, callback: GrowthCallback, folder: Path, epochs: int, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    return trainer


def test_a_seed_goes_its_way_under_the_trainer(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    entered: list[S] = []
    module.net.kasmina_layers["0"].on_transition(lambda event: entered.append(event.target))
    callback = growing(module, kernels)
    fit(module, callback, tmp_path, 7)
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
    fit(whole, growing(whole, kernels), tmp_path / "whole", 5)
    fit(half, growing(half, kernels), tmp_path / "half", 3)
    (saved,) = (tmp_path / "half").rglob("*.ckpt")
    fit(rest, growing(rest, kernels), tmp_path / "rest", 5, resume=saved)
    assert len(list(esper.seed_parameters(whole))) == 4
    mine = [*whole.state_dict().values(), *esper.seed_parameters(whole)]
    others = [*rest.state_dict().values(), *esper.seed_parameters(rest)]
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_what_the_module_has_beside_the_wrapped_model_goes_back_with_it(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    seen: list[Any] = []

    class Spoiler(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.factor = float("nan") if (trainer.current_epoch, batch_idx) == (1, 3) else 1.0
            if (trainer.current_epoch, batch_idx) == (1, 0):
                seen.append(pl_module.head.weight.detach().clone())
            elif (trainer.current_epoch, batch_idx) == (1, 4):
                seen.append(pl_module.head.weight.detach().clone())
                trainer.should_stop = True

    callback = GrowthCallback()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[callback, Spoiler()],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches())
    assert callback.hook is not None
    assert [rollback.reason for rollback in callback.hook.rollbacks] == ["the loss is nan"]
    assert torch.equal(*seen)


def test_a_logged_metric_is_what_the_controller_sees(kernels: Urza, tmp_path: Path) -> None:
    callback = GrowthCallback(monitor="train_loss")
    fit(Module(kernels), callback, tmp_path, 2)
    assert callback.hook is not None
    assert all(metric is not None and metric > 0 for metric in callback.hook.metrics)


def test_modules_without_one_wrapped_model_are_refused(kernels: Urza, tmp_path: Path) -> None:
    module = Module(kernels)
    esper.unwrap(module)
    with pytest.raises(ValueError, match="Module has 0 wrapped models, one is expected"):
        fit(module, GrowthCallback(), tmp_path, 1)
