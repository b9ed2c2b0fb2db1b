"""What models cost: parameters, FLOPs, bytes and the least time they take, by arithmetic alone.

Nothing here allocates a tensor; formulas are in the docstrings.
"""

from minimoe.cost.device import DEVICES, Device, Floor, get_device
from minimoe.cost.flops import decode_flops, forward_flops, kv_cache_bytes, weight_bytes
from minimoe.cost.layer import (
    crossover_tokens,
    experts_touched,
    layer_bytes,
    layer_floor,
    layer_flops,
)
from minimoe.cost.parameters import Count, Parameters, Weights, count_parameters, weights
from minimoe.cost.report import cost_report, cost_table
from minimoe.cost.time import Training, decode_floor, prefill_floor, training

__all__ = [
    "DEVICES", "Count", "Device", "Floor", "Parameters", "Training", "Weights", "cost_report", "cost_table",
    "count_parameters", "crossover_tokens", "decode_floor", "decode_flops", "experts_touched", "forward_flops",
    "get_device", "kv_cache_bytes", "layer_bytes", "layer_floor", "layer_flops", "prefill_floor", "training",
    "weight_bytes", "weights",
]  # fmt: skip
