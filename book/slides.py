"""Slides of a lesson: a reveal.js deck that needs no network, in _build/slides.

python book/slides.py [LESSON ...]     such as 03; all lessons when none is named

A lesson says what its slides are by its cells' metadata, {"slideshow": {"slide_type": "slide"}} (or subslide,
fragment, notes; '-' goes on with the slide before; cells without are left out). A lesson that marks none gets a deck
drawn from its text: headings, objectives, numbered equations, sentences in bold, figures with captions, summary.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.npm import NpmError, unpack  # noqa: E402

LESSONS, SLIDES = ROOT / "notebooks", ROOT / "_build" / "slides"
SHOWN = {"slide", "subslide", "fragment", "notes", "-"}
LISTED = ("What you will be able to do", "Summary")  # sections whose lists are slides
PICTURES = ("image/svg+xml", "image/png", "image/jpeg")

ASSETS = {
    "reveal.js@4.6.1": ("reveal", ["dist/(reveal|reset)\\.css", "dist/reveal\\.js", "dist/theme/white\\.css",
                                   "dist/theme/fonts/.*\\.(css|woff)", "plugin/notes/.*", "LICENSE"]),
    "mathjax@2.7.7": ("mathjax", ["MathJax\\.js", "config/(TeX-AMS_CHTML-full|Safe)\\.js", "extensions/(?!a11y).*",
                                  "jax/(element|input/TeX|output/CommonHTML)/.*", "fonts/HTML-CSS/TeX/woff/.*",
                                  "localization/en/.*", "LICENSE"]),
    "requirejs@2.3.7": ("require", ["require\\.js"]),
    "jquery@3.7.1": ("jquery", ["dist/jquery\\.min\\.js", "LICENSE\\.txt"]),
}  # fmt: skip

STYLE = """
<style>
.reveal { font-size: 30px; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; }
.reveal h1 { font-size: 1.8em; } .reveal h2 { font-size: 1.4em; } .reveal h3 { font-size: 1.1em; }
.reveal section img { max-height: 520px; border: 0; box-shadow: none; }
.reveal .jp-InputPrompt, .reveal .jp-OutputPrompt { display: none; }
.reveal .MJXc-display, .reveal .jp-RenderedHTMLCommon { overflow: hidden; }
.reveal .caption { font-size: 0.7em; }
</style>
"""


# --- what is on the slides ------------------------------------------------------------------------


def slide_type(cell: Any) -> str:
    """What a cell says it is on the slides; '' if nothing."""
    return cell.metadata.get("slideshow", {}).get("slide_type", "")


def marked_cells(lesson: Any) -> list[Any]:
    """The cells that a lesson marks as slides."""
    return [c for c in lesson.cells if slide_type(c) in SHOWN]


def markdown(text: str, kind: str) -> Any:
    """A Markdown cell of a deck."""
    return nbformat.v4.new_markdown_cell(text, metadata={"slideshow": {"slide_type": kind}})


def outline(lesson: Any) -> list[Any]:
    """A deck drawn from a lesson that marks no slides."""
    deck: list[Any] = []
    section = ""
    for cell in lesson.cells:
        if cell.cell_type == "code":
            bare = bool(deck) and deck[-1].source.startswith("## ")
            deck += figure(cell, "-" if bare else "subslide")
            continue
        if cell.cell_type != "markdown":
            continue
        for block in re.split(r"\n\s*\n", cell.source.strip()):
            heading = re.match(r"(#+) (.+)", block)
            if heading:
                section = heading[2]
                if section not in ("Papers", "Exercises"):
                    kind = "slide" if len(heading[1]) <= 2 else "subslide"
                    deck.append(markdown(block.split("\n")[0], kind))
                continue
            if block.startswith("**What you will be able to do"):
                section = LISTED[0]
                deck.append(markdown(f"## {section}", "slide"))
            elif (section in LISTED and re.match(r"[-*] ", block)) or block.startswith(
                ("$$", "\\begin{equation")
            ):
                deck.append(markdown(block, "-"))
            else:
                said = re.findall(r"\*\*([^*]{12,}?[.!?])\*\*", block.replace("\n", " "))
                deck += [markdown(f"- {sentence}", "-") for sentence in said]
    return without_empty_slides(deck)


def figure(cell: Any, kind: str) -> list[Any]:
    """A part of the deck with what a cell has drawn and its caption, without its code; nothing if it draws nothing."""
    drawn = [o for o in cell.outputs if any(k in o.get("data", {}) for k in PICTURES)]
    if not drawn:
        return []
    told = cell.metadata.get("mystnb", {})
    caption = told.get("figure", {}).get("caption", "")
    data = drawn[0]["data"]
    form = next(k for k in PICTURES if k in data)
    if form == "image/svg+xml":
        picture = "".join(data[form])
    else:
        alt = told.get("image", {}).get("alt", "").replace('"', "&quot;")
        code = "".join(data[form]).replace("\n", "")
        picture = f'<img src="data:{form};base64,{code}" alt="{alt}">'
    return [markdown(f'{picture}\n\n<p class="caption">{caption}</p>', kind)]


def without_empty_slides(deck: list[Any]) -> list[Any]:
    """The deck without headings of sections of which nothing is shown; the title stays."""
    kept: list[Any] = []
    for i, cell in enumerate(deck):
        bare = cell.source.startswith("#") and "\n" not in cell.source
        rank = {"slide": 2, "subslide": 1}.get(slide_type(cell), 0)
        after = deck[i + 1] if i + 1 < len(deck) else None
        ends = after is None or {"slide": 2, "subslide": 1}.get(slide_type(after), 0) >= rank
        if i and bare and ends:
            continue
        kept.append(cell)
    return kept


def citations() -> dict[str, str]:
    """The entries of the bibliography as 'Fedus et al. 2022'."""
    found: dict[str, str] = {}
    for key, entry in parse_file(str(ROOT / "book" / "references.bib")).entries.items():
        people: list[Any] = entry.persons.get("author", [])
        last = [" ".join(p.last_names) for p in people]
        who = f"{last[0]} et al." if len(last) > 2 else " and ".join(last) or key
        found[key] = f"{who} {entry.fields.get('year', '')}".strip()
    return found


def plain_roles(text: str, cited: dict[str, str]) -> str:
    """The book's roles as plain words: citations as names and years, cross-references as their text."""

    def cite(match: re.Match[str]) -> str:
        names = "; ".join(cited.get(k.strip(), k.strip()) for k in match[2].split(","))
        return f"({names})" if match[1] == ":p" else names

    def other(match: re.Match[str]) -> str:
        return match[1].partition("<")[0].strip()

    text = re.sub(r"\{cite(:[a-z]+)?\}`([^`]+)`", cite, text)
    return re.sub(r"\{(?:numref|ref|doc|term|eq|glue:text)\}`([^`]+)`", other, text)


def deck(lesson: Any) -> Any:
    """A lesson's deck as a notebook.

    Raises:
        ValueError: there is nothing to show.
    """
    cells = marked_cells(lesson) or outline(lesson)
    if not cells:
        raise ValueError("has neither slide cells nor headings")
    cited = citations()
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = plain_roles(cell.source, cited)
    if slide_type(cells[0]) != "slide":
        cells[0].metadata["slideshow"] = {"slide_type": "slide"}
    return nbformat.v4.new_notebook(cells=cells, metadata=lesson.metadata)


# --- the file -------------------------------------------------------------------------------------


def title(lesson: Any) -> str:
    """The lesson's first heading."""
    found = re.search(r"^# (.+)$", "\n".join(c.source for c in lesson.cells), re.M)
    return found[1] if found else "Slides"


def page(lesson: Any) -> str:
    """A lesson's deck as HTML that asks for nothing outside the folder assets/."""
    exporter = SlidesExporter()
    exporter.reveal_url_prefix = "assets/reveal"
    exporter.reveal_theme = "white"
    exporter.reveal_number = "c/t"
    exporter.reveal_transition = "none"
    exporter.mathjax_url = "assets/mathjax/MathJax.js?config=TeX-AMS_CHTML-full,Safe"
    exporter.require_js_url = "assets/require/require.js"
    exporter.jquery_url = "assets/jquery/dist/jquery.min.js"
    exporter.register_preprocessor(
        TagRemovePreprocessor(
            remove_input_tags={"hide-input", "remove-input", "hide-cell"},
            remove_cell_tags={"remove-cell"},
        ),
        enabled=True,
    )
    notebook = deck(lesson)
    notebook.metadata["title"] = title(lesson)
    html: str = exporter.from_notebook_node(notebook)[0]
    # diagrams of Mermaid, which no lesson has, would be drawn by a script from elsewhere
    html = re.sub(r'<script type="module">.*?</script>', "", html, flags=re.S)
    return html.replace("</head>", STYLE + "</head>", 1)


def outside(html: str) -> Iterator[str]:
    """Addresses of scripts, styles, fonts, pictures and frames that are not beside the page."""
    for tag, attribute in re.findall(r"<(script|link|img|iframe|source)\b([^>]*)>", html):
        found = re.search(r"""\b(?:src|href)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)""", attribute)
        if found:
            yield f"{tag} {found[1]}"
    yield from re.findall(r"""url\(\s*["']?((?:https?:)?//[^"')]+)""", html)
    yield from re.findall(r"""@import\s+["']((?:https?:)?//[^"']+)""", html)
    yield from re.findall(r"""(?<!@)\b(?:import|from)\s*\(?\s*["'](https?://[^"']+)""", html)


def copy_assets(folder: Path) -> None:
    """What the decks load, beside them: from the cache, or fetched.

    Raises:
        NpmError: a package cannot be had.
    """
    for package, (name, wanted) in ASSETS.items():
        done = folder / "assets" / name / ".complete"
        if done.is_file() and done.read_text() == package:
            continue
        shutil.rmtree(done.parent, ignore_errors=True)
        unpack(package, done.parent, wanted)
        done.write_text(package)


def make(path: Path, folder: Path = SLIDES) -> Path:
    """Write the deck of one lesson and what it loads; returns the page.

    Raises:
        ValueError: the lesson has nothing to show, or the page would ask for something elsewhere.
        NpmError: a script cannot be fetched.
    """
    lesson: Any = nbformat.read(path, as_version=4)
    html = page(lesson)
    if asked := list(outside(html)):
        raise ValueError(f"asks for something elsewhere: {', '.join(asked)}")
    folder.mkdir(parents=True, exist_ok=True)
    copy_assets(folder)
    target = folder / f"{path.stem}.html"
    target.write_text(html, encoding="utf-8")
    return target


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the slides of lessons.")
    parser.add_argument("lessons", nargs="*", help="such as 03; default: all")
    options = parser.parse_args(arguments)
    there = sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))
    wanted = [Path(name).stem for name in options.lessons]
    for name in wanted:
        if not any(name in (p.stem, p.stem[:2]) for p in there):
            print(f"slides: there is no lesson {name}", file=sys.stderr)
            return 2
    failed = 0
    for path in there:
        if wanted and path.stem not in wanted and path.stem[:2] not in wanted:
            continue
        try:
            print(make(path))
        except (ValueError, NpmError) as error:
            print(f"slides: {path.name}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
