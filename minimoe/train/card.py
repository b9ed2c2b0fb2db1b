"""The card of a trained model: how it was made and how well it reads each domain. Written from the run's own files."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError
from minimoe.io import read_object, write_text
from minimoe.text.documents import MAX_HELDOUT_CHARACTERS
from minimoe.text.domains import attributions
from minimoe.text.own import DOMAIN
from minimoe.train.settings import command
from minimoe.train.state import LOG, read_log


def write_card(folder: str | Path) -> str:
    """Write README.md beside the weights from recipe.json and log.jsonl, and return its text; card.md is its template.

    A folder without a recipe or a validation in its log is a CheckpointError.
    """
    folder = Path(folder)
    try:
        recipe = read_object(folder / "recipe.json", CheckpointError)
        log = read_log(folder / LOG)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds no complete training run: {error}") from error
    validations = [r for r in log if "heldout" in r]
    if not validations:
        raise CheckpointError(f"{folder / LOG} holds no validation; let the run reach one first")
    last = validations[-1]
    heldout: dict[str, dict[str, float]] = last["heldout"]
    domains, model = recipe["data"]["domains"], ModelConfig.from_dict(recipe["model"])
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    # what stands between brackets is of the library's own text
    own = DOMAIN in heldout
    template = re.sub(r"\[\[(.*?)\]\]", "" if own else r"\1", template, flags=re.DOTALL)
    text = template.format(
        recipe=recipe,
        **recipe | {"model": model},
        last=last,
        minutes=last["seconds"] / 60,
        mean=sum(loss["nats_per_byte"] for loss in heldout.values()) / len(heldout),
        read="all of it" if last["full"] else "a sample",
        longest=MAX_HELDOUT_CHARACTERS,
        balance=balance_words(model),
        command=command(recipe) + " --text PATH" * own,
        # with these routers, tokens do not all have the same number of experts
        on_average=" on average" if model.router_type in ("expert_choice", "relu") else "",
        rows="\n".join(
            f"| {name} | {domains[name]['train_tokens']:,} | {loss['tokens']:,} | {loss['nats_per_token']:.3f} | "
            f"{loss['nats_per_byte']:.3f} |"
            for name, loss in heldout.items()
        ),
    )
    # paragraphs in lines of at most 110 characters
    fit = functools.partial(
        textwrap.fill, width=110, break_long_words=False, break_on_hyphens=False
    )
    parts = [part if part[0] in "#|" else fit(part) for part in text.strip().split("\n\n")]
    sources = "The text is its trainer's own; what its licence asks for holds for the weights."
    if not own:
        sources = attributions(list(heldout)).split("\n", 1)[1].strip()  # without its own title
    text = "\n\n".join([*parts, sources + "\n"])
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
