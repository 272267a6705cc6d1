"""The page on blueprints has every operation as the table of operations has it."""

from __future__ import annotations

from pathlib import Path

from esper_triton.contracts.operations import OPERATIONS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "blueprints.md").read_text(encoding="utf-8")
PLACES = {"row": "", "positions": "sequence or image", "sequence": "sequence", "image": "image"}


def test_the_page_lists_every_operation_as_it_is():
    rows = "".join(f"| `{op.signature}` | {op.formula} | {PLACES[op.domain]} |\n" for op in OPERATIONS.values())
    table = "| operation | gives | layout |\n| --- | --- | --- |\n" + rows.replace("|a|", r"\|a\|")
    assert PAGE.endswith(table), f"the table of docs/blueprints.md should be:\n{table}"
