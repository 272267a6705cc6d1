"""What is built from the library: the same in every process, addressed in 64 bits, and part of the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from shipped import BLUEPRINTS, KERNELS, dims_of

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ["bottleneck_adapter", "channel_scale"]  # the others are written, and not compiled
# `standard` decides by measurements where the target is here, so that only its remembered choice is the same elsewhere.
BUILDS = [("cpu", "fast"), ("cuda:90", "fast"), ("cuda:90", "standard")]
SCRIPT = """
import hashlib, json, sys
import esper_triton as esper
from esper_triton.tezzeret.targets import parse_target
from esper_triton.tezzeret.plan import plan_build
folder, urza, requests, compiled, builds = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
ids, sources, blobs = {}, {}, {}
for name, dims in requests.items():
    blueprint = esper.Blueprint.load(f"{folder}/{name}.toml")
    for target, pipeline in builds:
        plan = plan_build(blueprint, dims, "float32", parse_target(target), pipeline)
        ids[f"{name} {target} {pipeline}"] = plan.artifact_id
        sources[f"{name} {target} {pipeline}"] = hashlib.sha256(plan.written.source_text.encode()).hexdigest()
        if name in compiled:
            artifact = esper.compile(blueprint, dims=dims, targets=target, pipeline=pipeline, urza=urza)
            assert artifact.id == plan.artifact_id
            kernels = artifact.manifest.kernels.items()
            blobs[artifact.id] = [[n, k.source, k.ttir, k.binary] for n, k in sorted(kernels)]
print(json.dumps([ids, sources, blobs]))
"""


def test_two_processes_with_two_stores_give_one_id_and_one_source(tmp_path: Path):
    requests = json.dumps({name: dims_of(name) for name in BLUEPRINTS})
    results = []
    for seed in ("1", "2"):  # of Python's hashes, and so of the order in sets
        arguments = [str(KERNELS), str(tmp_path / seed / "urza"), requests, json.dumps(COMPILED), json.dumps(BUILDS)]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / seed / "cache"), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    ids, sources, blobs = results[0]
    # conv1x1 and linear are one design; another target or pipeline may have other tiles, and so another source.
    assert len(set(ids.values())) == len(BUILDS) * (len(BLUEPRINTS) - 1)
    assert len(set(sources.values())) >= len(BLUEPRINTS) - 1
    assert len(blobs) == len(BUILDS) * len(COMPILED)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_design_that_an_artifact_keeps_is_written_as_the_same_artifact(name: str):
    blueprint = BLUEPRINTS[name]
    kept = Blueprint.from_canonical_bytes(blueprint.canonical_bytes())
    target = parse_target("cuda:90")
    plans = [plan_build(one, dims_of(name), "float32", target, "fast") for one in (blueprint, kept)]
    assert plans[0].artifact_id == plans[1].artifact_id
    assert plans[0].written.source_text == plans[1].written.source_text
    assert plans[0].parameters == plans[1].parameters


_NAME = r"%[-\w.$]+"
_LINE = re.compile(rf"(?P<results>{_NAME})(?::\d+)? = (?P<op>[\w.]+)(?P<rest>.*)")


def narrow_addresses(ttir: str, grids: list[list[str]]) -> list[str]:
    """Lines of a kernel's Triton IR in which an offset, or a product that goes into one, grows with the number of rows
    and is 32 bits wide.

    What grows are the kernel's integer arguments, the programs of a grid that grows, the counters of loops up to such a
    number, and all that is computed of these, but for a remainder by a constant. A block's own number times the block's
    extent is an index: it may be narrow, since there are less than 2^31 rows.
    """
    fixed_axes = {axis for axis in range(3) if all(grid[axis].isdigit() for grid in grids)}
    axes = {"x": 0, "y": 1, "z": 2}
    grows = {m[1] for m in re.finditer(rf"({_NAME}): i(?:32|64)", ttir.partition("tt.func")[2].partition("{")[0])}
    constants = {m[1]: int(m[2]) for m in re.finditer(rf"({_NAME}) = arith\.constant (?:dense<)?(-?\d+)\b", ttir)}
    blocks = {name for name, value in constants.items() if value == -1 or is_power_of_2(value)}
    faults = []
    for line in (text.strip() for text in ttir.splitlines()):
        loop = re.match(rf"(?:.* = )?scf\.for ({_NAME}) = (\S+) to (\S+) step", line)
        if loop:
            if {loop[2], loop[3]} & grows:
                grows.add(loop[1])
            continue
        match = _LINE.match(line)
        if not match:
            continue
        op, rest = match["op"], match["rest"]
        operands = re.findall(_NAME, rest.partition(" : ")[0])
        result, kind = match["results"], rest.rpartition(" : ")[2]
        is_narrow = bool(re.search(r"\bi32\b|xi32>", kind.rpartition(" -> ")[2] or kind))
        if op == "tt.get_program_id":
            if axes[rest.split()[0]] not in fixed_axes:
                grows.add(result)
            continue
        if op in ("tt.splat", "tt.expand_dims", "tt.broadcast") and operands[0] in constants:
            constants[result] = constants[operands[0]]
            blocks |= {result} if operands[0] in blocks else set()
        growing = [operand for operand in operands if operand in grows]
        if op == "tt.addptr":
            if operands[1] in grows and "i32" in rest.rpartition(", ")[2]:
                faults.append(line)
            continue
        if op == "arith.remsi" and operands[1] in constants:
            continue
        if growing and not op.startswith(("tt.load", "arith.cmp")) and re.search(r"\bi(32|64)\b|xi(32|64)>", kind):
            grows.add(result)
            if op == "arith.muli" and is_narrow and not blocks.intersection(operands):
                faults.append(line)
    return faults


def is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_no_address_that_grows_with_the_rows_is_computed_in_32_bits(
    library_artifact: Callable[..., str], library_store: esper.Urza, name: str
):
    # No extent of these dims is a power of two but r, which no row is multiplied by as it stands.
    artifact, blobs = library_store.load(library_artifact(name))
    manifest = artifact.manifest
    for kernel, record in manifest.kernels.items():
        grids = [list(step.grid) for step in (*manifest.forward, *manifest.backward) if step.kernel == kernel]
        text = blobs[record.ttir].decode()
        assert "tt.addptr" in text
        assert not narrow_addresses(text, grids), f"{kernel}:\n{text}"


def test_a_weight_of_more_than_2_31_elements_is_addressed_in_64_bits(store: esper.Urza):
    dims = {"d_in": 65536, "d": 65536}
    artifact = esper.compile(
        BLUEPRINTS["linear"], dims=dims, dtype="bfloat16", targets="cuda:90", pipeline="fast", urza=store
    )
    _, blobs = store.load(artifact.id)
    for record in artifact.manifest.kernels.values():
        text = blobs[record.ttir].decode()
        width = set(re.findall(rf"({_NAME}) = arith\.constant (?:dense<)?65536>? : (?:i32|tensor<[\dx]*i32>)", text))
        products = re.findall(rf"arith\.muli ({_NAME}), ({_NAME})(?: \S+)? : (?:i32|tensor<[\dx]*i32>)", text)
        assert not [pair for pair in products if width & set(pair)]


def test_an_address_in_32_bits_is_found():
    """The check above sees what it is for."""
    wrong = """
tt.func public @k(%h_ptr: !tt.ptr<f32>, %stride: i32, %rows: i32) {
  %block = arith.constant 32 : i32
  %pid = tt.get_program_id x : i32
  %start = arith.muli %pid, %block : i32
  %at = arith.muli %start, %stride : i32
  %p = tt.addptr %h_ptr, %at : !tt.ptr<f32>, i32
  %w = arith.extsi %start : i32 to i64
  %q = tt.addptr %h_ptr, %w : !tt.ptr<f32>, i64
}
"""
    right = (
        wrong.replace("%stride: i32", "%stride: i64")
        .replace("%at = arith.muli %start, %stride : i32", "")
        .replace("%p = tt.addptr %h_ptr, %at : !tt.ptr<f32>, i32", "")
    )
    grid = [["cdiv(rows, 32)", "1", "1"]]
    assert [line.split()[0] for line in narrow_addresses(wrong, grid)] == ["%at", "%p"]
    assert narrow_addresses(right, grid) == []


def test_a_wheel_carries_the_library(tmp_path: Path):
    for name in ("esper_triton", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        source, copy = ROOT / name, tmp_path / "tree" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "tree", capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.endswith(".toml")}
        pages = {name: archive.read(name) for name in archive.namelist() if "/static/" in name}
    assert packed == {
        f"esper_triton/kernels/{name}.toml": (KERNELS / f"{name}.toml").read_bytes() for name in BLUEPRINTS
    }
    static = ROOT / "esper_triton" / "nissa" / "static"
    assert pages == {f"esper_triton/nissa/static/{path.name}": path.read_bytes() for path in static.iterdir()}
