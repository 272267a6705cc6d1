"""A grafted bottleneck adapter against the same adapter in eager torch, on this machine's CPU.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/adapter.py [--json FILE]

Both sides blend with alpha and run on the same host layer's output. Samples are interleaved, medians are shown, and the
spread is that of the middle half of the samples. Set OMP_WAIT_POLICY=PASSIVE: with torch's spinning threads on few
cores the eager side would look far worse than it is.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import esper_triton as esper

BLUEPRINT = Path(__file__).resolve().parent.parent / "kernels" / "bottleneck_adapter.toml"
SHAPES = [(64, 64, 16), (512, 64, 16), (32, 512, 64), (512, 512, 64), (4096, 768, 64)]  # rows, d, r
SAMPLES = 31


class EagerAdapter(nn.Module):
    """The same host layer with the adapter written in torch."""

    def __init__(self, host: nn.Linear, seed: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.host, self.alpha = host, torch.tensor(0.5)
        self.down_weight, self.down_bias, self.up_weight, self.up_bias = (
            nn.Parameter(seed[f"0.{name}"].detach().clone())
            for name in ("down_weight", "down_bias", "up_weight", "up_bias")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.host(x)
        k = h + F.linear(F.gelu(F.linear(h, self.down_weight, self.down_bias)), self.up_weight, self.up_bias)
        return h + self.alpha * (k - h)


def sample_us(function) -> float:
    began = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - began) / 1000


def measure(ours, theirs) -> dict[str, float]:
    """Medians in microseconds, their ratio, and the spread of the ratio over interleaved samples."""
    for function in (ours, theirs, ours, theirs):
        function()
    pairs = [(sample_us(ours), sample_us(theirs)) for _ in range(SAMPLES)]
    quartiles = statistics.quantiles([their / our for our, their in pairs], n=4)
    our, their = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ours_us": our, "eager_us": their, "ratio": their / our, "low": quartiles[0], "high": quartiles[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows_of_table = []
    with tempfile.TemporaryDirectory() as folder:
        urza = esper.Urza(folder)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows, d, r in SHAPES:
                artifact = esper.compile(BLUEPRINT, dims={"d": d, "r": r}, urza=urza)
                model = esper.wrap(nn.Sequential(nn.Linear(d, d)), ["0"], seeds_per_layer=1, urza=urza)
                assert model.load_kernel_sync("0", 0, artifact.id), model[0].last_error(0)
                model.graft("0", 0)
                model.set_alpha("0", 0, 0.5)
                host = nn.Linear(d, d)
                host.load_state_dict(model[0].state_dict())
                eager = EagerAdapter(host, dict(model[0].seed_parameters()))
                x = torch.randn(rows, d)

                def train(module, x=x):
                    module(x).sum().backward()

                with torch.no_grad():
                    torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
                    forward = measure(lambda m=model, x=x: m(x), lambda m=eager, x=x: m(x))
                both = measure(lambda m=model: train(m), lambda m=eager: train(m))
                for what, figures in (("forward", forward), ("forward+backward", both)):
                    rows_of_table.append({"threads": threads, "rows": rows, "d": d, "r": r, "what": what, **figures})
    table = Table(title=f"host Linear(d, d) with adapter; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}")
    for column in ("threads", "rows", "d", "r", "what", "ours us", "eager us", "eager / ours", "middle half"):
        table.add_column(column, justify="right")
    for row in rows_of_table:
        table.add_row(
            *(str(row[key]) for key in ("threads", "rows", "d", "r", "what")),
            f"{row['ours_us']:.0f}",
            f"{row['eager_us']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        )
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows_of_table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
