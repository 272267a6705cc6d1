"""The step boundary of two replicas that have nothing to say to each other.

`measure` runs this file as two programs, `kasmina_replicas.py RANK RENDEZVOUS BOUNDARIES`, which exchange over gloo on
the loopback interface.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import esper_triton as esper

__all__ = ["measure"]

LAYERS = 100


def measure(boundaries: int) -> list[dict[str, Any]]:
    """Rows of medians, as the first rank sees them, over `boundaries` of each kind."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        arguments = [f"{folder}/rendezvous", str(boundaries)]
        with subprocess.Popen([*command, "1", *arguments], stdout=subprocess.DEVNULL, env=environment) as second:
            try:
                first = subprocess.run([*command, "0", *arguments], stdout=subprocess.PIPE, check=True, env=environment)
            except BaseException:
                second.kill()
                raise
    found = json.loads(first.stdout)
    return [
        {"what": f"boundary of {LAYERS} dormant layers, us", "value": found["alone"]},
        {"what": "the same of two replicas over gloo, us", "value": found["replicas"]},
        {"what": "all_reduce of one float over gloo, us", "value": found["all_reduce"]},
    ]


def main(rank: int, rendezvous: str, boundaries: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with tempfile.TemporaryDirectory() as folder:
        layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS)))
        model = esper.wrap(layers, [nn.Linear], seeds_per_layer=4, urza=esper.Urza(folder))

        def median_us(function: Callable[[], Any]) -> float:
            times = []
            for _ in range(boundaries):
                began = time.perf_counter()
                function()
                times.append((time.perf_counter() - began) * 1e6)
            return statistics.median(times)

        one = torch.zeros(1)
        found = {"alone": median_us(model.step_boundary)}
        replicas = esper.replicate(model)
        found |= {"replicas": median_us(model.step_boundary), "all_reduce": median_us(lambda: dist.all_reduce(one))}
        dist.barrier()
        replicas.close()
    del replicas
    gc.collect()
    dist.destroy_process_group()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
