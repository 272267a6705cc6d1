"""The page in a real browser: it loads, follows what happens, shows what fails, and takes commands of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bus_servers import eventually
from messages import ARTIFACT, frame, move, one_of_everything
from torch import nn

import esper_triton as esper
from esper_triton.contracts.envelope import COMPILE_FAILED, EPOCH, HEALTH, LIFECYCLE, SUBMITTED
from esper_triton.contracts.events import CompileFailed, CompileRequest, EpochEvent
from esper_triton.contracts.manifest import TargetSpec
from esper_triton.kasmina.lifecycle import SeedLifecycleState as S
from esper_triton.nissa import Dashboard
from esper_triton.nissa.view import STATES
from esper_triton.oona import Oona
from esper_triton.oona.tokens import Tokens

D, R = 16, 4


@pytest.fixture
def bus() -> Iterator[Oona]:
    with Oona() as bus:
        yield bus


@pytest.fixture
def shown(bus: Oona) -> Iterator[Dashboard]:
    with Dashboard(bus, port=0) as dashboard:
        yield dashboard


def cell(page: Any, layer: str, seed: int) -> Any:
    return page.get_by_role("row", name=layer).get_by_role("gridcell").nth(seed)


def has_count(page: Any, selector: str, count: int) -> None:
    """Waits until so many elements are there."""
    found = page.locator(selector)
    eventually(lambda: page.wait_for_timeout(20) or found.count() == count)


def test_it_loads_and_follows_what_happens(bus: Oona, shown: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(shown.url)
    page.get_by_text("No health message has come yet").wait_for()
    bus.publish(HEALTH, frame(["DORMANT", "TRAINING"] * 3, layers=3))
    cell(page, "layers.2", 1).wait_for()
    assert page.title() == "Esper"
    assert page.get_by_role("gridcell").count() == 6
    assert cell(page, "layers.0", 1).get_attribute("aria-label") == "seed 1 of layers.0, training"
    legend = page.get_by_role("group", name="Show one state alone")
    shown_states = [" ".join(text.split()) for text in legend.get_by_role("button").all_inner_texts()]
    assert shown_states == ["dormant 3", "t training 3"]
    bus.publish(LIFECYCLE, move("TRAINING", "GRAFTING", layer="layers.1", seed=1))
    has_count(page, '.cell[data-s="4"]', 1)
    bus.publish(
        HEALTH, frame(["DORMANT", "GRAFTING"] * 3, layers=3, at=1001.0, alpha=[0, 0.5] * 3, health=[None, 0.75] * 3)
    )
    page.get_by_role("img", name="now alpha 0.5, health 0.75").wait_for()
    assert cell(page, "layers.0", 1).get_attribute("aria-label") == (
        "seed 1 of layers.0, grafting, alpha 0.5, health 0.75"
    )
    assert page.locator("#link").inner_text() == "live"
    bus.publish(HEALTH, frame(["DORMANT"] * 2, model="another"))
    page.get_by_label("Model").select_option("another")
    has_count(page, ".cell", 2)


def test_it_shows_a_failure_when_one_happens_and_finds_it_among_others(
    bus: Oona, shown: Dashboard, open_page: Callable[..., Any]
) -> None:
    page = open_page(shown.url)
    bus.publish(HEALTH, frame(["GRAFTING", "DORMANT"]))
    for k in range(30):
        bus.publish(LIFECYCLE, move("GRAFTING", "STABILIZATION", seed=k))
    bus.publish(LIFECYCLE, move("GRAFTING", "ERROR_RECOVERY", error="NonFiniteOutput", artifact_id=ARTIFACT))
    failure = page.locator("#log .failure")
    failure.wait_for()
    assert "GRAFTING to ERROR_RECOVERY: NonFiniteOutput" in failure.inner_text()
    assert cell(page, "layers.0", 0).get_attribute("data-s") == str(STATES.index("ERROR_RECOVERY"))
    assert page.locator("#log li").count() == 31
    page.get_by_label("failures only").check()
    has_count(page, "#log li", 1)
    page.get_by_label("failures only").uncheck()
    page.get_by_label("Text").fill("layers.0")
    page.get_by_label("Text").fill("nonfinite")
    has_count(page, "#log li", 1)
    page.get_by_label("Text").fill("")
    target = TargetSpec(backend="cuda", arch="90")
    request = CompileRequest(like_artifact_id=ARTIFACT, dtype="float16", targets=(target,))
    bus.publish(SUBMITTED, request, event_id="job")
    page.locator("#jobs").get_by_text("waiting").wait_for()
    bus.publish(COMPILE_FAILED, CompileFailed(error="CompileError", message="<b>bold</b>"), in_reply_to="job")
    page.locator("#jobs").get_by_text("failed: CompileError: <b>bold</b>").wait_for()  # as text, not as markup
    bus.publish(EPOCH, EpochEvent(model="m", epoch=4, seeds_by_state={}, damaged={"layers.0": ("alpha_blend",)}))
    page.get_by_role("alert").get_by_text("State arrays are damaged in layers.0").wait_for()


def test_everything_can_be_reached_by_keys(bus: Oona, shown: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(shown.url)
    bus.publish(HEALTH, frame(["DORMANT"] * 6, layers=2))
    cell(page, "layers.1", 2).wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the seeds"
    for _ in range(3):  # operator, the legend's only state, the grid
        page.keyboard.press("Tab")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.getAttribute('aria-label')"))

    assert focused() == "seed 0 of layers.0, dormant"
    for key, label in (
        ("ArrowRight", "seed 1 of layers.0, dormant"),
        ("ArrowDown", "seed 1 of layers.1, dormant"),
        ("End", "seed 2 of layers.1, dormant"),
        ("Control+Home", "seed 0 of layers.0, dormant"),
        ("ArrowUp", "seed 0 of layers.0, dormant"),
        ("Control+End", "seed 2 of layers.1, dormant"),
    ):
        page.keyboard.press(key)
        assert focused() == label
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Seed 2 of layers.1").wait_for()
    page.keyboard.press("Escape")
    assert focused() == "seed 2 of layers.1, dormant"
    assert page.locator("#detail").is_hidden()


def test_a_model_is_commanded_from_the_page_with_the_token_and_not_without(
    adapter_store: esper.Urza, adapter_for: Callable[..., str], open_page: Callable[..., Any]
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(D, D), nn.ReLU()), ["0"], seeds_per_layer=1, urza=adapter_store)
    layer = model.kasmina_layers["0"]
    with esper.dashboard(model, port=0, name="grown") as shown:
        assert model.load_kernel_sync("0", 0, adapter_for(D, R))

        def train() -> bool:
            model(torch.randn(4, D))
            model.step_boundary()
            return True

        def until(condition: Callable[[], bool]) -> None:
            eventually(lambda: train() and condition())

        page = open_page(shown.url)
        has_count(page, '.cell[data-s="3"]', 1)
        cell(page, "0", 0).click()
        artifact = page.locator("#artifact")
        artifact.get_by_text("bottleneck_adapter").first.wait_for()
        for name, text in (
            ("Validation report", '"verdict": "VALIDATED"'),
            ("Blueprint", 'name = "bottleneck_adapter"'),
        ):
            artifact.get_by_text(name, exact=True).click()
            artifact.get_by_text(text).wait_for()
        assert page.locator("#seed-log li").count() >= 1

        cull = page.locator("#operations").get_by_role("button", name="Cull")
        cull.click()
        assert "It is training now, in model grown." in page.locator("#confirm").inner_text()
        page.get_by_role("button", name="Leave it").click()
        cull.click()
        page.locator("#confirm").get_by_role("button", name="Cull").click()
        page.locator("#outcome").get_by_text("Cull was not done: an operator's token is needed").wait_for()
        until(lambda: True)
        assert layer.seed_state(0) is S.TRAINING
        for token, outcome in (("wrong " + str(shown.token), "Cull was not done"), (shown.token, "Cull: applied")):
            page.locator("#token").fill(token)
            page.get_by_role("button", name="Keep").click()
            cull.click()
            page.locator("#confirm").get_by_role("button", name="Cull").click()
            said = page.locator("#outcome").get_by_text(outcome)
            until(said.is_visible)
        assert layer.seed_state(0) is S.CULLED
        has_count(page, '.cell[data-s="9"]', 1)
    assert layer._kasmina.boundary is None  # off the bus again


def test_ten_thousand_seeds_are_shown_and_followed(bus: Oona, shown: Dashboard, open_page: Callable[..., Any]) -> None:
    states = [STATES[k % 9] for k in range(10_000)]
    page = open_page(shown.url)
    bus.publish(HEALTH, frame(states, layers=500, alpha=[k % 9 / 8 for k in range(10_000)]))
    has_count(page, ".cell", 10000)
    painted = int(page.evaluate("document.body.dataset.painted"))
    states[9_999] = "CULLED"
    bus.publish(HEALTH, frame(states, layers=500, at=1001.0, alpha=[k % 9 / 8 for k in range(10_000)]))
    has_count(page, '.cell[data-s="9"]', 1)
    assert int(page.evaluate("document.body.dataset.painted")) > painted
    page.get_by_role("button", name="culled 1").click()
    has_count(page, ".cell.chosen", 1)
    last = cell(page, "layers.499", 19)
    last.scroll_into_view_if_needed()
    last.click()
    page.get_by_role("heading", name="Seed 19 of layers.499").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1280, "dark")])
def test_it_fits_a_phone_and_both_schemes(
    bus: Oona, shown: Dashboard, open_page: Callable[..., Any], width: int, scheme: str
) -> None:
    one_of_everything(shown.view)
    bus.publish(HEALTH, frame(["GRAFTING"] * 200, layers=10, at=2000.0, alpha=[0.5] * 200))
    page = open_page(shown.url, width=width, color_scheme=scheme)
    has_count(page, ".cell", 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cell(page, "layers.9", 19).click()
    page.get_by_role("heading", name="Seed 19 of layers.9").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    seeds, detail = page.locator("#seeds").bounding_box(), page.locator("#detail").bounding_box()
    if width < 760:  # over everything
        assert (detail["x"], detail["y"], detail["width"]) == (0, 0, width)
    else:  # beside the seeds
        assert detail["x"] >= seeds["x"] + seeds["width"]
        assert detail["y"] == seeds["y"]
    contrast = page.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast  # WCAG 2.2, 1.4.3


CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.createElement("i");
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return luminance(getComputedStyle(probe).color);
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const found = {};
  for (const name of ["--text", "--quiet", "--accent", "--bad"]) found[name] = ratio(colour(name), colour("--card"));
  for (let k = 0; k < 14; k++) found[`text on --s${k}`] = ratio(colour("--text"), colour(`--s${k}`));
  found["bad on its ground"] = ratio(colour("--bad"), colour("--bad-back"));
  probe.remove();
  return found;
}"""


def test_a_page_whose_server_ends_says_so_and_goes_on_with_the_next(bus: Oona, open_page: Callable[..., Any]) -> None:
    with Dashboard(bus, port=0) as first:
        port = int(first.url.rsplit(":", 1)[1].strip("/"))
        page = open_page(first.url)
        bus.publish(HEALTH, frame(["DORMANT"]))
        cell(page, "layers.0", 0).wait_for()
    page.get_by_text("the server is away").wait_for()
    with Dashboard(bus, port=port):
        bus.publish(HEALTH, frame(["TRAINING"] * 3))
        has_count(page, ".cell", 3)
        assert page.locator("#link").inner_text() == "live"


def test_where_a_token_is_needed_to_look_the_page_asks_for_it(
    bus: Oona, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "tokens.toml").write_text(
        '[[token]]\nname = "watcher"\ntoken = "watcher-0123456789"\nsubscribe = ["telemetry.*"]\n'
    )
    with Dashboard(bus, port=0, tokens=Tokens.read(tmp_path / "tokens.toml")) as shown:
        bus.publish(HEALTH, frame(["TRAINING", "DORMANT"]))
        page = open_page(shown.url)
        page.get_by_role("dialog").wait_for()
        assert page.locator("#link").inner_text() == "a token is needed to look"
        assert page.locator(".cell").count() == 0
        page.locator("#token").fill("a wrong one, certainly")
        page.locator("#token").press("Enter")
        page.get_by_role("dialog").wait_for()
        page.locator("#token").fill("watcher-0123456789")
        page.locator("#token").press("Enter")
        has_count(page, ".cell", 2)
        cell(page, "layers.0", 0).click()
        page.locator("#signal").get_by_text("training").wait_for()
        page.locator("#operations").get_by_role("button", name="Unload").click()
        page.locator("#confirm").get_by_role("button", name="Unload").click()
        page.locator("#outcome").get_by_text("Unload was not done: an operator's token is needed").wait_for()
