"""The card of a model that a run has trained."""

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
from minimoe.train import state


def write_card(folder: str | Path) -> str:
    """Write README.md beside the weights: how the model was made and how well it reads each domain; return its text.

    Of the run's own recipe.json and log.jsonl; card.md is its template.

    A folder without a recipe or a validation in its log is a CheckpointError.
    """
    folder = Path(folder)
    fault = f"{folder} holds no complete training run"
    with explained(CheckpointError, lambda e: f"{fault}: {e}", CheckpointError):
        recipe = read_object(folder / "recipe.json", CheckpointError)
        validations = [r for r in state.read_log(folder / state.LOG) if "heldout" in r]
        if not validations:
            raise CheckpointError(f"{state.LOG} holds no validation; let it reach one first")
    last = validations[-1]
    own, longest = DOMAIN in last["heldout"], MAX_HELDOUT_CHARACTERS
    words: dict[str, Any] = {"last": last, "own": own, "longest": longest}
    if not own:  # the sources, without their title
        words["sources"] = attributions(list(last["heldout"])).split("\n", 1)[1].strip()
    jinja2: Any = importlib.import_module("jinja2")
    template = jinja2.Template(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
        trim_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    text = template.render(recipe | words | {"model": ModelConfig.from_dict(recipe["model"])})
    lines = textwrap.TextWrapper(110, break_long_words=False, break_on_hyphens=False)
    parts = [x if x[0] in "#|-" else lines.fill(x) for x in re.split(r"\n\n+", text.strip())]
    write_text(folder / "README.md", text := "\n\n".join(parts) + "\n")
    return text
