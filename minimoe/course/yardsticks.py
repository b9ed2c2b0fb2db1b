"""Dense against sparse in the smallest language model: the arms of lesson 09, one run, and a plan of runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.balance import Load, switch_loss
from minimoe.config import ModelConfig
from minimoe.course.characters import Characters, NextCharacter
from minimoe.course.compare import arm_config
from minimoe.course.plan import Numbers, Piece, read_pieces, read_tables, recipe, run_missing
from minimoe.experts import MLP
from minimoe.layers import MoELayer
from minimoe.routing import Routing

BLOCK = 1000  # held-out characters whose losses are stored as one sum
POINTS = 12  # of a curve


@dataclass(frozen=True)
class Training:
    """What a run is told: Adam, whose rate falls from `lr` to 0 in a straight line."""

    lr: float
    seed: int
    steps: int
    batch_size: int = 256  #: predicted characters a step
    balance: float = 0.01  #: weight of Switch's balancing loss; for a learned router only


class Reader(NextCharacter):
    """A next-character model whose layer is the MLP or the sparse layer of a configuration.

    Args:
        config: V, D and the layer, which is dense if `mlp_only_layers` names it.
        told: of a hash router; how many characters back lies the one whose id it is told, 1 the last.
    """

    def __init__(self, config: ModelConfig, told: int = 1) -> None:
        d, init = config.hidden_size, config.initializer_range
        dense = bool(config.mlp_only_layers)
        mlp = MLP(d, config.intermediate_size, initializer_range=init) if dense else None
        super().__init__(config.vocab_size, mlp or MoELayer(config), d)
        self.told = told

    def forward(self, context: Tensor) -> tuple[Tensor, Routing | None]:
        """context [T, S] -> logits [T, V] and the layer's routing, None where it is dense."""
        places = torch.arange(context.shape[1], device=context.device)
        h = self.embedding[places, context].sum(dim=1)  # [T, D]
        h = F.rms_norm(h, h.shape[-1:])
        if isinstance(self.layer, MoELayer):
            y, routing = self.layer(h, token_ids=context[:, -self.told])
        else:
            y, routing = self.layer(h), None
        return F.rms_norm(h + y, h.shape[-1:]) @ self.head.T, routing


def reader(config: ModelConfig, arm: str) -> Reader:
    """The model of an arm: as in `course.compare`, and 'hash-2', which is told the last character but one."""
    name, _, told = arm.partition("-")
    return Reader(arm_config(config, name), int(told or 1))


def sizes(model: Reader) -> dict[str, int]:
    """Parameters held, those that a character uses outside the embedding, and FLOPs of training on one character."""
    held = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layer.parameters())
    if isinstance(model.layer, MoELayer):
        bank, gate = model.layer.experts, model.layer.gate
        layer -= (
            sum(p.numel() for p in bank.parameters())
            * (gate.num_experts - gate.k)
            // gate.num_experts
        )
    used = layer + model.head.numel()
    return {"held": held, "used": used, "flops": 6 * used}


@torch.no_grad()
def heldout_blocks(model: Reader, text: Characters, limit: int | None = None) -> Tensor:
    """Mean nats of each whole block of BLOCK held-out characters, in their order; of the first `limit` blocks."""
    windows = text.ids[text.cut :].unfold(0, 9, 1)
    count = len(windows) // BLOCK if limit is None else limit
    nats = [
        F.cross_entropy(model(part[:, :-1])[0], part[:, -1])
        for part in windows[: count * BLOCK].split(BLOCK)
    ]
    return torch.stack(nats)


def train(model: Reader, training: Training, text: Characters) -> dict[str, Any]:
    """Train and return what a piece stores: `loss`, `blocks`, `seconds` of the processor, `max_vio` and the `curve`.

    The curve has rows of step, loss on the first eight held-out blocks and seconds; MaxVio is the mean over the last
    tenth of the steps, and None where there is no router. Batches depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    learned = isinstance(model.layer, MoELayer) and any(True for _ in model.layer.gate.parameters())
    seconds, curve, violations = 0.0, list[list[float]](), list[float]()
    for step in range(1, training.steps + 1):
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * (1 - (step - 1) / training.steps)
        context, target = text.batch(generator, training.batch_size)
        logits, routing = model(context)
        loss = F.cross_entropy(logits, target)
        if routing is not None and learned:
            loss = loss + training.balance * switch_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.process_time() - started
        if routing is not None and step > 0.9 * training.steps:
            violations.append(Load.of(routing).max_vio)
        if step % max(1, training.steps // POINTS) == 0:
            part = heldout_blocks(model, text, 8).mean().item()
            curve.append([step, round(part, 4), round(seconds, 2)])
    blocks = heldout_blocks(model, text)
    return {
        "loss": round(blocks.mean().item(), 5),
        "seconds": round(seconds, 2),
        "max_vio": round(sum(violations) / len(violations), 3) if violations else None,
        "curve": curve,
        "blocks": [round(x, 4) for x in blocks.tolist()],
    }


def one_run(config: ModelConfig, arm: str, training: Training, text: Characters) -> dict[str, Any]:
    """A model made from the seed, and trained."""
    torch.manual_seed(training.seed)
    return train(reader(config, arm), training, text)


def read_plan(path: Path, text: Characters) -> list[Piece]:
    """The pieces of a plan, each with the sparse model of which its arm is made.

    Its `model` is a table of ModelConfig.

    Raises:
        ConfigError: the file is no such plan.
    """
    stages, model = read_tables(path, "model")
    given = {"vocab_size": len(text.letters), "num_hidden_layers": 1} | model

    def made(_: str, own: Numbers, chosen: Numbers) -> tuple[ModelConfig, Training]:
        own = given | own
        own["initializer_range"] = own["hidden_size"] ** -0.5
        return ModelConfig(**own), Training(**chosen)

    return read_pieces(path, stages, made)


def run_plan(path: Path) -> None:
    """Run the pieces that have no file yet.

    Raises:
        ConfigError: a file is of another model, training or text than the plan has; it stays.
    """
    text = Characters.documentation()
    run_missing(
        read_plan(path, text),
        lambda piece: recipe(piece, text=text.sha256),
        lambda piece: one_run(piece.model, piece.arm, piece.training, text),
    )
