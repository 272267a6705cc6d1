"""One of two replicas that grow under a GrowthHook; `test_replicated_hook` starts both. Prints what it saw as JSON.

`growing_replica.py RANK RENDEZVOUS STORE DIR ARTIFACT EPOCHS` goes on where the checkpoints in DIR have come to. With
an empty ARTIFACT the heuristic decides. What goes wrong goes wrong on the second rank alone: a loss in epoch 5, a state
array in epoch 6.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from growing import QUICK, D, command
from torch import nn

import esper_triton as esper
from esper_triton.model.distributed import replicate

STEPS = 6


def main(rank: int, rendezvous: str, store: str, directory: str, artifact_id: str, epochs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, D))
    model = esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=esper.Urza(store), policy=QUICK)
    replicas = replicate(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = torch.Generator().manual_seed(rank)  # each has data of its own
    manual = esper.Manual()
    names = ["bottleneck_adapter"]
    heuristic = esper.Heuristic(esper.Urza(store), warmup_epochs=1, plateau_epochs=0, max_seeds=1, blueprints=names)
    measured = 0

    def validate(model: esper.MorphableModel) -> float:
        """By the first rank every seed does good, by the second harm."""
        nonlocal measured
        measured += 1
        alphas = sum(float(layer.state.alpha_blend.sum()) for layer in model.kasmina_layers.values())
        return 5.0 - alphas if rank == 0 else 5.0 + alphas

    hook = esper.GrowthHook(
        model,
        optimizer,
        controller=manual if artifact_id else heuristic,
        measure_every=5,
        validate=validate,
        checkpoints=directory,
        carry={"batches": batches},
        control_every=1,
    )
    moves: list[tuple[int, str, str]] = []
    for layer in model.kasmina_layers.values():
        layer.on_transition(lambda event: moves.append((hook.steps, event.layer, event.target.name)))
    start, losses = hook.resume(), []
    trouble = rank == 1 and artifact_id != ""
    for epoch in range(start, epochs):
        for step in range(STEPS):
            if artifact_id and (epoch, step) in ((1, 0), (4, 2)):
                # What the second rank's controller would do does not count.
                what = "request_germination" if rank == 0 else "rollback"
                manual.submit(command(what, "0" if epoch == 1 else "2", artifact_id=artifact_id if rank == 0 else None))
            x = torch.randn(8, 6, generator=batches)
            loss = (ddp(x) - torch.sin(3 * x[:, :1])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            hook.step(float("nan") if trouble and (epoch, step) == (5, 3) else loss)
        if trouble and epoch == 6:
            model.kasmina_layers["0"].state.storage[3] += 1
        hook.epoch_end(epoch)
    weights = hashlib.sha256()
    for tensor in [*model.parameters(), *esper.seed_parameters(model)]:
        weights.update(tensor.detach().numpy().tobytes())
    said: dict[str, Any] = {
        "start": start,
        "moves": moves,
        "rollbacks": [asdict(rollback) for rollback in hook.rollbacks],
        "metrics": hook.metrics,
        "losses": losses,
        "measured": measured,
        "weights": weights.hexdigest(),
        "explanation": heuristic.explanation,
        "answers": {name: result.status.value for name, result in manual.results.items()},
        "files": sorted(path.name.split("-")[1] for path in (Path(directory) / f"rank-{rank}").iterdir()),
    }
    hook.close()
    replicas.close()
    dist.barrier()
    del ddp, replicas
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:6], int(sys.argv[6]))
