"""Checks of lesson 01: the dense MLP. One file for each task."""

from minimoe.check.lesson01.block import swiglu
from minimoe.check.lesson01.capacity import bits_remembered
from minimoe.check.lesson01.cost import block_cost
from minimoe.check.lesson01.roofline import roofline

__all__ = ["bits_remembered", "block_cost", "roofline", "swiglu"]
