"""What a training run moves to keep experts in use, besides the loss: once per optimiser step, part of its state."""

from __future__ import annotations

from collections.abc import Sequence

from minimoe.balance import BiasController
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.routers import SigmoidRouter
from minimoe.routing import Routing
from minimoe.zoo.relu import SparsityController


class Balancing:
    """The controllers of a model, as its configuration asks for them.

    With `router_bias_update_rate` the selection bias of each sigmoid router moves against the load of the whole step;
    it is a buffer of the model and is saved with it. With the 'relu' router and the 'l1' loss, the weight of that loss
    starts at `router_aux_loss_coef` and moves until a token has `num_experts_per_tok` experts on average.

    Call `begin`, then `observe` with the routings of each part of the batch, then `step`. What is observed is what a
    forward pass returned, so a recomputed pass (activation checkpointing) counts once.
    """

    def __init__(self, model: MixtralModel) -> None:
        config = model.config
        layers = [b.mlp for b in model.layers if isinstance(b.mlp, MoELayer)]
        self.biases = [
            BiasController(layer.gate, config.router_bias_update_rate)
            for layer in layers
            if config.router_bias_update_rate > 0 and isinstance(layer.gate, SigmoidRouter)
        ]
        adaptive = config.router_type == "relu" and config.router_aux_loss_type == "l1"
        self.sparsity = (
            SparsityController(config.num_experts_per_tok, coefficient=config.router_aux_loss_coef)
            if adaptive and layers and config.router_aux_loss_coef > 0
            else None
        )

    @property
    def aux_loss_coef(self) -> float | None:
        """The weight that the balancing loss has now; None: the configured one."""
        return None if self.sparsity is None else self.sparsity.coefficient

    @aux_loss_coef.setter
    def aux_loss_coef(self, value: float | None) -> None:
        if self.sparsity is not None and value is not None:
            self.sparsity.coefficient = value

    def begin(self) -> None:
        """Forget what was seen of a step that did not end."""
        for controller in (*self.biases, self.sparsity):
            if controller is not None:
                controller.reset()

    def observe(self, routings: Sequence[Routing]) -> None:
        """Count the routings of one forward pass, one of each sparse layer."""
        if self.biases:
            for controller, routing in zip(self.biases, routings, strict=True):
                controller.observe(routing)
        if self.sparsity is not None:
            for routing in routings:
                self.sparsity.observe(routing)

    def step(self) -> None:
        """Move once, by what was counted since `begin`."""
        for controller in (*self.biases, self.sparsity):
            if controller is not None:
                controller.step()
