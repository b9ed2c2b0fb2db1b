"""A browser and a server for the tests that look at pages; skipped with the reason where there is no Chromium."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.text_cache import in_ci

ROOT = Path(__file__).resolve().parent.parent.parent
BOOK = Path(os.environ.get("MINIMOE_BOOK", ROOT / "_build" / "html"))
SCREENSHOTS = ROOT / "_build" / "screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def need(there: bool, reason: str) -> None:
    """Skip where something is missing; in continuous integration fail."""
    if not there and in_ci():
        pytest.fail(reason)
    if not there:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, started once."""
    need(Path(CHROMIUM).exists(), f"there is no Chromium at {CHROMIUM}; set CHROMIUM to its path")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        need(False, "playwright is not installed: pip install -e '.[browser]'")
        raise
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """python -m http.server, without its log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def book() -> Iterator[str]:
    """The address of the built book, served as `python -m http.server` does."""
    need((BOOK / "book/intro.html").exists(), f"there is no book in {BOOK}; run `make book`")
    handler = functools.partial(Quiet, directory=str(BOOK))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
