"""What attention has to fetch, in two small tasks and in a text: the arms of lesson 16, one run, a plan of runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.attention import make_attention, make_place
from minimoe.balance import switch_loss
from minimoe.config import ModelConfig
from minimoe.course.characters import Characters
from minimoe.course.plan import Numbers, Piece, read_pieces, read_tables, recipe, run_missing
from minimoe.errors import TraceError
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routers import Context
from minimoe.routing import Routing
from minimoe.study.record import Layers, MinimoeSource, chosen_layers

SYMBOLS, COMMANDS = 16, 4
NEAR, FAR = 1, 3  # places back
# what each command makes of a symbol: fixed permutations [COMMANDS, SYMBOLS]
TABLE = torch.stack(
    [torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(c)) for c in range(COMMANDS)]
)
BALANCE = 0.01  # of a mixture of attention heads, as Switch has it


def answers(task: str, ids: Tensor) -> Tensor:
    """What is asked at each place of ids [B, S] from FAR on: [B, S − FAR, answers].

    'places': two answers, the symbol NEAR and the one FAR back. 'commands': one, which the token at the place itself
    makes of the symbol NEAR back: the token's remainder by COMMANDS says with which permutation.
    """
    near, far = ids.roll(NEAR, 1), ids.roll(FAR, 1)
    both = [near, far] if task == "places" else [TABLE[ids % COMMANDS, near]]
    return torch.stack(both, dim=-1)[:, FAR:]


class OneAttention(nn.Module):
    """An embedding, one attention of the configuration and a linear readout for each answer; there is no MLP."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__()
        self.config, d = config, config.hidden_size
        self.embedding = nn.Embedding(SYMBOLS, d)
        self.attention = make_attention(config)
        self.readout = nn.Parameter(torch.randn(count, SYMBOLS, d) * d**-0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """ids [B, S] -> (scores [B, S − FAR, answers, SYMBOLS], the attention's routings of the T = B·S tokens)."""
        x = self.embedding(ids)
        h = F.rms_norm(x, x.shape[-1:])
        place = make_place(ids, None, None, self.config)
        y, routings = self.attention(h, place, Context(ids.flatten()))
        h = F.rms_norm(h + y, h.shape[-1:])[:, FAR:]
        return torch.einsum("bsd,avd->bsav", h, self.readout), routings


@dataclass(frozen=True)
class Training:
    """What a run is told: Adam, whose rate falls from `lr` to 0 in a straight line."""

    task: str  #: 'places', 'commands' or 'text'
    lr: float
    seed: int
    steps: int
    batch_size: int = 32  #: sequences a step
    length: int = 32  #: tokens of each


def build(config: ModelConfig, training: Training) -> MixtralModel | OneAttention:
    """The model of a run, made from the seed."""
    torch.manual_seed(training.seed)
    if training.task == "text":
        return MixtralModel(config)
    return OneAttention(config, 2 if training.task == "places" else 1)


def train(
    model: MixtralModel | OneAttention, training: Training, text: Characters | None = None
) -> dict[str, Any]:
    """Train and return what a piece stores: `loss`, `right`, the `curve` of losses, `seconds` of the processor.

    `loss` is the mean of what is held out, in nats: of 'text' all windows of the last tenth, of the tasks 256 new
    sequences, of which `right` is the share of each answer. Batches depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    shape, curve, started = (training.batch_size, training.length), [], time.process_time()
    for step in range(1, training.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * (1 - (step - 1) / training.steps)
        if isinstance(model, MixtralModel):
            assert text is not None
            start = torch.randint(text.cut - shape[1], (shape[0],), generator=generator)
            ids = text.ids[start[:, None] + torch.arange(shape[1])]
            output = model(ids, ids)
            loss, lm_loss = output.loss, output.lm_loss
        else:
            ids = torch.randint(SYMBOLS, shape, generator=generator)
            scores, routings = model(ids)
            lm_loss = F.cross_entropy(scores.flatten(0, 2), answers(training.task, ids).flatten())
            mixed = len(routings) == 1  # SwitchHead has two and is not balanced
            loss = lm_loss + BALANCE * switch_loss(routings[0]) if mixed else lm_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, training.steps // 12) == 0:
            curve.append([step, round(lm_loss.item(), 4)])
    seconds = time.process_time() - started
    found = heldout(model.eval(), training, text)
    return {**found, "seconds": round(seconds, 2), "curve": curve}


@torch.no_grad()
def heldout(
    model: MixtralModel | OneAttention, training: Training, text: Characters | None = None
) -> dict[str, Any]:
    """`loss` in nats on what is held out, and of the two tasks the share of `right` answers."""
    if isinstance(model, MixtralModel):
        assert text is not None
        windows = text.ids[text.cut :].unfold(0, training.length, training.length)
        parts = [model(part, part).lm_loss.item() * len(part) for part in windows.split(64)]
        return {"loss": round(sum(parts) / len(windows), 5)}
    ids = torch.randint(SYMBOLS, (256, training.length), generator=torch.Generator().manual_seed(1))
    target, scores = answers(training.task, ids), model(ids)[0]
    loss = F.cross_entropy(scores.flatten(0, 2), target.flatten())
    right = (scores.argmax(-1) == target).double().mean((0, 1))
    return {"loss": round(loss.item(), 5), "right": [round(x, 4) for x in right.tolist()]}


def read_plan(path: Path, text: Characters) -> list[Piece]:
    """The pieces of a plan, each with the model of its arm.

    Its `model` is a table of ModelConfig that all arms share, `attention` has a table for each arm.

    Raises:
        ConfigError: the file is no such plan.
    """
    stages, shared, arms = read_tables(path, "model", "attention")

    def made(arm: str, own: Numbers, chosen: Numbers) -> tuple[ModelConfig, Training]:
        training = Training(**chosen)
        layers = 2 if training.task == "text" else 1
        sizes = {
            "vocab_size": len(text.letters) if training.task == "text" else SYMBOLS,
            "num_hidden_layers": layers,
            "mlp_only_layers": tuple(range(layers)),
            "initializer_range": shared["hidden_size"] ** -0.5,
        }
        return ModelConfig(**sizes, **shared, **arms[arm], **own), training

    return read_pieces(path, stages, made)


def run_plan(path: Path) -> None:
    """Run the pieces that have no file yet.

    Raises:
        ConfigError: a file is of another model, training or text than the plan has; it stays.
    """
    text = Characters.documentation()
    text_of = ({}, {"text": text.sha256})  # of the small tasks none, and of text
    run_missing(
        read_plan(path, text),
        lambda piece: recipe(piece, **text_of[piece.training.task == "text"]),
        lambda piece: train(build(piece.model, piece.training), piece.training, text),
    )


class AttentionSource(MinimoeSource):
    """The choices of a minimoe model's attention, to be given in the model's place.

    SwitchHead has two sides, 'value' and 'output', whose experts are numbered h·E + e over the heads (see
    `SwitchHeadRouting`); MoA has 'output' alone. A TraceError where there is no such side.
    """

    def __init__(self, model: MixtralModel, side: str = "output", layers: Layers = None) -> None:
        c = model.config
        heads = {
            "switchhead": {"value": c.num_key_value_heads, "output": c.num_attention_heads},
            "moa": {"output": 1},
        }.get(c.attention_type, {})
        if side not in heads:
            has = f"chooses on the sides {', '.join(heads)}" if heads else "chooses nothing"
            raise TraceError(f"side is {side!r}, but attention of type {c.attention_type!r} {has}")
        self.model: nn.Module = model
        self._side, self._random = list(heads).index(side), None
        self._last: Any = nn.Module()  # `read` leaves no MLP out
        self.layers = chosen_layers(range(1, c.num_hidden_layers + 1), layers)
        self.num_experts = heads[side] * c.attention_num_experts
        self.max_length = c.max_position_embeddings

    def _routings(self, output: ModelOutput) -> list[Routing]:
        return [output.attention_routings[layer - 1][self._side] for layer in self.layers]
