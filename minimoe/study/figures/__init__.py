"""Figures of the routing study: each takes results of `minimoe.study.statistics` and returns a `Figure` with its words.

One palette (Okabe and Ito), experts counted from 1 as in the article, chance in grey, intervals at 95 %.
"""

from minimoe.study.figures.depth import coactivation, information, paths, repeats
from minimoe.study.figures.domains import label_load, labels_at, skew
from minimoe.study.figures.loads import load, load_by_depth
from minimoe.study.figures.style import Figure
from minimoe.study.figures.tokens import ranked_tokens, shown, token_choice

__all__ = [
    "Figure",
    "coactivation",
    "information",
    "label_load",
    "labels_at",
    "load",
    "load_by_depth",
    "paths",
    "ranked_tokens",
    "repeats",
    "shown",
    "skew",
    "token_choice",
]
