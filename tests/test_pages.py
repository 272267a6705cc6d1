"""Every block of code of every page is run, or stands in a list here with the reason why not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pages import (
    PAGES,
    ROOT,
    Block,
    Command,
    blocks_of,
    commands_of,
    environment,
    name_of,
    prose_of,
    run_command,
    run_python,
    write_files,
)

import esper_triton as esper
from esper_triton.config import GrowthConfig, load_config
from esper_triton.oona.tokens import Tokens

PYTHON_THAT_IS_COMPILED_ONLY = {  # by what the block begins with
    "from esper_triton.lightning import": "for Lightning or Hugging Face, whichever is there, with dots for what "
    "is the reader's; tests/company and docs/examples/transformer.py run both callbacks",
}
_MINUTES = "it takes minutes or hours, or is what runs this test"
_SERVES = "it serves until it is stopped, or asks a server that is none of ours; tests of its room start it"
COMMANDS_THAT_ARE_NOT_RUN = {  # by how the command begins; of the package's own, its options have to exist
    "make ": _MINUTES,
    "pip install esper-triton": "tests/test_package.py installs what is here",
    "python -m pytest tests/": _MINUTES,
    "python bench/": _MINUTES,
    "python -m esper_triton.nissa serve": _SERVES,
    "python -m esper_triton.nissa status": _SERVES,
    "python -m esper_triton.nissa top": _SERVES,
    "python -m esper_triton.oona serve": _SERVES,
    "python -m esper_triton.tezzeret worker": _SERVES,
    "python -m esper_triton.urabrask validate ID --level standard": "half a minute, or with other work minutes",
    "python -m esper_triton.urza serve": _SERVES,
    "python -m esper_triton.urza push https://": _SERVES,
    "ESPER_URZA_TOKEN=... python -m esper_triton.urza ls --urza https://": _SERVES,
}


UNHURRIED = pytest.mark.timeout(600)  # what compiles in the background yields to everything else that runs


def read_run(text: str, folder: Path) -> None:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    assert load_config(folder / "run.toml") == GrowthConfig(heuristic={})


def read_hub_tokens(text: str, folder: Path) -> None:
    path = folder / "tokens.toml"
    path.write_text(text.replace('"..."', f'"{"t" * 16}"'), encoding="utf-8")
    assert Tokens.read(path).role("t" * 16) is not None


READERS_OF_TOML: Mapping[str, Callable[[str, Path], None]] = {  # of what is no file of the page's program
    "docs/growing.md": read_run,
    "docs/oona.md": read_hub_tokens,
}

AFTERWARDS = {  # what has to be so at the end of a page's program, in its own names
    "README.md": "assert type(model[0]) is nn.Linear and torch.equal(out, x * 2.0)",
    "docs/blueprints.md": """
written = Blueprint.load("bottleneck.toml")
assert [op.op for op in taken.canonical().ops] == [op.op for op in written.canonical().ops]
assert Blueprint.from_text(taken.to_toml()) == taken
""",
    "docs/compiling.md": 'assert len(esper.Urza("urza").ids()) == 2',
    "docs/kasmina.md": """
from pathlib import Path
assert Path("grown", "lineage.json").exists()
""",
    "docs/nissa.md": 'assert page.url.startswith("http://127.0.0.1:") and len(page.token) >= 32',
    "docs/oona.md": 'assert bus.publish("audit.lifecycle", {}) is False, "it is closed"',
    "docs/tutorial.md": """
from pathlib import Path
assert verdict.improvement > 0
assert Path("grown", "lineage.json").exists()
""",
    "docs/urza.md": "assert other.load(artifact_id)[1] == blobs",
}


def python_of(page: Path) -> list[Block]:
    """The blocks that are run."""
    blocks = blocks_of(page, "python")
    return [block for block in blocks if not block.text.startswith(tuple(PYTHON_THAT_IS_COMPILED_ONLY))]


def is_run(command: Command) -> bool:
    return not command.text.startswith(tuple(COMMANDS_THAT_ARE_NOT_RUN))


WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands_of(page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_has_fences_and_a_language_that_something_here_runs(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= {"python", "console", "toml", "text"}
    assert re.findall(r"^(?: {4}|\t)\S.*$", prose_of(page), re.MULTILINE) == [], "code without fences"
    assert "```" not in prose_of(page), "a fence without its other one"
    for block in blocks_of(page, "toml"):
        assert block.title is not None or name_of(page) in READERS_OF_TOML
    for block in blocks_of(page, "console"):
        assert block.text.startswith("$ ")
    commands = "\n".join(command.text for command in commands_of(page))
    for block in blocks_of(page):
        if block.title is not None:  # a file, so something of the page reads it
            others = [one.text for one in blocks_of(page, "python") if one is not block]
            assert block.title in commands or f'"{block.title}"' in "\n".join(others)


@UNHURRIED
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_is_one_program(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page, "python"):
        compile(block.text, name_of(page), "exec")
    write_files(page, tmp_path)
    run_python(page, tmp_path, python_of(page), AFTERWARDS.get(name_of(page), ""))


def test_the_training_of_the_page_on_growing_goes_on_where_it_ended(tmp_path: Path) -> None:
    page = ROOT / "docs" / "growing.md"
    first = python_of(page)[:1]
    check = """
grown = list(esper.seed_parameters(model, esper.SeedLifecycleState.FOSSILIZED))
assert len(grown) >= 4 and hook.metrics[-1] < hook.metrics[3] and len(hook.metrics) == 20
"""
    for _ in range(2):  # it has ended, so the second time it does nothing more
        run_python(page, tmp_path, first, check)


def options_of(command: str, folder: Path) -> tuple[set[str], str]:
    """The options that a command of the package is given, and what it says for --help."""
    words = [word for word in shlex.split(command) if "=" not in word.split("-")[0]]
    module = words[words.index("-m") + 1]
    action = next((word for word in words[words.index(module) + 1 :]), "")
    own = [] if action.startswith("-") else [action]
    ask = [sys.executable, "-m", module, *own, "--help"]
    done = subprocess.run(ask, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {word for word in words if word.startswith("--")}, done.stdout


@UNHURRIED
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    commands = commands_of(page)
    if any(re.search(r"\bID\b", command.text) for command in commands if is_run(command)):
        run_python(page, tmp_path, python_of(page))
    for command in commands:
        if is_run(command):
            store = esper.Urza(tmp_path / "urza")
            text = re.sub(r"\bID\b", lambda _: store.ids()[0], command.text)  # noqa: B023 - called at once
            said = run_command(text, tmp_path).splitlines()
            assert [line for line in command.shown if line not in said] == []
        else:
            assert command.shown == ()
            if "-m esper_triton" in command.text:
                options, said_of_help = options_of(command.text, tmp_path)
                assert [option for option in options if option not in said_of_help] == []


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) in READERS_OF_TOML], ids=name_of)
def test_the_files_of_a_page_are_read_by_what_they_are_for(page: Path, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(page, "toml") if block.title is None]
    assert blocks
    for block in blocks:
        tomllib.loads(block.text)
        READERS_OF_TOML[name_of(page)](block.text, tmp_path)


def test_nothing_is_in_the_lists_that_no_page_has() -> None:
    commands = [command.text for page in PAGES for command in commands_of(page)]
    assert [one for one in COMMANDS_THAT_ARE_NOT_RUN if not any(text.startswith(one) for text in commands)] == []
    python = [block.text for page in PAGES for block in blocks_of(page, "python")]
    assert [one for one in PYTHON_THAT_IS_COMPILED_ONLY if not any(text.startswith(one) for text in python)] == []
    assert [name for name in AFTERWARDS if name not in map(name_of, WITH_PYTHON)] == []
    assert len(WITH_PYTHON) > 12
