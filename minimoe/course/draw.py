"""Drawings of the course as SVG: boxes, arrows, matrices and words in one palette, light and dark in one file.

A drawing is a `Sheet` to which shapes are added. Colours are classes: the style at the top of the file sets them once
for light and once for dark (`prefers-color-scheme`: that of the page around the picture, where the browser tells it,
else of the reader's system). A sheet paints its own paper, so that it can be read on any page, and a program that
knows no dark shows the light one.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import hypot

Point = tuple[float, float]
Place = tuple[float, float, float, float]  # left, top, width, height

WIDTH = 360  # units; the text of a page is about as many pixels wide on a phone
NORMAL, SMALL = 14, 12  # heights of letters, in units
FONT = '"DejaVu Sans",Verdana,sans-serif'

# A colour is a fill, on which words can be read, and a line, which is seen on paper; in light and in dark. The hues are
# those of `style`. What a colour tells is always said by a word or a number as well.
COLOURS = {
    "plain": (("#f3f5f7", "#59626b"), ("#262e36", "#a3adb6")),
    "off": (("#ffffff", "#848c94"), ("#121212", "#727c86")),
    "blue": (("#d6e8f5", "#0072B2"), ("#123a54", "#56B4E9")),
    "orange": (("#fbe0d0", "#D55E00"), ("#54290f", "#f08c4b")),
    "green": (("#d3efe5", "#008862"), ("#0c4232", "#2fc79b")),
    "purple": (("#f5e0ec", "#b0518a"), ("#4a2440", "#e09ac4")),
}
WORDS = {"ink": ("#1d2126", "#e9edf0"), "soft": ("#545c65", "#b4bdc5")}
PAPER = ("#ffffff", "#121212")  # of the book's pages


def style(theme: int) -> str:
    """The rules of one theme: 0 is light, 1 is dark."""
    rules = f".paper{{fill:{PAPER[theme]}}}"
    for name, (fill, line) in ((name, themes[theme]) for name, themes in COLOURS.items()):
        rules += f".{name}{{fill:{fill};stroke:{line}}}.{name}-head{{fill:{line}}}"
        rules += f".{name}-line{{fill:none;stroke:{line}}}"
    return rules + "".join(f".{name}{{fill:{word[theme]}}}" for name, word in WORDS.items())


def number(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def path(points: Sequence[Point]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)


class Sheet:
    """A drawing in the making: `WIDTH` by `height` units, y grows downwards.

    Args:
        height: of the sheet.
        title: what the drawing is of.
        description: what is to be seen, for those who do not see it.
    """

    def __init__(self, height: float, title: str, description: str) -> None:
        self.height, self.title, self.description = height, title, " ".join(description.split())
        self.shapes: list[str] = []

    def add(self, tag: str, css: str, words: str = "", /, **attributes: str | float) -> None:
        """A shape as it stands in the file; an attribute has '_' for '-'."""
        told = "".join(
            f' {name.replace("_", "-")}="{value if isinstance(value, str) else number(value)}"'
            for name, value in attributes.items()
        )
        self.shapes.append(f'<{tag} class="{css}"{told}>{escape(words)}</{tag}>')

    def text(
        self, at: Point, words: str, css: str = "ink", anchor: str = "middle", size: int = NORMAL
    ) -> None:
        """Words around a point, in as many lines as they have; x is their 'start', 'middle' or 'end'."""
        lines = words.split("\n")
        for i, line in enumerate(lines):
            y = (
                at[1] + 1.3 * size * (i - (len(lines) - 1) / 2) + 0.36 * size
            )  # of the letters' feet
            self.add("text", css, line, x=at[0], y=y, text_anchor=anchor, font_size=size)

    def box(
        self, place: Place, words: str = "", css: str = "plain", size: int = NORMAL, **more: float
    ) -> None:
        """A box with words in it, soft ones where it is 'off'; `more` are attributes, such as the radius rx."""
        x, y, w, h = place
        self.add("rect", css, x=x, y=y, width=w, height=h, **{"rx": 4, **more})
        if words:
            self.text((x + w / 2, y + h / 2), words, "soft" if css == "off" else "ink", size=size)

    def line(self, *points: Point, css: str = "plain", width: float = 1.5) -> None:
        """A line through points."""
        self.add("polyline", f"{css}-line", points=path(points), stroke_width=width)

    def arrow(self, *points: Point, css: str = "plain", width: float = 1.5) -> None:
        """A line with a head at its last point."""
        (x0, y0), (x, y) = points[-2:]
        size = (5 + 1.5 * width) / hypot(x - x0, y - y0)
        dx, dy = (x - x0) * size, (y - y0) * size
        head = (x, y), (x - dx - dy / 2, y - dy + dx / 2), (x - dx + dy / 2, y - dy - dx / 2)
        self.line(*points[:-1], (x - dx / 2, y - dy / 2), css=css, width=width)
        self.add("polygon", f"{css}-head", points=path(head))

    def matrix(
        self, corner: Point, cell: Point, cells: Sequence[Sequence[tuple[str, str]]]
    ) -> None:
        """A table from its upper left corner: the width and height of a cell, and of each its words and colour."""
        (x, y), (w, h) = corner, cell
        for i, row in enumerate(cells):
            for j, (words, css) in enumerate(row):
                self.box((x + j * w, y + i * h, w, h), words, css, SMALL, rx=0)

    def svg(self) -> str:
        """The file. Where there is room it is shown a fifth larger than its units."""
        across, down = number(1.2 * WIDTH), number(1.2 * self.height)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(self.height)}" '
            f'width="{across}" height="{down}" role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(self.description)}</desc>',
            f"<style>text{{font-family:{FONT}}}{style(0)}@media (prefers-color-scheme:dark){{{style(1)}}}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{number(self.height)}"/>',
            *self.shapes,
            "</svg>\n",
        ])  # fmt: skip
