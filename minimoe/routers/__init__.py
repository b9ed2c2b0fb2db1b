"""Routers: [T, D] -> Routing, one class per published router. Arithmetic in float32, noise in training only.

A router is one function, `route`; what it declares beside it (`is_causal`, `is_batch_invariant`, …) tests measure. Soft
MoE mixes tokens before the experts and is a layer of its own, in `minimoe.soft`.
"""

from minimoe.routers.balanced import BaseRouter, SinkhornRouter, balanced_assignment, sinkhorn
from minimoe.routers.base import Context, Router
from minimoe.routers.expert_choice import ExpertChoiceRouter
from minimoe.routers.make import make_router
from minimoe.routers.relu import ActiveRouting, ReLURouter
from minimoe.routers.sigmoid import SigmoidRouter
from minimoe.routers.simple import DenseRouter, HashRouter, MeanBinningRouter, UniformRouter
from minimoe.routers.topk import NoisyRouting, NoisyTopKRouter, SwitchRouter, TopKRouter

__all__ = [
    "ActiveRouting",
    "BaseRouter",
    "Context",
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
