"""A browser and a server for the tests that look at pages; skipped with the reason where there is no Chromium."""

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from book import npm
from tests.text_cache import in_ci

ROOT = Path(__file__).resolve().parent.parent.parent
BOOK = Path(os.environ.get("MINIMOE_BOOK", ROOT / "_build" / "html"))
# Pictures of what was looked at, for people, are kept in this folder if it is named.
SCREENSHOTS = os.environ.get("MINIMOE_SCREENSHOTS")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# Milliseconds after which what does not come is given up: many times what a loaded machine takes.
PATIENCE = 90_000
# There is no network but the machine itself.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip

# What the theme's script says on a page whose margin notes have one heading: known, harmless, and not ours.
KNOWN = re.compile(r"Cannot read properties of null \(reading 'classList'\)")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
# Nothing moves, from the beginning: a style that comes later has a whole page styled again.
STILL = """document.adoptedStyleSheets = [new CSSStyleSheet()];
document.adoptedStyleSheets[0].replaceSync("* { transition: none !important; animation: none !important }");"""
# What depends on colours: all that can differ between light and dark.
COLOURS = ["color-contrast", "link-in-text-block"]
LOOK = """async ([theme, within, colours, standards, known]) => {
  document.documentElement.dataset.theme = theme;
  const kinds = Object.fromEntries(known.map(kind => [kind, 2])), some = [], papers = new Map([[null, []]]);
  const own = s => [s.backgroundColor, s.backgroundImage, s.opacity];
  const seen = p => !['rgba(0, 0, 0, 0)', 'none', '1'].includes(p);
  const behind = e => papers.get(e)
    ?? papers.set(e, [...own(getComputedStyle(e)).filter(seen), ...behind(e.parentElement)]).get(e);
  for (const e of document.querySelectorAll(`${within}, ${within} *`)) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const s = getComputedStyle(e);
    const large = parseFloat(s.fontSize) >= (s.fontWeight >= 700 ? 18.66 : 24);
    const kind = [e.tagName === 'A', s.color, large, s.textShadow, behind(e)].join();
    kinds[kind] = (kinds[kind] ?? 0) + 1;
    if (kinds[kind] <= 2) some.push(e);
  }
  const alike = ['pre', 'span.math mjx-container'].flatMap(q => [...document.querySelectorAll(q)].slice(1)).filter(
    box => !some.some(e => box.contains(e)) && (box.tagName !== 'PRE' || [...box.querySelectorAll('*')].every(
      e => e.tagName === 'SPAN' && [...e.attributes].every(a => a.name === 'class'))));
  const inside = alike.map(box => [...box.childNodes]);
  alike.forEach(box => box.replaceChildren(box.textContent));
  const found = some.length ? [await axe.run({include: some}, {runOnly: {type: 'rule', values: colours},
                                                               resultTypes: ['violations']})] : [];
  if (theme === 'light')
    found.push(await axe.run(within, {runOnly: {type: 'tag', values: standards}, resultTypes: ['violations'],
                                      rules: Object.fromEntries(colours.map(c => [c, {enabled: false}]))}));
  alike.forEach((box, i) => box.replaceChildren(...inside[i]));
  return [found.flatMap(f => f.violations), Object.keys(kinds)]; }"""
# The kinds of text whose colours were judged on the pages before, by theme: the pages of one book share most of them.
JUDGED: dict[str, set[str]] = {"light": set(), "dark": set()}


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


def picture(of: Any, name: str) -> None:
    """Keep a screenshot of a page or an element, where somebody wants them: rendering one takes as long as a check."""
    if SCREENSHOTS:
        of.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def wait(page: Any, expression: str, arg: Any = None, timeout: float = PATIENCE) -> None:
    """Wait until JavaScript says so, asking ten times per second: to ask at every frame has every frame drawn."""
    page.wait_for_function(expression, arg=arg, timeout=timeout, polling=100)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """python -m http.server, without its log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def stay(context: Any, address: str) -> None:
    """Open a page that stays: others of its site share its process and compiled scripts, and take half the time."""
    context.new_page().goto(address)


@pytest.fixture(scope="session")
def context(browser: Any) -> Iterator[Any]:
    """What the windows on the book have in common: a cache, and a process for each site."""
    made = browser.new_context(color_scheme="light")
    made.set_default_timeout(PATIENCE)
    stay(made, (ROOT / "book/assets/favicon.svg").as_uri())
    yield made
    made.close()


@pytest.fixture(scope="session")
def book(context: Any) -> Iterator[str]:
    """The address of the built book, served as `python -m http.server` does."""
    need((BOOK / "book/intro.html").exists(), f"there is no book in {BOOK}; run `make book`")
    handler = functools.partial(Quiet, directory=str(BOOK))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    stay(context, f"{address}/_static/favicon.svg")
    yield address
    server.shutdown()


@functools.cache
def axe() -> str:
    """axe-core, which finds what keeps people from using a page."""
    folder = npm.cache_dir() / "npm" / "axe-core-4.10.3"
    if not (folder / "axe.min.js").exists():
        npm.unpack("axe-core@4.10.3", folder, ["axe\\.min\\.js"])
    return (folder / "axe.min.js").read_text(encoding="utf-8")


class Seen:
    """A page and what went wrong while it was loaded."""

    def __init__(self, page: Any, book: str) -> None:
        self.page, self.book = page, book
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)
        page.on("response", self._answered)
        page.on("request", self._asks)
        page.add_init_script(STILL)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.errors.append(f"{response.status} {response.url}")

    def _asks(self, request: Any) -> None:
        self.asked.append(request.url)
        if not request.url.startswith((self.book, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def problems(self) -> list[str]:
        """What went wrong: errors, and what was asked for from elsewhere."""
        errors = [f"console: {e}" for e in self.errors if not KNOWN.search(e)]
        return errors + [f"loads {url}" for url in self.elsewhere]

    def each(self, selector: str, expression: str) -> list[Any]:
        """What JavaScript says of each element."""
        return self.page.eval_on_selector_all(selector, f"all => all.map({expression})")

    def until(self, expression: str, *arguments: Any) -> None:
        """Wait until JavaScript says so; it gets the arguments as a list."""
        wait(self.page, expression, list(arguments))

    def open(self, name: str) -> None:
        """Load a page and wait until its formulas are drawn."""
        self.page.goto(f"{self.book}/{name}", wait_until="load")
        self.page.wait_for_function("!window.MathJax?.startup || window.MathJax.startup.promise")
        self.page.evaluate("window.MathJax?.startup?.promise")

    def violations(self, theme: str, within: str = "html") -> list[str]:
        """What axe-core finds within an element in a theme, one line for each place.

        Colours take nearly all of its time, so it judges them on two elements of each kind that no page before had: a
        kind is a link or none, is large by WCAG's measure or not, and has one colour and the same papers behind it. All
        else is looked at in the light theme, everywhere. Inside formulas in a line and code of plain spans, which are
        made alike, it sees the first of a page, and those with a kind of text that is new.
        """
        if self.page.evaluate("!window.axe"):
            self.page.evaluate(axe())
        known = sorted(JUDGED[theme])
        found, kinds = self.page.evaluate(LOOK, [theme, within, COLOURS, WCAG, known])
        if not found:
            JUDGED[theme].update(kinds)
        return [
            f"{theme}: {v['id']}: {node['target']}: {node['html'][:120]} {node.get('failureSummary', '')[:200]}"
            for v in found
            for node in v["nodes"]
        ]


@pytest.fixture
def window(context: Any) -> Iterator[Any]:
    """A new window."""
    made = context.new_page()
    made.set_viewport_size({"width": 1280, "height": 900})
    yield made
    made.close()


@pytest.fixture
def seen(window: Any, book: str) -> Iterator[Seen]:
    """A new window on the book, which knows nothing of those before it."""
    yield Seen(window, book)
    window.evaluate("localStorage.clear()")


def press_end(seen: Seen, control: Any) -> None:
    """The key that puts a slider to its end, or, where it is there, to its beginning."""
    control.focus()
    seen.page.keyboard.press("Home" if control.evaluate("e => e.value === e.max") else "End")
