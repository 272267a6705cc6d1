"""A convolutional network gets channel attention after its first steps: a squeeze-and-excitation seed on a convolution.

The data are stripes across or along an image, in one colour of three, under noise. Which channel has them is told by
the whole image and by no single place, which is what the seed adds to a small convolution.
"""

import torch
from torch import nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import linear


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 12, 12], and which of six classes each is of."""
    labels = torch.randint(6, (count,))
    stripes = torch.arange(12).remainder(4).lt(2).float()
    x = torch.randn(count, 3, 12, 12)
    for image, label in zip(x, labels.tolist(), strict=True):
        image[label % 3] += stripes if label < 3 else stripes[:, None]
    return x, labels


torch.manual_seed(0)
host = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
)  # fmt: skip
model = esper.wrap(host, ["3"], seeds_per_layer=1, urza=esper.Urza("urza"))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
esper.attach(optimizer, model)  # it takes the seed's parameters when they come

for step in range(160):
    if step == 40:
        model.germinate_sync("3", "squeeze_excite", r=4, pipeline="fast")
        model.graft("3", 0, linear(40))  # a fresh one is the host, so it need not learn alone first
    x, labels = images(32)
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.step_boundary()
    if step % 40 == 39:
        layer = model.kasmina_layers["3"]
        alpha = float(layer.state.alpha_blend[0])
        print(f"step {step + 1:3}: loss {loss.item():.3f}, alpha {alpha:.2f}, {layer.seed_state(0).name}")

with torch.no_grad():
    x, labels = images(500)
    print(f"accuracy {float((model(x).argmax(1) == labels).float().mean()):.3f}")
