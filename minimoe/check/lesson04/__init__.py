"""Checks of lesson 04: load balancing. One file for each task."""

from minimoe.check.lesson04.bias import bias_step
from minimoe.check.lesson04.capacity import kept_tokens
from minimoe.check.lesson04.museum import balance_of_layers
from minimoe.check.lesson04.switch import switch_loss

__all__ = ["balance_of_layers", "bias_step", "kept_tokens", "switch_loss"]
