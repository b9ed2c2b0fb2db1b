"""The live router: the shipped model, in int8, reads any text in the page and shows which experts read its tokens.

examples.toml  texts to begin with
export.py      what the page needs of the model, as one safetensors file
tokenizer.js   byte-level BPE
model.js       the forward pass; what is float32 and what float64 stands there
engine.js      a worker that runs both
tour.js        six steps through what there is to be seen
view.js, widget.js   what is seen
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minimoe.checkpoint import pretrained_path
from minimoe.errors import MinimoeError
from minimoe.hf.lazy import quantize_experts
from minimoe.model import MixtralModel
from minimoe.text.domains import DOMAINS
from minimoe.text.tokenizer import begin_of_text_id, load_tokenizer
from minimoe.widgets.explorable import Explorable
from minimoe.widgets.live_router.export import FILE, export, spellings, weights
from minimoe.widgets.live_router.figure import draw

HERE = Path(__file__).resolve().parent
EXAMPLES: list[dict[str, str]] = tomllib.loads((HERE / "examples.toml").read_text("utf-8"))[
    "example"
]
RESULT = HERE.parents[2] / "book" / "results" / "live_router.json"


def measured(checkpoint: str | Path = "mini") -> dict[str, Any]:
    """The stored measurement of a model: agreement of int8 with the full weights, and each domain's load.

    Raises:
        MinimoeError: it is not there.
    """
    path, other = RESULT, "" if checkpoint == "mini" else f" --checkpoint {checkpoint}"
    if other:
        path = pretrained_path(checkpoint) / RESULT.name
    if not path.is_file():
        raise MinimoeError(
            f"{path} is not there; in the repository, run: python book/live_router.py{other}"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def live_router(checkpoint: str | Path = "mini", *, compact: bool = False) -> Explorable:
    """Any text, token by token: its experts at each layer, what it costs, and the load beside that of ten domains.

    `checkpoint` is the shipped model, or the folder of one that was trained like it.

    It begins with a recorded run of the first example; `compact` shows no more than its tokens until the reader starts
    the model.
    """
    path = pretrained_path(checkpoint)
    full = MixtralModel.from_pretrained(path)
    model = quantize_experts(full)
    config, result = model.config, measured(checkpoint)
    layers, experts = config.num_hidden_layers, config.num_experts
    run = record(model, EXAMPLES[0]["text"], load_tokenizer(path))
    words = [bytes(spelling).decode().strip() for spelling in run["bytes"]]
    first = torch.tensor(run["probs"]).view(len(words), layers, experts).argmax(dim=2) + 1
    shown = {layer: first[:, layer - 1].tolist() for layer in (1, (layers + 1) // 2, layers)}
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
        "name": None if checkpoint == "mini" else path.name,
        "layers": layers,
        "experts": experts,
        "k": config.num_experts_per_tok,
        "parameters": model.num_parameters(),
        "bytes": sum(tensor.nbytes for tensor in weights(full).values()),
        "domains": domains,
        "examples": EXAMPLES,
        "agreement": {
            **{key: sum(result[key]) / layers for key in ("same_set", "same_first")},
            **{key: result[key] for key in ("tokens", "date", "command")},
        },
        "recorded": run,
        "compact": compact,
    }
    return Explorable(
        "live_router", data=data, draw=lambda: draw(words, shown), alt=alt,
        files={FILE: lambda: export(checkpoint)},
    )  # fmt: skip


@torch.no_grad()
def record(
    model: MixtralModel, text: str, tokenizer: Tokenizer, likeliest: int = 8
) -> dict[str, Any]:
    """What the page's reader posts for a text, from PyTorch, rounded.

    Returns:
        bytes: [S] lists, of each token. probs: [S·L·E], flat. costs: [S], nats that each token cost. next: the
        likeliest tokens after the text, each with its bytes and probability `p`.
    """
    spelled = spellings(tokenizer)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    output = model(torch.tensor([[begin_of_text_id(tokenizer, own=True), *tokens]]))
    probs = torch.stack([routing.probs[1:] for routing in output.routings], dim=1)  # [S, L, E]
    logs = output.logits[0].log_softmax(dim=-1)  # [S + 1, V]
    costs = -logs[:-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
    top = logs[-1].exp().topk(likeliest)
    return {
        "text": text,
        "only": None,
        "cut": False,
        "tokens": tokens,
        "bytes": [spelled[token] for token in tokens],
        "probs": [round(p, 4) for p in probs.flatten().tolist()],
        "costs": [round(cost, 3) for cost in costs.tolist()],
        "next": [
            {"token": token, "bytes": spelled[token], "p": round(p, 4)}
            for token, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    }
