"""docs/testing.md, run as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import esper_triton.testing as testing

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def test_the_python_of_the_page_on_testing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})


def test_every_strategy_and_assertion_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in testing.__all__ if name not in text] == []
