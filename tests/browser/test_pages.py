"""Every page of the book, seen in Chromium without a network: it loads, its formulas are drawn, it is accessible."""

import gzip
import io
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.browser.conftest import ROOT, Seen, picture, press_end, wait

pytestmark = pytest.mark.browser


def pages() -> list[str]:
    """The pages of the table of contents, and the search page."""
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    found = [contents["root"]]
    for chapter in (chapter for part in contents["parts"] for chapter in part["chapters"]):
        found += [chapter["file"], *(s["file"] for s in chapter.get("sections", []))]
    return [*found, "search", "genindex"]


# The reference is made from docstrings by one template, and its pages are the largest: axe looks at these.
REFERENCE = {"book/api/index", "book/api/balance", "book/api/dispatch"}

# What is wrong on a page, as elements. A container of MathJax stands in every formula, and no error; a formula wider
# than its column begins at its beginning; a table fits into its column here, as long as the names in it may be; the
# order of the keyboard is the order of the page.
WRONG = {
    "not drawn": """[...document.querySelectorAll('.math')].filter(
        m => !m.querySelector('mjx-container') || m.querySelector('mjx-merror'))""",
    "cut on the left": """[...document.querySelectorAll('div.math')].filter(box => {
        const signs = [...box.querySelectorAll('mjx-mi, mjx-mo, mjx-mn')].map(e => e.getBoundingClientRect());
        return Math.min(...signs.map(s => s.left)) < box.getBoundingClientRect().left - 1; })""",
    "wider than its column": """[...document.querySelectorAll('.pst-scrollable-table-container')].filter(
        box => box.scrollWidth > box.clientWidth + 1)""",
    "out of order": "[...document.querySelectorAll('[tabindex]')].filter(e => e.tabIndex > 0)",
}
# On a phone a table scrolls; no cell is so narrow that it breaks a word of prose.
BROKEN_WORD = """[...document.querySelectorAll('.bd-article table.table :is(td, th)')].filter(cell => {
    const word = cell.innerText.split(/\\s|[-\u2013/]/).reduce((a, b) => a.length > b.length ? a : b, '');
    const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (text.nextNode()) {
      const at = text.currentNode.data.indexOf(word);
      if (word.length > 3 && at >= 0 && !text.currentNode.parentElement.closest('code')) {
        const range = document.createRange();
        range.setStart(text.currentNode, at); range.setEnd(text.currentNode, at + word.length);
        return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
      } }
    return false; })"""


@pytest.fixture(scope="module")
def one(context: Any, book: str) -> Iterator[Seen]:
    """One window for all the pages that are only looked at."""
    page = context.new_page()
    yield Seen(page, book)
    page.close()


@pytest.mark.parametrize("name", pages())
def test_page(one: Seen, name: str) -> None:
    seen, page = one, one.page
    page.set_viewport_size({"width": 1280, "height": 900})
    for before in (seen.errors, seen.elsewhere):
        before.clear()
    seen.open(f"{name}.html")
    problems = seen.problems()

    def look(what: str, elements: str) -> None:
        found = page.evaluate(f"{elements}.map(e => e.textContent.trim().slice(0, 60))")
        problems.extend(f"{what}: {said}" for said in found)

    for what, elements in WRONG.items():
        look(what, elements)
    looked_at = name in REFERENCE or not name.startswith("book/api/")
    for theme in ("light", "dark"):
        problems += seen.violations(theme) if looked_at else []
        picture(page, f"{name.replace('/', '-')}-{theme}")
    # Each other width has the page laid out anew. 640 pixels are a window of 1280 at 200 % zoom.
    for width in (640, 320):
        page.set_viewport_size({"width": width, "height": 800})
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            problems.append(f"{wide} pixels wide in a window of {width}")
    picture(page, f"{name.replace('/', '-')}-narrow")
    if page.query_selector(".bd-article table.table"):
        page.set_viewport_size({"width": 390, "height": 800})
        look("breaks a word", BROKEN_WORD)
    assert problems == []


def test_figures_keep_their_place_are_dark_in_the_dark_and_large_when_pressed(seen: Seen) -> None:
    seen.page.set_viewport_size({"width": 390, "height": 844})
    seen.open("notebooks/01_dense_mlp.html")
    page = seen.page
    figures = page.query_selector_all(".cell_output button.enlarge img")
    assert len(figures) >= 2
    for figure in figures:
        figure.scroll_into_view_if_needed()
        wait(page, "e => e.complete", figure)
        drawn, shown = figure.evaluate("e => [e.naturalWidth, Number(e.getAttribute('width'))]")
        assert drawn >= shown > 0  # its place is kept while it loads
        stretched = figure.evaluate("e => e.width / e.height * e.naturalHeight / e.naturalWidth")
        assert stretched == pytest.approx(1, abs=0.02)  # in a window that is narrower than it
    assert figures[0].evaluate("e => getComputedStyle(e).filter") == "none"
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert "invert" in figures[0].evaluate("e => getComputedStyle(e).filter")
    figures[0].click()
    large = page.wait_for_selector("dialog.enlarged img")
    # of text in 9 points on 7 inches: as large as on paper
    assert large.bounding_box()["width"] >= 850
    assert large.get_attribute("alt") == figures[0].get_attribute("alt")
    assert seen.violations("light") + seen.violations("dark") == []
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.enlarged", state="detached")
    figures[0].evaluate("e => e.parentElement.focus()")
    page.keyboard.press("Enter")
    page.click("dialog.enlarged button:has-text('Close')")
    page.wait_for_selector("dialog.enlarged", state="detached")


def test_on_a_phone_a_table_of_sentences_is_read_row_by_row(seen: Seen) -> None:
    seen.open("book/bugs.html")
    seen.page.set_viewport_size({"width": 390, "height": 844})
    table = seen.page.wait_for_selector("table.read-by-row")
    assert table.evaluate("e => e.scrollWidth <= e.closest('.bd-article').clientWidth")
    cells = table.query_selector_all("tbody tr:first-child td")
    lefts = {round(cell.bounding_box()["x"]) for cell in cells}
    assert len(cells) == 3 and len(lefts) == 1  # one below the other
    shown = [cell.evaluate("e => getComputedStyle(e, '::before').content") for cell in cells]
    heads = seen.page.query_selector("table.read-by-row thead").text_content()
    assert all(name.strip(' ":') in heads for name in shown)
    assert seen.violations("light") == []


@pytest.mark.parametrize("word", ["roofline", "routing", "router", "expert", "switch_loss"])
def test_search_puts_lessons_before_the_objects_of_the_library(seen: Seen, word: str) -> None:
    seen.open(f"search.html?q={word}")
    seen.until("document.querySelector('.search-summary')?.innerText.includes('found')")
    links: list[str] = seen.each("#search-results li a", "a => new URL(a.href).pathname")
    lessons = [i for i, link in enumerate(links) if "notebooks" in link]
    objects = [i for i, link in enumerate(links) if "book/api" in link]
    assert lessons and objects and max(lessons) < min(objects)
    assert word != "roofline" or any("01_dense_mlp" in link for link in links)
    assert seen.elsewhere == []


def test_the_search_field_opens_from_the_keyboard(seen: Seen) -> None:
    seen.open("book/intro.html")
    seen.page.keyboard.press("Control+k")
    seen.page.keyboard.type("sinkhorn")
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector("#search-results li a")
    assert "q=sinkhorn" in seen.page.url


def test_the_twenty_questions_are_marked_and_set_beside_those_before(seen: Seen) -> None:
    seen.open("book/before_and_after.html")
    for form, slips, said in (("a", range(10), "10 of 20"), ("b", [4], "you have learned 90 %")):
        for i, question in enumerate(seen.page.locator(f"[data-form={form}] fieldset").all()):
            kind = "[data-wrong]" if i in slips else ":not([data-wrong])"
            question.locator(f"input{kind}").first.check()
        seen.page.locator(f"[data-form={form}] button").click()
        status = seen.page.locator(f"[data-form={form}] [role=status]")
        assert said in status.inner_text() and status.locator("a").count() > 0
        assert seen.page.locator(f"[data-form={form}] .told").count() == 20
    reason = seen.page.locator("[data-form=b] fieldset").nth(4).locator(".told").inner_text()
    assert reason.startswith("Not right. ") and len(reason) > 30


def test_tab_goes_through_a_page_in_its_order(seen: Seen) -> None:
    """The first Tab offers to skip to the text; then every stop is visible, seen to be there, and further down."""
    seen.open("notebooks/03_routing.html")
    page = seen.page
    page.keyboard.press("Tab")
    assert "Skip to main content" in page.evaluate("document.activeElement.innerText")
    stop = """() => { const e = document.activeElement; const parts = [e, ...e.children];
      const marked = p => { const s = getComputedStyle(p);
        return s.outlineStyle !== 'none' || s.boxShadow !== 'none' || s.textDecorationThickness !== 'auto'; };
      const there = p => p.getBoundingClientRect().width * p.getBoundingClientRect().height > 0;
      return [[...document.querySelectorAll('*')].indexOf(e), e.outerHTML.slice(0, 80), parts.some(there),
              parts.some(marked)]; }"""
    stops: list[list[Any]] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(stop))
    places = [place for place, *_ in stops]
    assert places == sorted(places)
    assert len(set(places)) == len(places)  # nothing holds the focus
    assert [html for _, html, visible, _ in stops if not visible] == []
    assert [html for _, html, _, marked in stops if not marked] == []
    seen.open("notebooks/03_routing.html")
    for key in ("Tab", "Enter", "Tab"):
        page.keyboard.press(key)
    assert page.evaluate("!!document.activeElement.closest('main')")


def test_paper_is_white_and_nothing_is_cut_off(seen: Seen) -> None:
    seen.page.emulate_media(color_scheme="dark")
    seen.open("notebooks/06_dispatch.html")
    theme = "document.documentElement.dataset.theme"
    assert seen.page.evaluate(theme) == "dark"
    seen.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert seen.page.evaluate(theme) == "light"
    seen.page.emulate_media(media="print", color_scheme="dark")
    seen.page.set_viewport_size({"width": 720, "height": 1000})
    cut = """() => [...document.querySelectorAll('.bd-article pre')]
      .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"""
    assert seen.page.evaluate(cut) == []
    seen.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert seen.page.evaluate(theme) == "dark"


def test_the_theme_can_be_switched_and_stays(seen: Seen) -> None:
    seen.open("book/intro.html")
    theme = "document.documentElement.dataset.theme"
    modes: list[str] = []
    for _ in range(3):
        seen.page.click(".theme-switch-button:visible")
        modes.append(seen.page.evaluate(theme))
    assert {"light", "dark"} <= set(modes)
    while seen.page.evaluate(theme) != "dark":
        seen.page.click(".theme-switch-button:visible")
    seen.open("book/glossary.html")
    assert seen.page.evaluate(theme) == "dark"


def test_a_picture_follows_the_theme_and_a_phone_shows_it_at_its_size(seen: Seen) -> None:
    seen.page.emulate_media(color_scheme="light")
    seen.page.set_viewport_size({"width": 390, "height": 844})
    seen.open("notebooks/03_routing.html")
    drawing = seen.page.locator('img[src*="routing-matrix.svg"]')
    for theme, paper in (("light", (255, 255, 255)), ("dark", (18, 18, 18))):
        seen.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        seen.page.wait_for_timeout(200)
        with Image.open(io.BytesIO(drawing.screenshot())) as shot:
            assert shot.convert("RGB").getpixel((4, 4)) == paper
    assert drawing.bounding_box()["width"] >= 360  # so many units it has: a unit is a pixel or more
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_first_page_is_light_and_has_no_formula(seen: Seen) -> None:
    answers: list[Any] = []
    seen.page.on("response", lambda answer: answers.append(answer))
    seen.open("book/intro.html")
    seen.page.wait_for_selector(".minimoe-explorable[data-state=ready]")
    seen.page.wait_for_load_state("networkidle")
    sizes = {a.url: len(gzip.compress(a.body())) for a in answers}
    assert len(sizes) > 15
    assert any(url.split("?")[0].endswith(".woff2") for url in sizes)  # fonts count
    assert not any("mathjax" in url for url in sizes)
    assert sum(sizes.values()) <= 500_000


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_first_screen(seen: Seen, size: tuple[int, int]) -> None:
    width, height = size
    seen.page.set_viewport_size({"width": width, "height": height})
    seen.open("book/intro.html")
    page = seen.page
    router = page.wait_for_selector(".minimoe-explorable[data-state=ready]")
    begun = page.query_selector("[data-starts=live_router]")
    places = (
        ".bd-article h1, .bd-article p, .lr-token, [data-starts=live_router], .front-picture svg"
    )
    for selector in places.split(", "):
        box = page.query_selector(selector).bounding_box()
        seen_whole = box["y"] + box["height"] <= height
        assert box["y"] >= 0 and (seen_whole or (width < 400 and box["y"] < height)), selector
    starts = seen.each(".front-picture text", "text => text.getBBox().x")
    assert min(starts) >= 0
    assert page.title() == "minimoe: a course about Mixture-of-Experts language models"
    for name in ("description", "og:title", "og:description", "og:type"):
        meta = page.query_selector(f'meta[name="{name}"], meta[property="{name}"]')
        assert len(meta.get_attribute("content")) > 5
    # every button leads somewhere, and there is none to a repository that is not known
    links = seen.each(".front-actions a", "a => [a.textContent, a.href]")
    here = [(text, address) for text, address in links if text != "Open in Colab"]
    assert [text for text, _ in here] == ["Start", "Teach it", "Lesson 1"]
    assert all(page.request.get(address).ok for _, address in here)
    colab = [address for text, address in links if text == "Open in Colab"]
    assert all(a.startswith("https://colab.research.google.com/github/") for a in colab)
    # a recorded run until the reader acts, on its controls too
    press_end(seen, router.query_selector("input[type=range]"))
    assert not any("safetensors" in url for url in seen.asked)
    assert len(router.query_selector_all(".lr-token")) == 24
    assert router.query_selector("textarea").is_hidden()
    begun.click()
    page.wait_for_selector(".bd-article textarea:visible")
    page.wait_for_selector(".lr-live:has-text('Live:')")
    assert any("safetensors" in url for url in seen.asked)
    page.fill(".bd-article textarea", "It rains.")
    wait(page, "document.querySelectorAll('.lr-token').length === 4")
    assert seen.problems() == []
