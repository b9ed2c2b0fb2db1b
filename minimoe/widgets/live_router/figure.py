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

    starts, room = [0.0], 100.0  # in characters
    lines = [0]
    for word in words:
        width = max(len(word), 1) + 1.2
        if starts[-1] + width > room:
            starts[-1] = 0.0
            lines[-1] += 1
        starts.append(starts[-1] + width)
        lines.append(lines[-1])
    height = len(first) + 1.6  # rows of a line: the tokens, then a row for each layer
    with plt.rc_context(style.RC | {"font.family": ["DejaVu Sans Mono"]}):
        count = lines[-2] + 1
        figure, axis = plt.subplots(figsize=(7.6, 0.26 * height * count), layout="constrained")
        for word, x, line in zip(words, starts, lines, strict=False):
            y, width = line * height, max(len(word), 1) + 1.2
            axis.text(x + width / 2, y + 0.5, word, ha="center", va="center")
        for line in range(count):
            for row, layer in enumerate(first, 1):
                y = line * height + row
                axis.text(-1, y + 0.5, f"layer {layer}", ha="right", va="center", color=style.LINE)
                for i, expert in enumerate(first[layer]):
                    if lines[i] != line:
                        continue
                    width = max(len(words[i]), 1) + 1.2
                    axis.add_patch(
                        Rectangle(
                            (starts[i], y),
                            width,
                            1,
                            facecolor=COLOURS[(expert - 1) % 8],
                            edgecolor="white",
                        )
                    )
                    axis.text(starts[i] + width / 2, y + 0.5, str(expert), ha="center", va="center")
        axis.set(xlim=(-9, room), ylim=(count * height, 0))
        axis.axis("off")
    return figure
