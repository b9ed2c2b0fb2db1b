"""Checks of lesson 02: experts. One file for each task."""

from minimoe.check.lesson02.disagreement import error_of_average
from minimoe.check.lesson02.gate import mixture_gradient
from minimoe.check.lesson02.mixture import dense_mixture
from minimoe.check.lesson02.wide import wide_mlp

__all__ = ["dense_mixture", "error_of_average", "mixture_gradient", "wide_mlp"]
