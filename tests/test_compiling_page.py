"""docs/compiling.md, run as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import esper_triton as esper

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compiling.md"


def test_the_python_of_the_page_on_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_URZA", str(tmp_path / "default"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.split()[0] in {"WAITING", "RUNNING"}
    assert len(esper.Urza("urza").ids()) == 2


def test_the_options_of_the_page_on_compiling_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    commands = re.findall(r"^\$ python -m esper_triton\.compile (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(commands) == 3
    from shlex import split

    from esper_triton.compile import main

    for command in commands:
        arguments = [*split(command), "--urza", str(tmp_path / "urza")]
        dry = [argument for argument in arguments if argument not in ("--dry-run", "--emit-source")]
        assert main([*dry, "--dry-run"]) == 0, command
    assert capsys.readouterr().out.count("to build") >= 4
