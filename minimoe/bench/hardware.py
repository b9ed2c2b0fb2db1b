"""What the measurements ran on, and what that machine reaches at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from minimoe.bench.timing import Clock, Work, make_clock, steady
from minimoe.cost import DEVICES, Device
from minimoe.linear import cpu_backend, linear, onednn_available
from minimoe.train.environment import processor_name

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux
USUAL_CACHE = 64 << 20  # bytes, where the system does not say
PACKAGES = ("transformers", "triton", "liger-kernel", "sonic-moe")


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Date, hardware, versions and load average, JSON-ready."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware_name(device),
        "device": device.type,
        "threads": threads,
        "torch": torch.__version__,
        "cpu_products": cpu_backend(),
        "versions": versions,
        "load_average": load_average(),
    }


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where the system does not say."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cache_bytes(device: torch.device, *, tiny: bool = False) -> int:
    """Size of the last-level cache: the GPU's L2, or the largest of the first core; 64 MiB where it is not told."""
    if tiny:
        return 1 << 15
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "L2_cache_size", USUAL_CACHE))
    sizes: list[int] = []
    for path in CACHES.glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()  # '32768K'
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=USUAL_CACHE)


def measure_device(
    device: torch.device, dtype: torch.dtype, threads: int | None = None, *, tiny: bool = False
) -> Device:
    """What a large matrix product and a large copy reach here and now, best of several: a floor that can be met."""
    clock = make_clock(device)
    n = 64 if tiny else 8192 if device.type == "cuda" else 1024
    numbers = 1 << (12 if tiny else 29 if device.type == "cuda" else 24)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = best(lambda: linear(a, b), clock, threads)
    copy = best(lambda: target.copy_(source), clock, threads)
    name = f"{hardware_name(device)} (measured)"
    return Device(name, 2 * n**3 / product, 2 * source.nbytes / copy)


def reachable(device: torch.device, measured: Device) -> Device:
    """The device that floors are taken from: an H200's are on record, any other's are those measured in this run."""
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        return DEVICES["h200"]
    return measured


def backend_rates(threads: int, *, tiny: bool = False) -> dict[str, float]:
    """FLOP/s of a float32 product on the CPU through each backend: 'mkl' (torch's own) and, where used, 'onednn'."""
    n = 64 if tiny else 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    clock = make_clock(torch.device("cpu"))
    rates = {"mkl": 2 * n**3 / best(lambda: torch.mm(a, b.t()), clock, threads)}
    if onednn_available():
        rates["onednn"] = 2 * n**3 / best(lambda: linear(a, b), clock, threads)
    return rates


def best(work: Work, clock: Clock, threads: int | None, times: int = 9) -> float:
    """The shortest of several calls in seconds, by the clock that `steady` takes; never 0."""
    work()
    return max(min(steady([clock.time(work) for _ in range(times)], threads)), 1e-9)
