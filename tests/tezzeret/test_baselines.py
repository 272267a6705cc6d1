"""CPU targets that are a level and not this machine."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

import esper_triton as esper
from esper_triton.contracts.errors import UnknownTarget
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.cpu.host import BASELINES, compiling_for, cpu_features, cpu_name, vector_bits
from esper_triton.tezzeret.targets import parse_target, runs_on_this_cpu

KERNELS = Path(__file__).parents[2] / "kernels"


def test_a_level_has_the_features_of_the_levels_below_it() -> None:
    levels = [set(features) for features in BASELINES.values()]
    assert all(lower < higher for lower, higher in itertools.pairwise(levels))


@pytest.mark.parametrize(("level", "bits"), [("x86-64-v2", 128), ("x86-64-v3", 256), ("x86-64-v4", 512)])
def test_the_width_of_vectors_is_the_levels(level: str, bits: int) -> None:
    host = cpu_name(), cpu_features()
    with compiling_for(level):
        assert vector_bits() == bits
        assert cpu_name() == level
    assert (cpu_name(), cpu_features()) == host


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_a_kernel_for_a_level_uses_no_more_and_is_proven_where_it_runs(level: str, store: esper.Urza) -> None:
    spec = parse_target(f"cpu:{level}")
    artifact = esper.compile(
        KERNELS / "residual_mlp.toml",
        dims={"d": 40, "hidden_width": 24},
        targets=[f"cpu:{level}"],
        pipeline="fast",
        urza=store,
    )
    expected = KernelStatus.VALIDATED if runs_on_this_cpu(spec) else KernelStatus.PENDING_HARDWARE
    assert artifact.status is expected
    assert artifact.manifest.target.features == BASELINES[level]
    assert f"-cpu{level.replace('-', '')}-" in artifact.id
    _, blobs = store.load(artifact.id)
    for kernel in artifact.manifest.kernels.values():
        note = re.search(rb'\{"cpu": "[^}]*\}', blobs[kernel.binary])
        assert note is not None
        assert set(json.loads(note[0])["features"]) == set(BASELINES[level])


def test_a_level_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownTarget, match=r"cpu:x86-64-v3"):
        parse_target("cpu:x86-64-v5")
