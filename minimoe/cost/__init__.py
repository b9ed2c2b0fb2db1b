"""What models cost: parameters, FLOPs, bytes and the least time they take, by arithmetic alone.

Nothing here allocates a tensor; formulas are in the docstrings.
"""

from minimoe.cost.device import DEVICES, Device, Floor, get_device
from minimoe.cost.layer import (
    crossover_tokens,
    experts_touched,
    layer_bytes,
    layer_floor,
    layer_flops,
    layer_limit,
)

__all__ = [
    "DEVICES",
    "Device",
    "Floor",
    "crossover_tokens",
    "experts_touched",
    "get_device",
    "layer_bytes",
    "layer_floor",
    "layer_flops",
    "layer_limit",
]
