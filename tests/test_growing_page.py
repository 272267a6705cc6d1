"""docs/growing.md, run as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import esper_triton as esper

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "growing.md"


def test_the_code_of_the_page_on_growing_in_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    page: dict[str, Any] = {"torch": torch, "__name__": "page"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), page)
    grown = esper.seed_parameters(page["model"], esper.SeedLifecycleState.FOSSILIZED)
    assert len(list(grown)) >= 4
    assert page["hook"].metrics[-1] < page["hook"].metrics[3]
    assert (tmp_path / "grown" / "lineage.json").exists()
    assert capsys.readouterr().out
    assert page["manual"].step(page["hook"].system_state())[0].artifact_id == page["artifact"].id
    exec(compile(blocks[0], str(PAGE), "exec"), page | {"__name__": "page"})  # it has ended, so it does nothing more
    assert len(page["hook"].metrics) == 20
