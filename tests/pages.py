"""The code of the pages: where it stands, and how a reader runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """What stands between two fences. `title`: the file that it is, as its fence says with title="..."."""

    language: str
    title: str | None
    line: int
    text: str


@dataclass(frozen=True)
class Command:
    """A line of a console block after its `$`, with those that continue it, and what the page shows of its output."""

    text: str
    shown: tuple[str, ...]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page in their order, of one language or all."""
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        own, _, rest = match[2].partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', rest.strip())
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(own, title[1] if title else None, line, match[3]))
    return [block for block in found if language in (None, block.language)]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def commands_of(page: Path) -> list[Command]:
    """What a page has a reader type."""
    found: list[Command] = []
    for block in blocks_of(page, "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append(Command(re.sub(r"\s+# .*$", "", line[2:]).strip(), ()))
            else:
                found[-1] = Command(found[-1].text, (*found[-1].shown, line))
    return found


def write_files(page: Path, folder: Path) -> None:
    """The files that a page's blocks are, by their titles."""
    for block in blocks_of(page):
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """A process's in a reader's folder: `python` is this one, this tree is installed, and the store is `urza`."""
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
        "ESPER_URZA": str(folder / "urza"),
        "ESPER_OONA": str(folder / "journal"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "2",
    }
    return os.environ | own


def run_python(page: Path, folder: Path, blocks: list[Block], afterwards: str = "") -> str:
    """Runs blocks one after the other as one program in a folder, where a warning is an error; what it prints. Lines of
    a traceback are those of the page. `afterwards` is run at the program's end."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    path = folder / f"{page.stem}_page.py"
    path.write_text("\n".join([*lines, afterwards, ""]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", path.name],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_command(command: str, folder: Path) -> str:
    """What a command prints in a folder; it has to succeed."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
