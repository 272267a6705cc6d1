from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import esper_triton as esper
from esper_triton.config import GrowthConfig, documented, load_config
from esper_triton.contracts.errors import ConfigError
from esper_triton.kasmina import Policy, cosine, linear
from esper_triton.kasmina.gates import ErrorRateGate, MetricGate, ReconstructionGate
from esper_triton.urza import Urza

ROOT = Path(__file__).resolve().parent.parent


def written(folder: Path, text: str, name: str = "growth.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_every_default_is_that_of_the_code() -> None:
    config = GrowthConfig(heuristic={})
    for section, function, left_out in (
        (config.wrap, esper.wrap, {"urza", "copy", "policy", "auto_advance"}),  # the last is the hook's
        (config.heuristic, esper.Heuristic, set()),
        (
            config.hook,
            esper.GrowthHook,
            {"schedulers", "controller", "validate", "carry", "divergence"},
        ),
        (config.divergence, esper.LossWatch, set()),
    ):
        known = {name: value for name, value in defaults_of(function).items() if name not in left_out}
        own = section.model_dump(exclude={"target_layers", "target_types"})
        assert own == known
    assert config.make_policy() == Policy()
    assert Policy() == Policy(
        to_grafting=ReconstructionGate(), metric=MetricGate(), error_rate=ErrorRateGate(), schedule=linear(100)
    )


def test_the_documented_file_is_the_default_and_stands_in_the_page(tmp_path: Path) -> None:
    text = documented()
    assert load_config(written(tmp_path, text)) == GrowthConfig(heuristic={})
    assert text in (ROOT / "docs" / "growing.md").read_text("utf-8")
    commented = set(re.findall(r"^# (\w+): ", text, re.MULTILINE))
    body = tomllib.loads(text)
    for name, section in body.items():
        if isinstance(section, dict):
            own = getattr(GrowthConfig(heuristic={}), name)
            assert set(section) | (commented & set(type(own).model_fields)) == set(type(own).model_fields)
    done = subprocess.run([sys.executable, "-m", "esper_triton.config"], capture_output=True, text=True, check=True)
    assert done.stdout == text


def test_a_file_makes_a_run(tmp_path: Path, adapter_store: Urza) -> None:
    path = written(
        tmp_path,
        f"""
        urza = "{adapter_store.root}"
        [wrap]
        target_layers = ["head"]
        target_types = ["Conv2d"]
        seeds_per_layer = 2
        [policy]
        max_training_steps = 7
        schedule = {{ schedule = "cosine", steps = 12 }}
        embargo_epochs = 1
        [heuristic]
        warmup_epochs = 4
        [hook]
        checkpoints = "{tmp_path / "run"}"
        keep = 2
        [divergence]
        factor = 3.0
        """,
    )

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.body, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.conv(x).mean((2, 3))))

    config = load_config(path)
    model = config.wrap_model(Host())
    assert {name: len(layer._kasmina.seeds) for name, layer in model.kasmina_layers.items()} == {"conv": 2, "head": 2}
    policy = model.kasmina_layers["head"]._kasmina.policy
    assert (policy.schedule, policy.to_grafting.max_steps, policy.embargo_epochs) == (cosine(12), 7, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = config.make_hook(model, optimizer, measure_every=9)
    assert hook.resume() == 0
    assert len(list((tmp_path / "run").iterdir())) == 1
    hook._control()
    assert hook.controller.explanation == "waits for epoch 4 (warmup_epochs); it is 0"
    assert load_config(written(tmp_path, "", "empty.toml")).make_controller(adapter_store) is None


WRONG = [
    ("[hook]\nkep = 2", "hook.kep: there is no such name; did you mean 'keep'?"),
    ("[huk]\nkeep = 2", "huk: there is no such name; did you mean 'hook'?"),
    ("[heuristic]\nwarmup = 2", "heuristic.warmup: there is no such name; did you mean 'warmup_epochs'?"),
    ("hook = 3", "hook: must be a table, found 3"),
    ("urza = 3", "urza: must be a text, found 3"),
    ("[hook]\nkeep = 0", "hook.keep: must be at least 1, found 0"),
    ("[hook]\nkeep = true", "hook.keep: must be a whole number, found True"),
    ("[hook]\nkeep = 2.0", "hook.keep: must be a whole number, found 2.0"),
    ("[hook]\nlower_is_better = 1", "hook.lower_is_better: must be true or false, found 1"),
    ("[divergence]\nfactor = '3'", "divergence.factor: must be a number, as 0.5 or 1.0e-3, found '3'"),
    ("[divergence]\nfactor = true", "divergence.factor: must be a number, as 0.5 or 1.0e-3, found True"),
    ("[divergence]\nfactor = 1", "divergence.factor: must be above 1.0, found 1"),
    ("[divergence]\nfactor = nan", "divergence.factor: must be above 1.0, found nan"),
    ("[policy]\nmax_error_rate = 1.5", "policy.max_error_rate: must be at most 1.0, found 1.5"),
    ("[wrap]\nchunking = 'rows'", "wrap.chunking: must be 'features' or 'whole', found 'rows'"),
    (
        "[wrap]\nchunking = 'featurs'",
        "wrap.chunking: must be 'features' or 'whole', found 'featurs'; did you mean 'feat",
    ),
    ("[wrap]\ntarget_layers = 'fc1'", "wrap.target_layers: must be a list, found 'fc1'"),
    ("[wrap]\ntarget_layers = [1]", "wrap.target_layers.0: must be a text, found 1"),
    (
        "[wrap]\ntarget_types = ['Linear', 'Linaer']",
        "wrap.target_types.1: torch.nn has no module 'Linaer'; did you mean 'Linear'",
    ),
    (
        "[heuristic]\npreferred = ['fast', 'hi_speed']",
        "heuristic.preferred.0: must be 'high_speed', 'medium_speed', 'low_speed', 'high_memory' or "
        "'numerically_stable', found 'fast'; heuristic.preferred.1: must be 'high_speed', 'medium_speed', 'low_speed', "
        "'high_memory' or 'numerically_stable', found 'hi_speed'; did you mean 'high_speed'",
    ),
    ("[policy]\nschedule = 'linear'", "policy.schedule: must be a table, found 'linear'"),
    (
        "[policy.schedule]\nschedule = 'linaer'\nsteps = 3",
        "policy.schedule: unknown schedule 'linaer'; did you mean 'linear' or",
    ),
    (
        "[policy.schedule]\nschedule = 'drift_controlled'\nstep = 3\nmax_drift = '1'",
        "policy.schedule: schedule 'drift_controlled': 'steps' is missing; there is no option 'step'; did you mean "
        "'steps'?; max_drift must be a number, found '1'",
    ),
    (
        "[policy.schedule]\nschedule = 'cosine'\nsteps = 0",
        "policy.schedule: cosine: steps must be a whole number of at least 1, found 0",
    ),
]


@pytest.mark.parametrize(("text", "message"), [*WRONG, ("[wrap", "not valid TOML")])
def test_what_is_wrong_is_named_with_its_place_and_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_config(written(tmp_path, text))
    assert str(found.value).startswith(f"{tmp_path / 'growth.toml'}: {message}")


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_code_is_told_the_same_as_a_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        GrowthConfig(**tomllib.loads(text))
    assert str(found.value).startswith(message)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    text = "size = 1\n[hook]\nkeep = 'two'\n[divergence]\nfactor = 1.0\n[policy.schedule]\nschedule = 'liner'"
    keys = (
        r"policy\.schedule: unknown",
        r"hook\.keep: must",
        r"divergence\.factor: must",
        "size: there is no such name",
    )
    with pytest.raises(ConfigError, match="; ".join(f"{key}.*" for key in keys)):
        load_config(written(tmp_path, text))


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates()
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3))
sections = {
    name: list(type(getattr(GrowthConfig(heuristic={}), name)).model_fields)
    for name in ("wrap", "policy", "heuristic", "hook", "divergence")
}
places = st.one_of(st.tuples(st.just(name), st.sampled_from(keys)) for name, keys in sections.items())


@given(places, values)
def test_whatever_stands_for_a_value_is_taken_or_named(place: tuple[str, str], value: Any) -> None:
    config, said = None, ""
    try:
        config = GrowthConfig(**{place[0]: {place[1]: value}})
    except ConfigError as error:
        said = str(error)
    if config is None:
        assert said.startswith(".".join(place))
    else:
        taken = getattr(getattr(config, place[0]), place[1])
        assert taken == (tuple(value) if isinstance(value, list) else value)
        assert isinstance(taken, bool) == isinstance(value, bool)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it ends in \.json, expected \.toml, \.yaml or \.yml"):
        load_config(written(tmp_path, "{}", "growth.json"))
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "nowhere.toml")


def test_a_file_of_another_encoding_is_refused_and_a_mark_before_utf_8_is_not(tmp_path: Path) -> None:
    path = tmp_path / "growth.toml"
    for encoding, message in (
        ("utf-16", "not UTF-8: byte 0xff at 0; it begins as UTF-16 does, and UTF-8 is expected"),
        ("latin-1", "not UTF-8: byte 0xe9 at 2"),
    ):
        path.write_bytes("# é\n[hook]\nkeep = 2".encode(encoding))
        with pytest.raises(ConfigError) as found:
            load_config(path)
        assert str(found.value) == f"{path}: {message}"
    path.write_bytes("# é\n[hook]\nkeep = 2".encode("utf-8-sig"))
    assert load_config(path) == GrowthConfig(hook={"keep": 2})
