"""What the prose of the course avoids: long sentences, and words that read as translated.

python book/prose.py [FILE ...]     list what is found, by default in lessons, pages and README
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "notebooks"
PAGES = (
    *sorted(LESSONS.glob("*.ipynb")),
    *sorted((ROOT / "solutions").glob("*.ipynb")),
    *sorted((ROOT / "book").glob("*.md")),
    ROOT / "README.md",
)
WORDS = 35  # the most that a sentence has
COUNTED = "bits?|bytes?|nats?|FLOPs?|operations|experts?|tokens|rows|slots|places|seeds|assignments|parameters|seconds"
UNIT = "parameter|token|character|number|second|layer|expert|batch|step|row|block|word|symbol|byte"
AVOIDED = {
    "per": rf"\b(?:{COUNTED}) an? (?:{UNIT})\b",
    "who or what it is": r"\b(?:whoever|somebody|nobody|everybody)\b",
    "fix, correct": r"\bmend(?:s|ed|ing)?\b",
    "generates": r"\bmodels? (?:that )?writes?\b|\bwhen it writes\b",
    "a plain word": r"\b(?:beforehand|by lot|dearer|hitherto|thereby|learnt|likewise|beside)\b",
}
# What is no sentence: formulas, code, tables, tags, pictures. What is no word: the address of a link.
NO_PROSE = re.compile(
    r"\$\$.*?\$\$|```.*?```|^\|.*?$|<[^>\n]*>|!\[[^\]]*\]\([^)]*\)", re.DOTALL | re.MULTILINE
)
ADDRESS = re.compile(r"(?<=\])\([^)]*\)")
# A sentence ends before a capital, a formula or a quotation; a paragraph and a line of a list end one too.
END = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z*(\[`$'‘])|\n\s*\n|\n\s*(?:[-*]|\d\.) ")


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown, each on one line; a formula in one counts as a word."""
    text = ADDRESS.sub("", NO_PROSE.sub("\n\n", text))
    text = re.sub(r"\$[^$\n]*\$|`[^`\n]*`", "X", text)
    for sentence in END.split(text):
        if words := " ".join(sentence.split()):
            yield words


def faults(text: str) -> Iterator[str]:
    """What is wrong with the sentences of a page, one line for each fault."""
    for sentence in sentences(text):
        if (number := len(sentence.split())) > WORDS:
            yield f"{number} words: {sentence}"
        for instead, pattern in AVOIDED.items():
            for found in re.finditer(pattern, sentence, flags=re.IGNORECASE):
                yield f"{found[0]!r}, better: {instead}: {sentence}"


def prose(path: Path) -> str:
    """The Markdown of a page or of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    notebook: Any = nbformat.read(path, as_version=4)
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def main(names: list[str]) -> int:
    """The command line; returns the exit code."""
    pages = [Path(name) for name in names] or PAGES
    found = [f"{page.name}: {fault}" for page in pages for fault in faults(prose(page))]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
