"""The optimiser of a run, and its learning rate at each step."""

from __future__ import annotations

import math

import torch

from minimoe.model import MixtralModel
from minimoe.train.settings import TrainConfig


def make_optimizer(model: MixtralModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms (vectors) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (
        config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )
