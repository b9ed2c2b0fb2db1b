"""Slides: what of a lesson is on them, and that they ask for nothing from elsewhere."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from book import npm, slides

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def lesson(*cells: Any) -> Any:
    """A notebook of these cells."""
    notebook: Any = nbformat.v4.new_notebook(cells=list(cells))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    return notebook


def text(source: str, kind: str = "") -> Any:
    """A Markdown cell, on the slides as `kind`."""
    return nbformat.v4.new_markdown_cell(
        source, metadata={"slideshow": {"slide_type": kind}} if kind else {}
    )


def test_marked_cells_are_the_deck() -> None:
    made = slides.deck(
        lesson(
            text("# Title", "slide"),
            text("left out"),
            text("also", "skip"),
            text("more", "-"),
            text("below", "subslide"),
            text("say this", "notes"),
        )
    )
    assert [c.source for c in made.cells] == ["# Title", "more", "below", "say this"]


def test_an_unmarked_lesson_gives_an_outline() -> None:
    drawn = nbformat.v4.new_code_cell(
        "plot()",
        outputs=[nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})],
        metadata={"mystnb": {"figure": {"caption": "A load."}, "image": {"alt": 'Two "bars"'}}},
    )
    made = slides.deck(
        lesson(
            text("# Title\n\nProse that is read, not shown."),
            text("**What you will be able to do**\n\n- route a token."),
            text(
                "## 1. A question?\n\nWhy? **Because it learns nothing.** And so on.\n\n$$\nx\n$$"
            ),
            nbformat.v4.new_code_cell("x = 1"),
            drawn,
            text("## Nothing to show\n\nOnly prose."),
            text("## Papers\n\n- one"),
        )
    )
    shown = [c.source for c in made.cells]
    assert shown[:6] == [
        "# Title", "## What you will be able to do", "- route a token.",
        "## 1. A question?", "- Because it learns nothing.", "$$\nx\n$$",
    ]  # fmt: skip
    assert len(shown) == 7 and 'alt="Two &quot;bars&quot;"' in shown[6] and "A load." in shown[6]


def test_a_lesson_with_nothing_to_show_says_so() -> None:
    with pytest.raises(ValueError, match="neither slide cells nor headings"):
        slides.deck(lesson(text("only prose")))


def test_roles_of_the_book_are_plain_words() -> None:
    cited = slides.citations()
    assert cited["fedus2022"] == "Fedus et al. 2022"
    told = slides.plain_roles(
        "As {cite:t}`fedus2022` say {cite:p}`jiang2024`, see {numref}`fig`.", cited
    )
    assert told == "As Fedus et al. 2022 say (Jiang et al. 2024), see fig."


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lessons_slides_ask_for_nothing_from_elsewhere(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    html = slides.page(notebook)
    assert list(slides.outside(html)) == []
    assert slides.title(notebook) in html
    assert "{cite" not in html
    beside = set(re.findall(r'(?:src|href)="(assets/[^"?]+)', html))
    assert {a.split("/")[1] for a in beside} == {name for name, _ in slides.ASSETS.values()}


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        "<style>@import 'http://example.org/a.css';</style>",
        "<style>a { background: url(https://example.org/a.png) }</style>",
        '<script type="module">import m from "https://example.org/m.mjs"</script>',
        '<img alt="" src="https://example.org/a.png">',
    ],
)
def test_what_comes_from_elsewhere_is_seen(html: str) -> None:
    assert len(list(slides.outside(html))) == 1


def test_a_deck_has_what_it_loads_beside_it(tmp_path: Path) -> None:
    """Fetches once, into the cache; without a network it is skipped, in CI it fails."""
    try:
        made = slides.make(LESSONS[0], tmp_path)
    except npm.NpmError as error:
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            raise
        pytest.skip(str(error))
    html = made.read_text(encoding="utf-8")
    for address in set(re.findall(r'(?:src|href)="(assets/[^"?]+)', html)):
        assert (tmp_path / address).is_file(), address
    for script in ("dist/reveal.js", "plugin/notes/notes.js"):
        assert (tmp_path / "assets/reveal" / script).is_file()
    for part in ("config/TeX-AMS_CHTML-full.js", "config/Safe.js", "jax/output/CommonHTML/jax.js"):
        assert (tmp_path / "assets/mathjax" / part).is_file()
    styles = (tmp_path / "assets").rglob("*.css")
    assert [s for s in styles if list(slides.outside(s.read_text(encoding="utf-8")))] == []


def test_another_content_than_expected_is_refused(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(package: str, folder: Path) -> Path:
        (folder / "x.tgz").write_bytes(b"something else")
        return folder / "x.tgz"

    monkeypatch.setattr(npm, "fetch", fetch)
    with pytest.raises(npm.NpmError, match="expects"):
        npm.archive("jquery@3.7.1")
    assert list((own_cache / "npm").iterdir()) == []
