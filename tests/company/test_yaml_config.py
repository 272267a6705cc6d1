"""A configuration in YAML, which PyYAML reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_triton.config import GrowthConfig, load_config
from esper_triton.contracts.errors import ConfigError


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_yaml_says_what_toml_says(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"growth.{suffix}"
    path.write_text("wrap:\n  target_types: [Linear]\nheuristic:\n  max_seeds: 3\nhook:\n  keep: 7\n")
    expected = GrowthConfig(wrap={"target_types": ["Linear"]}, heuristic={"max_seeds": 3}, hook={"keep": 7})
    assert load_config(path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hook: [", "not valid YAML"),
        ("- 1", "a mapping is expected, found list"),
        ("hook:\n  kep: 1", r"hook\.kep: there is no such name; did you mean 'keep'"),
        ("1: 2\nhook:\n  2: 3", r"hook\.2: there is no such name; .*; 1: there is no such name"),
        ("hook:", "hook: must be a table, found None"),
        ("policy:\n  max_reconstruction_error: 1e-3", "must be a number, as 0.5 or 1.0e-3, found '1e-3'"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "growth.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
