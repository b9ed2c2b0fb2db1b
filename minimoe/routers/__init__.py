"""Routers: [T, D] -> Routing, one class per published router. Arithmetic in float32, noise in training only.

Every router declares `is_causal` and `is_batch_invariant`; tests measure both. Soft MoE mixes tokens before the
experts and is a layer of its own, in `minimoe.soft`.
"""

from minimoe.routers.balanced import BaseRouter, SinkhornRouter, balanced_assignment, sinkhorn
from minimoe.routers.base import Router
from minimoe.routers.expert_choice import ExpertChoiceRouter
from minimoe.routers.make import make_router
from minimoe.routers.relu import ActiveRouting, ReLURouter
from minimoe.routers.sigmoid import SigmoidRouter
from minimoe.routers.simple import DenseRouter, HashRouter, MeanBinningRouter, UniformRouter
from minimoe.routers.topk import NoisyRouting, NoisyTopKRouter, SwitchRouter, TopKRouter

__all__ = [
    "ActiveRouting",
    "BaseRouter",
    "DenseRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "MeanBinningRouter",
    "NoisyRouting",
    "NoisyTopKRouter",
    "ReLURouter",
    "Router",
    "SigmoidRouter",
    "SinkhornRouter",
    "SwitchRouter",
    "TopKRouter",
    "UniformRouter",
    "balanced_assignment",
    "make_router",
    "sinkhorn",
]
