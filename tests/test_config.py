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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hook]\nkep = 2", "hook.kep: there is no such name; did you mean 'keep'?"),
        ("[huk]\nkeep = 2", "huk: there is no such name; did you mean 'hook'?"),
        ("[heuristic]\nwarmup = 2", "heuristic.warmup: there is no such name; did you mean 'warmup_epochs'?"),
        ("[hook]\nkeep = 0", "hook.keep: input should be greater than or equal to 1, found 0"),
        ("[wrap]\nchunking = 'rows'", "wrap.chunking: input should be 'features' or 'whole', found 'rows'"),
        ("[wrap", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_config(written(tmp_path, text))
    assert str(found.value).startswith(f"{tmp_path / 'growth.toml'}: {message}")


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hook\.keep: .*; divergence\.factor: .*; size: there is no such name"):
        load_config(written(tmp_path, "size = 1\n[hook]\nkeep = 'two'\n[divergence]\nfactor = 1.0"))


def test_names_that_only_torch_knows_are_checked_when_they_are_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn has no module 'Linaer'; did you mean 'Linear'"):
        GrowthConfig(wrap={"target_types": ["Linaer"]}).wrap_model(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"policy\.schedule: unknown schedule 'liner'; did you mean 'linear'"):
        GrowthConfig(policy={"schedule": {"schedule": "liner", "steps": 3}}).make_policy()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it ends in \.json, expected \.toml, \.yaml or \.yml"):
        load_config(written(tmp_path, "{}", "growth.json"))
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "nowhere.toml")
