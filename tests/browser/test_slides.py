"""Every slide of every deck, seen in Chromium: nothing overflows, everything is drawn, and the text stays legible."""

from pathlib import Path
from typing import Any

import pytest

from book import npm, slides
from tests.browser.conftest import ROOT, need, picture

pytestmark = pytest.mark.browser

LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
SMALLEST = 18  # pixels of text on a slide of 1280 by 720

# Where a slide sticks out, what is not drawn, and the size of its text.
MEASURED = """() => {
  const slide = document.querySelector('.slides section.present section.present')
    || document.querySelector('.slides section.present:not(.stack)');
  const place = document.querySelector('.slides').getBoundingClientRect();
  const scale = place.width / WIDTH;
  const out = [...slide.querySelectorAll('h1, h2, h3, p, li, pre, img, svg, table, .MathJax_CHTML, .MJXc-display')]
    .filter(e => !e.closest('aside') && !e.parentElement.closest('.MathJax_CHTML, svg'))
    .filter(e => { const r = e.getBoundingClientRect();
      return r.width && (r.left < place.left - 2 || r.right > place.right + 2 || r.top < place.top - 2
        || r.bottom > place.bottom + 2 || e.tagName === 'PRE' && e.scrollWidth > e.clientWidth + 2); })
    .map(e => `${e.tagName}: ${e.textContent.trim().slice(0, 60)} ${JSON.stringify(e.getBoundingClientRect())}`);
  const broken = [...slide.querySelectorAll('img')].filter(i => !i.naturalWidth).map(i => 'not drawn: ' + i.alt);
  const raw = slide.innerText.includes('$$') ? ['a formula is not set'] : [];
  const size = parseFloat(getComputedStyle(slide).fontSize);
  return {problems: [...out, ...broken, ...raw], size, empty: !slide.innerText.trim() && !slide.querySelector('img'),
          last: !document.querySelector('.navigate-right.enabled, .navigate-down.enabled')};
}""".replace("WIDTH", str(slides.WIDTH))


@pytest.mark.parametrize("name", [p.stem for p in LESSONS])
def test_nothing_on_a_slide_overflows(window: Any, tmp_path: Path, name: str) -> None:
    try:
        deck = slides.make(ROOT / f"notebooks/{name}.ipynb", tmp_path)
    except npm.NpmError as error:
        need(False, str(error))
        raise
    page = window
    page.set_viewport_size({"width": slides.WIDTH, "height": slides.HEIGHT})
    page.goto(deck.as_uri())
    page.wait_for_selector(".reveal.ready")
    page.evaluate("new Promise(done => MathJax.Hub.Queue(done))")
    problems: list[str] = []
    for number in range(1, 100):
        page.evaluate("new Promise(done => MathJax.Hub.Queue(() => done()))")
        seen = page.evaluate(MEASURED)
        picture(page, f"slides/{name}-{number:02}")
        problems += [f"slide {number}: {p}" for p in seen["problems"]]
        if seen["size"] < SMALLEST:
            problems.append(f"slide {number}: text of {seen['size']} pixels")
        if seen["empty"]:
            problems.append(f"slide {number} is empty")
        if seen["last"]:
            assert number > 10
            break
        page.keyboard.press("Space")
    assert problems == []
