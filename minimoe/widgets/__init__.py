"""Explorables: figures that the reader can turn, in JupyterLab and on the static page, where no kernel runs.

Each computes in JavaScript what the library computes in Python, from data that the library hands over; tests run both.
"""

from collections.abc import Callable

from minimoe.widgets.balance_film import balance_film
from minimoe.widgets.budget import budget
from minimoe.widgets.calculator import calculator
from minimoe.widgets.capacity_drops import capacity_drops
from minimoe.widgets.explorable import Explorable
from minimoe.widgets.live_router import live_router
from minimoe.widgets.rescue_router import rescue_router
from minimoe.widgets.roofline import roofline
from minimoe.widgets.router_playground import router_playground
from minimoe.widgets.serving import serving
from minimoe.widgets.straggler import straggler
from minimoe.widgets.tile_layout import tile_layout
from minimoe.widgets.yardsticks import yardsticks

MADE_BY = (
    router_playground, calculator, roofline, balance_film, capacity_drops, tile_layout, yardsticks,
    live_router, serving, budget, rescue_router, straggler,
)  # fmt: skip
EXPLORABLES: dict[str, Callable[[], Explorable]] = {made.__name__: made for made in MADE_BY}

__all__ = [
    "EXPLORABLES",
    "Explorable",
    "balance_film",
    "budget",
    "calculator",
    "capacity_drops",
    "live_router",
    "rescue_router",
    "roofline",
    "router_playground",
    "serving",
    "straggler",
    "tile_layout",
    "yardsticks",
]
