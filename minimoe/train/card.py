"""The card of a trained model: how it was made and how well it reads each domain. Written from the run's own files."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, explained
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
    fault = f"{folder} holds no complete training run"
    with explained(CheckpointError, lambda e: f"{fault}: {e}", CheckpointError):
        recipe = read_object(folder / "recipe.json", CheckpointError)
        validations = [r for r in read_log(folder / LOG) if "heldout" in r]
    if not validations:
        raise CheckpointError(f"{folder / LOG} holds no validation; let the run reach one first")
    last, model = validations[-1], ModelConfig.from_dict(recipe["model"])
    jinja2: Any = importlib.import_module("jinja2")
    template = jinja2.Template(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
        trim_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    words = {"last": last, "command": command(recipe)}
    words |= {"own": DOMAIN in last["heldout"], "longest": MAX_HELDOUT_CHARACTERS}
    text = template.render(**recipe | {"model": model}, **words)
    lines = textwrap.TextWrapper(110, break_long_words=False, break_on_hyphens=False)
    parts = re.split(r"\n\n+", text.strip())
    parts = [part if part[0] in "#|" else lines.fill(part) for part in parts]
    if not words["own"]:
        sources = attributions(list(last["heldout"]))
        parts.append(sources.split("\n", 1)[1].strip())  # without its own title
    write_text(folder / "README.md", text := "\n\n".join(parts) + "\n")
    return text
