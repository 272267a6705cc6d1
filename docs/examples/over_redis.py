"""A trainer, a forge, a prover and a dashboard, four processes that know each other by a Redis server alone.

`python over_redis.py redis://127.0.0.1:6379/0`. This process is the trainer and starts the others; in earnest each runs
where it belongs, with a store behind a URL in the place of the directory. Needs the extra `redis`.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import nn

import esper_triton as esper
from esper_triton.contracts.commands import CommandResult, KasminaCommand
from esper_triton.contracts.envelope import CHARACTERIZED, COMMANDS, COMPILE_FAILED, PROOF_FAILED, RESULTS, SUBMITTED
from esper_triton.contracts.events import KernelCharacterized
from esper_triton.tezzeret.jobs import request_of
from esper_triton.tezzeret.library import find

redis = sys.argv[1]


@contextlib.contextmanager
def started(*command: str) -> Iterator[str]:
    """`python -m esper_triton.COMMAND`, from the first line that it prints until the block ends. Gives that line."""
    process = subprocess.Popen([sys.executable, "-m", *command, "--bus", redis], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


with contextlib.ExitStack() as running:
    bus = running.enter_context(esper.Oona(redis, name="trainer"))
    answers = bus.subscribe((CHARACTERIZED, COMPILE_FAILED, PROOF_FAILED, RESULTS))
    for command in ("esper_triton.tezzeret worker", "esper_triton.urabrask worker --level fast"):
        print(running.enter_context(started(*command.split(), "--store", "urza")))
    page = running.enter_context(started(*"esper_triton.nissa serve --store urza --port 0".split()))
    print(page)  # a browser's address

    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model = esper.wrap(host, ["0"], seeds_per_layer=1, urza=esper.Urza("urza"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    esper.attach(optimizer, model)
    remote = esper.connect(model, bus, name="model", health_every=50)

    # What a controller on another machine would do: ask for a kernel, and have it planted once it is proven.
    blueprint = esper.Blueprint.load(find("bottleneck_adapter"))
    bus.publish(SUBMITTED, request_of(blueprint, {"d": 16, "r": 4}, "float32", "cpu", "fast"))

    layer, step = model.kasmina_layers["0"], 0
    while layer.seed_state(0).name != "GRAFTING":
        x = torch.randn(64, 8)
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 0).long())
        if (own := model.seed_loss()) is not None:
            loss = loss + own
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.step_boundary()  # commands from the bus take effect here
        step += 1
        delivery = answers.get(timeout_s=0.02)  # in the place of the time that a larger model's step takes
        if delivery is None:
            continue
        match delivery.parse():
            case KernelCharacterized(artifact_id=artifact_id, status="VALIDATED"):
                print(f"step {step}: {artifact_id} is proven, and planted")
                seed = {"layer": "0", "seed": 0, "artifact_id": artifact_id}
                bus.publish(COMMANDS, KasminaCommand(command_id="plant", command="request_germination", **seed))
            case CommandResult(status="applied", state=state):
                print(f"step {step}: the seed is in {state}")
                bus.publish(COMMANDS, KasminaCommand(command_id="graft", command="advance", layer="0", seed=0))
            case failure:
                raise SystemExit(str(failure))

    remote.publish_health()
    address = page.removeprefix("page at ")
    print(subprocess.check_output([sys.executable, "-m", "esper_triton.nissa", "status", "--page", address], text=True))
    remote.close()
