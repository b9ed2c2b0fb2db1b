"""Answers to the tasks of lesson 01."""

from typing import Any

import torch
import torch.nn.functional as F


class Swiglu(Any):
    task = "01.1"

    def right_in_float64(x, w1, w3, w2):
        return (F.silu(x.double() @ w1.double().T) * (x.double() @ w3.double().T)) @ w2.double().T

    def wrong_by_hand(x, w1, w3, w2):
        """says: The output is right and its gradient is not: exp(-a) overflows"""
        gate = x @ w1.T
        return (gate / (1 + torch.exp(-gate)) * (x @ w3.T)) @ w2.T

    def wrong_gate_detached(x, w1, w3, w2):
        """says: gradient by x is not"""
        return (F.silu(x @ w1.T).detach() * (x @ w3.T)) @ w2.T


class BlockCost(Any):
    task = "01.2"

    def right_as_a_list_of_floats(T, D, F):
        forward = 2.0 * T * (F * D + F * D + D * F)
        return [3.0 * D * F, forward, forward * 3]


class Roofline(Any):
    task = "01.3"

    def right_in_float32(T, D, F, size, peak, bandwidth):
        times = [6.0 * T * D * F / peak, (3.0 * D * F + 2 * T * D) * size / bandwidth]
        return torch.tensor(times).max()


class BitsRemembered(Any):
    task = "01.4"

    def right_in_float32(loss, facts, answers):
        known = torch.tensor(float(answers)).log() - torch.tensor(loss)
        return facts * torch.clamp(known, min=0) / torch.tensor(2.0).log()
