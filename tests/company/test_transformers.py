"""Growing under Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from seeding import copy_artifact
from torch import nn

import esper_triton as esper
from esper_triton.huggingface import GrowthCallback
from esper_triton.kasmina.gates import Policy, ReconstructionGate
from esper_triton.kasmina.schedules import linear
from esper_triton.model import Rollback
from esper_triton.urza import Urza

D, STEPS = 16, 8
S = esper.SeedLifecycleState
QUICK = Policy(
    to_grafting=ReconstructionGate(max_steps=3), schedule=linear(4), stabilization_steps=2, fine_tuning_steps=4
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers says what one might do better


@pytest.fixture
def kernels(store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]) -> Urza:
    copy_artifact(adapter_store, store, adapter_for(D, 4))
    return store


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(12, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": int(tokens[0] > tokens[1])}


def classifier(store: Urza) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    return esper.wrap(model, ["*.output.dense"], urza=store, seeds_per_layer=1, policy=QUICK)


def plain_adamw(model: Any) -> torch.optim.AdamW:
    """The Trainer's own is fused, and rounds otherwise than one that is given to it."""
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is wanted], "weight_decay": 0.0}
        for wanted in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=5e-3)


def trainer(
    model: Any, callbacks: list[Any], folder: Path, epochs: int, *, optimizer: Any = None, save_steps: int | None = None
) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 1,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        learning_rate=5e-3,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def growing(store: Urza, **options: Any) -> GrowthCallback:
    def validate(model: nn.Module) -> float:
        rows = [Rows()[k] for k in range(32)]
        tokens = torch.stack([row["input_ids"] for row in rows])
        return float(model(input_ids=tokens, labels=torch.tensor([row["labels"] for row in rows])).loss)

    controller = esper.Heuristic(store, warmup_epochs=1, plateau_epochs=0)
    return GrowthCallback(controller=controller, validate=validate, measure_every=3, **options)


def test_a_seed_goes_its_way_under_the_trainer(
    kernels: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier(kernels)
    entered: list[S] = []
    for layer in model.kasmina_layers.values():
        layer.on_transition(lambda event: entered.append(event.target))
    callback = growing(kernels, metric="eval_loss")
    trainer(model, [callback], tmp_path, 5).train()
    assert entered[2:6] == [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING]
    assert callback.hook is not None
    assert callback.hook.steps == 5 * STEPS
    assert callback.hook.epoch == 5
    assert all(metric is not None for metric in callback.hook.metrics)
    assert len(callback.hook._watch._losses) == 5 * STEPS
    assert "eval_loss" in capsys.readouterr().out
    assert {len(layer._kasmina.observers) for layer in model.kasmina_layers.values()} == {1}  # the test's own


@pytest.mark.parametrize(
    ("save_steps", "saved_step"),
    [(None, 2 * STEPS), (13, 13)],
    ids=["at an epoch's end", "in the middle of one"],
)
def test_a_training_that_is_resumed_goes_on_with_its_seeds(
    kernels: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_steps: int | None, saved_step: int
) -> None:
    whole, callback = classifier(kernels), growing(kernels, metric="eval_loss")
    trainer(whole, [callback], tmp_path / "run", 4, optimizer=plain_adamw(whole), save_steps=save_steps).train()
    assert len(list(esper.seed_parameters(whole))) >= 4
    rest, resumed = classifier(kernels), growing(kernels, metric="eval_loss")
    optimizer, saved = plain_adamw(rest), tmp_path / "run" / f"checkpoint-{saved_step}"
    resumed.restore(rest, optimizer, saved)
    rest_trainer = trainer(rest, [resumed], tmp_path / "rest", 4, optimizer=optimizer, save_steps=save_steps)
    rest_trainer.train(resume_from_checkpoint=str(saved))
    mine = [*whole.state_dict().values(), *esper.seed_parameters(whole)]
    others = [*rest.state_dict().values(), *esper.seed_parameters(rest)]
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    assert callback.hook is not None
    assert resumed.hook is not None
    assert len(callback.hook.metrics) == 4
    assert None not in callback.hook.metrics
    assert resumed.hook.metrics == callback.hook.metrics
    capsys.readouterr()


@pytest.mark.parametrize("steps", [3, 5])
def test_an_epoch_that_is_told_to_stop_is_over(
    kernels: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    ended: list[int] = []

    class Stopper(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % steps == 0

    def validate(model: nn.Module) -> float:
        assert callback.hook is not None
        ended.append(callback.hook.steps)
        return 1.0

    callback = GrowthCallback(validate=validate)
    trainer(classifier(kernels), [callback, Stopper()], tmp_path, 3).train()
    assert ended == [steps, 2 * steps, 3 * steps]
    capsys.readouterr()


def test_a_seed_that_makes_the_loss_diverge_is_locked_and_training_goes_on(
    kernels: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, callback = classifier(kernels), growing(kernels)
    after: dict[int, dict[str, torch.Tensor]] = {}  # by the hook's steps
    spoiled: list[tuple[int, str]] = []

    class Spoiler(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grafting = [n for n, layer in model.kasmina_layers.items() if layer.seed_state(0) is S.GRAFTING]
            if grafting and not spoiled:
                spoiled.append((state.global_step + 1, *grafting))
                model.classifier.bias.detach().fill_(torch.nan)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert callback.hook is not None
            after[callback.hook.steps] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer(model, [callback, Spoiler()], tmp_path, 5).train()
    ((step, name),) = spoiled
    saved = (step - 1) // STEPS * STEPS  # the end of the epoch before
    assert callback.hook is not None
    assert callback.hook.rollbacks == [
        Rollback(reason="the loss is nan", step=step, checkpoint_step=saved, layer=name, seed=0)
    ]
    assert all(torch.equal(after[step][key], value) for key, value in after[saved].items())
    assert model.kasmina_layers[name].seed_state(0) is S.ROLLED_BACK
    assert callback.hook.steps == 5 * STEPS
    assert len(callback.hook.metrics) == 5
    assert all(value.isfinite().all() for value in after[5 * STEPS].values())
    assert not torch.equal(after[5 * STEPS]["classifier.weight"], after[saved]["classifier.weight"])
    capsys.readouterr()


class Interrupts(transformers.TrainerCallback):
    """As a person does, once."""

    def __init__(self) -> None:
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_a_training_that_was_interrupted_can_be_begun_again(kernels: Urza, tmp_path: Path) -> None:
    callback = growing(kernels)
    training = trainer(classifier(kernels), [callback, Interrupts()], tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        training.train()
    training.train()
    assert callback.hook is not None
    assert callback.hook.steps == STEPS
    assert len(callback.hook._watch._losses) == STEPS  # each heard once


def test_a_model_that_is_not_wrapped_is_refused(kernels: Urza, tmp_path: Path) -> None:
    model = esper.unwrap(classifier(kernels))
    with pytest.raises(ValueError, match="BertForSequenceClassification is not wrapped"):
        trainer(model, [GrowthCallback()], tmp_path, 1).train()
