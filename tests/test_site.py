"""The site that `make docs` makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from package_folder import install
from pages import ROOT


def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    packages = install(ROOT / "docs" / "requirements.txt")
    site = tmp_path / "site"
    build = ["-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(ROOT / ".mkdocs.yml"), "--site-dir", str(site)]
    done = subprocess.run(
        [sys.executable, *build],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(packages), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")]
    made = {page: site / page.parent / page.name.replace("README.html", "index.html") for page in pages}
    assert [page for page, path in made.items() if not path.is_file()] == []
    assert 'id="esper_triton.kasmina.KasminaLayer"' in (site / "reference.html").read_text("utf-8")
    for path in made.values():
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\" >]+)", path.read_text("utf-8"))
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == []
