"""Claims C4 and C6 by their rules, from the stored measurement of serving: `python -m minimoe bench --suite serve`.

python -m book.serving      counts what imbalance costs (C16), into book/results/imbalance.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import as_object  # noqa: E402
from minimoe import MixtralModel  # noqa: E402
from minimoe.bench.timing import environment  # noqa: E402
from minimoe.course.seeds import mean  # noqa: E402
from minimoe.io import write_object  # noqa: E402
from minimoe.study import claims as say  # noqa: E402
from minimoe.study.chance import Band  # noqa: E402
from minimoe.text.corpus import Corpus, load_corpus  # noqa: E402


def judge(result: dict[str, Any]) -> list[say.Finding]:
    """What the rules of both claims say of a result of the suite."""
    return [_batches(result), _first_token(result)]


def ratio(result: dict[str, Any], what: str, batch: float, tokens: float, to: str) -> Band:
    """Time of the sparse model over that of the dense one of equal 'work', or equal size, 'held', at a point."""
    key = (what, batch, tokens)
    (found,) = (
        p[f"to_{to}"] for p in result["points"] if (p["what"], p["batch"], p["tokens"]) == key
    )
    return Band(found["median"], *(found["interval"] or ()))


def below(what: str, band: Band, least: float, *, decides: bool = True) -> say.Part:
    """A part that agrees if an interval lies below `least`, and disagrees if it lies above."""
    return say.Part(what, say.factor(band), say.inside(band, most=least), decides, band)


def _batches(result: dict[str, Any]) -> say.Finding:
    limits = say.limits("C4")
    ours, same = result["models"]["moe"], result["models"]["held"]
    (touched,) = (t for t in result["touched"] if t["batch"] == limits["batch"])
    share = mean(np.array(touched["means"]) / touched["experts"])
    memory, work = ours["parameters"] / same["parameters"], ours["flops"] / same["flops"]
    fits: say.Verdict = "agrees" if abs(memory - 1) <= limits["same"] else "disagrees"
    less: say.Verdict = "agrees" if work < limits["less"] else "disagrees"
    batch = f"{limits['batch']:g} sequences"
    step = ratio(result, "decode", limits["batch"], result["context"], "held")
    parts = [
        say.Part(
            f"experts, {batch}", say.share(share), say.above(share, limits["most"]), True, share
        ),
        say.Part("memory, over the dense model's", say.times(memory), fits),
        say.Part("FLOPs, over the dense model's", say.times(work), less),
        below("time of a step, over the dense model's", step, 1, decides=False),
    ]
    short = f"{say.share(share, 0)} of the experts for {batch}; memory {say.times(memory)}, FLOPs "
    return say.finding("C4", parts, f"{short}{say.times(work)} of the dense model's")


def _first_token(result: dict[str, Any]) -> say.Finding:
    limits = say.limits("C6")
    long, even = f"one prompt of {limits['prompt']:,.0f} tokens", limits["even"]
    many = f"{limits['batch']:g} prompts of {limits['each']:g} tokens"
    one = ratio(result, "prefill", 1, limits["prompt"], "held")
    work = ratio(result, "prefill", 1, limits["prompt"], "work")
    several = ratio(result, "prefill", limits["batch"], limits["each"], "held")
    short = min(p["tokens"] for p in result["points"] if p["what"] == "prefill")
    few = ratio(result, "prefill", 1, short, "held")
    parts = [
        below(long, one, even),
        below(many, several, even),
        below(f"one prompt of {short} tokens", few, even, decides=False),
        below(f"{long}, over the dense model of equal work", work, even, decides=False),
    ]
    said = f"{say.times(one.value)} of the time of a dense model of equal size, {say.times(work.value)} of that "
    return say.finding("C6", parts, f"{said}of one of equal work, for {long}")


def lost(expert: Tensor, experts: int) -> Tensor:
    """Share of the time of a worker for each expert that is lost, of the choices [S, N] of each step: [S]."""
    rows = torch.stack([e.bincount(minlength=experts) for e in expert])
    return 1 - rows.double().mean(1) / rows.max(1).values


def dealt(corpus: Corpus, batch: int, tokens: int) -> Tensor:
    """The first tokens [batches, batch, tokens] of held-out documents, one of each work, in random order."""
    split = corpus.heldout
    works = {
        (d.domain, d.work): split.tokens[at : at + tokens].astype(np.int64)
        for d, at in zip(split.documents, split.offsets, strict=False)
        if d.tokens > tokens
    }
    order = np.random.default_rng(0).permutation(len(works))[: len(works) // batch * batch]
    return torch.from_numpy(np.stack(list(works.values()))[order]).view(-1, batch, tokens)


@torch.no_grad()
def waiting(model: MixtralModel, text: Tensor) -> dict[str, Any]:
    """What uniform choices lose in a step, and each layer [batches] in `steps` and in reading a batch at `once`."""
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    torch.manual_seed(0)
    draws = torch.rand(20_000, text.shape[1], experts).topk(k).indices.flatten(1)
    found: list[list[list[float]]] = []
    for ids in text:
        of_batch = [r.expert.view(*ids.shape, k) for r in model(ids, logits_to_keep=1).routings]
        ways = [(x.transpose(0, 1).flatten(1), x.reshape(1, -1)) for x in of_batch]
        found.append([[float(lost(x, experts).mean()) for x in way] for way in ways])
    steps, once = np.array(found).round(4).transpose(2, 1, 0).tolist()
    return {"uniform": round(float(lost(draws, experts).mean()), 4), "steps": steps, "once": once}


def imbalance(counted: dict[str, Any]) -> say.Finding:
    """C16's price by its rule, from what `waiting` counted."""
    limits, layers = say.limits("C16, its time"), len(counted["steps"])
    parts: list[say.Part] = []
    for layer in sorted({1, (layers + 1) // 2, layers}):
        steps, once = (mean(np.array(counted[way][layer - 1])) for way in ("steps", "once"))
        over = Band(*(x - counted["uniform"] for x in (steps.value, steps.low, steps.high)))
        found = f"{say.share(over)} of the workers' time beyond uniform choices' {say.percent(counted['uniform'])}"
        words = f"{found}; a batch that is read at once loses {say.share(once)} in all"
        where = say.of_layers(layer, layers)
        parts.append(say.Part(where, words, say.above(over, limits["more"]), True, over))
    spread = say.spread([100 * part.effect.value for part in parts], 0)
    short = f"{spread} % of the workers' time is lost in a step, beyond what uniform choices lose"
    return say.finding("C16, its time", parts, short)


def main() -> None:
    """Count and store."""
    torch.set_num_threads(1)
    limits = say.limits("C16, its time")
    text = dealt(load_corpus(), int(limits["batch"]), int(limits["tokens"]))
    counted = waiting(MixtralModel.from_pretrained("mini").eval(), text)
    result = environment(torch.device("cpu"), 1) | {"command": "python -m book.serving"}
    result |= {"findings": [as_object(imbalance(counted))], "batches": len(text)} | counted
    write_object(ROOT / "book/results/imbalance.json", result)


if __name__ == "__main__":
    main()
