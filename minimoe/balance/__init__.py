"""Keeping experts evenly used: losses, statistics, the bias controller, capacity and replicas.

One layer at a time; a model averages over its layers.
"""

from minimoe.balance.controllers import BiasController, SparsityController
from minimoe.balance.load import GlobalLoad, Load
from minimoe.balance.losses import (
    balance_loss,
    importance_loss,
    l1_loss,
    load_loss,
    selection_probability,
    sequence_loss,
    switch_loss,
    z_loss,
)
from minimoe.balance.replicas import ReplicaPlan, plan_replicas
from minimoe.capacity import DropStats, expert_capacity, limit_capacity, routing_capacity

__all__ = [
    "BiasController",
    "DropStats",
    "GlobalLoad",
    "Load",
    "ReplicaPlan",
    "SparsityController",
    "balance_loss",
    "expert_capacity",
    "importance_loss",
    "l1_loss",
    "limit_capacity",
    "load_loss",
    "plan_replicas",
    "routing_capacity",
    "selection_probability",
    "sequence_loss",
    "switch_loss",
    "z_loss",
]
