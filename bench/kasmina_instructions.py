"""Instructions of a dormant model over those of the bare one, counted by valgrind, which no clock disturbs.

    .venv/bin/python bench/kasmina.py --only instructions

runs this file as a program of its own, `kasmina_instructions.py VARIANT HOST CALLS`, under callgrind: the model `HOST`,
`bare`, `wrapped`, or `again` (an equal copy), and as many forward passes. The instructions of one pass are the
difference between many passes and few, which has no start-up in it.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
from kasmina_hosts import HOSTS
from torch import nn

import esper_triton as esper

__all__ = ["count"]

# Few, by which everything that is done once has been done, and many.
CALLS = {"transformer, 12 blocks, d=256": (3, 9), "MLP, 3 layers, d=64, batch 8": (20, 1020)}
VARIANTS = ("bare", "again", "wrapped")


def model_of(variant: str, host: str) -> nn.Module:
    make, _ = HOSTS[host]
    torch.manual_seed(0)
    model = make()
    # The three are made alike in every process, all of them copies: a copy's dictionaries take other paths in Python
    # than those of what it was made from.
    models = {name: copy.deepcopy(model) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        esper.wrap(models["wrapped"], [nn.Linear], seeds_per_layer=4, urza=esper.Urza(folder))
    return models[variant]


def instructions(variant: str, host: str, calls: int) -> int:
    """Of a whole process that makes `calls` forward passes."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, __file__]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, variant, host, str(calls)], capture_output=True, text=True, env=environment)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(command)} {variant} {host!r} {calls} failed:\n{done.stderr[-2000:]}")
    return int(found[1])


def count() -> list[dict[str, Any]]:
    """A row for each host and each model but the bare one. Takes minutes."""
    rows = []
    for host, (few, many) in CALLS.items():
        each = {
            variant: (instructions(variant, host, many) - instructions(variant, host, few)) / (many - few)
            for variant in VARIANTS
        }
        rows += [
            {"host": host, "what": "forward", "model": variant, "instructions": round(each[variant]),
             "bare": round(each["bare"]), "ratio": each[variant] / each["bare"]}
            for variant in VARIANTS[1:]
        ]  # fmt: skip
    return rows


def main(variant: str, host: str, calls: str) -> None:
    torch.set_num_threads(1)
    model, x = model_of(variant, host), torch.randn(HOSTS[host][1])
    with torch.no_grad():
        for _ in range(int(calls)):
            model(x)


if __name__ == "__main__":
    main(*sys.argv[1:])
