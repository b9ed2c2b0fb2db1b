"""The explorables in Chromium: each starts when scrolled to and reacts to a key and to a drag."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from minimoe.widgets import EXPLORABLES
from minimoe.widgets.rescue_router import SIZES
from tests.browser.conftest import BOOK, Seen, picture, press_end, wait

pytestmark = pytest.mark.browser

PAGE = "book/explorables.html"
of_each = pytest.mark.parametrize("name", EXPLORABLES)


def place(name: str) -> str:
    """The selector of an explorable's place."""
    return f'.minimoe-explorable[data-explorable="{name}"]'


def started(seen: Seen, name: str) -> Any:
    """Open the page, scroll to the explorable and wait until it is there; returns its element."""
    seen.open(PAGE)
    element = seen.page.wait_for_selector(place(name))
    element.scroll_into_view_if_needed()
    seen.page.wait_for_selector(f"{place(name)}[data-state]")
    assert element.get_attribute("data-state") == "ready", element.inner_text()
    return element


SHOWN = """[...document.querySelector(where).querySelectorAll('svg, canvas, table, .mm-live')]
    .map(x => x.outerHTML).join('')"""


def moved(seen: Seen, name: str, act: Callable[[], None]) -> None:
    """Do something, and wait until the drawing, numbers and words of the explorable are others."""
    before = seen.page.evaluate(f"where => {SHOWN}", place(name))
    act()
    seen.until(f"([where, old]) => {SHOWN} !== old", place(name), before)


def drag(seen: Seen, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press the mouse, move and let go."""
    seen.page.mouse.move(*start)
    seen.page.mouse.down()
    seen.page.mouse.move(*end, steps=5)
    seen.page.mouse.up()


@of_each
def test_reacts_to_a_key_and_a_drag_begins_anew_and_is_accessible(seen: Seen, name: str) -> None:
    element = started(seen, name)
    assert element.query_selector(":scope > figure") is None
    control = element.query_selector("input[type=range]")
    control.scroll_into_view_if_needed()
    moved(seen, name, lambda: press_end(seen, control))
    box = control.bounding_box()
    middle = box["y"] + box["height"] / 2
    start, end = (box["x"] + box["width"] - 8, middle), (box["x"] + box["width"] / 2, middle)
    moved(seen, name, lambda: drag(seen, start, end))
    # 'As at first' resets every control
    press, values = (
        "button:has-text('As at first')",
        """e => [...e.querySelectorAll('input, select, textarea')]
                .map(x => x.type === 'checkbox' ? x.checked : x.value)""",
    )
    element.query_selector(press).click()
    seen.page.wait_for_timeout(100)
    before = element.evaluate(values)
    element.evaluate(
        """e => { for (const x of e.querySelectorAll('input, select')) {
             if (x.type === 'checkbox') x.checked = !x.checked;
             else if (x.type === 'range') x.value = x.max;
             else x.selectedIndex = x.options.length - 1;
             x.dispatchEvent(new Event('input', {bubbles: true})); } }"""
    )
    assert element.evaluate(values) != before
    element.query_selector(press).click()
    seen.until(
        f"([e, old]) => JSON.stringify(({values})(e)) === JSON.stringify(old)", element, before
    )
    assert seen.problems() == []
    seen.page.mouse.move(0, 0)  # as at first, but with open folds
    for fold in element.query_selector_all("details"):
        fold.evaluate("e => e.open = true")
    problems: list[str] = []
    for theme in ("light", "dark"):
        problems += seen.violations(theme, place(name))
        picture(element, f"explorable-{name}-{theme}")
    # every control has its name, every drawing its words
    unnamed = "e => [...e.querySelectorAll('svg[role=img], canvas')].filter(x => !(x.ariaLabel ?? '').trim()).length"
    assert element.evaluate(unnamed) == 0
    # what takes part with the mouse takes part with the keyboard: nothing is skipped by Tab
    skipped = "e => e.querySelectorAll('[tabindex=\"-1\"]:not([data-roving])').length"
    assert element.evaluate(skipped) == 0
    assert problems == []
    assert element.query_selector(".mm-controls").is_visible()
    seen.page.emulate_media(media="print")
    assert not element.query_selector(".mm-controls").is_visible()
    assert element.query_selector("svg, canvas").is_visible()
    assert element.query_selector(".mm-status").is_visible()


def test_each_fits_into_a_narrow_window(seen: Seen) -> None:
    seen.page.set_viewport_size({"width": 320, "height": 800})
    seen.open(PAGE)
    for name in EXPLORABLES:
        element = seen.page.query_selector(place(name))
        element.scroll_into_view_if_needed()
        seen.until("([e]) => e.dataset.state === 'ready'", element)
        wide = seen.page.evaluate("document.documentElement.scrollWidth")
        assert wide == 320, f"{name}: {wide} pixels wide in a window of 320"
        picture(element, f"explorable-{name}-narrow")


def test_a_bar_of_the_playground_is_dragged(seen: Seen) -> None:
    element = started(seen, "router_playground")
    bar = element.query_selector_all(".mm-drag")[6]
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    x, row = box["x"] + box["width"] / 2, ".mm-table tbody tr:nth-child(7)"
    drag(seen, (x, box["y"] + box["height"] - 3), (x, box["y"] + box["height"] / 2))
    shown = element.query_selector(row).text_content()
    seen.page.mouse.move(x, box["y"])
    assert element.query_selector(row).text_content() == shown
    probability = element.query_selector_all(f"{row} td")[1].text_content()
    assert abs(float(probability) - 0.5) < 0.03
    # the sentence follows when the hand rests
    said = "([e]) => e.querySelector('.mm-status').textContent.includes('goes to experts 7')"
    seen.until(said, element)


def test_starts_only_when_scrolled_to(seen: Seen) -> None:
    seen.open("book/notation.html")
    assert not any("explorables/" in url for url in seen.asked)
    last = list(EXPLORABLES)[-1]
    seen.page.set_viewport_size({"width": 1280, "height": 300})
    seen.open(PAGE)
    seen.page.wait_for_timeout(300)
    assert not any(f"{last}.js" in url for url in seen.asked)
    started(seen, last)
    assert any(f"{last}.js" in url for url in seen.asked)


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
    reserved = seen.each(every, "(e) => [e.dataset.explorable, e.offsetHeight]")
    # as a thumb scrolls: there is no time to be ready before the figure is seen
    for element in seen.page.query_selector_all(every):
        element.evaluate("e => e.scrollIntoView({block: 'center'})")
        seen.until("([e]) => e.dataset.state === 'ready'", element)
        seen.page.wait_for_timeout(100)
    real = seen.each(every, "(e) => [e.dataset.explorable, e.offsetHeight, e.clientWidth]")
    for (name, height), (_, now, wide) in zip(reserved, real, strict=True):
        assert abs(height - now) <= 0.04 * now, f"{name} is {now} high where it is {wide} wide"
    assert seen.page.evaluate("window.shifted") < 0.05


def without_scripts(seen: Seen) -> Any:
    """The first explorable on a page that gets no scripts of explorables."""
    seen.page.route("**/explorables/*.js", lambda route: route.abort())
    seen.open(PAGE)
    where = place(next(iter(EXPLORABLES)))
    seen.page.eval_on_selector(where, "e => e.scrollIntoView()")
    return seen.page.wait_for_selector(f"{where}[data-state=failed]")


def test_without_its_script_a_sentence_and_the_figure_stay(seen: Seen) -> None:
    element = without_scripts(seen)
    assert "could not be loaded" in element.inner_text()
    assert element.query_selector("figure img").is_visible()


# --- those that move: to the end, stopped by hand, and still for readers who ask for it ------------

WIDE = 700  # units of a drawing in a window of 1280
PLAYS = {"capacity_drops": "Let them fall", "balance_film": "Play"}


def film(seen: Seen, name: str) -> tuple[Any, Any]:
    """An explorable that has started, and the slider that is played: the last."""
    element = started(seen, name)
    return element, element.query_selector_all("input[type=range]")[-1]


def value(slider: Any) -> int:
    """Where a slider stands."""
    return int(slider.evaluate("e => e.value"))


def to(slider: Any, index: int) -> None:
    """Put a slider somewhere, as a reader does."""
    slider.evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", index
    )


@pytest.mark.parametrize("name", PLAYS)
def test_plays_to_the_end(seen: Seen, name: str) -> None:
    (element, slider), play = film(seen, name), f"{place(name)} button:has-text('{PLAYS[name]}')"
    end = int(slider.get_attribute("max"))
    to(slider, end - 10)
    # asked in one breath: the rest of the film is short
    assert seen.page.locator(play).evaluate("e => { e.click(); return e.textContent; }") == "Pause"
    seen.page.wait_for_selector(play)
    assert value(slider) == end
    # at the end it begins anew; a key on the slider stops it
    seen.page.click(play)
    slider.focus()
    seen.page.keyboard.press("ArrowRight")
    assert element.query_selector("button:has-text('Pause')") is None
    here = value(slider)
    assert here < end
    seen.page.wait_for_timeout(600)
    assert value(slider) == here


def test_tokens_fall_unless_less_motion_is_asked_for(seen: Seen) -> None:
    moving = "() => document.getAnimations().filter(a => a.effect.target.closest?.('.mm-drawing')).length"
    for motion, expected in (("no-preference", 2), ("reduce", 0)):
        seen.page.emulate_media(reduced_motion=motion)
        _, slider = film(seen, "capacity_drops")
        to(slider, 0)
        seen.page.evaluate(
            f"""() => {{ window.most = 0;
                 const look = () => {{ window.most = Math.max(window.most, ({moving})());
                                        requestAnimationFrame(look); }};
                 look(); }}"""
        )
        seen.page.click(f"{place('capacity_drops')} button:has-text('Let them fall')")
        wait(seen.page, "e => Number(e.value) > 0", slider)
        seen.until(f"() => window.most >= {expected}")
        seen.page.wait_for_timeout(300)  # no more than these
        assert seen.page.evaluate("window.most") == expected, motion
        # calmly: a tenth of the tokens at once
        assert value(slider) == (3 if motion == "reduce" else value(slider))


def test_the_film_of_balance_is_dragged_through(seen: Seen) -> None:
    element, slider = film(seen, "balance_film")
    box = element.query_selector("svg").bounding_box()
    middle = box["y"] + 100
    seen.page.mouse.move(box["x"] + 60, middle)
    seen.page.mouse.down()
    first = value(slider)
    seen.page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    seen.page.mouse.up()
    assert 0 < first < value(slider)
    where = value(slider)
    seen.page.mouse.move(box["x"] + 60, middle)
    assert value(slider) == where
    element.query_selector("select").select_option(label="the shipped model, mini")
    assert int(slider.get_attribute("max")) == 29
    assert value(slider) == round(where / 79 * 29)  # as far into the training as before
    # a press on a cell of the map names its expert and step
    box = element.query_selector("svg").bounding_box()
    press = (box["x"] + box["width"] * 0.4, box["y"] + (44 + 2.5 * 20) * box["width"] / WIDE)
    seen.page.mouse.click(*press)
    assert element.query_selector_all("select")[4].input_value() == "2"
    says(seen, ".mm-status", "Expert 3 has", within=place("balance_film"))
    assert "times the fair share" in element.query_selector(".mm-status").inner_text()
    labels = [x.inner_text() for x in element.query_selector_all("label") if x.is_visible()]
    assert labels[:4] == ["run", "layer", "tokens", "show"]


# --- the live router ------------------------------------------------------------------------------

REFUSED = """window.Worker = class {
  terminate() {}
  postMessage() {
    setTimeout(() => this.onerror(new Event("error", {cancelable: true})));
  }
}"""
# Whoever works on the page in slices looks at the clock between its steps. How often in one turn of the event loop, at
# most, is the measure of a page that lives, on any machine: each look costs a millisecond more than it takes.
WATCH = """() => {
  const [clock, turn] = [performance.now.bind(performance), new MessageChannel()];
  let looks = 0, these = 0;
  window.most = 0;
  turn.port1.onmessage = () => { these = 0; };
  performance.now = () => {
    if (!these) turn.port2.postMessage("the turn is over");
    window.most = Math.max(window.most, these += 1);
    return clock() + (looks += 1);
  };
}"""


def lived(seen: Seen, worker: str) -> None:
    """The page's own work, where it does any, was done in slices: a text has 256 steps, a training 1600."""
    most = seen.page.evaluate("window.most")
    assert most < 50 and (most > 1 or worker == "worker"), most


ROUTER = place("live_router")


def says(seen: Seen, where: str, words: str, how: str = "includes", within: str = ROUTER) -> None:
    """Wait until a part of the live router, or of another, has these words."""
    said = f"([where, words]) => document.querySelector(where).textContent.{how}(words)"
    seen.until(said, f"{within} {where}", words)


def live_router(seen: Seen) -> Any:
    """Open the page and scroll to the live router until it is ready; returns its element."""
    seen.open(PAGE)
    seen.until(
        """([where]) => {
          const place = document.querySelector(where);
          if (!place.dataset.state) place.scrollIntoView();
          return place.dataset.state === 'ready';
        }""",
        ROUTER,
    )
    return seen.page.query_selector(ROUTER)


def write(seen: Seen, text: str, said: str) -> str:
    """Put a text into the emptied live router and wait for the beginning of its status; returns the notice of a cut."""
    for content, beginning in (("", "There is no text to read"), (text, said)):
        seen.page.fill(f"{ROUTER} textarea", content)
        says(seen, ".mm-status", beginning, "startsWith")
    return seen.page.inner_text(f"{ROUTER} .lr-cut")


def tokens(seen: Seen) -> list[str]:
    """The tokens that the live router shows."""
    where = f"{ROUTER} .lr-token bdi"
    return seen.each(where, "e => e.textContent")


def test_live_router_shows_the_tokens_of_what_is_typed(seen: Seen) -> None:
    element = live_router(seen)
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
    press_end(seen, element.query_selector("input[type=range]"))
    numbers = selected.query_selector("span").inner_text().split()
    rows = element.query_selector_all(".lr-detail tbody tr")
    framed = {
        row.query_selector("th").inner_text()
        for row in rows
        if "lr-chosen" in (row.query_selector_all("td")[5].get_attribute("class") or "")
    }
    assert framed == set(numbers)
    assert seen.problems() == []


@pytest.mark.parametrize("worker", ["worker", "no worker", "worker refused"])
def test_live_router_takes_any_text_and_the_page_lives(seen: Seen, worker: str) -> None:
    seen.page.add_init_script("delete window.WebAssembly")
    if worker == "no worker":
        seen.page.add_init_script("delete window.Worker")
    if worker == "worker refused":  # as a page's security policy does, later
        seen.page.add_init_script(REFUSED)
    live_router(seen)
    write(seen, "Now it begins.", "5 tokens")
    seen.page.evaluate(WATCH)
    notice = write(seen, "word and number 7, " * 527, "255 tokens")
    assert "cut after" in notice and "of its 10,013 characters" in notice
    assert len(tokens(seen)) == 255
    assert write(seen, "", "There is no text to read") == ""
    assert tokens(seen) == []
    if worker == "worker":  # a text is cut into tokens alike, wherever they are read
        assert "cut" in write(seen, "👩‍🚀 é \u200b" * 1400, "255 tokens")
        assert {"⟨F0⟩", "⟨9F⟩"} & set(tokens(seen))
        write(seen, "مرحبا بالعالم", "25 tokens")
        assert seen.page.get_attribute(f"{ROUTER} .lr-tokens", "dir") == "rtl"
        write(seen, "\x00\ufeff\u202e" + "a" * 10_000, "255 tokens")
    # what is typed while a long text is read replaces it
    seen.page.fill(f"{ROUTER} textarea", "x = 1; " * 2000)
    seen.page.wait_for_timeout(250)
    write(seen, "Done", "2 tokens")
    assert tokens(seen) == ["D", "one"]
    lived(seen, worker)
    assert seen.problems() == []


WATCHED = (
    "window.Worker = class extends Worker { constructor(a) { super(a); window.worker = this; } }"
)


def test_live_router_says_when_its_worker_is_lost(seen: Seen) -> None:
    seen.page.add_init_script(WATCHED)
    element = live_router(seen)
    write(seen, "It rains.", "4 tokens")
    # a worker that is ended from outside says nothing
    seen.page.evaluate("window.worker.terminate()")
    seen.page.fill(f"{ROUTER} textarea", "It rains again.")
    seen.page.click(f"{ROUTER} button:has-text('Start again')")
    says(seen, ".mm-status", "5 tokens", "startsWith")
    assert tokens(seen) == ["It", "ra", "ins", "again", "."]
    assert "no longer answers" not in element.inner_text()


@pytest.mark.parametrize("damaged", [False, True])
def test_live_router_without_its_weights(seen: Seen, damaged: bool) -> None:
    """A sentence says what is wrong, the recorded run stays, and Start can be pressed again."""
    body = 'minimoe["live_router/router.safetensors"] = btoa("<!doctype html>")'
    seen.page.route(
        "**/router.safetensors.js",
        lambda route: route.fulfill(body=body, status=200) if damaged else route.abort(),
    )
    element = live_router(seen)
    missing = "its file live_router/router.safetensors could not be loaded"
    for _ in range(2):
        element.query_selector("button:has-text('Start')").click()
        says(seen, "", "its weights are damaged" if damaged else missing)
    assert len(tokens(seen)) == 24


def costs(seen: Seen, said: str) -> str:
    """The sentence on what the text costs, once it has these words."""
    says(seen, ".lr-costs", said)
    return seen.page.inner_text(f"{ROUTER} .lr-costs")


def test_live_router_goes_without_an_expert_writes_on_and_begins_anew(seen: Seen) -> None:
    element = live_router(seen)
    shown = """e => [...e.querySelectorAll('select, input, textarea')].map(x => x.value)
                 .concat([...e.querySelectorAll('.lr-token, .lr-detail')].map(x => x.textContent))"""
    before = element.evaluate(shown)
    what, where = element.query_selector_all("select")[1:3]
    what.select_option(label="expert 2 is switched off")
    assert "than the 4.06 as trained" in costs(seen, "With expert 2 switched off at layer 3")
    where.select_option(label="at every layer")
    costs(seen, "With expert 2 switched off at every layer")
    assert "2" not in seen.each(".lr-token :is(b, i)", "e => e.textContent")
    what.select_option(label="expert 3 is forced")
    costs(seen, "With expert 3 forced at every layer")
    assert {"3", "–"} == set(seen.each(".lr-token :is(b, i)", "e => e.textContent"))
    # next tokens: a low temperature makes the first likelier, and a press writes it
    what.select_option(label="nothing is changed")
    costs(seen, "To predict it")
    share = "e => parseFloat(e.querySelector('.lr-next output').textContent)"
    plain = element.evaluate(share)
    element.query_selector_all("input[type=range]")[1].focus()
    seen.page.keyboard.press("Home")
    assert element.evaluate(share) > plain
    element.query_selector(".lr-next").click()
    wait(seen.page, "document.querySelectorAll('.lr-token').length === 25")
    # all as at first
    element.query_selector("button:has-text('As at first')").click()
    wait(seen.page, "document.querySelectorAll('.lr-token').length === 24")
    seen.until(
        f"([e, old]) => JSON.stringify(({shown})(e)) === JSON.stringify(old)", element, before
    )
    assert seen.problems() == []


def test_live_router_breaks_by_switches(seen: Seen) -> None:
    element = live_router(seen)
    element.query_selector(".lr-break summary").click()
    boxes = {
        box.get_attribute("aria-label"): box
        for box in element.query_selector_all(".lr-break input")
    }
    assert len(boxes) == 48
    for expert in (5, 2):
        boxes[f"expert {expert} at layer 1"].focus()
        seen.page.keyboard.press("Space")
    assert "more than the 4.06 as trained" in costs(
        seen, "With expert 2 at layer 1, expert 5 at layer 1 off"
    )
    first = element.query_selector("input[type=range]")
    first.focus()
    seen.page.keyboard.press("Home")
    shown = set(seen.each(".lr-token :is(b, i)", "e => e.textContent"))
    assert shown and not {"2", "5"} & shown
    # a layer keeps one expert
    for expert in (1, 3, 4, 6, 7):
        boxes[f"expert {expert} at layer 1"].click()
    assert boxes["expert 8 at layer 1"].is_disabled()
    costs(seen, "With 7 switches off")
    assert {"8", "–"} == set(seen.each(".lr-token :is(b, i)", "e => e.textContent"))
    element.query_selector("button:has-text('All on')").click()
    costs(seen, "To predict it")
    assert all(box.is_checked() and box.is_enabled() for box in boxes.values())
    rows = element.query_selector_all(".mm-table:has-text('What you tried') tbody tr")
    assert len(rows) >= 2 and "+" in rows[-1].text_content()
    assert seen.problems() == []


def test_live_router_has_a_tour_of_six_steps(seen: Seen) -> None:
    element = live_router(seen)
    element.query_selector("button:has-text('Guided tour')").click()
    said = "Look at the token, tokens are repeated, The same text, French, After the text, is switched off"
    for step, words in enumerate(said.split(", "), 1):
        says(seen, ".lr-tour strong", f"{step} of 6", "startsWith")
        says(seen, ".lr-tour p", words)
        if step < 6:
            element.query_selector(".lr-tour button:has-text('Next')").click()
    assert "as trained" in element.query_selector(".lr-tour p").inner_text()
    element.query_selector("button:has-text('End the tour')").click()
    assert element.query_selector(".lr-tour").is_hidden()


# --- rescue a router ------------------------------------------------------------------------------

RESCUE = place("rescue_router")
STEP = f"() => Number(/step (\\d+)/.exec(document.querySelector('{RESCUE} svg').textContent)?.[1] ?? 0)"


def trained(seen: Seen, steps: int) -> None:
    """Wait until the training has come so far."""
    wait(seen.page, f"({STEP})() >= {steps}", timeout=600_000)


def waits(seen: Seen) -> int:
    """The step at which the training waits: once what was under way has come, no other does."""
    last, same = 0, 0
    while same < 10:
        seen.page.wait_for_timeout(100)
        now = seen.page.evaluate(STEP)
        last, same = now, same + 1 if now == last else 0
    assert 0 < last < SIZES["steps"]
    return last


def hurried(route: Any) -> None:
    """The page, whose training takes four times the steps per second that a reader can follow."""
    page = route.fetch()
    body, found = re.subn(r'"pace": ?\d+', '"pace":64', page.text())
    route.fulfill(response=page, body=body if found else "no pace in the page")


@pytest.mark.parametrize("worker", ["worker", "no worker", "worker refused"])
def test_a_router_collapses_and_is_rescued(seen: Seen, worker: str) -> None:
    seen.page.route(f"**/{PAGE}", hurried)
    if worker != "worker":
        seen.page.add_init_script("delete window.Worker" if worker == "no worker" else REFUSED)
    element = started(seen, "rescue_router")
    seen.page.evaluate(WATCH)
    element.query_selector("button:has-text('Train')").click()
    trained(seen, 80)
    says(seen, ".mm-status", "has collapsed", within=RESCUE)
    # with the keys, while it trains
    slider = element.query_selector("input[type=range]")
    slider.focus()
    for _ in range(5):
        seen.page.keyboard.press("ArrowRight")
    assert element.query_selector("output").inner_text() == "0.1"
    assert "balance 0.1" in element.query_selector("svg").text_content()
    # however late the keys came, the training that goes on is rescued
    seen.until("([e]) => !e.querySelector('.mm-status').textContent.includes('collapsed')", element)
    trained(seen, 240)  # by now the film has been halved
    element.query_selector("button:has-text('Pause')").click()
    lived(seen, worker)
    waits(seen)
    # another start is another training
    element.query_selector("select").select_option(label="random start 2")
    wait(seen.page, f"({STEP})() === 0")
    assert seen.problems() == []


def test_training_waits_out_of_sight(seen: Seen) -> None:
    element = started(seen, "rescue_router")
    element.query_selector("button:has-text('Train')").click()
    trained(seen, 4)
    seen.page.evaluate("window.scrollTo(0, 0)")
    here = waits(seen)
    element.scroll_into_view_if_needed()
    trained(seen, here + 6)


@pytest.fixture
def opened(window: Any, book: str) -> Seen:
    """A browser window that reads the built book from its folder, without a server."""
    return Seen(window, BOOK.as_uri())


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
        opened.page.query_selector(place(name)).scroll_into_view_if_needed()
        element = opened.page.wait_for_selector(f"{place(name)}[data-state]")
        assert element.get_attribute("data-state") == "ready", element.inner_text()
        control = element.query_selector("input[type=range]")
        moved(opened, name, lambda control=control: press_end(opened, control))
    if "live_router" in names:
        write(opened, "It rains.", "4 tokens")
        assert tokens(opened) == ["It", "ra", "ins", "."]
    assert opened.problems() == []


def test_what_a_file_may_not_do_names_the_command_that_serves_the_folder(opened: Seen) -> None:
    command = f'python -m http.server --directory "{BOOK}/"'
    assert command in without_scripts(opened).inner_text()
    opened.errors.clear()
    opened.open("search.html?q=roofline")
    opened.page.wait_for_selector("#search-results li a")
    assert command in opened.page.inner_text(".served")
    assert opened.errors == []
