"""Every slide of every deck, seen in Chromium: nothing overflows, everything is drawn, and the text stays legible."""

from typing import Any

import pytest

from book import npm, slides
from tests.browser.conftest import ROOT, SCREENSHOTS, need, picture

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
# So many slides, turned as Space does, by a script: a key from outside waits until a slide is painted, as long again.
MANY = f"""async (many) => {{
  const seen = [];
  while (true) {{
    await new Promise(done => MathJax.Hub.Queue(() => done()));
    seen.push(({MEASURED})());
    if (seen.at(-1).last || seen.length === many) return seen;
    document.dispatchEvent(new KeyboardEvent("keydown", {{key: " ", code: "Space", keyCode: 32, bubbles: true}}));
  }}
}}"""


@pytest.mark.parametrize("name", [p.stem for p in LESSONS])
def test_nothing_on_a_slide_overflows(window: Any, tmp_path_factory: Any, name: str) -> None:
    together = tmp_path_factory.getbasetemp() / "slides"  # what they load is copied once
    try:
        deck = slides.make(ROOT / f"notebooks/{name}.ipynb", together)
    except npm.NpmError as error:
        need(False, str(error))
        raise
    window.set_viewport_size({"width": slides.WIDTH, "height": slides.HEIGHT})
    window.goto(deck.as_uri())
    window.wait_for_selector(".reveal.ready")
    problems: list[str] = []
    seen: list[dict[str, Any]] = []
    while not (seen and seen[-1]["last"]) and len(seen) < 100:
        seen += window.evaluate(MANY, 99 if seen and not SCREENSHOTS else 1)
        picture(window, f"slides/{name}-{len(seen):02}")
        window.keyboard.press("Space")
    for number, slide in enumerate(seen, start=1):
        problems += [f"slide {number}: {p}" for p in slide["problems"]]
        if slide["size"] < SMALLEST or slide["empty"]:
            problems.append(f"slide {number} is empty, or its text has {slide['size']} pixels")
    assert len(seen) > 10 and problems == []
