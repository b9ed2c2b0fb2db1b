"""What a training run is told: its numbers, and the presets, of settings.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minimoe.config import ModelConfig, check_count
from minimoe.errors import ConfigError, choose

COUNTED = ("switch", "l1")  # balancing losses that can take the counts of the whole step

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
MODEL_OPTIONS: dict[str, str] = _TABLES["options"]


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
            parts, size = f"accumulate is {self.accumulate}", f"batch_size = {self.batch_size}"
            raise ConfigError(
                f"{parts}, which does not divide {size} evenly: parts are equally large"
            )
        choose("balance_scope", self.balance_scope, dict.fromkeys(("part", "step")))
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

    def windows(self, domains: int) -> int:
        """Sequences per domain in a validation during the run: `eval_windows`, or as many as a tenth of the time pays.

        A step takes about three times as long for a token as reading it does. A standard error needs two at least.
        """
        validations = self.steps // self.eval_every + 1
        paid = 0.3 * self.tokens / (validations * domains * self.seq_len)
        return max(2, min(self.eval_windows, int(paid) - 1))  # the probe reads one more


def require_fit(model: ModelConfig, config: TrainConfig) -> None:
    """A ConfigError where a model cannot be trained as the numbers say."""
    if (most := model.max_position_embeddings) < (length := config.seq_len):
        raise ConfigError(f"seq_len is {length}, but the model has positions for {most} tokens")
    if config.balance_scope == "step" and model.router_aux_loss_type not in COUNTED:
        raise ConfigError(
            f"balance_scope is 'step', but router_aux_loss_type is {model.router_aux_loss_type!r}: only "
            f"{' and '.join(COUNTED)} can count over the parts of a step"
        )


def with_router(config: ModelConfig, router_type: str, **changes: Any) -> ModelConfig:
    """The same architecture with another router, balanced as its paper does where `changes` do not say otherwise.

    Noisy top-k: importance and load, 0.1 each (Shazeer et al. 2017). Switch: K = 1, 0.01 (Fedus et al. 2021). Sigmoid:
    a bias moved by 0.001 a step and 1e-4 on each sequence (DeepSeek-V3). ReLU: the L1 loss, from 1e-8 on (ReMoE). BASE
    has K = 1, the dense ones K = E. Routers that are balanced by construction, or learn nothing, have no such loss. A
    ConfigError where there is no router of this name.
    """
    options = _TABLES["routers"].get(router_type, {"router_aux_loss_type": "none"})
    if router_type in ("dense", "average"):
        options = options | {"num_experts_per_tok": changes.get("num_experts", config.num_experts)}
    return config.replace(router_type=router_type, **options | changes)


def dense_twin(config: ModelConfig, equal: Literal["work", "held"]) -> ModelConfig:
    """The same model with one dense MLP in place of each sparse layer.

    'work': of width K·F, so a token passes through as many parameters as in the sparse model, less the router's D·E a
    layer. 'held': of width E·F, so the model holds as many, less the routers'. Shared experts add their width to both.
    """
    experts = {"work": config.num_experts_per_tok, "held": config.num_experts}
    width = choose("kind of equal size", equal, experts) * config.expert_size
    return config.replace(
        mlp_only_layers=tuple(range(config.num_hidden_layers)),
        intermediate_size=width + config.shared_size,
        moe_intermediate_size=None,
    )


def with_options(config: ModelConfig, given: dict[str, Any]) -> ModelConfig:
    """The model that the command line describes: `router`, `dense` and MODEL_OPTIONS, where they were given.

    Options that the model has no use for are a ConfigError.
    """
    changes = {field: given[name] for name, field in MODEL_OPTIONS.items() if name in given}
    if "dense" in given:
        return dense_twin(config.replace(**changes), "work")
    made = with_router(config, given["router"], **changes) if "router" in given else config
    made = made.replace(**changes)
    if "balance_coef" in given and made.router_aux_loss_type == "none":
        fault = (
            f"--balance-coef is {given['balance_coef']}, but there is no balancing loss to weigh"
        )
        raise ConfigError(f"{fault}: give --balance too, or leave it out")
    if given.get("balance", "none") != "none" or given.get("z_loss"):
        import torch

        from minimoe.model import MixtralModel

        # a small model of the kind shows what its router can be taught by
        small = made.replace(vocab_size=8, num_hidden_layers=1, mlp_only_layers=())
        out = MixtralModel(small)(ids := torch.arange(8)[None], ids)
        for name, loss in (("balance", out.aux_loss), ("z_loss", out.z_loss)):
            if name in given and loss is None:
                what = f"--{name.replace('_', '-')} is {given[name]}, but nothing in the {made.router_type!r}"
                raise ConfigError(
                    f"{what} router can be taught by it: leave it out, or choose another"
                )
    return made


TRAIN_PRESETS = {name: TrainConfig(**numbers) for name, numbers in _TABLES["presets"].items()}
