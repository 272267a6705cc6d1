"""Launches an artifact's kernels through Triton's real driver and launcher of a vendor, in a process whose library of
that vendor is recording_libcuda.c or recording_libamdhip64.c.

    python recorded_launches.py STORE ARTIFACT_ID LIBRARY < request.json

The request has `rows`, `stream`, `strides`, and `addresses` by tensor. Forward and then backward are launched.
"""

from __future__ import annotations

import ctypes
import json
import sys

import pytest
import torch
import triton
from gpu_recorder import pretend

from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.views import Extents
from esper_triton.urza import Urza

PARAM_BYTES = {"i32": 4, "i64": 8}


def main(root: str, artifact_id: str, path: str) -> None:
    request = json.load(sys.stdin)
    library = ctypes.CDLL(path)
    artifact, blobs = Urza(root).load(artifact_id)
    manifest = artifact.manifest
    with pytest.MonkeyPatch.context() as patch:
        machine = pretend(patch, manifest.target.backend, [manifest.target.arch])
        machine.streams = {0: request["stream"]}
        driver = triton.backends.backends[{"cuda": "nvidia", "hip": "amd"}[manifest.target.backend]].driver()
        driver.get_current_device, driver.get_current_stream = machine.get_current_device, machine.get_current_stream
        patch.setattr(triton.runtime.driver, "_active", driver)
        program = KernelProgram.load(manifest, blobs, torch.device("cuda:0"))
        for bind, steps in ((program.bind_forward, manifest.forward), (program.bind_backward, manifest.backward)):
            bound = bind(Extents.of_rows(request["rows"]), request["strides"])
            values = (*bound.constants, *(request["addresses"][name] for name in bound.order))
            for (launch, grid, pick), step in zip(bound.launches, steps, strict=True):
                signature = manifest.kernels[step.kernel].signature
                sizes = [PARAM_BYTES.get(kind, 8) for kind in signature] + [8, 8]  # and two of scratch memory
                library.recorder_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
                launch(*grid, *pick(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
