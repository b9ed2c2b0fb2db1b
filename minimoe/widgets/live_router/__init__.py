"""The live router: the shipped model, in int8, reads any text in the page and shows which experts read its tokens.

export.py      what the page needs of the model, as one safetensors file
tokenizer.js   byte-level BPE
model.js       the forward pass up to the last router; what is float32 and what float64 stands there
engine.js      a worker that runs both
view.js, widget.js   what is seen
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minimoe.checkpoint import pretrained_path
from minimoe.errors import MinimoeError
from minimoe.experts_int8 import quantize_experts
from minimoe.model import MixtralModel
from minimoe.train.domains import DOMAINS
from minimoe.train.tokens import begin_of_text_id, load_tokenizer
from minimoe.widgets.explorable import Explorable
from minimoe.widgets.live_router.examples import EXAMPLES
from minimoe.widgets.live_router.export import FILE, export
from minimoe.widgets.live_router.figure import draw

RESULT = Path(__file__).resolve().parents[3] / "book" / "results" / "live_router.json"


def measured() -> dict[str, Any]:
    """The stored measurement: agreement of int8 with the full weights, and each domain's load.

    Raises:
        MinimoeError: it is not there, or of other weights.
    """
    if not RESULT.is_file():
        raise MinimoeError(
            f"{RESULT} is not there; in the repository, run: python book/live_router.py"
        )
    return json.loads(RESULT.read_text(encoding="utf-8"))


def live_router() -> Explorable:
    """Any text, token by token: its experts at each layer, their weights, and the load beside that of ten domains."""
    path = pretrained_path("mini")
    model = MixtralModel.from_pretrained(path)
    config, result = model.config, measured()
    layers, experts = config.num_hidden_layers, config.num_experts
    words, first = first_experts(model, EXAMPLES[0][2])
    shown = {layer: first[layer] for layer in (1, (layers + 1) // 2, layers)}
    alt = (
        f"The {len(words)} tokens of a sentence, each with the number of the expert that the shipped model, in int8, "
        "chooses first. "
        + " ".join(
            f"Layer {layer}: {', '.join(f'{word} {e}' for word, e in zip(words, chosen, strict=True))}."
            for layer, chosen in shown.items()
        )
    )
    domains = [
        {
            "name": d["name"],
            "title": DOMAINS[d["name"]].title,
            "load": [[round(share, 4) for share in layer] for layer in d["load"]],
        }
        for d in result["domains"]
    ]
    data = {
        "layers": layers,
        "experts": experts,
        "k": config.num_experts_per_tok,
        "parameters": model.num_parameters(),
        "domains": domains,
        "examples": [{"name": n, "domain": d, "text": text} for n, d, text in EXAMPLES],
        "agreement": {
            **{key: sum(result[key]) / layers for key in ("same_set", "same_first")},
            **{key: result[key] for key in ("tokens", "date", "command")},
        },
    }
    return Explorable(
        "live_router", data=data, draw=lambda: draw(words, shown), alt=alt, files={FILE: export}
    )


@torch.no_grad()
def first_experts(model: MixtralModel, text: str) -> tuple[list[str], dict[int, list[int]]]:
    """The tokens of `text`, written out, and by layer (from 1) the first expert of each (from 1), in int8."""
    tokenizer = load_tokenizer(pretrained_path("mini"))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([[begin_of_text_id(tokenizer, own=True), *tokens.ids]])
    routings = quantize_experts(model)(ids, logits_to_keep=1).routings
    words = [text[start:end].strip() or "␣" for start, end in tokens.offsets]
    k = model.config.num_experts_per_tok
    return words, {
        layer: (routing.expert.view(-1, k)[1:, 0] + 1).tolist()
        for layer, routing in enumerate(routings, 1)
    }
