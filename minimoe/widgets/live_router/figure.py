"""The live router's static figure: one sentence, its tokens marked by their first expert at three layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimoe.course import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Those of the page, for experts 1 to 8: light enough for dark text.
COLOURS = ("#9bd1f3", "#f6bf6a", "#7fd6b4", "#f0e36a", "#a9b8f5", "#f7a283", "#e9aed6", "#c9c9c9")


def draw(words: list[str], first: dict[int, list[int]]) -> Figure:
    """`words` are the tokens; `first` maps a layer's number to the first expert of each, counted from 1."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    room, placed = (
        100.0,
        list[tuple[int, float, float]](),
    )  # line, start and width of each, in characters
    line, x = 0, 0.0
    for word in words:
        width = max(len(word), 1) + 1.2
        if x + width > room:
            line, x = line + 1, 0.0
        placed.append((line, x, width))
        x += width
    height = len(first) + 1.6  # rows of a line: the tokens, then a row for each layer
    with plt.rc_context(style.RC | {"font.family": ["DejaVu Sans Mono"]}):
        figure, axis = plt.subplots(figsize=(7.6, 0.26 * height * (line + 1)), layout="constrained")
        for word, (its, x, width) in zip(words, placed, strict=True):
            axis.text(x + width / 2, its * height + 0.5, word, ha="center", va="center")
        for its in range(line + 1):
            for row, layer in enumerate(first, 1):
                y = its * height + row
                axis.text(-1, y + 0.5, f"layer {layer}", ha="right", va="center", color=style.LINE)
                for expert, (other, x, width) in zip(first[layer], placed, strict=True):
                    if other == its:
                        colour = COLOURS[(expert - 1) % 8]
                        axis.add_patch(
                            Rectangle((x, y), width, 1, facecolor=colour, edgecolor="white")
                        )
                        axis.text(x + width / 2, y + 0.5, str(expert), ha="center", va="center")
        axis.set(xlim=(-9, room), ylim=((line + 1) * height, 0))
        axis.axis("off")
    return figure
