"""A Triton kernel that was written by hand (ripple.py) goes through the proof and into a layer, as one of ours does."""

from pathlib import Path

import torch
from torch import nn

import esper_triton as esper
from esper_triton.urabrask.verdict import read_report

urza = esper.Urza("urza")
artifact = esper.compile(Path(__file__).with_name("ripple.toml"), dims={"d": 16}, urza=urza)
report = read_report(artifact.id, urza)
print(artifact.id, report.verdict, "after", report.cases, "cases")
for name in ("out", "grad_h", "grad_amount"):
    print(f"worst error of {name}: {report.worst[name]:.3f} of what is tolerated")

# A function with a period, which the host, a linear layer, cannot have.
torch.manual_seed(0)
model = esper.wrap(nn.Linear(1, 16), [nn.Linear], seeds_per_layer=1, urza=urza)
head = nn.Linear(16, 1)
optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-2)
esper.attach(optimizer, model)
x = torch.linspace(-3, 3, 256)[:, None]
wanted = torch.sin(3 * x)
for step in range(400):
    if step == 100:
        model.load_kernel_sync("", 0, artifact.id)
        model.graft("", 0)
        model.set_alpha("", 0, 1.0)  # at once: a fresh one is the host
    loss = (head(model(x)) - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.step_boundary()
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss.item():.4f}")
