"""Writes the pictures of docs/nissa.md, from messages made by hand.

`PYTHONPATH=.:tests python tests/nissa/screenshots.py [FOLDER]`
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

from chromium import find_or_install
from messages import frame, move, tell
from package_folder import install

from esper_triton.contracts.events import CompileFailed, CompileRequest, EpochEvent, KernelReady
from esper_triton.contracts.manifest import KernelStatus, TargetSpec
from esper_triton.nissa import Dashboard, View
from esper_triton.nissa.view import ACTIVE, STATES
from esper_triton.oona import Oona

DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYERS, SEEDS, START = 24, 12, 1_790_000_000.0
WEIGHTS = (40, 2, 3, 10, 9, 4, 3, 4, 18, 4, 1, 1, 1)


def tell_a_run(view: View) -> None:
    """A training run of two minutes that has met this and that."""
    draw = random.Random(7)
    states = draw.choices(STATES, WEIGHTS, k=LAYERS * SEEDS)
    states[0] = "GRAFTING"
    begins = [draw.uniform(0, 60) for _ in states]
    for second in range(120):
        ramps = [min(max((second - begin) / 55, 0.0), 1.0) for begin in begins]
        active = [STATES.index(state) in ACTIVE for state in states]
        alpha = [1.0 if s == "FOSSILIZED" else r * on for s, r, on in zip(states, ramps, active, strict=True)]
        health = [0.9 - 0.2 * math.exp(-second / 30) * draw.uniform(0.5, 1.5) if on else None for on in active]
        latency = [draw.uniform(20, 80) if on else None for on in active]
        errors = [int(state == "ERROR_RECOVERY") * 2 for state in states]
        tell(
            view,
            _named(
                frame(
                    states,
                    layers=LAYERS,
                    at=START + second,
                    alpha=alpha,
                    health=health,
                    latency_us=latency,
                    errors=errors,
                )
            ),
        )
    cache = {"hits": 412, "misses": 31, "evictions": 4, "entries": 27, "bytes": 3_482_112, "pinned": 19}
    tell(
        view,
        EpochEvent(model="m", epoch=3, seeds_by_state={"DORMANT": 110, "FOSSILIZED": 52}, cache=cache),
        at=START + 60,
    )
    tell(
        view,
        move("LOADING", "TRAINING", layer=_name(0), artifact_id="b3d4f51c09aa-cpu-standard-a1c3b2774e01"),
        at=START + 8,
    )
    tell(
        view,
        move("TRAINING", "GRAFTING", layer=_name(0), artifact_id="b3d4f51c09aa-cpu-standard-a1c3b2774e01"),
        at=START + 41,
    )
    tell(view, move("GRAFTING", "ERROR_RECOVERY", layer=_name(9), seed=4, error="NonFiniteOutput"), at=START + 95)
    cuda = TargetSpec(backend="cuda", arch="90")
    for k, (name, dtype) in enumerate(
        (("bottleneck_adapter", "float32"), ("swiglu_ffn", "bfloat16"), ("lora", "float16"))
    ):
        request = CompileRequest(blueprint=f'{{"name":"{name}"}}', dtype=dtype, targets=(cuda,))
        tell(view, request, at=START + 70 + k, event_id=name, trace_id=f"{k}f3a9c01e77d")
    ready = KernelReady(
        artifact_id="b3d4f51c09aa-cuda90-standard-5e01a1c3b277",
        manifest_digest="0" * 64,
        status=KernelStatus.PENDING_HARDWARE,
        compile_seconds=2.4,
    )
    tell(view, ready, at=START + 73.1, in_reply_to="bottleneck_adapter")
    failure = CompileFailed(error="BlueprintError", message="blueprint 'lora': dim 'r' is 512, at most 256 is allowed")
    tell(view, failure, at=START + 73.4, in_reply_to="lora")
    view.server = {"groups": {"tezzeret": {"lag": 0, "held": 1}}}


def _name(layer: int) -> str:
    return f"encoder.{layer // 2}.fc{layer % 2 + 1}"


def _named(made: object) -> object:
    return made.model_copy(update={"layers": tuple(map(_name, range(LAYERS)))})


def main(folder: Path) -> None:
    sys.path.append(str(install(Path(__file__).resolve().parent / "requirements.txt")))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, Oona() as bus, Dashboard(bus, port=0) as shown:
        tell_a_run(shown.view)
        browser = playwright.chromium.launch(executable_path=find_or_install(), args=["--no-sandbox", "--disable-gpu"])
        for name, scheme, width, height in (
            ("nissa-light.png", "light", 1280, 1000),
            ("nissa-dark.png", "dark", 1280, 1000),
            ("nissa-phone.png", "dark", 390, 844),
        ):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, timezone_id="UTC", locale="en-GB"
            )
            page = context.new_page()
            page.goto(shown.url)
            page.get_by_role("row", name=_name(0)).get_by_role("gridcell").first.wait_for()
            if width > 1000:
                page.get_by_role("row", name=_name(0)).get_by_role("gridcell").first.click()
                page.locator("#seed-log li").first.wait_for()
            page.wait_for_timeout(600)
            page.screenshot(path=folder / name, full_page=name == "nissa-light.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
