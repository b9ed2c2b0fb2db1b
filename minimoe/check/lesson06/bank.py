"""Experts to call, which keep count: what the tasks of lesson 06 hand to a learner's function as `run`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from minimoe.check.forms import draw


class Bank:
    """Experts to call: bank(rows [n, D], e) -> [n, D], each a small function of its own that is not linear.

    They work number by number, so that a row has the same result in every company, bit for bit. In bfloat16
    results are eighths: their sum with weights in 1024ths is exact in float32, in any order. Keeps how often each was
    called and on how many rows.
    """

    def __init__(self, num_experts: int, hidden_size: int, seed: int) -> None:
        self.num_experts = num_experts
        self.scale = draw(seed, num_experts, hidden_size)
        self.shift = draw(seed + 1, num_experts, hidden_size)
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls: Counter[int] = Counter()
        self.rows = 0
        self.types: set[torch.dtype] = set()

    def __call__(self, rows: Tensor, expert: int) -> Tensor:
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"run was called with expert {expert}; they are 0 to {self.num_experts - 1}"
            )
        self.calls[expert] += len(rows) > 0
        self.rows += len(rows)
        self.types |= {rows.dtype} if len(rows) else set()
        out = (rows.float() * self.scale[expert] + self.shift[expert]).abs()
        return ((8 * out).round() / 8).bfloat16() if rows.dtype == torch.bfloat16 else out

    def __str__(self) -> str:
        return f"{self.num_experts} experts"
