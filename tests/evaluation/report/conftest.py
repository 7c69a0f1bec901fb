"""A real browser for the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_inputs import make_evaluation

from longlora_cli.evaluation.report.page import make_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser_path() -> str | None:
    """The Chromium that `TEST_BROWSER` names, else the one that is installed."""
    return os.environ.get("TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Without one nothing is opened, and the skip says so."""
    path = browser_path()
    if path is None:
        pytest.skip(
            "NO BROWSER: the report was not opened. `make browser` installs Debian's Chromium (as root), or set "
            f"TEST_BROWSER to one; looked for {', '.join(NAMES)}"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


class Opened:
    """A page in the browser, and what it did that it should not.

    Args:
        page: Playwright's page.
        messages: Lines of its console and errors of its scripts.
        requests: Addresses it asked for, its own left out.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))

    def go(self, address: str) -> None:
        """Open an address and listen to what it asks for."""
        self.page.on("request", lambda request: request.url != address and self.requests.append(request.url))
        self.page.goto(address)

    def texts(self, selector: str) -> list[str]:
        """The text of every element that fits, as it is written in the page."""
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Write a report and open it from `file://`."""
    contexts = []

    def opened(content: str | tuple[Any, Any], **options: Any) -> Opened:
        text = content if isinstance(content, str) else make_page(*content)[0]
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(**options))
        shown = Opened(contexts[-1].new_page())
        shown.go(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def evaluation() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """See `make_evaluation`."""
    return make_evaluation()
