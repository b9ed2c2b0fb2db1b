"""What models cost: parameters, FLOPs, bytes and the least time they take, by arithmetic alone.

Nothing here allocates a tensor; formulas are in the docstrings.
"""

from minimoe.cost.device import DEVICES, Device, get_device
from minimoe.cost.flops import decode_flops, forward_flops, kv_cache_bytes, training, weight_bytes
from minimoe.cost.layer import crossover_tokens, layer_bytes, layer_floor, layer_flops
from minimoe.cost.parameters import count_parameters, weights

__all__ = [
    "DEVICES", "Device", "count_parameters", "crossover_tokens", "decode_flops", "forward_flops", "get_device",
    "kv_cache_bytes", "layer_bytes", "layer_floor", "layer_flops", "training", "weight_bytes", "weights",
]  # fmt: skip
