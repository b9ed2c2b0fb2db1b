"""What a training run is told: its numbers, and the presets."""

from __future__ import annotations

from dataclasses import dataclass

from minimoe.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run besides the model and the text.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step; domains take turns, so each gets the same share.
        seq_len: tokens a sequence.
        lr: peak learning rate of AdamW (Loshchilov & Hutter 2019); weight decay on matrices only.
        warmup: steps of linear warm-up; then a cosine down to `final_lr` · lr.
        clip: largest global gradient norm.
        eval_every: steps between validations on held-out text; also at the end.
        eval_windows: sequences per domain in those validations; the last one reads all held-out text.
        save_every: steps between checkpoints; also at the end and at an interrupt.
    """

    steps: int
    batch_size: int = 16
    seq_len: int = 256
    lr: float = 2e-3
    warmup: int = 100
    final_lr: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 250
    eval_windows: int = 16
    save_every: int = 250
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "eval_every",
            "eval_windows",
            "save_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seq_len < 2:
            raise ConfigError(
                "seq_len is 1; a token is predicted from those before it, so give at least 2"
            )
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}; it must be 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not self.lr > 0 or not self.clip > 0:
            raise ConfigError(f"lr is {self.lr} and clip is {self.clip}; both must be positive")

    @property
    def tokens(self) -> int:
        """Tokens the run processes."""
        return self.steps * self.batch_size * self.seq_len


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "nano": TrainConfig(
        steps=60, batch_size=8, seq_len=64, lr=5e-3, warmup=10, eval_every=30, save_every=20
    ),
    "mini": TrainConfig(steps=7500, batch_size=16, seq_len=256),
    "small": TrainConfig(steps=6000, batch_size=64, seq_len=512, lr=1e-3, warmup=200),
}
