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

# What is no prose: code, formulas, other roles, links, HTML, headings, tables, and the papers at the end.
NO_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\{\w+(?::\w+)?\}`[^`]*`|`[^`]*`|\$[^$\n]*\$"
    r"|!?\[[^\]]*\]\([^)]*\)|<[^>\n]*>|^#.*?$|^\|.*?$|^[-*] .*?$|<details>.*?</details>",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\{term\}`([^`<]+)(?:<([^>]+)>)?`")


def terms() -> list[list[str]]:
    """The glossary's entries: each the spellings of one term."""
    body = (
        GLOSSARY.read_text(encoding="utf-8").partition(":::{glossary}\n")[2].partition("\n:::")[0]
    )
    return [
        [line for line in entry.splitlines() if not line.startswith(" ")]
        for entry in body.strip().split("\n\n")
    ]  # fmt: skip


def expression(spellings: list[str]) -> re.Pattern[str]:
    """Any spelling of a term as a word of its own, the longest first; a small letter may be a capital."""
    ordered = sorted(spellings, key=len, reverse=True)
    words = [
        f"[{s[0].upper()}{s[0].lower()}]{re.escape(s[1:])}".replace("\\ ", r"\s+") for s in ordered
    ]
    return re.compile(rf"(?<![\w/-])(?:{'|'.join(words)})(?![\w/-]|\.\w)")  # fmt: skip


def first_use(
    text: str, spellings: list[str], taken: list[tuple[int, int]]
) -> re.Match[str] | None:
    """Where a term first stands in prose, outside what longer terms have taken."""
    hidden = [m.span() for m in NO_PROSE.finditer(text)] + taken
    for found in expression(spellings).finditer(text):
        if not any(found.start() < end and start < found.end() for start, end in hidden):
            return found
    return None  # fmt: skip


def linked(text: str, spellings: list[str]) -> int | None:
    """Where a term is first linked, or None."""
    names = {s.lower() for s in spellings}
    for link in LINK.finditer(text):
        if (link[2] or link[1]).strip().lower() in names:
            return link.start()
    return None


def missing(texts: list[str]) -> Iterator[tuple[int, re.Match[str]]]:
    """First uses that are not linked: the number of the cell, and the place in it."""
    longest_first = sorted(terms(), key=lambda t: max(map(len, t)), reverse=True)
    taken: list[list[tuple[int, int]]] = [[] for _ in texts]
    for spellings in longest_first:
        for number, text in enumerate(texts):
            link = linked(text, spellings)
            found = first_use(text, spellings, taken[number])
            for every in expression(spellings).finditer(text):
                if len(spellings[0].split()) > 1:
                    taken[number].append(every.span())
            if found and (link is None or found.start() < link):
                yield number, found
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
    return [found[0] for _, found in missing(texts)]


def link(path: Path) -> int:
    """Add the missing links to a lesson; returns how many."""
    lesson = nbformat.read(path, as_version=4)
    numbers = prose_cells(lesson.cells)
    places = list(missing([lesson.cells[n].source for n in numbers]))
    for number, found in sorted(places, key=lambda p: -p[1].start()):
        cell = lesson.cells[numbers[number]]
        word = re.sub(r"\s+", " ", found[0])
        cell.source = f"{cell.source[: found.start()]}{{term}}`{word}`{cell.source[found.end() :]}"
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
