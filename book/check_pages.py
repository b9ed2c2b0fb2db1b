"""Read the built pages of the book: every picture says what it shows, every link inside the book leads somewhere, every
lesson that is named is a link, tables are tables, and nothing is loaded from elsewhere.

    python book/check_pages.py _build/html

Sphinx checks the links that it makes itself, but not those written as HTML, nor alternative text.
"""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What the theme writes for its own search page and index. No text of ours is in them: only what they load counts.
THEME_PAGES = {"search.html", "genindex.html"}


# What a browser fetches by itself: tag -> attributes. Links that somebody follows are not among them.
LOADED = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "embed": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "input": ("src",),
    "image": ("href", "xlink:href"), "use": ("href", "xlink:href"),
}  # fmt: skip
# A link of these kinds names a page for readers and machines; all others (stylesheet, icon, preload ...) are fetched.
NAMING = {"index", "search", "next", "prev", "author", "license", "canonical", "alternate", "help"}
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")
# A line of a Markdown table that stayed text.
PIPES = re.compile(r"<p>(?:[^<]*?\n)??\s*(\|[^|<\n]*\|[^|<\n]*\|[^<\n]*)")
NO_PROSE = {
    "a",
    "h1",
    "h2",
    "h3",
    "h4",
    "title",
    "code",
    "pre",
    "script",
    "style",
    "nav",
    "aside",
    "svg",
    "button",
}
# Put there by the build where it reaches the npm registry, see book/extension.py.
FROM_NPM = "_static/npm/"


class Page(HTMLParser):
    """The ids, links and pictures of one page, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self.loaded: list[str] = []
        self.in_style = False
        self.inside: list[str] = []  # elements whose text is no prose, or is a link already
        self.prose = ""
        self.pipes = PIPES.findall(text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in NO_PROSE:
            self.inside.append(tag)
        for name in ("id", "name"):
            if value := values.get(name):
                self.ids.add(value)
        if tag == "a" and (link := values.get("href")):
            self.links.append(link)
        if tag == "img":
            self.pictures.append((values.get("src") or "", values.get("alt")))
        self.loaded += [a for name in LOADED.get(tag, ()) if (a := values.get(name))]
        if tag == "link" and not set((values.get("rel") or "").lower().split()) <= NAMING:
            self.loaded.append(values.get("href") or "")
        self.loaded += IN_STYLE.findall(values.get("style") or "")
        self.in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass
        self.in_style = self.in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.prose += data
        if self.in_style:
            self.loaded += IN_STYLE.findall(data)


def foreign(address: str) -> bool:
    """Whether an address, or one of a srcset, is on another machine."""
    return any(re.match(r"(?i)(?:[a-z][a-z0-9+.-]*:)?//", part) for part in address.split(", "))


def styles_from_elsewhere(folder: Path) -> list[str]:
    """What the style sheets of the book load from other machines, one line each."""
    return [
        f"{path.relative_to(folder)}: loads {address[:80]}"
        for path in sorted(folder.rglob("*.css"))
        for address in IN_STYLE.findall(path.read_text(encoding="utf-8", errors="replace"))
        if foreign(address)
    ]


def says_nothing(source: str, alt: str | None) -> bool:
    """Whether alternative text is missing, or is the picture's file name that docutils puts where none was given.

    An empty text is a statement of its own (the picture is decoration), and is let through.
    """
    return alt is None or (alt != "" and Path(unquote(alt)).name == Path(unquote(source)).name)


def may_lack(path: str) -> bool:
    """Whether a script may be missing: one that is fetched from the npm registry, outside continuous integration."""
    return FROM_NPM in path and os.environ.get("CI") != "true"


def problems(folder: Path) -> list[str]:
    """What is wrong with the pages under a folder, one line each."""
    pages = {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.relative_to(folder).parts
    }
    lessons = {
        Path(name).name.split("_")[0]: name for name in pages if name.startswith("notebooks/")
    }
    found: list[str] = []
    for name, page in pages.items():
        named = re.finditer(r"\b[Ll]essons?\s+(\d\d?)(b?)\b", page.prose)
        found += [
            f"{name}: '{n[0]}' is no link"
            for n in named
            if lessons.get(n[1].zfill(2) + n[2], name) != name
        ]
        found += [f"{name}: '{line[:60]}' is a table's text, no table" for line in page.pipes]
        theirs = Path(name).name in THEME_PAGES
        for source, alt in [] if theirs else page.pictures:
            if says_nothing(source, alt):
                found.append(f"{name}: no alternative text for {source[:80]}")
        found += [f"{name}: loads {a[:80]}, from elsewhere" for a in page.loaded if foreign(a)]
        for address in page.loaded:
            path = unquote(urlsplit(address).path)
            if foreign(address) or not path or address.startswith("data:"):
                continue
            if not ((folder / name).parent / path).exists() and not may_lack(path):
                found.append(f"{name}: loads {address[:80]}, which is not there")
        for link in [] if theirs else page.links:
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
    found += styles_from_elsewhere(folder)
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
