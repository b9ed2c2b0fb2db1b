"""The card of a trained model: how it was made and how well it reads each domain. Written from the run's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError
from minimoe.io import write_text
from minimoe.train.corpus import attributions


def write_card(folder: str | Path) -> str:
    """Write README.md beside the weights from recipe.json and log.jsonl, and return its text.

    Raises:
        CheckpointError: the folder holds no recipe or no finished log.
    """
    folder = Path(folder)
    try:
        recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        log: list[dict[str, Any]] = [
            json.loads(x) for x in (folder / "log.jsonl").read_text("utf-8").splitlines()
        ]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no complete training run: {error}") from error
    final = [r for r in log if "heldout" in r]
    if not final:
        raise CheckpointError(
            f"{folder / 'log.jsonl'} holds no validation; let the run reach one first"
        )
    last = final[-1]
    config = ModelConfig.from_dict(recipe["model"])
    training, environment, data = recipe["training"], recipe["environment"], recipe["data"]
    heldout: dict[str, dict[str, float]] = last["heldout"]
    mean = sum(loss["nats_per_byte"] for loss in heldout.values()) / len(heldout)
    rows = "\n".join(
        f"| {name} | {data['domains'][name]['train_tokens']:,} | {loss['tokens']:,} | {loss['nats_per_token']:.3f} | "
        f"{loss['nats_per_byte']:.3f} |"
        for name, loss in heldout.items()
    )
    text = f"""# {recipe["preset"]}: a small Mixtral-like language model

A decoder of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, with {config.num_experts} SwiGLU experts of
width {config.expert_size} in every layer, of which each token uses {config.num_experts_per_tok}; made to study routing, not to
answer questions. It continues text in the manner of what it read, and invents facts.

## Recipe

`python -m minimoe train --preset {recipe["preset"]}` · seed {training["seed"]} · {last["step"]:,} steps ·
{last["tokens"]:,} tokens (windows of {training["seq_len"]}, {training["batch_size"]} a step, domains in equal shares) · AdamW, peak
rate {training["lr"]}, cosine to {training["final_lr"]} of it, weight decay {training["weight_decay"]} · Switch balancing loss
{config.router_aux_loss_coef} per layer, z-loss {config.router_z_loss_coef} · {last["seconds"] / 60:.0f} minutes of optimiser
steps on {environment["hardware"]} ({environment["threads"]} threads, {environment["device"]}, torch {environment["torch"]},
Python {environment["python"]}, CPU products through {environment["cpu_products"]}).
The weights are stored and used as bf16. Training text: sha256 `{data["sha256"]}` over the token arrays.
`recipe.json` holds every setting, `log.jsonl` every tenth step and every validation.

## Held-out loss

Mean over domains: {mean:.3f} nats per byte, measured on text of whole works that training never saw
({"all of it" if last["full"] else "a sample"}), in windows of {training["seq_len"]} tokens.

| domain | training tokens | held-out tokens | nats per token | nats per byte |
|---|---|---|---|---|
{rows}

## Licence

CC BY-SA 4.0 for the weights, since they are trained on encyclopaedia text under that licence; the library's code is MIT.
No text is contained; the sources were:

{attributions(list(heldout))}
"""
    write_text(folder / "README.md", text)
    return text
