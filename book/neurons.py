"""What single neurons tell, in experts and in a dense layer of equal work.

    python -m book.neurons STAGE...           what these stages of book/results/neurons/plan.toml have left to run
    python -m book.neurons published FOLDER   what others' probes found: github.com/jerryy33/MoE_analysis

Texts are beginnings of held-out documents. Works are divided in two halves: a neuron and its threshold
are chosen on the first, and measured on the second.
"""

import csv
import dataclasses
import gzip
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from book.counterfactuals import SIZE, texts_of
from minimoe.config import ModelConfig
from minimoe.course import further as fu
from minimoe.course.compare import arm_config
from minimoe.course.plan import Numbers, Piece, read_pieces, read_tables, recipe, run_missing
from minimoe.experts import ACTIVATIONS, MLP
from minimoe.io import write_object
from minimoe.model import MixtralModel
from minimoe.study import chance as ch
from minimoe.study.report import rounded
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.text.tokenizer import begin_of_text_id
from minimoe.train.loop import Run
from minimoe.train.settings import TrainConfig

FOLDER = Path(__file__).resolve().parent / "results" / "neurons"
EACH, SUBSETS, DRAWS, OFF, SETS, NEAR = 12, 20, 400, 8, 8, 32

PUBLISHED = (
    "Mixtral-8x7B-v0.1", "OLMo-1B-0724-hf", "OLMo-7B-0724-hf", "Llama-3.2-3B", "Ministral-3-3B-Base-2512",
    "Qwen3-4B-Base", "pythia-12b",
)  # fmt: skip
COMMIT = "2e716c7c1306c3cfbaed31c440c342dcb69a392c"
NAMES = r"(?<=[\w,;] )[A-Z][a-z]+"  # inside a sentence
CLASSES = {"digits": r"\d", "brackets": r"[()\[\]{}<>]", "names": NAMES}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids [B, S], the class masks of their tokens, the half and the work of each text."""

    ids: Tensor
    classes: dict[str, Any]  # [B, S] bool
    second: Any  # [B] bool: where results are measured
    weights: Any  # [draws, B], for intervals over the works of the second half; 0 in the first


def classes_of(pieces: list[str]) -> dict[str, Any]:
    """[S] bool for each class: a match begins in the piece."""
    text, starts = "".join(pieces), np.cumsum([0, *map(len, pieces)])
    found = {}
    for name, pattern in CLASSES.items():
        found[name] = np.zeros(len(pieces), bool)
        at = [m.start() for m in re.finditer(pattern, text)]
        found[name][np.searchsorted(starts, at, side="right") - 1] = True
    return found


def read_texts(corpus: Corpus, tokenizer: Any, each: int, size: int = SIZE) -> Texts:
    """The beginnings of `each` long documents of every domain but the questions, in pieces of `size` tokens."""
    domains = [d for d in corpus.domains if d != "questions"]
    begin = begin_of_text_id(tokenizer, own=True)
    ids, works = texts_of(corpus.heldout, domains, begin, 0, each)
    ids = ids.view(-1, size)
    works = [work for work in works for _ in range(SIZE // size)]
    rows = [classes_of([tokenizer.decode([i]) for i in row.tolist()]) for row in ids]
    number = {work: i for i, work in enumerate(dict.fromkeys(works))}
    unit = np.array([number[w] for w in works])
    order = dict[tuple[str, str], int]()  # a work's place in its domain
    for domain, work in number:
        order[domain, work] = sum(d == domain for d, _ in order)
    second = np.array([order[w] % 2 == 1 for w in works])
    units = np.unique(unit[second])
    strata = np.array([domains.index(list(number)[u][0]) for u in units])
    drawn = ch.bootstrap_weights(strata, DRAWS, np.random.default_rng(0))
    weights = np.zeros((DRAWS, len(works)))
    weights[:, second] = drawn[:, np.searchsorted(units, unit[second])]
    return Texts(ids, {c: np.stack([r[c] for r in rows]) for c in CLASSES}, second, weights)


@torch.no_grad()
def inputs(model: MixtralModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """What each feed-forward layer reads [T, D], and the weights of its experts [T, E]; None for a dense one."""
    kept, hooks = list[Tensor](), []
    for block in model.layers:
        hook = block.get_submodule("mlp").register_forward_pre_hook(
            lambda _, args: kept.append(args[0].flatten(0, -2))
        )
        hooks.append(hook)
    routings = iter(model(ids).routings)
    for hook in hooks:
        hook.remove()
    dense = [isinstance(block.mlp, MLP) for block in model.layers]
    return kept, [None if d else next(routings).dense() for d in dense]


def weights_of(mlp: Any) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, D] and down [E, D, F]; E is 1 for a dense layer."""
    if isinstance(mlp, MLP):
        return mlp.gate_up_proj[None], mlp.down_proj[None]
    return mlp.experts.stacked()


def activations(x: Tensor, gate_up: Tensor, weight: Tensor | None, act: Any) -> Tensor:
    """[T, E·F] what each neuron's column of `down` is multiplied with: 0 where its expert is not chosen."""
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=2)
    h = act(gate) * up
    return (h if weight is None else h * weight[:, :, None]).flatten(1)


def best_f1(a: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The best F1 [C, N] of 'a > threshold' over all thresholds, for a [T, N] and classes [C, T]; the thresholds."""
    value, order = a.sort(dim=0, descending=True)
    following = torch.cat([value[1:], value.new_full((1, a.shape[1]), -torch.inf)])
    said = torch.arange(1, len(a) + 1)[:, None]
    f1, threshold = [], []
    for is_in in truth:
        score = 2 * is_in[order].cumsum(0) / (said + is_in.sum())
        top, at = score.masked_fill(value == following, -1).max(dim=0)  # not between equal values
        f1.append(top)
        threshold.append(following.gather(0, at[None])[0])
    return torch.stack(f1), torch.stack(threshold)


def tables_of(layers: list[Tensor], texts: Texts) -> list[Any]:
    """Of each layer, for its neurons and for their negatives, what `best_f1` says on the first half."""
    first = torch.from_numpy(np.repeat(~texts.second, texts.ids.shape[1]))
    truth = torch.from_numpy(np.stack([c.flatten() for c in texts.classes.values()]))[:, first]
    return [[best_f1(sign * a[first], truth) for sign in (1, -1)] for a in layers]


def detect(
    layers: list[Tensor], tables: list[Any], texts: Texts, candidates: int | None, seed: int = 0
) -> Numbers:
    """For each class the F1, on the second half, of the neuron that is best on the first; and draws over works.

    `layers` are activations [T, N]. With `candidates`, the best of so many neurons a layer, mean over random choices.
    """
    rng, (b, s) = np.random.default_rng(seed), texts.ids.shape
    n, found = layers[0].shape[1], {}
    for c, name in enumerate(texts.classes):
        f1 = torch.stack([torch.stack([t[0][c] for t in table]) for table in tables])  # [L, 2, N]
        picks = list[tuple[int, ...]]()
        for _ in range(1 if candidates in (None, n) else SUBSETS):
            some = rng.choice(n, candidates or n, replace=False)
            best = np.unravel_index(int(f1[:, :, some].argmax()), (len(layers), 2, len(some)))
            picks.append((int(best[0]), int(best[1]), int(some[best[2]])))
        values, draws = [], []
        for layer, sign, j in picks:
            a = layers[layer][:, j] * (1 - 2 * sign)
            said = (a > tables[layer][sign][1][c, j]).view(b, s).numpy()
            hit, either = (
                (said & texts.classes[name]).sum(1),
                said.sum(1) + texts.classes[name].sum(1),
            )
            values.append(2 * hit[texts.second].sum() / either[texts.second].sum())
            draws.append(2 * (texts.weights @ hit) / (texts.weights @ either))
        layer, sign, j = picks[0]
        found[name] = {
            "f1": float(np.mean(values)), "draws": np.mean(draws, axis=0).round(4).tolist(),
            "first_half": float(np.mean([float(f1[p]) for p in picks])),
            "neuron": [layer + 1, j, 1 - 2 * sign], "share": float(texts.classes[name][texts.second].mean()),
        }  # fmt: skip
    return found


@torch.no_grad()
def probe(model: MixtralModel, texts: Texts, candidates: int | None, seed: int = 0) -> Numbers:
    """F1 of the best neuron, and of what is left of it without trained neurons, router or experts."""
    rng = torch.Generator().manual_seed(seed)
    x, weight = inputs(model, texts.ids)
    act = ACTIVATIONS[model.config.hidden_act]
    mlps = [block.mlp for block in model.layers]

    def under(change: str) -> list[Tensor]:
        every = []
        for mlp, x_, w in zip(mlps, x, weight, strict=True):
            gate_up = weights_of(mlp)[0]
            if change == "random directions":
                gate_up = torch.randn(gate_up.shape, generator=rng) * gate_up.std()
            if change == "random router" and w is not None:
                w = w[torch.randperm(len(w), generator=rng)]
            every.append(activations(x_, gate_up, w, act))
        return every

    found = Numbers()
    for change in ("trained", "random directions", "random router"):
        if change == "random router" and weight[0] is None:
            continue
        layers = under(change)
        tables = tables_of(layers, texts)
        found[change] = detect(layers, tables, texts, candidates, seed)
        if change == "trained" and weight[0] is not None:
            found["all candidates"] = detect(layers, tables, texts, None, seed)
    if routers := [w for w in weight if w is not None]:
        found["router alone"] = detect(routers, tables_of(routers, texts), texts, None, seed)
    return found


@torch.no_grad()
def decide(model: MixtralModel, texts: Texts, seed: int = 0) -> Numbers:
    """What it costs the next tokens of each class to switch off the neurons that write most towards it."""
    rng, (b, s) = np.random.default_rng(seed), texts.ids.shape
    x, weight = inputs(model, texts.ids)
    mlps = [block.mlp for block in model.layers]
    acts, writes, sizes, act = [], [], [], ACTIVATIONS[model.config.hidden_act]
    for mlp, x_, w in zip(mlps, x, weight, strict=True):
        gate_up, down = weights_of(mlp)
        acts.append(activations(x_, gate_up, w, act).view(b, s, -1)[:, :-1])
        writes.append(down.transpose(1, 2).flatten(0, 1))  # [N, D]
        sizes.append(acts[-1].abs().mean((0, 1)) * writes[-1].norm(dim=1))
    first, target = torch.from_numpy(~texts.second), texts.ids[:, 1:]
    own = fu.token_losses(model, texts.ids)[0]
    vectors = model.lm_head.weight * model.norm.weight  # [V, D] the final norm's gain in each row

    def cost(neurons: list[tuple[int, int]]) -> Any:
        kept = [weights_of(mlp)[1].clone() for mlp in mlps]
        for layer, j in neurons:
            down = weights_of(mlps[layer])[1]
            down[j // down.shape[2], :, j % down.shape[2]] = 0
        more = (fu.token_losses(model, texts.ids)[0] - own).numpy()
        for mlp, old in zip(mlps, kept, strict=True):
            weights_of(mlp)[1].copy_(old)
        return more

    def mean(more: Any, where: Any) -> tuple[float, Any]:
        total, count = (more * where).sum(1), where.sum(1)
        value = total[texts.second].sum() / count[texts.second].sum()
        return float(value), (texts.weights @ total) / (texts.weights @ count)

    found = {}
    for name, every in texts.classes.items():
        comes = torch.from_numpy(every[:, 1:])
        inside, outside = comes & first[:, None], ~comes & first[:, None]
        towards = vectors[target[inside]].mean(0) - vectors[target[first]].mean((0, 1))
        scores = [
            (a[inside].mean(0) - a[outside].mean(0)) * (w @ towards)
            for a, w in zip(acts, writes, strict=True)
        ]
        n = len(scores[0])
        top = torch.cat(scores).topk(OFF)
        chosen = [(int(i) // n, int(i) % n) for i in top.indices]
        alike = [
            [
                j
                for j in (sizes[layer] - sizes[layer][i]).abs().argsort()[:NEAR].tolist()
                if (layer, j) not in chosen
            ]
            for layer, i in chosen
        ]
        others = [
            [(p[0], int(rng.choice(a))) for p, a in zip(chosen, alike, strict=True)]
            for _ in range(SETS)
        ]
        is_in = every[:, 1:]
        one, more, null = cost(chosen[:1]), cost(chosen), [cost(o) for o in others]
        here, draws = mean(more, is_in)
        rest, rest_draws = mean(more, ~is_in)
        chance = [mean(m, is_in) for m in null]
        less = here - float(np.mean([c[0] for c in chance]))
        less_draws = draws - np.mean([c[1] for c in chance], axis=0)
        five = here - 5 * max(rest, 0)
        five_draws = draws - 5 * np.maximum(rest_draws, 0)
        found[name] = {
            "neurons": [[layer + 1, j] for layer, j in chosen],
            "one": band(*mean(one, is_in)), "eight": band(here, draws), "elsewhere": band(rest, rest_draws),
            "others": [round(c[0], 5) for c in chance], "difference": band(less, less_draws),
            "five": band(five, five_draws),
            "verdict": verdict(ch.percentile(less_draws), ch.percentile(five_draws)),
        }  # fmt: skip
    return found


def band(value: float, draws: Any) -> dict[str, float]:
    """The value with its 95 % interval."""
    low, high = ch.percentile(draws)
    return {k: round(float(x), 4) for k, x in (("value", value), ("low", low), ("high", high))}


def verdict(*intervals: Any) -> str:
    """Agrees if all intervals lie above 0, disagrees if one lies below."""
    if all(low > 0 for low, _ in intervals):
        return "agrees"
    return "disagrees" if any(high < 0 for _, high in intervals) else "cannot be told"


def read_plan(path: Path) -> tuple[list[Piece], Numbers]:
    """The pieces, and what the plan says of the text."""
    stages, _, text, model, training = read_tables(path, "rules", "text", "model", "training")

    def made(arm: str, sizes: Numbers, chosen: Numbers) -> tuple[ModelConfig, TrainConfig]:
        config = TrainConfig(**training | {"eval_every": 10**6, "save_every": 10**6} | chosen)
        return arm_config(ModelConfig(**model | sizes), arm), config

    return read_pieces(path, stages, made), text


def run_stages(names: list[str]) -> None:
    """Run the pieces of the named stages that are not there yet."""
    pieces, text = read_plan(FOLDER / "plan.toml")
    corpus = load_corpus(**text)
    texts = read_texts(corpus, corpus.tokenizer, EACH, pieces[0].training.seq_len)

    def run(piece: Piece) -> Numbers:
        with tempfile.TemporaryDirectory() as folder:
            training = Run(folder, piece.model, piece.training, corpus, name=piece.arm, whole=False)
            training.train(progress=False)
        model = training.model.eval()
        nats = fu.token_losses(model, texts.ids)[0]
        found: Numbers = {"nats": round(float(nats.mean()), 4)}
        if "tuning" not in piece.path.parent.name:
            width = piece.model.num_experts_per_tok * piece.model.expert_size
            narrow = None if piece.arm == "work" else width
            found |= {"probe": probe(model, texts, narrow), "decide": decide(model, texts)}
        return found

    mine = [p for p in pieces if p.path.parent.name in names]
    run_missing(mine, lambda piece: recipe(piece, text=corpus.sha256), run)


def published(folder: Path) -> Numbers:
    """Of Herbst et al.'s probes of one neuron: means over concepts, as they are and put on an equal footing.

    `share`: of the class where the best probe is; F1 depends on it. `balanced`: the best F1 if the class had
    half of the tokens everywhere, from recall and false alarms; `as_many`: the same where one expert a layer
    is looked at, drawn at random, so that a layer has one place in every model.
    """
    rng, found = np.random.default_rng(0), Numbers()
    for name in PUBLISHED:
        with gzip.open(
            folder / "data" / "probing" / f"{name}.csv.gz", "rt", encoding="utf-8"
        ) as file:
            rows = [r for r in csv.DictReader(file) if r["k"] == "1" and r["f1"][0] in "01"]
        places: dict[str, dict[str, list[Any]]] = {}
        for r in rows:
            f1, recall, precision, yes, no = (
                float(r[k]) for k in ("f1", "recall", "precision", "num_positive", "num_negative")
            )
            if precision > 0:
                alarms = recall * yes * (1 / precision - 1) / no
                equal = 2 * recall / (1 + recall + alarms)
                layer = places.setdefault(r["concept"], {}).setdefault(r["layer"], [])
                layer.append((f1, yes / (yes + no), equal))
        best = [max(p for layer in x.values() for p in layer) for x in places.values()]
        some = [
            np.mean([max(rng.choice([p[2] for p in y]) for y in x.values()) for _ in range(50)])
            for x in places.values()
        ]
        found[name] = {
            "concepts": len(best), "places": round(len(rows) / len(best)),
            "f1": np.mean([b[0] for b in best]), "share": np.mean([b[1] for b in best]),
            "balanced": np.mean([max(p[2] for layer in x.values() for p in layer) for x in places.values()]),
            "as_many": np.mean(some),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "published":
        about = {
            "source": "https://github.com/jerryy33/MoE_analysis", "licence": "MIT", "commit": COMMIT,
            "files": "data/probing/*.csv.gz", "models": published(Path(sys.argv[2])),
        }  # fmt: skip
        write_object(FOLDER / "published.json", rounded(about))
    else:
        run_stages(sys.argv[1:])
