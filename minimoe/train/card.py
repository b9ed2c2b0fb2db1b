"""The card of a trained model: how it was made and how well it reads each domain. Written from the run's own files."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch

from minimoe.checkpoint import read_tensors, write_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError
from minimoe.io import atomic_write, write_text
from minimoe.text.documents import MAX_HELDOUT_CHARACTERS
from minimoe.text.domains import attributions
from minimoe.train.state import LOG, read_log


def write_card(folder: str | Path) -> str:
    """Write README.md beside the weights from recipe.json and log.jsonl, and return its text.

    Raises:
        CheckpointError: the folder holds no recipe or no finished log. WriteError: README.md cannot be written.
    """
    folder = Path(folder)
    try:
        recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        log = read_log(folder / LOG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no complete training run: {error}") from error
    final = [r for r in log if "heldout" in r]
    if not final:
        raise CheckpointError(f"{folder / LOG} holds no validation; let the run reach one first")
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
    # which routers do not give every token the same number
    mean_only = " on average" if config.router_type in ("expert_choice", "relu") else ""
    intro = (
        f"A decoder of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, with "
        f"{config.num_experts} SwiGLU experts of width {config.expert_size} in every layer, of which each token uses "
        f"{config.num_experts_per_tok}{mean_only}; made to study routing, not to answer questions. "
        "It continues text in the manner of what it read, and invents facts."
    )
    router = "" if config.router_type == "top_k" else f" --router {config.router_type}"
    how = (
        f"`python -m minimoe train --preset {recipe['preset']}{router}`: seed {training['seed']}, "
        f"{last['step']:,} steps, {last['tokens']:,} tokens "
        f"(windows of {training['seq_len']}, {training['batch_size']} a step, domains in equal shares), "
        f"AdamW, peak rate {training['lr']}, cosine to {training['final_lr']} of it, weight decay "
        f"{training['weight_decay']}, {balance_words(config)}, z-loss "
        f"{config.router_z_loss_coef}; {last['seconds'] / 60:.0f} minutes of optimiser steps on "
        f"{environment['hardware']} ({environment['threads']} thread(s), {environment['device']}, torch "
        f"{environment['torch']}, Python {environment['python']}, CPU products through "
        f"{environment['cpu_products']}). The weights are stored and used as bf16."
    )
    what = (
        f"Training text: sha256 `{data['sha256']}` over the token arrays. Two of the domains come with the Python "
        "installation (its standard library and SymPy), so another version of them gives other tokens and another "
        "hash. `recipe.json` holds every setting, `log.jsonl` every tenth step and every validation."
    )
    measured = (
        f"Mean over domains: {mean:.3f} nats per byte, measured on text of whole works that training never saw "
        f"({'all of it' if last['full'] else 'a sample'}), in windows of {training['seq_len']} tokens. Of long "
        f"held-out documents only the first {MAX_HELDOUT_CHARACTERS:,} characters are read, so their beginnings weigh "
        "more than their ends."
    )
    licence = (
        "CC BY-SA 4.0 for the weights, since they are trained on encyclopaedia text under that licence; the library's "
        "code is MIT. No text is contained. What was read:"
    )
    sources = attributions(list(heldout)).split("\n", 1)[1].strip()  # without its own title
    text = "\n\n".join(
        [
            f"# {recipe['preset']}: a small Mixtral-like language model",
            fill(intro),
            "## Recipe",
            fill(how),
            fill(what),
            "## Held-out loss",
            fill(measured),
            "| domain | training tokens | held-out tokens | nats per token | nats per byte |\n|---|---|---|---|---|\n"
            + rows,
            "## Licence",
            fill(licence),
            sources + "\n",
        ]
    )
    write_text(folder / "README.md", text)
    return text


def balance_words(config: ModelConfig) -> str:
    """What keeps the experts in use, for the recipe: 'Switch balancing loss 0.02 (mean over layers)'."""
    if config.router_aux_loss_type == "none":
        return "no balancing loss"
    kind = config.router_aux_loss_type.replace("_", " and ").capitalize()
    words = f"{kind} balancing loss {config.router_aux_loss_coef} (mean over layers)"
    if config.router_type == "relu" and config.router_aux_loss_type == "l1":
        words += " at the start, moved towards the wanted number of experts"
    if config.router_bias_update_rate:
        words += f", selection bias moved by {config.router_bias_update_rate} a step"
    return words


def fill(paragraph: str) -> str:
    """The paragraph in lines of at most 110 characters."""
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)


FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "recipe.json", "log.jsonl"
)  # fmt: skip


def release(run: str | Path, target: str | Path) -> Path:
    """Copy what a reader needs of the run folder `run` to `target`, and return `target`.

    Left behind is the state of the optimiser. The probes of all validations become one file, probe.safetensors:
    `step` [P] int32, `token` [rows, S] int32 and `expert` [P, T, L, K] uint8, the experts of the same held-out tokens
    as training went on.

    Raises:
        CheckpointError: a file of the run is missing.
    """
    run, target = Path(run), Path(target)
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        raise CheckpointError(f"{run} holds no finished run; missing: {', '.join(missing)}")
    for name in FILES:
        with atomic_write(target / name) as temporary:
            shutil.copyfile(run / name, temporary)
    write_card(target)
    probes = sorted((run / "probe").glob("*.safetensors"))
    if probes:
        tensors = [read_tensors(path) for path in probes]
        write_tensors(
            target / "probe.safetensors",
            {
                "step": torch.tensor([int(path.stem) for path in probes], dtype=torch.int32),
                "token": tensors[0]["token"],
                "expert": torch.stack([t["expert"] for t in tensors]),
            },
        )
    return target
