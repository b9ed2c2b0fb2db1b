"""Slides: what of a lesson is on them, and that they ask for nothing from elsewhere."""

import os
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import nbformat
import pytest

from book import npm, slides

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))


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


def test_marked_cells_are_the_deck_and_links_to_pages_of_the_book_are_words() -> None:
    link = "A [router](../book/glossary.md#router) of [ours](https://example.org/x)."
    cells = [text("left out"), text("also", "skip"), text("more", "-"), text(link, "subslide")]
    made = slides.deck(lesson(text("# Title", "slide"), *cells, text("say this", "notes")))
    assert [c.source for c in made.cells] == [
        "# Title",
        "more",
        "A router of [ours](https://example.org/x).",
        "say this",
    ]


def shown(made: Any) -> list[str]:
    """The cells of a deck that the audience sees."""
    return [c.source for c in made.cells if slides.slide_type(c) != "notes"]


def test_an_unmarked_lesson_gives_its_argument_its_code_and_its_figures() -> None:
    drawn = nbformat.v4.new_code_cell(
        "plot()",
        outputs=[nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})],
        metadata={"mystnb": {"image": {"alt": 'Two "bars"'}}},
    )
    block = b64encode((ROOT / "book/assets/pictures/block.svg").read_bytes()).decode()
    made = slides.deck(
        lesson(
            text(
                "# Title\n\nIt opens with this sentence, which is long enough. And more is only said."
            ),
            text("**What you will be able to do**\n\n- route a token."),
            text(
                "## 1. A question?\n\nWhy? Because a router that is left alone learns nothing. "
                "Between these two sentences stands **a claim in bold**. "
                "With e.g. $a. B$ it is\n\n$$\nx, \\tag{1}\n$$\n\nwhich is little.\n\nof half a sentence"
            ),
            nbformat.v4.new_code_cell("x = 1"),
            nbformat.v4.new_code_cell('def f(x):\n    """Twice."""\n    return 2 * x'),
            drawn,
            text("**Figure 03.1.** A load."),
            text("![A block.](../book/assets/pictures/block.svg)"),
            text("**Figure 03.2.** A block."),
            text("## Nothing to show\n\n<details><summary>Answer</summary>\n\n</details>"),
            text("## Papers\n\n- one"),
        )
    )
    assert shown(made) == [
        "# Title\n\n- It opens with this sentence, which is long enough.",
        "## What you will be able to do\n\n- route a token.",
        "## 1. A question?\n\n- Why? Because a router that is left alone learns nothing.\n\n"
        "- Between these two sentences stands **a claim in bold**.\n\n"
        "- With e.g. $a. B$ it is\n\n$$\nx, \\tag{1}\n$$\n\nwhich is little.",
        "## 1. A question?",
        'def f(x):\n    """Twice."""\n    return 2 * x',
        '## 1. A question?\n\n<img src="data:image/png;base64,AAAA" alt="Two &quot;bars&quot;">\n\n'
        '<p class="caption">A load.</p>',
        f'## 1. A question?\n\n<img src="data:image/svg+xml;base64,{block}" alt="A block.">\n\n'
        '<p class="caption">A block.</p>',
    ]
    notes = [c.source for c in made.cells if slides.slide_type(c) == "notes"]
    assert any("And more is only said." in note for note in notes)


@pytest.mark.parametrize("path", LESSONS[::9], ids=lambda p: p.stem)
def test_a_deck_asks_for_nothing_from_elsewhere(path: Path) -> None:
    """Of what every deck loads; what a lesson itself would load is looked for in its page of the book."""
    notebook: Any = nbformat.read(path, as_version=4)
    html = slides.page(notebook)
    assert list(slides.outside(html)) == []
    assert slides.title(notebook) in html
    assert "references.md" not in html
    beside = set(re.findall(r'(?:src|href)="(assets/[^"?]+)', html))
    assert {a.split("/")[1] for a in beside} == {name for name, _ in slides.ASSETS.values()}


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_deck_has_argument_code_figures_and_notes_in_whole_sentences(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    deck = slides.deck(notebook).cells
    kinds = [slides.slide_type(c) for c in deck]
    assert 12 <= sum(k in ("slide", "subslide") for k in kinds) <= 60
    assert kinds.count("notes") > 8
    assert sum(c.cell_type == "code" for c in deck) >= 1
    there = sum(bool(slides.figure(c, "")) for c in notebook.cells)
    assert sum("<img" in c.source or "<svg" in c.source for c in deck) >= min(2, there)
    for cell in deck:
        if slides.slide_type(cell) == "notes" or cell.cell_type == "code":
            continue
        parts = cell.source.split("\n\n")
        assert parts[0].startswith("#"), cell.source
        for part, after in zip(parts, [*parts[1:], ""], strict=True):
            if part.startswith("- ") and not after.startswith(("$$", "\\begin")):
                assert re.search(r"[.!?;][*_\"')’”]*$", part), part


def test_a_lesson_with_nothing_to_show_says_so() -> None:
    with pytest.raises(ValueError, match="neither slide cells nor headings"):
        slides.deck(lesson(text("only prose")))


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
