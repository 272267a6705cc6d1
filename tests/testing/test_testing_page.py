"""docs/testing.md names all that the package has for tests."""

from __future__ import annotations

from pathlib import Path

import esper_triton.testing as testing

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def test_every_strategy_and_assertion_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in testing.__all__ if name not in text] == []
