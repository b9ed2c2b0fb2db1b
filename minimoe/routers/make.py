"""The router that a configuration names."""

from __future__ import annotations

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.routers.balanced import BaseRouter, SinkhornRouter
from minimoe.routers.base import Router
from minimoe.routers.expert_choice import ExpertChoiceRouter
from minimoe.routers.relu import ReLURouter
from minimoe.routers.sigmoid import SigmoidRouter
from minimoe.routers.simple import DenseRouter, HashRouter, MeanBinningRouter, UniformRouter
from minimoe.routers.topk import NoisyTopKRouter, SwitchRouter, TopKRouter


def make_router(config: ModelConfig) -> Router:
    """The router `config.router_type` of D, E and K as configured; its weight [E, D] drawn, nothing else.

    Jitter is for the softmax routers ('top_k', 'switch'); the 'hash' table is the random one of seed 0.

    Raises:
        ConfigError: 'soft', which is a layer and no router; or sizes that the router refuses.
    """
    d, e, k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    init, norm = config.initializer_range, config.norm_topk_prob
    jitter = config.router_jitter_noise
    match config.router_type:
        case "top_k":
            return TopKRouter(
                d, e, k, norm_topk_prob=norm, jitter_noise=jitter, initializer_range=init
            )
        case "switch":
            return SwitchRouter(d, e, jitter_noise=jitter, initializer_range=init)
        case "noisy_top_k":
            return NoisyTopKRouter(d, e, k, initializer_range=init)
        case "sigmoid":
            return SigmoidRouter(
                d, e, k, norm_topk_prob=norm, n_group=config.n_group, topk_group=config.topk_group,
                routed_scaling_factor=config.routed_scaling_factor, initializer_range=init,
            )  # fmt: skip
        case "expert_choice":
            factor = 1.0 if config.capacity_factor is None else config.capacity_factor
            return ExpertChoiceRouter(d, e, capacity_factor=k * factor, initializer_range=init)
        case "sinkhorn":
            return SinkhornRouter(d, e, k, norm_topk_prob=norm, initializer_range=init)
        case "base":
            return BaseRouter(d, e, initializer_range=init)
        case "relu":
            return ReLURouter(d, e, initializer_range=init)
        case "dense" | "average":
            return DenseRouter(
                d, e, average=config.router_type == "average", initializer_range=init
            )
        case "uniform":
            return UniformRouter(e, k)
        case "round_robin":
            return UniformRouter(e, k, order="round_robin")
        case "mean_binning":
            # the norm before the layer makes entries of variance 1, so a mean of D of them has deviation 1/√D
            return MeanBinningRouter(e, k, scale=d**-0.5)
        case "hash":
            return HashRouter(config.vocab_size, e, k)
        case _:
            raise ConfigError(
                f"router_type {config.router_type!r} is a layer of its own (minimoe.soft.SoftMoELayer), not a router"
            )
