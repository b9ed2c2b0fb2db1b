"""What a training run is told: its numbers, and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minimoe.config import ModelConfig, check_count
from minimoe.errors import ConfigError

BALANCE_SCOPES = ("part", "step")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run besides the model and the text."""

    steps: int  #: optimiser steps
    batch_size: int = 16  #: sequences per step; domains take turns, so each gets the same share
    seq_len: int = 256  #: tokens per sequence
    #: peak learning rate of AdamW (Loshchilov & Hutter 2019); weight decay on matrices only
    lr: float = 2e-3
    warmup: int = 100  #: steps of linear warm-up; then a cosine down to `final_lr` · lr
    final_lr: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  #: largest global gradient norm
    seed: int = 0
    eval_every: int = 250  #: steps between validations on held-out text; also at the end
    #: sequences per domain in those validations; the last one reads all held-out text
    eval_windows: int = 16
    save_every: int = 250  #: steps between checkpoints; also at the end and at an interrupt
    log_every: int = 10
    #: parts into which the sequences of a step are divided; read one after the other, they give the same step in
    #: less memory
    accumulate: int = 1
    #: what balancing losses count when there are parts: 'part', each balances itself; 'step', the share of each
    #: expert is that of the whole step, counted in a pass beforehand (Qiu et al. 2025)
    balance_scope: str = "part"

    def __post_init__(self) -> None:
        counts = "steps batch_size eval_every eval_windows save_every log_every accumulate"
        # a token is predicted from those before it
        for name, least in (*((n, 1) for n in counts.split()), ("seq_len", 2), ("warmup", 0)):
            check_count(name, getattr(self, name), least)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate is {self.accumulate}, which does not divide batch_size = {self.batch_size} evenly: "
                "parts have to be equally large"
            )
        if self.balance_scope not in BALANCE_SCOPES:
            raise ConfigError(
                f"balance_scope is {self.balance_scope!r}; known are {', '.join(BALANCE_SCOPES)}"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not self.lr > 0 or not self.clip > 0:
            raise ConfigError(f"lr is {self.lr} and clip is {self.clip}; both must be positive")

    @property
    def step_tokens(self) -> int:
        """Tokens that one step processes."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens that the run processes."""
        return self.steps * self.step_tokens


# How each router is trained in its paper. Where K is not given, it is that of the preset.
ROUTER_OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "noisy_top_k": {"router_aux_loss_type": "importance_load", "router_aux_loss_coef": 0.1},
    "switch": {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.01},
    "sigmoid": {
        "router_bias_update_rate": 0.001, "router_aux_loss_type": "sequence", "router_aux_loss_coef": 1e-4
    },
    "base": {"num_experts_per_tok": 1, "router_aux_loss_type": "none"},
    "relu": {"router_aux_loss_type": "l1", "router_aux_loss_coef": 1e-8},
}  # fmt: skip


def with_router(config: ModelConfig, router_type: str) -> ModelConfig:
    """The same architecture with another router, balanced as its paper does.

    Noisy top-k: importance and load, 0.1 each (Shazeer et al. 2017). Switch: K = 1, 0.01 (Fedus et al. 2021). Sigmoid:
    a bias moved by 0.001 a step and 1e-4 on each sequence (DeepSeek-V3). ReLU: the L1 loss, from 1e-8 on (ReMoE). BASE
    has K = 1, the dense ones K = E. Routers that are balanced by construction, or learn nothing, have no such loss.

    Raises:
        ConfigError: no router of this name.
    """
    options = ROUTER_OPTIONS.get(router_type, {"router_aux_loss_type": "none"})
    if router_type in ("dense", "average"):
        options = options | {"num_experts_per_tok": config.num_experts}
    return config.replace(router_type=router_type, **options)


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "nano": TrainConfig(
        steps=60, batch_size=8, seq_len=64, lr=5e-3, warmup=10, eval_every=30, save_every=20
    ),
    "mini": TrainConfig(steps=7500, batch_size=16, seq_len=256),
    "small": TrainConfig(steps=6000, batch_size=64, seq_len=512, lr=1e-3, warmup=200),
}
