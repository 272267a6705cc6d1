"""Two processes train one model under DDP, and grow it at the same step. `python two_processes.py`, or torchrun."""

import gc
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import linear


def train(rank: int, rendezvous: str, world_size: int) -> None:
    """One process of `world_size`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    urza = esper.Urza("urza")
    if rank == 0:  # once, and not once in each process
        artifact_id = [esper.compile("bottleneck_adapter", dims={"d": 16, "r": 4}, pipeline="fast", urza=urza).id]
    else:
        artifact_id = [""]
    dist.broadcast_object_list(artifact_id)

    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model = esper.wrap(host, ["0"], seeds_per_layer=1, urza=urza)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    esper.attach(optimizer, model)
    replicas = esper.replicate(model)  # before DDP: from now on the first rank decides, for all of them
    ddp = nn.parallel.DistributedDataParallel(model)

    own = torch.Generator().manual_seed(rank)  # each has data of its own
    for step in range(80):
        if rank == 0 and step == 20:
            model.load_kernel_sync("0", 0, artifact_id[0])
            model.graft("0", 0, linear(20))
        x = torch.randn(32, 8, generator=own)
        loss = F.cross_entropy(ddp(x), (x[:, 0] * x[:, 1] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        replicas.all_reduce_gradients()  # DDP knows the host's parameters, this the seeds'
        optimizer.step()
        model.step_boundary()

    weights = torch.cat([p.detach().flatten() for p in (*model.parameters(), *esper.seed_parameters(model))])
    others = [torch.empty_like(weights) for _ in range(world_size)]
    dist.all_gather(others, weights)
    layer = model.kasmina_layers["0"]
    if rank == 0:
        print(f"{layer.seed_state(0).name}, alpha {float(layer.state.alpha_blend[0]):.2f}, {weights.numel()} weights,")
        print("the same to the bit in all processes:", all(torch.equal(weights, other) for other in others))
    # gloo's threads end with the last reference to their group, and DDP holds one.
    replicas.close()
    dist.barrier()
    del ddp, replicas
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has started us
        train(int(os.environ["RANK"]), "env://", int(os.environ["WORLD_SIZE"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (f"file://{folder}/rendezvous", 2), nprocs=2)
