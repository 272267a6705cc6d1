"""A browser, and what the tests of the bus have: servers, and buses to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import find_or_install
from package_folder import install

sys.path.append(str(Path(__file__).resolve().parent.parent / "oona"))

from bus_fixtures import bus_to, hub, redis_server, scratch, server

__all__ = ["bus_to", "hub", "redis_server", "scratch", "server"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by Playwright, whose event loop runs meanwhile: no other may in this thread."""
    binary = find_or_install()
    if binary is None:
        pytest.skip("chromium is not installed, and cannot be: apt-get, root and a network are needed")
    sys.path.append(str(install(Path(__file__).resolve().parent / "requirements.txt")))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox wants a user of its own; what it is shown here is ours.
        running = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, width=..., ...)`: a page in a context of its own. Whatever it asks of another host, and every
    error of its scripts, fails the test."""
    contexts: list[Any] = []
    faults: list[str] = []

    def opened(url: str, *, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on(
            "request", lambda r: None if r.url.startswith((url, url.replace("http", "ws", 1))) else faults.append(r.url)
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []
