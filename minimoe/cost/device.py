"""What hardware can do at best: FLOP/s and bytes/s, and the time floor that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from minimoe.errors import ConfigError, did_you_mean


class Floor(NamedTuple):
    """A lower bound on a time, after the roofline model (Williams et al. 2009): arithmetic and traffic may overlap."""

    seconds: float  #: the longer of the two
    limit: str  #: which of the two it is, 'compute' or 'memory'
    compute: float  #: seconds that the arithmetic takes alone
    memory: float  #: seconds that the traffic with memory takes alone


@dataclass(frozen=True)
class Device:
    """An accelerator as two numbers."""

    name: str  #: what it is, and whose figures these are
    #: of dense bf16 matrix products accumulated in float32, unless the name says otherwise
    flops_per_second: float
    bytes_per_second: float  #: between the chip and its own memory
    memory_bytes: float | None = None  #: of that memory; None: not known

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and self.bytes_per_second > 0):
            speeds = f"{self.flops_per_second} FLOP/s and {self.bytes_per_second} bytes/s"
            raise ConfigError(f"device {self.name!r} has {speeds}; both must be positive")

    def floor(self, flops: float, moved: float) -> Floor:
        """The least time for `flops` operations and `moved` bytes."""
        compute, memory = flops / self.flops_per_second, moved / self.bytes_per_second
        return Floor(
            *max((compute, "compute"), (memory, "memory"), key=lambda x: x[0]), compute, memory
        )


# 'h200' is what a large matrix product and a large copy reach on the card, so a floor from it can be met. All others
# are dense peaks of the makers' data sheets, which programs stay below: the H200 by 20 % of FLOP/s, 10 % of bytes/s.
# NVIDIA's sheets for H200 and H100 say 1,979 TFLOP/s with sparsity, half of it without; the T4 has no bf16; the RTX
# 4090 is from the GeForce Ada architecture paper, bf16 with float32 accumulation.
DEVICES: dict[str, Device] = {
    "h200": Device("H200 (reachable)", 790e12, 4.3e12, 141e9),
    "h200-peak": Device("H200 SXM (data sheet)", 989.5e12, 4.8e12, 141e9),
    "h100": Device("H100 SXM (data sheet)", 989.5e12, 3.35e12, 80e9),
    "a100": Device("A100 SXM 80 GB (data sheet)", 312e12, 2.039e12, 80e9),
    "a100-40gb": Device("A100 SXM 40 GB (data sheet)", 312e12, 1.555e12, 40e9),
    "l4": Device("L4 (data sheet)", 121e12, 0.3e12, 24e9),
    "t4": Device("T4 (data sheet, fp16)", 65e12, 0.32e12, 16e9),
    "rtx4090": Device("RTX 4090 (data sheet)", 165.2e12, 1.008e12, 24e9),
    "mi300x": Device("MI300X (data sheet)", 1307.4e12, 5.3e12, 192e9),
}


def get_device(name: str) -> Device:
    """The device of this name in `DEVICES`; another name is a ConfigError."""
    if name not in DEVICES:
        near = did_you_mean(name, DEVICES)
        raise ConfigError(f"unknown device {name!r}; {near}known are {', '.join(DEVICES)}")
    return DEVICES[name]
