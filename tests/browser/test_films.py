"""Explorables that move: they play to the end, stop when taken by hand, and keep still for readers who ask for it."""

from typing import Any

import pytest

from tests.browser.conftest import Seen
from tests.browser.test_explorables import place, started

pytestmark = pytest.mark.browser

WIDE = 700  # units of a drawing in a window of 1280
PLAYS = {"capacity_drops": "Let them fall", "balance_film": "Play"}


def last_slider(element: Any) -> Any:
    """The slider that is played: the last."""
    return element.query_selector_all("input[type=range]")[-1]


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
    element = started(seen, name)
    slider, play = last_slider(element), f"{place(name)} button:has-text('{PLAYS[name]}')"
    end = int(slider.get_attribute("max"))
    to(slider, end - 3)
    seen.page.click(play)
    assert element.query_selector("button:has-text('Pause')") is not None
    seen.page.wait_for_selector(play, timeout=10_000)
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
        element = started(seen, "capacity_drops")
        slider = last_slider(element)
        to(slider, 0)
        seen.page.evaluate(
            f"""() => {{ window.most = 0;
                 const look = () => {{ window.most = Math.max(window.most, ({moving})());
                                        requestAnimationFrame(look); }};
                 look(); }}"""
        )
        seen.page.click(f"{place('capacity_drops')} button:has-text('Let them fall')")
        seen.page.wait_for_function("e => Number(e.value) > 0", arg=slider, timeout=5_000)
        seen.page.wait_for_timeout(300)
        assert seen.page.evaluate("window.most") == expected, motion
        # calmly: a tenth of the tokens at once
        assert value(slider) == (3 if motion == "reduce" else value(slider))


def test_the_film_of_balance_is_dragged_through(seen: Seen) -> None:
    element = started(seen, "balance_film")
    slider = last_slider(element)
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
    seen.page.wait_for_function(
        "e => e.querySelector('.mm-status').textContent.includes('Expert 3 has')", arg=element
    )
    assert "times the fair share" in element.query_selector(".mm-status").inner_text()
    labels = [x.inner_text() for x in element.query_selector_all("label") if x.is_visible()]
    assert labels[:4] == ["run", "layer", "tokens", "show"]
