"""The explorables in Chromium: each starts when scrolled to and reacts to a key and to a drag."""

from typing import Any

import pytest

from minimoe.widgets import EXPLORABLES
from tests.browser.conftest import SCREENSHOTS
from tests.browser.test_pages import COLOURS, KNOWN, WCAG, Seen, seen

pytestmark = pytest.mark.browser
__all__ = ["seen"]

PAGE = "book/explorables.html"


def place(name: str) -> str:
    """The selector of an explorable's place."""
    return f'.minimoe-explorable[data-explorable="{name}"]'


def started(seen: Seen, name: str) -> Any:
    """Open the page, scroll to the explorable and wait until it is there; returns its element."""
    seen.open(PAGE)
    element = seen.page.wait_for_selector(place(name))
    element.scroll_into_view_if_needed()
    seen.page.wait_for_selector(f"{place(name)}[data-state]", timeout=20_000)
    assert element.get_attribute("data-state") == "ready", element.inner_text()
    return element


def look(seen: Seen, name: str) -> str:
    """What the explorable shows now: its drawing, numbers and words."""
    return seen.page.eval_on_selector(
        place(name),
        "e => [...e.querySelectorAll('svg, canvas, table, .mm-live')].map(x => x.outerHTML).join('')",
    )


def changed(seen: Seen, name: str, before: str) -> None:
    """Wait until the explorable shows something else."""
    seen.page.wait_for_function(
        """([where, old]) => [...document.querySelector(where).querySelectorAll('svg, canvas, table, .mm-live')]
             .map(x => x.outerHTML).join('') !== old""",
        arg=[place(name), before],
        timeout=10_000,
    )


@pytest.mark.parametrize("name", EXPLORABLES)
def test_reacts_to_a_key_and_a_drag(seen: Seen, name: str) -> None:
    element = started(seen, name)
    assert element.query_selector(":scope > figure") is None
    control = element.query_selector("input[type=range]")
    assert control is not None
    control.scroll_into_view_if_needed()

    before = look(seen, name)
    control.focus()
    seen.page.keyboard.press("End")
    changed(seen, name, before)

    before = look(seen, name)
    box = control.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    seen.page.mouse.move(box["x"] + box["width"] - 8, middle)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + box["width"] / 2, middle, steps=5)
    seen.page.mouse.up()
    changed(seen, name, before)
    assert [e for e in seen.errors if not KNOWN.search(e)] == []
    assert seen.elsewhere == []


@pytest.mark.parametrize("name", EXPLORABLES)
def test_is_accessible_and_fits(seen: Seen, name: str) -> None:
    element = started(seen, name)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for fold in element.query_selector_all("details"):
        fold.evaluate("e => e.open = true")
    problems: list[str] = []
    for theme in ("light", "dark"):
        seen.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        element.screenshot(path=str(SCREENSHOTS / f"explorable-{name}-{theme}.png"))
        only = {"type": "tag", "values": WCAG} if theme == "light" else {"type": "rule", "values": COLOURS}  # fmt: skip
        problems += [f"{theme}: {v}" for v in seen.violations(only)]
    # every control has its name, every drawing its words
    unnamed = "e => [...e.querySelectorAll('svg[role=img], canvas')].filter(x => !(x.ariaLabel ?? '').trim()).length"
    assert element.evaluate(unnamed) == 0
    # what takes part with the mouse takes part with the keyboard: nothing is skipped by Tab
    skipped = "e => e.querySelectorAll('[tabindex=\"-1\"]:not([data-roving])').length"
    assert element.evaluate(skipped) == 0
    seen.page.set_viewport_size({"width": 320, "height": 800})
    element = started(seen, name)
    wide = seen.page.evaluate("document.documentElement.scrollWidth")
    if wide > 320:
        problems.append(f"{wide} pixels wide in a window of 320")
    element.screenshot(path=str(SCREENSHOTS / f"explorable-{name}-narrow.png"))
    assert problems == []


@pytest.mark.parametrize("name", EXPLORABLES)
def test_is_printed(seen: Seen, name: str) -> None:
    element = started(seen, name)
    seen.page.emulate_media(media="print")
    assert element.is_visible()


def test_starts_only_when_scrolled_to(seen: Seen) -> None:
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url))
    seen.open("book/intro.html")
    assert not any("explorables" in url for url in asked)
    last = list(EXPLORABLES)[-1]
    seen.page.set_viewport_size({"width": 1280, "height": 300})
    seen.open(PAGE)
    seen.page.wait_for_timeout(300)
    if len(EXPLORABLES) > 2:
        assert not any(f"{last}.mjs" in url for url in asked)
    started(seen, last)
    assert any(f"{last}.mjs" in url for url in asked)


def test_without_its_script_a_sentence_and_the_figure_stay(seen: Seen) -> None:
    seen.page.route("**/*.mjs", lambda route: route.abort())
    seen.open(PAGE)
    name = next(iter(EXPLORABLES))
    seen.page.eval_on_selector(place(name), "e => e.scrollIntoView()")
    seen.page.wait_for_selector(f"{place(name)}[data-state=failed]")
    element = seen.page.query_selector(place(name))
    assert element is not None
    assert "could not be loaded" in element.inner_text()
    assert element.query_selector("figure img").is_visible()
