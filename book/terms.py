"""Links from the lessons to the glossary: the first use of every term, in prose.

python book/terms.py [NOTEBOOK ...]     add the missing links; all lessons when none is named
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "book" / "glossary.md"

# What is no prose: code, formulas, links, HTML, headings, tables, lists, folds, and the captions of figures.
NO_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|`[^`]*`|\$[^$\n]*\$"
    r"|!?\[[^\]]*\]\([^)]*\)|<[^>\n]*>|^#.*?$|^\|.*?$|^[-*] .*?$|^\*\*Figure .*?$|<details>.*?</details>",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\[[^\]]+\]\((?:\.\./book/)?glossary\.md#([\w-]+)\)")


def terms() -> list[str]:
    """The terms of the glossary: its headings."""
    return re.findall(r"^## (.+)$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)


def anchor(term: str) -> str:
    """The place of a term on the page, as GitHub and the book name it."""
    return term.lower().replace(" ", "-")


def expression(term: str) -> re.Pattern[str]:
    """A term as a word of its own, or its plural; a small letter may be a capital."""
    rest = re.escape(term[1:]).replace("\\ ", r"\s+")
    return re.compile(
        rf"(?<![\w/-])[{term[0].upper()}{term[0].lower()}]{rest}(?:e?s)?(?![\w/-]|\.\w)"
    )


def first_use(text: str, term: str, taken: list[tuple[int, int]]) -> re.Match[str] | None:
    """Where a term first stands in prose, outside what longer terms have taken."""
    hidden = [m.span() for m in NO_PROSE.finditer(text)] + taken
    for found in expression(term).finditer(text):
        if not any(found.start() < end and start < found.end() for start, end in hidden):
            return found
    return None


def linked(text: str, term: str) -> int | None:
    """Where a term is first linked, or None."""
    return next((link.start() for link in LINK.finditer(text) if link[1] == anchor(term)), None)


def missing(texts: list[str]) -> Iterator[tuple[int, re.Match[str], str]]:
    """First uses that are not linked: the number of the cell, the place in it, and the term."""
    taken: list[list[tuple[int, int]]] = [[] for _ in texts]
    for term in sorted(terms(), key=len, reverse=True):
        for number, text in enumerate(texts):
            link = linked(text, term)
            found = first_use(text, term, taken[number])
            for every in expression(term).finditer(text):
                if len(term.split()) > 1:
                    taken[number].append(every.span())
            if found and (link is None or found.start() < link):
                yield number, found, term
                taken[number].append(found.span())
                break
            if link is not None:
                break


def prose_cells(cells: list[dict[str, object]]) -> list[int]:
    """The Markdown cells of a lesson up to its exercises."""
    chosen: list[int] = []
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])  # type: ignore[arg-type]
        if cell["cell_type"] != "markdown":
            continue
        if re.search(r"^## (?:Summary|Exercises|Papers)", text, re.M):
            break
        chosen.append(number)
    return chosen


def unlinked(path: Path) -> list[str]:
    """The terms whose first use in a lesson is no link."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cells[n]["source"]) for n in prose_cells(cells)]
    return [found[0] for _, found, _ in missing(texts)]


def link(path: Path) -> int:
    """Add the missing links to a lesson; returns how many."""
    lesson = nbformat.read(path, as_version=4)
    numbers = prose_cells(lesson.cells)
    places = list(missing([lesson.cells[n].source for n in numbers]))
    for number, found, term in sorted(places, key=lambda p: -p[1].start()):
        cell = lesson.cells[numbers[number]]
        link = f"[{' '.join(found[0].split())}](../book/glossary.md#{anchor(term)})"
        cell.source = cell.source[: found.start()] + link + cell.source[found.end() :]
    if places:
        nbformat.write(lesson, path)
    return len(places)


def main() -> int:
    """The command line; returns the exit code."""
    paths = [Path(a) for a in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for path in paths:
        print(f"{path.name}: {link(path)} links added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
