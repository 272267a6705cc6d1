"""The pages of docs/: links lead somewhere, code runs, and what they list is all that there is."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
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


def test_the_diagrams_are_what_their_script_draws_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("diagrams", DOCS / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    diagrams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagrams)
    assert (DOCS / "architecture.svg").read_text("utf-8") == diagrams.architecture()
    drawn = (DOCS / "lifecycle.svg").read_text("utf-8")
    assert drawn == diagrams.lifecycle()
    assert all(f">{state.name}</text>" in drawn for state in SeedLifecycleState)


def test_the_page_on_the_architecture_has_every_state() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| ([A-Z_, ]+) \|", text, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} == set(SeedLifecycleState.__members__)


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


def run(page: str, code: str, **names: Any) -> dict[str, Any]:
    found = {"__name__": "page", **names}
    exec(compile(code, str(DOCS / page), "exec"), found)
    return found


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = run("tutorial.md", "\n".join(code_of("tutorial.md")))
    assert page["verdict"].improvement > 0
    assert capsys.readouterr().out.startswith("no artifact '0123456789ab-cpu-fast-ba9876543210' in ")
    assert (tmp_path / "grown" / "lineage.json").exists()


def test_the_code_of_the_page_on_proofs(adapter_store: esper.Urza, adapter_for: Callable[..., str]) -> None:
    artifact_id = adapter_for(16, 4)
    artifact, blobs = adapter_store.load(artifact_id)
    design = adapter_store.blueprint(artifact_id)
    given = {"manifest": artifact.manifest, "blobs": blobs, "blueprint": design}
    (code,) = code_of("urabrask.md")
    page = run(
        "urabrask.md", code.replace('"standard"', '"fast"'), artifact_id=artifact_id, store=adapter_store, **given
    )
    assert page["artifact"].status == "VALIDATED"
    assert page["report"].verdict == "VALIDATED"


def test_the_code_of_the_page_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    monkeypatch.chdir(tmp_path)
    (code,) = code_of("gpu.md")
    (artifact,) = run("gpu.md", code, esper=esper)["artifacts"]
    assert (artifact.manifest.target.backend, artifact.manifest.target.arch) == ("cuda", "90")


def test_every_page_with_code_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    pages = [page.name for page in PAGES if "```python" in page.read_text("utf-8")]
    assert len(pages) > 10
    assert [name for name in pages if f'"{name}"' not in tests] == []
