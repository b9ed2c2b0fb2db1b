"""Slides of a lesson: a reveal.js deck that needs no network, in _build/slides.

python book/slides.py [LESSON ...]     such as 03; all lessons when none is named

A lesson says what its slides are by its cells' metadata, {"slideshow": {"slide_type": "slide"}} (or subslide,
fragment, notes; '-' goes on with the slide before; cells without are left out). A lesson that marks none gets a deck
drawn from its text (`Outline`).
"""

import argparse
import ast
import re
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.npm import NpmError, unpack  # noqa: E402

LESSONS, SLIDES = ROOT / "notebooks", ROOT / "_build" / "slides"
SHOWN = {"slide", "subslide", "fragment", "notes", "-"}
UNSHOWN = (
    "Papers",
    "Exercises",
    "The library's version",
)  # sections that are no part of the argument
LINES = 12  # of text on a slide
CODE_LINES = 18
SHORT = 45  # characters of a sentence that stands with the next one
PICTURES = ("image/svg+xml", "image/png", "image/jpeg")
PICTURE = re.compile(r"!\[([^\]]*)\]\((\S+\.svg)\)")  # of the course, a cell of its own

ASSETS = {
    "reveal.js@4.6.1": ("reveal", ["dist/(reveal|reset)\\.css", "dist/reveal\\.js", "dist/theme/white\\.css",
                                   "dist/theme/fonts/.*\\.(css|woff)", "plugin/notes/.*", "LICENSE"]),
    "mathjax@2.7.7": ("mathjax", ["MathJax\\.js", "config/(TeX-AMS_CHTML-full|Safe)\\.js", "extensions/(?!a11y).*",
                                  "jax/(element|input/TeX|output/CommonHTML)/.*", "fonts/HTML-CSS/TeX/woff/.*",
                                  "localization/en/.*", "LICENSE"]),
    "requirejs@2.3.7": ("require", ["require\\.js"]),
    "jquery@3.7.1": ("jquery", ["dist/jquery\\.min\\.js", "LICENSE\\.txt"]),
}  # fmt: skip

WIDTH, HEIGHT = 1280, 720
# What is still too large for its slide is shown smaller; tests/browser/test_slides.py measures how much.
STYLE = """
<style>
.reveal { font-size: 28px; text-align: left; }
.reveal .slides { text-align: left; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; }
.reveal h1 { font-size: 1.8em; } .reveal h2 { font-size: 1.35em; } .reveal h3 { font-size: 1.15em; }
.reveal p, .reveal li { margin: 0.35em 0; line-height: 1.3; }
.reveal ul, .reveal ol { display: block; }
.reveal section img, .reveal section svg { max-height: 500px; max-width: 100%; margin: 0 auto; display: block;
  border: 0; box-shadow: none; }
.reveal .jp-CodeCell { font-size: 0.66em; }
.reveal .jp-CodeCell * { font-size: inherit !important; box-sizing: border-box; }
.reveal pre, .reveal .highlight pre { line-height: 1.3; box-shadow: none; margin: 0; padding: 4px; width: 100%;
  max-height: none; white-space: pre; overflow: visible; }
.reveal .jp-Cell, .reveal .jp-Cell :is(.jp-Cell-inputWrapper, .jp-Cell-outputWrapper, .jp-InputArea, .jp-OutputArea,
  .jp-OutputArea-child, .jp-InputArea-editor, .CodeMirror, .cm-editor) { margin: 0; padding: 0; overflow: visible; }
.reveal .jp-InputPrompt, .reveal .jp-OutputPrompt { display: none; }
.reveal .jp-Cell, .reveal .jp-RenderedHTMLCommon, .reveal .jp-OutputArea { overflow: visible; max-width: none; }
.reveal .jp-RenderedMarkdown, .reveal .jp-RenderedHTMLCommon { font-size: 1em; }
.reveal .caption { font-size: 0.7em; line-height: 1.3; }
</style>
<script>
function fit() {
  const section = document.querySelector(".slides section.present section.present")
    || document.querySelector(".slides section.present:not(.stack)");
  if (!section) return;
  const over = () => section.scrollHeight > HEIGHT - 12 || section.scrollWidth > WIDTH;  // some room below
  for (let size = 28; over() && size > 14; size--) section.style.fontSize = size + "px";
}
document.addEventListener("ready", fit);
document.addEventListener("slidechanged", () => { fit(); window.MathJax?.Hub?.Queue(fit); });
window.addEventListener("load", () => window.MathJax?.Hub?.Queue(fit));
</script>
""".replace("HEIGHT", str(HEIGHT)).replace("WIDTH", str(WIDTH))


# --- what is on the slides ------------------------------------------------------------------------


def slide_type(cell: Any) -> str:
    """What a cell says it is on the slides; '' if nothing."""
    return cell.metadata.get("slideshow", {}).get("slide_type", "")


def marked_cells(lesson: Any) -> list[Any]:
    """The cells that a lesson marks as slides."""
    return [c for c in lesson.cells if slide_type(c) in SHOWN]


def slide(kind: str) -> Any:
    """The metadata of a cell that is on the slides."""
    return {"slideshow": {"slide_type": kind}}


def markdown(text: str, kind: str) -> Any:
    """A Markdown cell of a deck."""
    return nbformat.v4.new_markdown_cell(text, metadata=slide(kind))


def figure(cell: Any, caption: str) -> str:
    """The picture that a cell has drawn, or that it names, with its caption, as Markdown; '' if there is none."""
    drawn = [
        o.data for o in cell.get("outputs", []) if any(k in o.get("data", {}) for k in PICTURES)
    ]
    if named := PICTURE.fullmatch(cell.source):
        told, form = named[1], "image/svg+xml"
        code = b64encode((LESSONS / named[2]).read_bytes()).decode()
    elif drawn:
        told = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        form = next(k for k in PICTURES if k in drawn[0])
        code = "".join(drawn[0][form]).replace("\n", "")
    else:
        return ""
    alt = told.replace('"', "&quot;")
    picture = code if code.startswith("<") else f'<img src="data:{form};base64,{code}" alt="{alt}">'
    return f'{picture}\n\n<p class="caption">{caption}</p>'


def caption_of(cell: Any) -> str:
    """What a cell below a figure says of it, without the figure's number; '' if it is no caption."""
    found = re.match(r"\*\*Figure \d\d\.\d+\.\*\*\s+", cell.source)
    return cell.source[found.end() :] if found else ""


# --- a deck drawn from a lesson's text ------------------------------------------------------------


class Outline:
    """The slides of a lesson that marks none: the lesson's argument, in its own whole sentences.

    Of each paragraph the sentence that it begins with, those with words in bold, and the one that leads to an equation;
    equations, first sentences of list items, figures with captions, and code that defines something and fits. What is
    not shown is in the speaker's notes.
    """

    def __init__(self) -> None:
        self.deck: list[Any] = []
        self.heading = ""
        self.shown: list[tuple[str, int]] = []  # what is on the slide in the making, with lines
        self.notes: list[str] = []
        self.is_new = True

    def add(self, text: str, lines: int) -> None:
        """Put something on the slide; what does not fit begins the next one."""
        if self.shown and sum(n for _, n in self.shown) + lines > LINES:
            lead = [self.shown.pop()] if text.startswith("$$") and len(self.shown) > 1 else []
            self.close()
            self.shown = lead
        self.shown.append((text, lines))

    def close(self) -> None:
        """End the slide, if anything is on it."""
        if self.shown:
            kind = "slide" if self.heading.startswith(("# ", "## ")) and self.is_new else "subslide"
            body = "\n\n".join([self.heading, *(text for text, _ in self.shown)])
            self.deck.append(markdown(body, kind))
            self.is_new = False
            self.note()
        self.shown = []

    def note(self) -> None:
        """What the speaker reads with the slide before."""
        if self.notes and self.deck:
            self.deck.append(markdown("\n\n".join(self.notes), "notes"))
            self.notes = []

    def section(self, heading: str) -> None:
        """Begin a section."""
        self.close()
        self.note()
        self.heading, self.is_new = heading, True

    def text(self, source: str) -> None:
        """Show what is to be shown of a Markdown cell."""
        blocks = [b.strip() for b in re.split(r"\n\s*\n", source.strip())]
        for i, block in enumerate(blocks):
            if heading := re.match(r"#+ .+", block):
                self.section(heading[0])
                block = block[len(heading[0]) :].strip()
            name = self.heading.lstrip("# ")
            if not block or name in UNSHOWN or block.startswith(("```", "<", "![")):
                continue
            if block.startswith("**What you need"):
                self.notes.append(block)
                continue
            if block.startswith("**What you will be able to do"):
                self.section("## What you will be able to do")
                block = block.partition("\n")[2].strip()
            if block.startswith(("$$", "\\begin{")):
                self.add(block, 2 + block.count("\\\\") + block.count("\n") // 2)
            elif block.startswith("|"):
                self.add(block, 2 + block.count("\n"))
            elif re.match(r"([-*]|\d+\.) ", block):
                for item in re.split(r"\n(?=(?:[-*]|\d+\.) )", block):
                    whole = " ".join(item.split())
                    told = whole if name == "Summary" else argument(whole)
                    self.add(told, lines_of(told))
                self.notes.append(block)
            else:
                if i and goes_on(blocks[i - 1]):
                    self.add(sentences(block)[0], lines_of(sentences(block)[0]))
                    block = " ".join(sentences(block)[1:])
                leads = i + 1 < len(blocks) and blocks[i + 1].startswith(("$$", "\\begin{"))
                for sentence in chosen(block, leads):
                    self.add(f"- {sentence}", lines_of(sentence))
                self.notes.append(block)

    def show(self, cell: Any, caption: str) -> None:
        """Show a cell's picture with its caption, or what it defines and prints."""
        if self.heading.lstrip("# ") in UNSHOWN:
            return
        if drawn := figure(cell, caption):
            self.close()
            self.deck.append(markdown(f"{self.heading}\n\n{drawn}", "subslide"))
            self.note()
        elif source := worth_seeing(cell):
            self.close()
            self.deck.append(markdown(self.heading, "subslide"))
            whole = source == cell.source
            printed = [o for o in cell.outputs if o.output_type == "stream"] if whole else []
            short = sum(o.text.count("\n") for o in printed) + source.count("\n") <= CODE_LINES
            self.deck.append(
                nbformat.v4.new_code_cell(
                    source, outputs=printed if short else [], metadata=slide("-")
                )
            )
            self.note()


def outline(lesson: Any) -> list[Any]:
    """A deck drawn from a lesson that marks no slides."""
    made = Outline()
    for cell, after in zip_longest(lesson.cells, lesson.cells[1:]):
        if cell.cell_type == "code" or PICTURE.fullmatch(cell.source):
            made.show(cell, caption_of(after) if after else "")
        elif cell.cell_type == "markdown" and not caption_of(cell):
            made.text(cell.source)
    made.close()
    made.note()
    return made.deck


def lines_of(text: str) -> int:
    """About how many lines a text takes on a slide."""
    plain = re.sub(r"\\[a-zA-Z]+|[{}$*`\\]", "", text)
    return 1 + len(plain) // 85


def sentences(block: str) -> list[str]:
    """The sentences of a paragraph, formulas and abbreviations whole."""
    text = " ".join(block.split())
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\x00{len(kept) - 1}\x00"

    text = re.sub(
        r"\$[^$]+\$|`[^`]+`|\]\([^)]*\)|\b(?:et al|e\.g|i\.e|eq|Fig|Figs|vs|cf)\.", keep, text
    )
    parts = re.split(r"(?<=[.!?])([*_\"')’”]*)\s+(?=[A-Z0-9$`*_\[({‘“'\"\x00])", text)
    found = [
        parts[i] + (parts[i + 1] if i + 1 < len(parts) else "") for i in range(0, len(parts), 2)
    ]
    return [re.sub(r"\x00(\d+)\x00", lambda m: kept[int(m[1])], s) for s in found if s.strip()]


def chosen(block: str, leads: bool) -> list[str]:
    """The sentences of a paragraph that a slide shows; `leads` to an equation, which the last one introduces."""
    all_of = sentences(block)
    joined: list[str] = []
    for sentence in all_of:  # a bold word or a short question belongs to what follows
        if joined and len(joined[-1]) < SHORT and not joined[-1].endswith(":"):
            joined[-1] += f" {sentence}"
        else:
            joined.append(sentence)
    if not joined:
        return []
    picked = {0} | {i for i, s in enumerate(joined) if re.search(r"\*\*[^*]{12,}\*\*", s)}
    if leads:
        picked.add(len(joined) - 1)
    shown = [joined[i] for i in sorted(picked)[:3]]
    return [s for i, s in enumerate(shown) if is_whole(s) or (leads and i == len(shown) - 1)]


def goes_on(block: str) -> bool:
    """Whether the sentence of an equation goes on after it."""
    return block.startswith("$$") and bool(re.search(r",\s*(\\tag\{\w+\})?\s*\$\$$", block))


def is_whole(sentence: str) -> bool:
    """Whether a sentence is one: it begins as one and ends as one, and is not the beginning of what is not shown."""
    return bool(re.match(r"[^a-z,;:.)]", sentence) and re.search(r"[.!?][*_\"')’”]*$", sentence))


def argument(item: str) -> str:
    """The first sentence of a list item, with its mark."""
    mark, _, text = item.partition(" ")
    return f"{mark} {chosen(text, False)[0] if chosen(text, False) else text}"


def worth_seeing(cell: Any) -> str:
    """The code of a cell that a slide shows: what it defines, with all of the cell if that is short; no helpers."""
    tags = set(cell.metadata.get("tags", []))
    if (
        tags & {"hide-input", "remove-input", "hide-cell", "remove-cell"}
        or "interact" in cell.source
    ):
        return ""
    try:
        body = ast.parse(re.sub("^%", "# %", cell.source, flags=re.M)).body
    except SyntaxError:
        return ""
    defined = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    told = [n for n in defined if isinstance(n, ast.ClassDef) or ast.get_docstring(n)]
    if defined and cell.source.count("\n") < (CODE_LINES if told else CODE_LINES // 2):
        return cell.source
    pieces = [ast.get_source_segment(cell.source, n) or "" for n in told]
    return next((p for p in pieces if 0 < p.count("\n") < CODE_LINES), "")


# --- the deck --------------------------------------------------------------------------------------


def deck(lesson: Any) -> Any:
    """A lesson's deck as a notebook.

    Raises:
        ValueError: there is nothing to show.
    """
    cells = marked_cells(lesson) or outline(lesson)
    if not cells:
        raise ValueError("has neither slide cells nor headings")
    for cell in cells:
        if cell.cell_type == "markdown":  # a page of the book is not beside the deck
            cell.source = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", cell.source)
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
    exporter.reveal_width, exporter.reveal_height = str(WIDTH), str(HEIGHT)
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
    there = sorted(LESSONS.glob("[0-9][0-9]*_*.ipynb"))
    wanted = [Path(name).stem for name in options.lessons]
    for name in wanted:
        if not any(name in (p.stem, p.stem.split("_")[0]) for p in there):
            print(f"slides: there is no lesson {name}", file=sys.stderr)
            return 2
    failed = 0
    for path in there:
        if wanted and not {path.stem, path.stem.split("_")[0]} & {*wanted}:
            continue
        try:
            print(make(path))
        except (ValueError, NpmError) as error:
            print(f"slides: {path.name}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
