"""The pages of docs/: links lead somewhere, and what they list is all that there is. test_pages.py runs their code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import esper_triton as esper
from esper_triton.contracts import errors
from esper_triton.cpu import errors as cpu_errors
from esper_triton.kasmina import SeedLifecycleState

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"(?:src|href)=\"([^\"]+)\"", text)]
    wrong = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
        elif DOCS in page.parents and not target.is_relative_to(DOCS):
            wrong.append(f"{link}: the site has no such page")
    assert not wrong


def classes_of(module: Any) -> set[str]:
    return {name for name in module.__all__ if inspect.isclass(getattr(module, name))}


def test_every_error_is_in_the_questions_and_none_that_is_gone() -> None:
    text = (DOCS / "faq.md").read_text("utf-8")
    ours, theirs = text.partition("\n## Errors of the CPU backend")[::2]
    headings = re.compile(r"^### (\w+)$", re.MULTILINE)
    assert headings.findall(ours) == sorted(classes_of(errors) - {"EsperError"})
    assert headings.findall(theirs) == sorted(classes_of(cpu_errors) - {"CPUBackendError"})


def message_of(node: ast.expr) -> str | None:
    """The text of an expression, … where something is put in; None where it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def messages_of_the_code() -> Iterator[str]:
    for path in (ROOT / "esper_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)) and (message := message_of(node)):
                yield message


def test_every_message_that_the_questions_quote_is_one_of_the_code() -> None:
    quoted = re.findall(r"^> (.*)$", (DOCS / "faq.md").read_text("utf-8"), re.MULTILINE)
    assert len(quoted) > 20
    said = set(messages_of_the_code())
    assert [quote for quote in quoted if not any(quote in message for message in said)] == []


def test_the_reference_has_every_public_name() -> None:
    named = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE))
    assert named >= {f"{home}.{name}" for name, home in esper._HOME.items()}
    for path in named:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, f"{path} has no docstring"


def test_the_site_has_every_page_in_its_contents() -> None:
    contents = (ROOT / ".mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"- (\S+\.md)$", contents, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def script(name: str) -> Any:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_every_message_is_what_its_script_reads_in_the_code() -> None:
    messages = script("messages")
    assert (DOCS / "messages.md").read_text("utf-8") == messages.page(), "write it anew: python docs/messages.py"
    assert len({text for _, _, text in messages.messages()}) > 600


def test_the_diagrams_are_what_their_script_draws_of_the_code() -> None:
    diagrams = script("diagrams")
    assert (DOCS / "architecture.svg").read_text("utf-8") == diagrams.architecture()
    drawn = (DOCS / "lifecycle.svg").read_text("utf-8")
    assert drawn == diagrams.lifecycle()
    assert all(f">{state.name}</text>" in drawn for state in SeedLifecycleState)


def test_the_page_on_the_architecture_has_every_state() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| ([A-Z_, ]+) \|", text, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} == set(SeedLifecycleState.__members__)
