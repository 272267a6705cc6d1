"""A network that is too narrow in one place grows there while it trains. Data: scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import Policy, ReconstructionGate, linear

digits = load_digits()
x, y = torch.from_numpy(digits.data).float() / 8 - 1, torch.from_numpy(digits.target).long()
train_x, train_y, held_x, held_y = x[:1400], y[:1400], x[1400:], y[1400:]

# A seed learns for 20 steps on its own, is blended in over 100, and is judged by what it does to the held-out loss.
policy = Policy(
    to_grafting=ReconstructionGate(max_steps=20), schedule=linear(100), stabilization_steps=20, fine_tuning_steps=40
)
torch.manual_seed(0)
host = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 10))
model = esper.wrap(host, ["0"], seeds_per_layer=1, urza=esper.Urza("urza"), policy=policy)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)


def held_out_loss(model: nn.Module) -> float:
    return float(F.cross_entropy(model(held_x), held_y))


hook = esper.GrowthHook(model, optimizer, validate=held_out_loss)
for epoch in range(20):
    if epoch == 5:
        model.germinate_sync("0", "parallel_adapter", r=32)  # compiled, proven, loaded; now in TRAINING
    for rows in torch.randperm(1400).split(64):
        loss = F.cross_entropy(model(train_x[rows]), train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hook.step(loss)
    hook.epoch_end(epoch)
    print(f"epoch {epoch:2}: held-out loss {hook.metrics[-1]:.3f}, seed {model.kasmina_layers['0'].seed_state(0).name}")
esper.save_model(model, "grown")  # weights, and the lineage that says what has grown
