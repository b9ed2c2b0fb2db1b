"""Read the built pages of the book: every picture says what it shows, and every link inside the book leads somewhere.

    python book/check_pages.py _build/html

Sphinx checks the links that it makes itself, but not those written as HTML, nor alternative text.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What the theme writes for its own search page and index; there is no text of ours in them.
THEME_PAGES = {"search.html", "genindex.html"}


class Page(HTMLParser):
    """The ids, links and pictures of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("id", "name"):
            if value := values.get(name):
                self.ids.add(value)
        if tag == "a" and (link := values.get("href")):
            self.links.append(link)
        if tag == "img":
            self.pictures.append((values.get("src") or "", values.get("alt")))


def says_nothing(source: str, alt: str | None) -> bool:
    """Whether alternative text is missing, or is the picture's file name that docutils puts where none was given.

    An empty text is a statement of its own (the picture is decoration), and is let through.
    """
    return alt is None or (alt != "" and Path(unquote(alt)).name == Path(unquote(source)).name)


def problems(folder: Path) -> list[str]:
    """What is wrong with the pages under a folder, one line each."""
    pages = {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.relative_to(folder).parts and path.name not in THEME_PAGES
    }
    found: list[str] = []
    for name, page in pages.items():
        for source, alt in page.pictures:
            if says_nothing(source, alt):
                found.append(f"{name}: no alternative text for {source[:80]}")
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (folder / name).parent / unquote(parts.path) if parts.path else folder / name
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
                continue
            relative = target.resolve().relative_to(folder.resolve()).as_posix()
            fragment = unquote(parts.fragment)
            if fragment and relative in pages and fragment not in pages[relative].ids:
                found.append(f"{name}: {link} names no place on that page")
    if not pages:
        found.append(f"{folder}: no pages; run `make book`")
    return found


def main() -> int:
    """The command line; returns the exit code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = problems(Path(sys.argv[1]))
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
