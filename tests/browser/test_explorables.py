"""The explorables in Chromium: each starts when scrolled to and reacts to a key and to a drag."""

from collections.abc import Iterator
from typing import Any

import pytest

from minimoe.widgets import EXPLORABLES
from tests.browser.conftest import BOOK, SCREENSHOTS
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
    assert element.query_selector(".mm-controls").is_visible()
    seen.page.emulate_media(media="print")
    assert not element.query_selector(".mm-controls").is_visible()  # paper has no sliders
    assert element.query_selector("svg, canvas").is_visible()
    assert element.query_selector(".mm-status").is_visible()


@pytest.mark.parametrize("name", EXPLORABLES)
def test_as_at_first_resets_every_control(seen: Seen, name: str) -> None:
    element = started(seen, name)
    values = """e => [...e.querySelectorAll('input, select, textarea')]
                   .map(x => x.type === 'checkbox' ? x.checked : x.value)"""
    before = element.evaluate(values)
    element.evaluate(
        """e => { for (const x of e.querySelectorAll('input, select')) {
             if (x.type === 'checkbox') x.checked = !x.checked;
             else if (x.type === 'range') x.value = x.max;
             else x.selectedIndex = x.options.length - 1;
             x.dispatchEvent(new Event('input', {bubbles: true})); } }"""
    )
    assert element.evaluate(values) != before
    element.query_selector("button:has-text('As at first')").click()
    seen.page.wait_for_function(
        f"([e, before]) => JSON.stringify(({values})(e)) === JSON.stringify(before)",
        arg=[element, before],
        timeout=20_000,
    )


def test_a_bar_of_the_playground_is_dragged(seen: Seen) -> None:
    element = started(seen, "router_playground")
    bar = element.query_selector_all(".mm-drag")[6]
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    x = box["x"] + box["width"] / 2
    seen.page.mouse.move(x, box["y"] + box["height"] - 3)
    seen.page.mouse.down()
    seen.page.mouse.move(x, box["y"] + box["height"] / 2, steps=5)
    seen.page.mouse.up()
    shown = element.query_selector(".mm-table tbody tr:nth-child(7)").text_content()
    seen.page.mouse.move(x, box["y"])
    assert element.query_selector(".mm-table tbody tr:nth-child(7)").text_content() == shown
    cells = element.query_selector_all(".mm-table tbody tr:nth-child(7) td")
    assert abs(float(cells[1].text_content()) - 0.5) < 0.03  # its probability
    # the sentence follows when the hand rests
    said = "(e) => e.querySelector('.mm-status').textContent.includes('goes to experts 7')"
    seen.page.wait_for_function(said, arg=element, timeout=10_000)


def test_starts_only_when_scrolled_to(seen: Seen) -> None:
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url))
    seen.open("book/notation.html")
    assert not any("explorables/" in url for url in asked)
    last = list(EXPLORABLES)[-1]
    seen.page.set_viewport_size({"width": 1280, "height": 300})
    seen.open(PAGE)
    seen.page.wait_for_timeout(300)
    assert not any(f"{last}.js" in url for url in asked)
    started(seen, last)
    assert any(f"{last}.js" in url for url in asked)


SHIFTS = """(buffered) => {
  window.shifted = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((e) => { window.shifted += e.value; }))
    .observe({ type: "layout-shift", buffered });
}"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", [PAGE, "notebooks/06_dispatch.html"])
def test_the_page_does_not_jump_when_explorables_start(seen: Seen, page: str, width: int) -> None:
    seen.page.set_viewport_size({"width": width, "height": 844})
    seen.open(page)
    # on a page with formulas those move it before; here it is about the explorables
    seen.page.evaluate(SHIFTS, page == PAGE)
    every = ".minimoe-explorable"
    reserved = seen.page.eval_on_selector_all(
        every, "all => all.map((e) => [e.dataset.explorable, e.offsetHeight])"
    )
    # as a thumb scrolls: there is no time to be ready before the figure is seen
    for element in seen.page.query_selector_all(every):
        element.evaluate("e => e.scrollIntoView({block: 'center'})")
        seen.page.wait_for_function("e => e.dataset.state === 'ready'", arg=element)
        seen.page.wait_for_timeout(400)
    real = seen.page.eval_on_selector_all(
        every,
        "all => all.map((e) => [e.dataset.explorable, e.offsetHeight, e.clientWidth])",
    )
    for (name, height), (_, now, wide) in zip(reserved, real, strict=True):
        assert abs(height - now) <= 0.04 * now, f"{name} is {now} high where it is {wide} wide"
    shifted = seen.page.evaluate("window.shifted")
    print(f"{page} at {width}: {shifted:.3f}")
    assert shifted < 0.05


def test_without_its_script_a_sentence_and_the_figure_stay(seen: Seen) -> None:
    seen.page.route("**/explorables/*.js", lambda route: route.abort())
    seen.open(PAGE)
    name = next(iter(EXPLORABLES))
    seen.page.eval_on_selector(place(name), "e => e.scrollIntoView()")
    seen.page.wait_for_selector(f"{place(name)}[data-state=failed]")
    element = seen.page.query_selector(place(name))
    assert element is not None
    assert "could not be loaded" in element.inner_text()
    assert element.query_selector("figure img").is_visible()


# --- the live router ------------------------------------------------------------------------------

REFUSED = """window.Worker = class {
  terminate() {}
  postMessage() {
    setTimeout(() => this.onerror(new Event("error", {cancelable: true})));
  }
}"""
WATCH = """() => {
  let last = performance.now();
  window.longest = 0;
  setInterval(() => {
    const now = performance.now();
    window.longest = Math.max(window.longest, now - last);
    last = now;
  }, 10);
}"""


def live_router(seen: Seen, state: str) -> Any:
    """Open the page and scroll to the live router until it is ready, or has failed; returns its element."""
    seen.open(PAGE)
    seen.page.wait_for_function(
        """([where, state]) => {
          const place = document.querySelector(where);
          if (!place.dataset.state) place.scrollIntoView();
          return place.dataset.state === state;
        }""",
        arg=[place("live_router"), state],
        timeout=20_000,
    )
    return seen.page.query_selector(place("live_router"))


def write(seen: Seen, text: str, said: str) -> str:
    """Put a text into the emptied live router and wait for the beginning of its status; returns the notice of a cut."""
    for content, beginning in (("", "There is no text to read"), (text, said)):
        seen.page.fill(f"{place('live_router')} textarea", content)
        seen.page.wait_for_function(
            "([where, said]) => document.querySelector(where + ' .mm-status').textContent.startsWith(said)",
            arg=[place("live_router"), beginning],
            timeout=20_000,
        )
    return seen.page.inner_text(f"{place('live_router')} .lr-cut")


def tokens(seen: Seen) -> list[str]:
    """The tokens that the live router shows."""
    return seen.page.eval_on_selector_all(
        f"{place('live_router')} .lr-token bdi", "all => all.map(e => e.textContent)"
    )


def test_live_router_shows_the_tokens_of_what_is_typed(seen: Seen) -> None:
    element = live_router(seen, "ready")
    assert write(seen, "It rains.", "4 tokens") == ""
    assert tokens(seen) == ["It", "ra", "ins", "."]
    # walk with the keys: one token is in the order of Tab, and its numbers are in the table
    element.query_selector(".lr-token").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("ArrowRight")
    selected = element.query_selector('.lr-token[aria-selected="true"]')
    assert selected.inner_text().split()[0] == "ins"
    assert "ins: expert" in selected.get_attribute("aria-label")
    assert seen.page.evaluate("document.activeElement.getAttribute('tabindex')") == "0"
    assert len(element.query_selector_all('.lr-token[tabindex="0"]')) == 1
    assert "Token 3, “ins”" in element.query_selector(".lr-detail caption").inner_text()
    # the other pointer: only looks
    element.query_selector_all(".lr-token")[0].hover()
    assert "Token 1, “It”" in element.query_selector(".lr-detail caption").inner_text()
    seen.page.mouse.move(0, 0)
    assert "Token 3, “ins”" in element.query_selector(".lr-detail caption").inner_text()
    # what is framed at layer 6 is what the token shows there
    element.query_selector("input[type=range]").focus()
    seen.page.keyboard.press("End")
    numbers = selected.query_selector("span").inner_text().split()
    rows = element.query_selector_all(".lr-detail tbody tr")
    framed = {
        row.query_selector("th").inner_text()
        for row in rows
        if "lr-chosen" in (row.query_selector_all("td")[5].get_attribute("class") or "")
    }
    assert framed == set(numbers)
    assert [e for e in seen.errors if not KNOWN.search(e)] == []


@pytest.mark.parametrize("worker", ["worker", "no worker", "worker refused"])
def test_live_router_takes_any_text_and_the_page_lives(seen: Seen, worker: str) -> None:
    seen.page.add_init_script("delete window.WebAssembly")
    if worker == "no worker":
        seen.page.add_init_script("delete window.Worker")
    if worker == "worker refused":  # as a page's security policy does, later
        seen.page.add_init_script(REFUSED)
    live_router(seen, "ready")
    write(seen, "Now it begins.", "5 tokens")
    seen.page.evaluate(WATCH)
    notice = write(seen, "word and number 7, " * 527, "255 tokens")
    assert "cut after" in notice and "of its 10,013 characters" in notice
    assert len(tokens(seen)) == 255
    assert "cut" in write(seen, "👩‍🚀 é \u200b" * 1400, "255 tokens")
    assert {"⟨F0⟩", "⟨9F⟩"} & set(tokens(seen))
    assert write(seen, "", "There is no text to read") == ""
    assert tokens(seen) == []
    write(seen, "مرحبا بالعالم", "25 tokens")
    assert seen.page.get_attribute(f"{place('live_router')} .lr-tokens", "dir") == "rtl"
    write(seen, "\x00\ufeff\u202e" + "a" * 10_000, "255 tokens")
    # what is typed while a long text is read replaces it
    seen.page.fill(f"{place('live_router')} textarea", "x = 1; " * 2000)
    seen.page.wait_for_timeout(250)
    write(seen, "Done", "2 tokens")
    assert tokens(seen) == ["D", "one"]
    assert seen.page.evaluate("window.longest") < 1000
    assert [e for e in seen.errors if not KNOWN.search(e)] == []


WATCHED = (
    "window.Worker = class extends Worker { constructor(a) { super(a); window.worker = this; } }"
)


def test_live_router_reads_on_after_half_a_minute_and_says_when_its_worker_is_lost(
    seen: Seen,
) -> None:
    seen.page.add_init_script(WATCHED)
    element = live_router(seen, "ready")
    write(seen, "It rains.", "4 tokens")
    seen.page.wait_for_timeout(30_000)
    assert write(seen, "Done", "2 tokens") == ""
    assert "no longer answers" not in element.inner_text()
    # a worker that is ended from outside says nothing
    seen.page.evaluate("window.worker.terminate()")
    seen.page.fill(f"{place('live_router')} textarea", "It rains again.")
    seen.page.click(f"{place('live_router')} button:has-text('Start again')", timeout=10_000)
    seen.page.wait_for_function(
        "where => document.querySelector(where + ' .mm-status').textContent.startsWith('5 tokens')",
        arg=place("live_router"),
    )
    assert tokens(seen) == ["It", "ra", "ins", "again", "."]
    assert "no longer answers" not in element.inner_text()


def fails_to_start(seen: Seen, said: str) -> None:
    """Press Start: a sentence says what is wrong, the recorded run stays, and Start can be pressed again."""
    element = live_router(seen, "ready")
    for _ in range(2):
        element.query_selector("button:has-text('Start')").click()
        seen.page.wait_for_function(
            "([where, said]) => document.querySelector(where).innerText.includes(said)",
            arg=[place("live_router"), said],
        )
    assert len(tokens(seen)) == 24


def test_live_router_without_its_weights(seen: Seen) -> None:
    seen.page.route("**/router.safetensors.js", lambda route: route.abort())
    fails_to_start(seen, "its file live_router/router.safetensors could not be loaded")


def test_live_router_with_damaged_weights(seen: Seen) -> None:
    seen.page.route(
        "**/router.safetensors.js",
        lambda route: route.fulfill(
            body='minimoe["live_router/router.safetensors"] = btoa("<!doctype html>")', status=200
        ),
    )
    fails_to_start(seen, "its weights are damaged")


def test_live_router_is_a_recorded_run_until_the_reader_acts(seen: Seen) -> None:
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url))
    element = live_router(seen, "ready")
    recorded = look(seen, "live_router")
    element.query_selector("input[type=range]").focus()
    seen.page.keyboard.press("End")
    changed(seen, "live_router", recorded)
    seen.page.wait_for_timeout(300)
    assert not any("safetensors" in url for url in asked)
    element.query_selector("button:has-text('Start')").click()
    seen.page.wait_for_selector(f"{place('live_router')} .lr-live:has-text('Live:')")
    assert any("safetensors" in url for url in asked)
    assert len(tokens(seen)) == 24  # the model finds what was recorded


def costs(seen: Seen, said: str) -> str:
    """The sentence on what the text costs, once it has these words."""
    seen.page.wait_for_function(
        "([where, said]) => document.querySelector(where + ' .lr-costs').textContent.includes(said)",
        arg=[place("live_router"), said],
        timeout=20_000,
    )
    return seen.page.inner_text(f"{place('live_router')} .lr-costs")


def test_live_router_goes_without_an_expert_writes_on_and_begins_anew(seen: Seen) -> None:
    element = live_router(seen, "ready")
    shown = """e => [...e.querySelectorAll('select, input, textarea')].map(x => x.value)
                 .concat([...e.querySelectorAll('.lr-token, .lr-detail')].map(x => x.textContent))"""
    before = element.evaluate(shown)
    what, where = element.query_selector_all("select")[1:3]
    what.select_option(label="expert 2 is switched off")
    assert "than the 4.06 as trained" in costs(seen, "With expert 2 switched off")
    where.select_option(label="at every layer")
    costs(seen, "With expert 2 switched off")
    numbers = "all => all.map(e => e.textContent)"
    assert "2" not in seen.page.eval_on_selector_all(".lr-token :is(b, i)", numbers)
    what.select_option(label="expert 3 is forced")
    costs(seen, "With expert 3 forced")
    assert {"3", "–"} == set(seen.page.eval_on_selector_all(".lr-token :is(b, i)", numbers))
    # next tokens: a low temperature makes the first likelier, and a press writes it
    what.select_option(label="nothing is changed")
    costs(seen, "To predict it")
    share = "e => parseFloat(e.querySelector('.lr-next output').textContent)"
    plain = element.evaluate(share)
    element.query_selector_all("input[type=range]")[1].focus()
    seen.page.keyboard.press("Home")
    assert element.evaluate(share) > plain
    element.query_selector(".lr-next").click()
    seen.page.wait_for_function("document.querySelectorAll('.lr-token').length === 25")
    # all as at first
    element.query_selector("button:has-text('As at first')").click()
    seen.page.wait_for_function("document.querySelectorAll('.lr-token').length === 24")
    seen.page.wait_for_timeout(400)
    assert element.evaluate(shown) == before
    assert [e for e in seen.errors if not KNOWN.search(e)] == []


def test_live_router_has_a_tour_of_six_steps(seen: Seen) -> None:
    element = live_router(seen, "ready")
    element.query_selector("button:has-text('Guided tour')").click()
    said = [
        "Look at the token",
        "tokens are repeated",
        "The same text",
        "French",
        "After the text",
        "is switched off",
    ]
    for step, words in enumerate(said, 1):
        seen.page.wait_for_function(
            """([where, head, words]) => {
                 const tour = document.querySelector(where + ' .lr-tour');
                 return tour.querySelector('strong').textContent.startsWith(head)
                   && tour.querySelector('p').textContent.includes(words); }""",
            arg=[place("live_router"), f"{step} of 6", words],
            timeout=20_000,
        )
        if step < 6:
            element.query_selector(".lr-tour button:has-text('Next')").click()
    assert "as trained" in element.query_selector(".lr-tour p").inner_text()
    element.query_selector("button:has-text('End the tour')").click()
    assert element.query_selector(".lr-tour").is_hidden()


# --- opened as files ------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any, book: str) -> Iterator[Seen]:
    """A browser window that reads the built book from its folder, without a server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield Seen(context.new_page(), BOOK.as_uri())
    context.close()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (PAGE, list(EXPLORABLES)),
        ("notebooks/06_dispatch.html", ["roofline", "capacity_drops"]),
        ("notebooks/12_recording_routing.html", ["live_router"]),
    ],
)
def test_explorables_work_where_a_page_is_opened_as_a_file(
    opened: Seen, page: str, names: list[str]
) -> None:
    opened.open(page)
    for name in names:
        element = opened.page.query_selector(place(name))
        assert element is not None
        element.scroll_into_view_if_needed()
        opened.page.wait_for_selector(f"{place(name)}[data-state]", timeout=20_000)
        assert element.get_attribute("data-state") == "ready", element.inner_text()
        assert element.query_selector("input[type=range]") is not None
        before = look(opened, name)
        element.query_selector("input[type=range]").focus()
        opened.page.keyboard.press("End")
        changed(opened, name, before)
    if "live_router" in names:
        write(opened, "It rains.", "4 tokens")
        assert tokens(opened) == ["It", "ra", "ins", "."]
    assert [e for e in opened.errors if not KNOWN.search(e)] == []
    assert opened.elsewhere == []


def test_what_a_file_may_not_do_names_the_command_that_serves_the_folder(opened: Seen) -> None:
    command = f'python -m http.server --directory "{BOOK}/"'
    opened.page.route("**/explorables/*.js", lambda route: route.abort())
    opened.open(PAGE)
    name = next(iter(EXPLORABLES))
    opened.page.eval_on_selector(place(name), "e => e.scrollIntoView()")
    opened.page.wait_for_selector(f"{place(name)}[data-state=failed]")
    assert command in opened.page.inner_text(place(name))
    opened.errors.clear()
    opened.open("search.html?q=roofline")
    opened.page.wait_for_selector("#search-results li a")
    assert command in opened.page.inner_text(".served")
    assert opened.errors == []
