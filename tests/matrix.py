"""Runs the CPU backend's tests on several releases of Triton and writes down how they went.

    python tests/matrix.py .venv .venv-matrix/3.6.0 ... [-- arguments of pytest]

Each folder is a virtual environment. One line per release goes to standard output, and one for each test that failed
or was skipped. The results replace the last section of `docs/cpu-matrix.md`, unless pytest was given arguments and so
may have run only some of the tests. Exits with 1 if a test failed or a run broke off.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "cpu-matrix.md"
HEADING = "## The last run of `make test-matrix`"
_ASK = "import json, sys, torch, triton; print(json.dumps([triton.__version__, torch.__version__]))"


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How many tests passed, and a line for each that did not."""

    passed: int
    failed: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the tests went on one release. `seconds`: of the whole run. `date`: when it ended, in UTC."""

    triton: str
    torch: str
    tests: Outcomes
    seconds: float
    date: str

    def lines(self) -> str:
        """For people: the release, what did not pass, and where the rest of it can be read."""
        tests = self.tests
        counts = [(len(tests.failed), "FAILED"), (tests.passed, "passed"), (len(tests.skipped), "skipped")]
        summary = ", ".join(f"{count} {name}" for count, name in counts if count or name == "passed")
        where = [f"what pytest said is in {log_of(self.triton).relative_to(ROOT)}"] if tests.failed else []
        first = f"triton {self.triton}: {summary} in {self.seconds:.0f} s"
        return "\n  ".join([first, *tests.failed, *tests.skipped, *where])

    def row(self) -> str:
        """A line of the table in the documentation."""
        counts = (self.tests.passed, len(self.tests.failed), len(self.tests.skipped))
        cells = (self.triton, self.torch, *counts, f"{self.seconds:.0f}", self.date)
        return "| " + " | ".join(map(str, cells)) + " |"


def log_of(release: str) -> Path:
    """Where what pytest prints on a release of Triton is kept."""
    return ROOT / ".venv-matrix" / f"{release}.log"


def outcomes(junit: str) -> Outcomes:
    """What pytest's report in JUnit's XML says."""
    passed, failed, skipped = 0, [], []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        child = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if child is None:
            passed += 1
            continue
        reason = (child.get("message") or "").strip().splitlines() or [""]
        line = f"{child.tag}: {case.get('classname')}::{case.get('name')}: {reason[0]}"
        (skipped if child.tag == "skipped" else failed).append(line)
    return Outcomes(passed=passed, failed=tuple(failed), skipped=tuple(skipped))


def run(environment: Path, arguments: Sequence[str]) -> Result:
    """The backend's tests in a virtual environment."""
    python = environment / "bin" / "python"
    asked = subprocess.run([python, "-c", _ASK], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    triton, torch = json.loads(asked.stdout)
    log = log_of(triton)
    log.parent.mkdir(exist_ok=True)
    start = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        junit = Path(folder) / "junit.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", "tests/cpu"]
        status = subprocess.run([*command, *arguments], cwd=ROOT, stdout=output, stderr=output, check=False).returncode
        report = junit.read_text(encoding="utf-8") if junit.is_file() else "<testsuites/>"
    tests = outcomes(report)
    if status != 0 and not tests.failed:
        tests = replace(tests, failed=(f"pytest ended with status {status}",))
    end = datetime.now(UTC)
    return Result(
        triton=triton, torch=torch, tests=tests, seconds=(end - start).total_seconds(), date=f"{end:%Y-%m-%d}"
    )


def with_results(document: str, results: Sequence[Result]) -> str:
    """The document with its last section, which begins with `HEADING`, replaced by a table of the results.

    Raises:
        ValueError: it has no such section.
    """
    before, found, _ = document.partition(f"{HEADING}\n")
    if not found:
        raise ValueError(f"no section {HEADING!r} in the document")
    head = "| triton | torch | passed | failed | skipped | seconds | date |"
    table = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    rows = sorted(results, key=lambda result: [int(part) for part in result.triton.split(".")])
    return "\n".join([f"{before}{HEADING}", "", *table, *(result.row() for result in rows), ""])


def main(arguments: Sequence[str]) -> int:
    """Run the matrix; 0 if every test passed on every release."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    environments, for_pytest = arguments[:split], arguments[split + 1 :]
    if not environments:
        sys.stderr.write("error: expected the folders of one or more virtual environments\n")
        return 2
    results = []
    for environment in environments:
        result = run(ROOT / environment, for_pytest)
        sys.stdout.write(f"{result.lines()}\n")
        sys.stdout.flush()
        results.append(result)
    if not for_pytest:
        REPORT.write_text(with_results(REPORT.read_text(encoding="utf-8"), results), encoding="utf-8")
    return int(any(result.tests.failed for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
