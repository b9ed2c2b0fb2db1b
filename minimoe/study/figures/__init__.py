"""Figures of the routing study: each takes results of `minimoe.study.statistics` and returns a `Figure` with its words.

One palette (Okabe and Ito), experts counted from 1 as in the article, chance in grey, intervals at 95 %.
"""

from minimoe.study.depth import draw_information as information
from minimoe.study.domains import label_load, labels_at, skew
from minimoe.study.drawing import Figure
from minimoe.study.load import draw_load as load
from minimoe.study.load import draw_load_by_depth as load_by_depth
from minimoe.study.paths import draw_coactivation as coactivation
from minimoe.study.paths import draw_paths as paths
from minimoe.study.paths import draw_repeats as repeats
from minimoe.study.vocabulary import ranked_tokens, shown, token_choice

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
