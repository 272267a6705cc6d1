"""Kernels that are in use against what their blueprints say, with the parameters that they have by now.

A proof is about drawn parameters, on the prover's machine. What becomes of a kernel in a long run is seen here: at an
epoch's end one active seed's kernel is run on a few drawn rows, forward and backward, beside its blueprint in float64,
and held to the tolerance that the prover holds it to. That takes tenths of a second at most, and no call is touched.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from esper_triton.contracts.errors import EsperError, OutputDrifted
from esper_triton.contracts.report import CaseRecord
from esper_triton.kasmina.launcher import x_width_of
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.measuring import who
from esper_triton.kasmina.seed import LoadedKernel, Seed
from esper_triton.kasmina.training import run_alone
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.judging import Miss, judge
from esper_triton.urabrask.oracle import LocalOracle, Question
from esper_triton.urabrask.subject import Outcome
from esper_triton.urza import Urza
from esper_triton.urza.designs import blueprint_of

__all__ = ["DriftWatch"]

_EXTENTS = {
    "rows": Extents.of_rows(8),
    "sequence": Extents(8, 2, 4),
    "image": Extents(12, 2, 6, 2, 3),
}
_MOST_ELEMENTS = 1 << 20  # of parameters: more would hold the epoch up
_TRIES = 2  # draws that have to show it
_KEPT = 16
_log = logging.getLogger("esper_triton.model")


class DriftWatch:
    """Looks at the active seeds of some layers, one each time.

    A kernel whose blueprint is a hand-written source is not looked at, since its reference is code that was stored
    (law 4), nor is one with more than a million elements of parameters, or with parameters that are not plain tensors.
    """

    def __init__(self, layers: Sequence[KasminaLayer]) -> None:
        self._layers = list(layers)
        self._oracles: OrderedDict[str, LocalOracle | None] = OrderedDict()
        self._last: tuple[int, int] = (-1, -1)
        self._looks = 0

    def look(self) -> bool:
        """Looks at the seed whose turn it is; what is wrong with its kernel is noted on it as an `OutputDrifted`, which
        takes effect at the next boundary as every fault does. Call it between steps. Returns whether one was looked at.

        Raises nothing: what prevents a look is logged (law 9).
        """
        active = [
            (at, seed.index)
            for at, layer in enumerate(self._layers)
            if (record := layer.__dict__.get("_kasmina")) is not None
            for seed in record.seeds
            if seed.state.is_active and seed.kernel is not None and not seed.pending_faults
        ]
        # Those after the last one first, and then from the beginning.
        for at, index in sorted(active, key=lambda key: (key <= self._last, key)):
            layer = self._layers[at]
            seed = layer._kasmina.seeds[index]
            try:
                # As if the training loop had set nothing.
                with torch.device("cpu"), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                    looked = self._look_at(layer, seed)
            except Exception as error:
                told = {"event": "no_drift_measured", "layer": layer._kasmina.name, "seed": index}
                _log.warning("%s", json.dumps(told | {"error": f"{type(error).__name__}: {error}"[:500]}))
                looked = False
            if looked:
                self._last = at, index
                return True
        return False

    def _look_at(self, layer: KasminaLayer, seed: Seed) -> bool:
        record, kernel = layer._kasmina, seed.kernel
        assert kernel is not None
        oracle = self._oracle_of(kernel, record.urza)
        if oracle is None or any(type(p.data) is not Tensor for p in seed.parameters.values()):
            return False
        wrong: Miss | None = None
        for _ in range(_TRIES):
            self._looks += 1
            worst = _worst(seed, kernel, oracle, self._looks)
            if worst is None or worst.ratio <= 1.0:
                return worst is not None
            wrong = worst
        seed.fault(OutputDrifted(f"{who(record, seed)}, with the parameters that it has by now: {wrong}"))
        return True

    def _oracle_of(self, kernel: LoadedKernel, store: Urza | None) -> LocalOracle | None:
        """What knows the kernel's answers; None where nothing does, or it would take too long."""
        manifest = kernel.manifest
        if manifest.id not in self._oracles:
            found = None
            if store is not None and sum(_count(r.shape) for r in manifest.parameters.values()) <= _MOST_ELEMENTS:
                try:
                    artifact, blobs = store.load(manifest.id)
                    blueprint = blueprint_of(artifact.manifest, blobs)
                except EsperError as error:  # away for now, perhaps
                    told = {"event": "no_drift_measured", "artifact": manifest.id, "error": f"{error}"[:500]}
                    _log.warning("%s", json.dumps(told))
                    return None
                if blueprint.ops:
                    found = LocalOracle.of_blueprint(blueprint, manifest.dims, manifest.dtype)
            self._oracles[manifest.id] = found
            while len(self._oracles) > _KEPT:
                self._oracles.popitem(last=False)
        return self._oracles[manifest.id]


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _worst(seed: Seed, kernel: LoadedKernel, oracle: LocalOracle, number: int) -> Miss | None:
    """Of a call at alpha 1 with drawn rows and the seed's own parameters, what is furthest off; None where the kernel
    did not run."""
    manifest, program = kernel.manifest, kernel.program
    extents = _EXTENTS[program.layout]
    generator = torch.Generator().manual_seed(number)

    def drawn(width: int) -> Tensor:
        return torch.randn(extents.rows, width, generator=generator).to(program.dtype)

    tensors = {"h": drawn(manifest.width), "x": drawn(x_width_of(manifest)), "grad_out": drawn(manifest.width)}
    tensors |= {name: value.detach().to("cpu", copy=True) for name, value in seed.parameters.items()}
    # Parameters of its own, so that nothing is left on the seed's.
    names = ["h", *(["x"] if "x" in program.inputs else []), *seed.parameters]
    leaves = {name: tensors[name].to(program.device, copy=True).requires_grad_() for name in names}
    own = {name: torch.nn.Parameter(leaves[name].detach()) for name in seed.parameters}
    leaves |= own
    with torch.enable_grad():
        k = run_alone(seed, kernel, own, leaves.get("x"), leaves["h"], extents)
        if k is None:
            return None
        results = {"out": k.detach()}
        if program.has_backward:
            grads = torch.autograd.grad(
                k,
                list(leaves.values()),
                tensors["grad_out"].to(program.device),
                allow_unused=True,
                materialize_grads=True,
            )
            if seed.pending_faults:  # which says more
                return None
            results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    case = CaseRecord(**extents._asdict(), values="normal", seed=number, alpha=1.0)
    with torch.enable_grad():
        question = Question(
            extents=extents,
            inputs={name: tensors[name] for name in program.inputs},
            parameters={name: tensors[name] for name in seed.parameters},
            grad_k=tensors["grad_out"],
            seed=number,
        )
        answer = oracle.answer(question)
    outcome = Outcome({name: value.cpu() for name, value in results.items()}, None)
    terms = max(manifest.dims.values())
    return max(judge(outcome, answer, case, tensors, program.dtype, terms), key=lambda miss: miss.ratio)
