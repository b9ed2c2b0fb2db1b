"""What routing is worth in the shipped model: the rules, and the table that they judge.

    python -m book.counterfactuals     into book/results/counterfactuals.json (half an hour on one core)

Texts are the beginnings of held-out documents, after an end-of-text mark, and none of those that
`study --further` reads. A token's usual experts are read from training text.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from minimoe.checkpoint import pretrained_path
from minimoe.course import further as fu
from minimoe.io import write_text
from minimoe.model import MixtralModel
from minimoe.study import chance as ch
from minimoe.study.claims import AGREES, UNKNOWN, above
from minimoe.study.record import documents_of
from minimoe.study.report import rounded, surroundings
from minimoe.text.corpus import load_corpus
from minimoe.text.tokenizer import begin_of_text_id, load_tokenizer
from minimoe.train.environment import today

RESULT = Path(__file__).resolve().parent / "results" / "counterfactuals.json"
TEXTS, SIZE, ELSEWHERE, SKIPPED = 8, 128, 32, 12

# Written down before any of these texts was read; seen before: book/results/further.json, of other texts.
RULES = {
    "weights": "The choice of experts matters more than their weights: random experts in all layers cost more than "
    "five times what even weights cost (95 % interval of the ratio).",
    "dictionary": "A layer is a dictionary if each token id's usual experts cost less than 5 % of what random experts "
    "cost there, and uses context if they cost more than 10 % (95 % interval of the ratio).",
    "identity": "It matters in a layer which expert is off if the costs of its eight experts, each less the cost of as "
    "many refusals scattered over all experts, differ by more than trading experts within works gives: p < 0.05/6.",
    "load": "Load predicts need if the correlation of load and cost over a layer's eight experts, pooled over layers, "
    "lies above 0.5 with its 95 % interval, and does not if it lies below.",
    "function": "How far a layer's output moves tells more of the cost than how many choices change, if its rank "
    "correlation with the cost, over all changes of single layers, is larger (95 % interval of the difference).",
}
MORE, DICTIONARY, CONTEXT, P, NEED = 5, 0.05, 0.1, 0.05 / 6, 0.5
RANDOM, EVEN, USUAL = "random experts", "even weights", "usual experts of the token id"


class Table:
    """Costs of changes, text by text, paired with what the model does when it is left alone."""

    def __init__(self, model: MixtralModel, texts: Tensor, unit: Any) -> None:
        """texts [B, S]; unit [B], the number of each one's work."""
        self.model, self.texts, self.unit = model, texts, unit
        self.layers = range(1, len(model.layers) + 1)
        self.outputs: dict[int, Tensor] = {}
        self.blocks: list[Any] = []
        with self.watched(self.outputs, self.layers) as hooks:
            for block in model.layers:
                hook = block.register_forward_hook(lambda _, x, out: self.blocks.append(out))
                hooks.callback(hook.remove)
            self.nats, self.own = fu.token_losses(model, texts)
        self.cost: dict[tuple[str, int | None], Any] = {}  # [B] each
        self.same: dict[
            tuple[str, int | None], float
        ] = {}  # share of the own choices that are kept
        self.moved: dict[
            tuple[str, int | None], float
        ] = {}  # |change of the layer's output|² / |output|²

    def watched(self, kept: dict[int, Tensor], layers: Any) -> Any:
        """Inside, the outputs of these layers' experts are kept."""
        hooks = contextlib.ExitStack()
        for n in layers:

            def keep(_: Any, args: object, out: Any, n: int = n) -> None:
                kept[n] = out[0]

            sparse = self.model.get_submodule(f"layers.{n - 1}.mlp")
            hooks.callback(sparse.register_forward_hook(keep).remove)
        return hooks

    def change(self, name: str, changes: Mapping[int, fu.Change]) -> None:
        """Measure one change: of one layer, or of all."""
        layer = next(iter(changes)) if len(changes) == 1 else None
        after: dict[int, Tensor] = {}
        with (
            fu.overruled(self.model, changes),
            self.watched(after, changes if layer else ()) as hooks,
        ):
            for block, out in zip(self.model.layers[: (layer or 1) - 1], self.blocks, strict=False):
                block.forward = lambda *_, out=out: out  # nothing changes before the layer
                hooks.callback(delattr, block, "forward")
            nats, chosen = fu.token_losses(self.model, self.texts)
        self.cost[name, layer] = (nats - self.nats).double().mean(1).numpy()
        if layer:
            own, new = self.own[layer - 1], chosen[layer - 1]
            self.same[name, layer] = float((own[:, :, None] == new[:, None]).any(2).float().mean())
            y = self.outputs[layer]
            self.moved[name, layer] = float((after[layer] - y).square().sum() / y.square().sum())
        print(f"{name}, {layer or 'all'}: {self.cost[name, layer].mean():.3f}", flush=True)


def texts_of(split: Any, domains: list[str], begin: int | None, first: int, number: int) -> Any:
    """[B, S] beginnings of `number` long documents of each domain, from the `first` on; [B] (domain, work)."""
    ids, works = list[Any](), list[tuple[str, str]]()
    for domain in domains:
        long = [x for x in zip(*documents_of(split, (domain,)), strict=True) if len(x[1]) >= SIZE]
        for i in np.linspace(first, len(long) - 1, number).round().astype(int):
            ids.append([begin, *long[i][1][: SIZE - 1].tolist()])
            works.append((domain, long[i][0].work or long[i][0].id))
    return torch.tensor(ids), works


def measure(model: MixtralModel, texts: Tensor, unit: Any, other: Tensor, each: int) -> Table:
    """All changes; `each` is how many texts a domain has, one after the other."""
    table, e, rng = Table(model, texts, unit), model.config.num_experts, torch.Generator()
    elsewhere = fu.token_losses(model, other)[1]
    ids, place = texts.flatten(), torch.arange(len(texts)).view(-1, each)

    def usual(i: int) -> fu.Change:
        return fu.replayed(fu.usual_experts(other.flatten(), elsewhere[i], ids, table.own[i], e))

    def replay(i: int, axis: int) -> fu.Change:
        chosen = table.own[i].view(len(texts), -1, table.own[i].shape[1])
        return fu.replayed(chosen[place.roll(1, axis).flatten()].flatten(0, 1))

    every: dict[str, Any] = {
        RANDOM: lambda i: fu.at_random(i),
        "ranks 2 and 3": lambda i: fu.by_rank(2),
        "last two ranks": lambda i: fu.by_rank(-1),
        EVEN: lambda i: fu.by_rank(1, even=True),
        USUAL: usual,
        "replay of a text of the domain": lambda i: replay(i, 1),
        "replay of a text of another domain": lambda i: replay(i, 0),
    }
    for name, make in every.items():
        table.change(name, {n: make(n - 1) for n in table.layers})
        for n in table.layers:
            table.change(name, {n: make(n - 1)})
    for n in table.layers:
        own = table.own[n - 1].view(len(texts), -1, table.own[n - 1].shape[1])
        for x in range(e):
            table.change(f"expert {x + 1} off", {n: fu.without(x)})
            order = torch.rand(own.shape[:2], generator=rng.manual_seed(x)).argsort(1)
            scattered = (own == x).gather(1, order[:, :, None].expand_as(own)).flatten(0, 1)
            table.change(f"as many as expert {x + 1}", {n: fu.refused(scattered)})
    return table


def fisher(r: float, n: float) -> ch.Band:
    """A correlation with its 95 % interval from about n pairs."""
    ends = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / math.sqrt(n - 3))
    return ch.Band(r, *ends)


def judged(table: Table, strata: Any, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Every cost with its interval over works, and what the rules say."""
    rng, unit = np.random.default_rng(seed), table.unit
    weights = ch.bootstrap_weights(strata, draws, rng)
    size, layers, e = np.bincount(unit), table.layers, table.model.config.num_experts
    summed = {key: np.bincount(unit, x) for key, x in table.cost.items()}
    drawn = {key: weights @ x / (weights @ size) for key, x in summed.items()}
    mean = {key: float(x.mean()) for key, x in table.cost.items()}

    def band(value: Any, more: Any) -> ch.Band:
        return ch.Band(value, *ch.percentile(more))

    def ratio(a: Any, b: Any) -> ch.Band:
        return band(mean[a] / mean[b], drawn[a] / drawn[b])

    weigh = ratio((RANDOM, None), (EVEN, None))
    said: dict[str, Any] = {"weights": {"ratio": weigh.to_dict(), "verdict": above(weigh, MORE)}}
    said["dictionary"], said["identity"], scores = [], [], []
    for n in layers:
        part = ratio((USUAL, n), (RANDOM, n))
        kind = (
            "dictionary" if part.high < DICTIONARY else "context" if part.low > CONTEXT else UNKNOWN
        )
        said["dictionary"].append({"ratio": part.to_dict(), "verdict": kind})
        off, alike = (
            np.stack([summed[name.format(x + 1), n] for x in range(e)], 1)
            for name in ("expert {} off", "as many as expert {}")
        )
        less = off - alike  # [U, E]
        spread = less.mean(0).var()
        null = [rng.permuted(less, axis=1).mean(0).var() for _ in range(draws)]
        p = (1 + sum(x >= spread for x in null)) / (1 + draws)
        total = (weights @ less).sum(1) / (weights @ size) / e
        rest = band(float(less.sum() / size.sum() / e), total)
        own = {"p": p, "beyond_scattered": rest.to_dict(), "verdict": AGREES if p < P else UNKNOWN}
        said["identity"].append(own)
        load = np.bincount(table.own[n - 1].flatten(), minlength=e) / table.own[n - 1].numel()
        need = np.array([mean[f"expert {x + 1} off", n] for x in range(e)])
        scores.append(np.stack([load, need]))
    single = [fisher(np.corrcoef(s)[0, 1], e) for s in scores]
    # within layers: eight experts less one mean in each
    deviation = [(s - s.mean(1, keepdims=True)) / s.std(1, keepdims=True) for s in scores]
    pooled = fisher(float(np.mean([d[0] * d[1] for d in deviation])), len(layers) * (e - 1) + 1)
    said["load"] = {
        "pooled": pooled.to_dict(), "layers": [x.to_dict() for x in single],
        "load": [s[0].tolist() for s in scores], "verdict": above(pooled, NEED),
    }  # fmt: skip
    keys = [key for key in table.same if not key[0].startswith("as many")]
    values, every = np.array([mean[key] for key in keys]), np.stack([drawn[key] for key in keys], 1)

    def ranked(x: Any, y: Any) -> Any:
        x, y = (rankdata(a, axis=-1) for a in (x, y))
        x, y = (a - a.mean(-1, keepdims=True) for a in (x, y))
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    moved, kept = (np.array([x[key] for key in keys]) for x in (table.moved, table.same))
    both = {"moved": moved, "changed": 1 - kept}
    bands = {k: band(float(ranked(x, values)), ranked(x[None], every)) for k, x in both.items()}
    gap = band(
        bands["moved"].value - bands["changed"].value,
        ranked(moved[None], every) - ranked(1 - kept[None], every),
    )
    said["function"] = {
        **{k: b.to_dict() for k, b in bands.items()},
        "difference": gap.to_dict(), "verdict": above(gap, 0),
    }  # fmt: skip
    rows = [
        {
            "change": name, "layer": n, "cost": band(mean[name, n], drawn[name, n]).to_dict(),
            "same": table.same.get((name, n)), "moved": table.moved.get((name, n)),
        }
        for name, n in mean
    ]  # fmt: skip
    return {"rows": rows, "verdicts": said}


def main() -> None:
    """Measure and store."""
    folder, model = pretrained_path("mini"), MixtralModel.from_pretrained("mini").eval()
    tokenizer = load_tokenizer(folder)
    corpus, begin = load_corpus(tokenizer=tokenizer), begin_of_text_id(tokenizer, own=True)
    domains = [d for d in corpus.domains if d != "questions"]
    texts, works = texts_of(corpus.heldout, domains, begin, SKIPPED, TEXTS)
    other, _ = texts_of(corpus.train, domains, begin, 0, ELSEWHERE)
    number = {work: i for i, work in enumerate(dict.fromkeys(works))}
    strata = np.array([domains.index(domain) for domain, _ in number])
    table = measure(model, texts, np.array([number[w] for w in works]), other, TEXTS)
    seen = torch.isin(texts[:, 1:], other).float().mean()
    result = {
        "command": "python -m book.counterfactuals", "date": today(), **surroundings(),
        "rules": RULES,
        "texts": {
            "domains": domains, "each": TEXTS, "tokens": SIZE, "works": len(number),
            "elsewhere": len(other), "ids_seen": float(seen), "nats": float(table.nats.mean()),
        },
        **judged(table, strata),
    }  # fmt: skip
    write_text(RESULT, json.dumps(rounded(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
