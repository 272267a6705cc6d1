"""One of two replicas that train together; `test_distributed` starts both. Prints what it has seen as JSON."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import sys

import torch
import torch.distributed as dist
from torch import nn

import esper_triton as esper
from esper_triton.kasmina import loading
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.gates import Policy
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.prepared import Prepared
from esper_triton.kasmina.schedules import drift_controlled, linear
from esper_triton.model.distributed import replicate

D, IN, STEPS = 16, 6, 50


def refuse_one_layer(name: str) -> None:
    """On this rank alone, loads for layer `name` fail."""
    load = loading.load

    def refusing(request: loading.LoadRequest, urza: esper.Urza) -> object:
        if request.layer_name == name:
            raise OSError("this rank has no such file")
        return load(request, urza)

    loading.load = refusing  # type: ignore[assignment]


def end_loads(model: esper.MorphableModel) -> None:
    """Boundaries until no seed is LOADING, as many on both ranks, however slow a load is here."""
    while any(
        layer.seed_state(seed) is esper.SeedLifecycleState.LOADING
        for layer in model.kasmina_layers.values()
        for seed in range(2)
    ):
        model.step_boundary()


def main(rank: int, rendezvous: str, store: str, artifact_id: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, 2 * D), nn.Tanh(), nn.Linear(2 * D, 2 * D), nn.Linear(2 * D, 2 * D))
    model = esper.wrap(plain, ["0", "2", "3"], seeds_per_layer=2, urza=esper.Urza(store), policy=Policy(sample_every=4))
    replicas = replicate(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    moves: list[tuple[int, str, int, str]] = []
    step = 0

    def observe(event: Transition) -> None:
        moves.append((step, event.layer, event.seed, event.target.name))
        if event.target.name == "TRAINING":
            layer = model.kasmina_layers[event.layer]
            own = [p for name, p in layer.seed_parameters() if name.startswith(f"{event.seed}.")]
            draw = torch.Generator().manual_seed(7)
            for parameter in own:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
            optimizer.add_param_group({"params": own})

    for layer in model.kasmina_layers.values():
        layer.on_transition(observe)
    if rank == 1:
        refuse_one_layer("3")

    launch, fits = KernelProgram.forward, Prepared.fits
    for step in range(STEPS):
        if rank == 0 and step == 3:
            assert asyncio.run(model.load_kernel("0", 0, artifact_id))
            model.graft("0", 0, linear(10))
        if step == 5:  # the same command on both ranks
            assert model.load_kernel_sync("0", 1, artifact_id)
            model.graft("0", 1, drift_controlled(5, max_drift=0.02))
        if rank == 1 and step == 6:
            model.request_transition("0", 1, esper.SeedLifecycleState.CULLED)  # does not count
        if rank == 0 and step == 8:
            model.epoch_boundary(0)
            assert model.load_kernel_sync("2", 0, "000000000000-cpu-standard-000000000000") is False
        if rank == 0 and step == 12 and model.load_kernel_sync("3", 0, artifact_id):
            model.graft("3", 0)
        if rank == 1 and step == 30:
            KernelProgram.forward = lambda *_, **__: 1 / 0  # type: ignore[assignment,method-assign]
            Prepared.fits = lambda *_: False  # type: ignore[method-assign]  # so that the call goes that way
        x = torch.randn(8, IN, generator=generator)
        loss = ddp(x).square().mean()
        seeds = model.seed_loss()
        optimizer.zero_grad()
        (loss if seeds is None else loss + seeds).backward()
        KernelProgram.forward, Prepared.fits = launch, fits  # type: ignore[method-assign]
        replicas.all_reduce_gradients()
        optimizer.step()
        model.step_boundary()
        if step in (20, STEPS - 1):
            end_loads(model)
    model.epoch_boundary(1)
    weights = hashlib.sha256()
    for tensor in [*model.parameters(), *esper.seed_parameters(model)]:
        weights.update(tensor.detach().numpy().tobytes())
    alphas = {name: layer.state.alpha_blend.tolist() for name, layer in model.kasmina_layers.items()}
    states = {name: [layer.seed_state(s).name for s in range(2)] for name, layer in model.kasmina_layers.items()}
    said = json.dumps({"moves": moves, "weights": weights.hexdigest(), "alphas": alphas, "states": states})
    replicas.close()
    assert [layer._kasmina.replicas for layer in model.kasmina_layers.values()] == [None] * 3
    # As `replicate` asks: gloo's threads end with the last reference to their group, and DDP holds one.
    dist.barrier()
    del ddp, replicas
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.write(said)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
