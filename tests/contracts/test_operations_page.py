"""The page on blueprints has every operation as the table of operations has it, and its examples are one design."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.operations import OPERATIONS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "blueprints.md").read_text(encoding="utf-8")
PLACES = {"row": "", "positions": "sequence or image", "sequence": "sequence", "image": "image"}


def test_the_page_lists_every_operation_as_it_is():
    rows = "".join(f"| `{op.signature}` | {op.formula} | {PLACES[op.domain]} |\n" for op in OPERATIONS.values())
    table = "| operation | gives | layout |\n| --- | --- | --- |\n" + rows.replace("|a|", r"\|a\|")
    assert PAGE.endswith(table), f"the table of docs/blueprints.md should be:\n{table}"


def test_the_examples_of_the_page_are_one_design(capsys: pytest.CaptureFixture[str]):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    written = Blueprint.from_text(text)
    assert names["bottleneck"].id == written.id
    assert [op.op for op in names["taken"].canonical().ops] == [op.op for op in written.canonical().ops]
    assert Blueprint.from_text(capsys.readouterr().out) == names["taken"]
