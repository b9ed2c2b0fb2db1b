"""What a run has from its machine and its process: device, precision, CPU settings, Ctrl-C, the processor's name."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from minimoe.cpu import cpu_backend
from minimoe.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU where there is one; what is absent, or neither a CPU nor a CUDA GPU, is a ConfigError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = "cpu" if name == "auto" and not gpus else "cuda" if name == "auto" else name
    if not (fits := re.fullmatch(r"(?:cpu|(cuda))(?::(\d+))?", device)):
        raise ConfigError(f"device {name!r} is not one that training uses; give auto, cpu or cuda")
    if fits[1] and int(fits[2] or 0) >= gpus:
        found = f"this torch ({torch.__version__}) finds {gpus} CUDA GPUs, from 0"
        hint = "use --device cpu, or install a CUDA build of torch and a driver"
        raise ConfigError(f"device {name!r} was asked for, but {found}; {hint}")
    return torch.device(device)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextlib.contextmanager
def fast_cpu() -> Generator[None]:
    """Settings of the process that make small models train faster on a CPU; none changes a normal number.

    Without them, buffers as large as the logits go back to the system after each step and are zeroed at the next, and
    numbers below 1e-38, which the tails of a softmax produce, are computed in slow microcode. The settings of malloc
    stay for the life of the process.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def unbroken() -> Generator[None]:
    """Hold Ctrl-C, and SIGTERM where it is handled, back until the block is done, an update that must be whole."""
    held: list[int] = []
    # signals reach Python's main thread only
    there = threading.current_thread() is threading.main_thread()
    both = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if there}
    handlers = {n: handler for n, handler in both.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def provenance(device: torch.device) -> dict[str, Any]:
    """What the last bits and the speed of a computation hang on: the machine, and the versions of what computes."""
    return {
        "device": device.type,
        "hardware": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_products": cpu_backend(),
    }


def processor_name(device: torch.device | None = None) -> str:
    """The model of the processor, or of the GPU that `device` is, for labels of measurements."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if named := re.search(r"^model name[^:\n]*:(.*)", text, re.MULTILINE):
            return f"{named[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
