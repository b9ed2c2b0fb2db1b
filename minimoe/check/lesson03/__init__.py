"""Checks of lesson 03: routing. One file for each task."""

from minimoe.check.lesson03.gradient import gate_gradient
from minimoe.check.lesson03.museum import batch_independent_weights
from minimoe.check.lesson03.noise import noisy_router
from minimoe.check.lesson03.orders import choose_then_weigh
from minimoe.check.lesson03.router import top_k_router

__all__ = [
    "batch_independent_weights",
    "choose_then_weigh",
    "gate_gradient",
    "noisy_router",
    "top_k_router",
]
