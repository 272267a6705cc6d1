"""Blueprints whose source cannot be read or run: one error each, and never the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.tezzeret.source import load_source


def test_a_source_that_is_not_utf_8(adapter_variant: Callable[..., Path]) -> None:
    path = adapter_variant()
    path.with_suffix(".py").write_bytes(b"# \xff")
    with pytest.raises(BlueprintError, match="cannot be read"):
        Blueprint.load(path)


def test_a_source_that_ends_the_process(adapter_variant: Callable[..., Path]) -> None:
    path = adapter_variant()
    path.with_suffix(".py").write_text("raise SystemExit(0)")
    blueprint = Blueprint.load(path)
    with pytest.raises(BlueprintError, match="does not run: SystemExit"):
        load_source(blueprint)


def test_a_dim_whose_least_size_is_above_its_largest(adapter_variant: Callable[..., Path]) -> None:
    path = adapter_variant(toml={"d = { min = 1, max = 65536 }": "d = { min = 9, max = 2 }"})
    with pytest.raises(BlueprintError, match="min 9 is above max 2"):
        Blueprint.load(path)
