"""Memory of a call: what it keeps for the backward pass, and how much it needs at most."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for its backward pass, each storage once, without those of `without` (weights)."""
    known = {t.untyped_storage().data_ptr() for t in without}
    storages: dict[int, int] = {}
    keep: list[Tensor] = []  # or a freed address could come back as another tensor's

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            keep.append(t)
        return t

    def unpack(t: Tensor) -> Tensor:
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = forward()
    total = sum(storages.values())
    del out
    return total


def held_bytes(forward: Callable[[], Tensor], x: Tensor) -> int:
    """Bytes on a GPU that a forward pass leaves allocated for its backward pass: without its result, and with x.

    Other than `saved_bytes` it sees what a function keeps outside autograd's list.
    """
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    y = forward()
    torch.cuda.synchronize(x.device)
    return torch.cuda.memory_allocated(x.device) - before - y.nbytes + x.nbytes


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held during `work` beyond what it held before.

    On a CPU, what the libraries behind torch allocate for themselves (packed blocks of a product) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _cpu_peak(work)


def _cpu_peak(work: Callable[[], object]) -> int:
    """Peak of the allocations and releases that torch's profiler reports."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += int(event.nbytes())
        peak = max(peak, held)
    return peak
