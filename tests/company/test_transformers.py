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


def trainer(model: Any, callback: Any, folder: Path, epochs: int, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        learning_rate=5e-3,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback], **options
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
    trainer(model, callback, tmp_path, 5).train()
    assert entered[2:6] == [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING]
    assert callback.hook is not None
    assert callback.hook.steps == 5 * STEPS
    assert callback.hook.epoch == 5
    assert all(metric is not None for metric in callback.hook.metrics)
    assert len(callback.hook._watch._losses) == 5 * STEPS
    assert "eval_loss" in capsys.readouterr().out
    assert {len(layer._kasmina.observers) for layer in model.kasmina_layers.values()} == {1}  # the test's own


def test_a_training_that_is_resumed_goes_on_with_its_seeds(
    kernels: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = classifier(kernels)
    trainer(whole, growing(kernels), tmp_path / "run", 4).train()
    assert len(list(esper.seed_parameters(whole))) >= 4
    rest, callback, saved = classifier(kernels), growing(kernels), tmp_path / "run" / f"checkpoint-{2 * STEPS}"
    decayed = transformers.Trainer.get_decay_parameter_names(None, rest)
    groups = [
        {"params": [p for n, p in rest.named_parameters() if (n in decayed) is wanted], "weight_decay": 0.0}
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    callback.restore(rest, optimizer, saved)
    trainer(rest, callback, tmp_path / "rest", 4, optimizers=(optimizer, None)).train(resume_from_checkpoint=str(saved))
    mine = [*whole.state_dict().values(), *esper.seed_parameters(whole)]
    others = [*rest.state_dict().values(), *esper.seed_parameters(rest)]
    assert len(mine) == len(others)
    assert all(torch.allclose(a, b) for a, b in zip(mine, others, strict=True))
    capsys.readouterr()


def test_a_model_that_is_not_wrapped_is_refused(kernels: Urza, tmp_path: Path) -> None:
    model = esper.unwrap(classifier(kernels))
    with pytest.raises(ValueError, match="BertForSequenceClassification is not wrapped"):
        trainer(model, GrowthCallback(), tmp_path, 1).train()
