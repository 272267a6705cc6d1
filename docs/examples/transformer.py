"""A transformer of Hugging Face grows while it is fine-tuned by their Trainer. Needs the extra `transformers`.

The model is small and has random weights, so that nothing is downloaded; `from_pretrained` goes in its place. The task:
does the first token come later in the alphabet than the second?
"""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import esper_triton as esper
from esper_triton.huggingface import GrowthCallback
from esper_triton.kasmina import Policy, ReconstructionGate, linear


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`count` sequences of six tokens, drawn from `seed`."""

    def __init__(self, count: int, seed: int) -> None:
        self.tokens = torch.randint(12, (count, 6), generator=torch.Generator().manual_seed(seed))
        self.labels = (self.tokens[:, 0] > self.tokens[:, 1]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


torch.manual_seed(0)
config = BertConfig(
    vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=2
)
policy = Policy(
    to_grafting=ReconstructionGate(max_steps=10), schedule=linear(20), stabilization_steps=5, fine_tuning_steps=20
)
urza = esper.Urza("urza")
model = BertForSequenceClassification(config)
model = esper.wrap(model, ["bert.encoder.layer.*.output.dense"], seeds_per_layer=1, urza=urza, policy=policy)
esper.compile("bottleneck_adapter", dims={"d": 16, "r": 8}, pipeline="fast", urza=urza)  # for the controller to find

held_out = Pairs(256, seed=1)


def validate(model: nn.Module) -> float:
    return float(model(input_ids=held_out.tokens, labels=held_out.labels).loss)


controller = esper.Heuristic(urza, warmup_epochs=1, plateau_epochs=0)
trainer = Trainer(
    model,
    TrainingArguments(
        "trained", num_train_epochs=6, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    ),
    train_dataset=Pairs(1024, seed=2),
    callbacks=[GrowthCallback(controller=controller, validate=validate, measure_every=10)],
)  # fmt: skip
trainer.train()
for name, layer in model.kasmina_layers.items():
    print(name, layer.seed_state(0).name)
print(controller.explanation)
esper.save_model(model, "grown")
