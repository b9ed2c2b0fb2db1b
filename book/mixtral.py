"""Claim C3, counted: what Mixtral 8x7B holds, and what one token uses.

python -m book.mixtral      into book/results/mixtral.json

Nothing is downloaded: the published config.json is stored with the tests, and models of that size are built without
memory. What is used is shown on a small model, by gradients. The rule is in minimoe/study/claims.toml.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import as_object  # noqa: E402
from minimoe import MixtralModel, ModelConfig  # noqa: E402
from minimoe.attention import KVCache  # noqa: E402
from minimoe.bench.timing import environment  # noqa: E402
from minimoe.cost import count_parameters  # noqa: E402
from minimoe.hf.translate import from_huggingface  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.study import claims as say  # noqa: E402

PUBLISHED = ROOT / "tests" / "published" / "mixtral-8x7b.json"
SMALL = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, tie_word_embeddings=False
)  # fmt: skip
NOISE = 1e-12  # of a tensor's largest gradient: what rounding leaves in float64


def held(values: dict[str, Any]) -> dict[str, int]:
    """Parameters of the model that a config.json means: by formula, and by size of the tensors in two libraries."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_huggingface(values)
    kind = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        ours = MixtralModel(config)
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values["model_type"], **kind)
        )
    return {
        "formula": count_parameters(config).total,
        "minimoe": sum(p.numel() for p in ours.parameters()),
        "transformers": sum(p.numel() for p in theirs.parameters()),
    }


def gradients(config: ModelConfig, context: int = 8) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Which entries of each tensor get a gradient from one token, and the token's experts in each layer.

    The context before it is in a cache, whose keys and values take no gradient: its own use of parameters must not
    count. Without a context the softmax of attention runs over one key, and the queries would get nothing.
    """
    torch.manual_seed(0)
    model = MixtralModel(config).double()
    ids = torch.randint(config.vocab_size, (1, context + 1))
    cache = KVCache(config.num_hidden_layers)
    with torch.no_grad():
        model(ids[:, :context], cache=cache)
    output = model(ids[:, context:], cache=cache)
    (output.logits[0, 0, 0] - output.logits.logsumexp(-1).sum()).backward()
    slopes = {n: p.grad.abs() for n, p in model.named_parameters() if p.grad is not None}
    return {n: g > NOISE * g.max() for n, g in slopes.items()}, [r.expert for r in output.routings]


def used(config: ModelConfig) -> dict[str, int]:
    """What one token uses of a small model: by formula, by gradients, what tells them apart, and what nothing does."""
    got, experts = gradients(config)
    counted: Counter[str] = Counter()
    for name, some in got.items():
        counted["gradient"] += int(some.sum())
        want = torch.ones_like(some)  # attention, norms and the head: all of it
        if "experts" in name or name.endswith("gate.weight"):
            want[:] = False
            want[experts[int(name.split(".")[1])]] = True
            counted["router"] += 0 if "experts" in name else int((~want).sum())
        elif name == "embed_tokens.weight":
            want = some.any(1, keepdim=True).expand_as(some)
            counted["embedding"] += int((~want).sum())
            counted["other"] += config.hidden_size * abs(int(want[:, 0].sum()) - 1)
        counted["other"] += int((some != want).sum())
    return {"formula": count_parameters(config).active, **counted}


def number(count: int) -> str:
    """12,879,925,248."""
    return f"{count:,}"


def finding(values: dict[str, Any]) -> say.Finding:
    """The claim, judged by its rule."""
    limit, counts, part = say.limits("C3"), held(values), used(SMALL)
    same = len({*counts.values()}) == 1
    total, active = counts["formula"], count_parameters(from_huggingface(values)).active
    explained = part["gradient"] + part["embedding"] + part["router"] == part["formula"]

    def verdict(count: int, told: str, off: str, others: bool) -> say.Verdict:
        near = abs(count / 1e9 - limit[told]) <= limit[off]
        return say.AGREES if near and others else say.DISAGREES

    parts = [
        say.Part(
            "held",
            ", ".join(f"{number(count)} by {how}" for how, count in counts.items()),
            verdict(total, "held", "half", same),
        ),
        say.Part(
            "used",
            f"{number(active)} by formula. In the small model {number(part['gradient'])} entries get a gradient from "
            f"one token, of {number(part['formula'])} by formula; the rest are {number(part['embedding'])} of the "
            f"embedding's other rows and {number(part['router'])} of the router's rows of experts that were not "
            f"chosen; entries of another kind: {part['other']}",
            verdict(active, "used", "near", explained and not part["other"]),
        ),
    ]
    remarks = (
        f"56 and 14 are {56e9 / total - 1:.0%} and {14e9 / active - 1:.0%} too many. The count of what is used takes "
        f"in the whole embedding, of which a token reads one row; without it {number(active - 32_000 * 4096)}.",
    )
    return say.finding("C3", parts, f"{total / 1e9:.2f} B held, {active / 1e9:.2f} B used", remarks)


def main() -> None:
    """Count and store."""
    found = finding(json.loads(PUBLISHED.read_text(encoding="utf-8")))
    result = environment(torch.device("cpu"), torch.get_num_threads())
    result |= {"command": "python -m book.mixtral", "findings": [as_object(found)]}
    write_text(ROOT / "book/results/mixtral.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
