"""Analyses that few make: routings overruled, saturation, one token in other meanings, outputs, parallel texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.checkpoint import pretrained_path, read_tensors
from minimoe.errors import TraceError
from minimoe.generate import evaluating
from minimoe.io import write_text
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routing import Routing
from minimoe.study import chance as ch
from minimoe.study.depth import information
from minimoe.study.models import find_minimoe
from minimoe.study.record import documents_of, record_documents
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.text.tokenizer import TokenSplit
from minimoe.train.environment import processor_name, today

Experts = npt.NDArray[np.integer[Any]]
Tokens = list[npt.NDArray[Any]]

SIZE, TEXTS = 128, 12  # tokens of a text whose routings are overruled; texts of a domain
HOLDERS = 10  # documents that hold a token whose meanings are compared


# --- routings overruled ---------------------------------------------------------------------------

Change = Callable[[Routing], Routing]
"""Another routing in place of the one that a layer's router gave."""


@dataclass(frozen=True, eq=False)
class Counterfactual(ch.Result):
    """What one change costs, in nats per token more than with the model's own routing."""

    change: str  #: which experts tokens get instead
    layer: int | None  #: the changed layer, from 1; None: all at once
    loss: ch.Band  #: paired by token; the interval is over works


def choose(routing: Routing, expert: Tensor, even: bool = False) -> Routing:
    """The router's own logits and other experts [T, K], weighted by the softmax of their logits, or evenly."""
    assert routing.logits is not None
    weight = routing.logits.gather(1, expert).softmax(dim=1)
    weight = torch.full_like(weight, 1 / expert.shape[1]) if even else weight
    return dataclasses.replace(routing, expert=expert.flatten(), weight=weight.flatten())


def own_choice(routing: Routing) -> Tensor:
    """[T, K] experts of a routing in which every token has K."""
    if routing.k is None or routing.logits is None:
        raise TraceError("only routers that give every token K experts by logits can be overruled")
    return routing.expert.view(-1, routing.k)


def by_rank(
    first: int = 1, even: bool = False, score: Callable[[Tensor], Tensor] = Tensor.detach
) -> Change:
    """Each token's K experts of rank `first` on (1: the best; negative: the last) by a `score` [T, E] of its logits."""

    def change(routing: Routing) -> Routing:
        k, logits = own_choice(routing).shape[1], routing.logits
        assert logits is not None
        order = score(logits).argsort(dim=1, descending=True)
        return choose(routing, order[:, -k:] if first < 0 else order[:, first - 1 :][:, :k], even)

    return change


def at_random(seed: int = 0) -> Change:
    """K experts drawn anew for each token."""
    generator = torch.Generator().manual_seed(seed)
    return by_rank(score=lambda x: -torch.rand(x.shape, generator=generator).to(x.device))


def renumbered(routing: Routing) -> Routing:
    """Every expert's tokens go to the next one, those of the last to the first; the weights stay."""
    moved = (own_choice(routing) + 1) % routing.num_experts
    return dataclasses.replace(routing, expert=moved.flatten())


def without(expert: int) -> Change:
    """One expert (from 0) is off: each of its tokens takes its next best, and weights are renormalised."""
    return by_rank(score=lambda x: x.index_fill(1, x.new_tensor([expert]).long(), -torch.inf))


def refused(choices: Tensor) -> Change:
    """These of the choices [T, K] are off, each for its own token alone, which takes its next best instead."""

    def change(routing: Routing) -> Routing:
        off = torch.zeros(routing.shape, dtype=torch.bool, device=choices.device)
        off.scatter_(1, own_choice(routing), choices)
        return by_rank(score=lambda x: x.masked_fill(off, -torch.inf))(routing)

    return change


def replayed(expert: Tensor) -> Change:
    """Experts [T, K] of another pass, which may be those of other texts, at the same places."""
    return lambda routing: choose(routing, expert)


@contextlib.contextmanager
def overruled(model: MixtralModel, changes: Mapping[int, Change]) -> Generator[None]:
    """Inside, the routings of these layers (from 1) are changed before any expert sees a token."""
    with contextlib.ExitStack() as stack:
        for layer, change in changes.items():
            gate = model.get_submodule(f"layers.{layer - 1}.mlp.gate")
            handle = gate.register_forward_hook(lambda *given, change=change: change(given[-1]))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def token_losses(model: MixtralModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Nats [B, S − 1] of the next tokens of ids [B, S], read at once, and the experts [B·S, K] of each sparse layer."""
    with evaluating(model):
        out = model(ids)
    rows, following = out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    nats = F.cross_entropy(rows, following, reduction="none").view(len(ids), -1)
    return nats, [own_choice(routing) for routing in out.routings]


def usual_experts(
    token: Tensor, expert: Tensor, read: Tensor, own: Tensor, num_experts: int
) -> Tensor:
    """[T, K] the K experts that each token id of `read` [T] got most often in another text: a hash of the id.

    That text has ids `token` [n] and experts [n, K]; ids that did not occur there keep their `own` [T, K].
    """
    counts = torch.zeros(int(max(token.max(), read.max())) + 1, num_experts, device=token.device)
    for column in expert.T:
        counts.index_put_((token, column), counts.new_ones(len(token)), accumulate=True)
    best = counts[read].topk(own.shape[1], dim=1).indices
    return torch.where(counts[read].any(dim=1, keepdim=True), best, own)


def counterfactuals(
    model: MixtralModel,
    ids: Tensor,
    work: npt.NDArray[np.int64],
    other: Tensor,
    *,
    layers: Sequence[int],
    seed: int = 0,
) -> tuple[Counterfactual, ...]:
    """The cost of every change, in all sparse `layers` (from 1) at once and in each alone.

    Args:
        ids: [D, W, S] the first tokens of W texts of each of D domains.
        work: [D, W] number of the work that each text is from; works are resampled for the intervals.
        other: [B, S] other texts, from which each token id's usual experts are read.

    Raises TraceError: a router that does not give every token K experts by logits.
    """
    texts = ids.flatten(0, 1)
    nats, own = token_losses(model, texts)
    elsewhere = token_losses(model, other)[1]
    e, place = model.config.num_experts, torch.arange(len(texts)).view(ids.shape[:2])
    usual = [
        usual_experts(other.flatten(), read, texts.flatten(), chosen, e)
        for read, chosen in zip(elsewhere, own, strict=True)
    ]

    def of_others(i: int, axis: int) -> Change:
        chosen = own[i].view(len(texts), -1, own[i].shape[1])
        return replayed(chosen[place.roll(1, axis).flatten()].flatten(0, 1))

    every: dict[str, Callable[[int], Change]] = {
        "random experts": lambda i: at_random(seed + i),
        "the next best: ranks 2 to K + 1": lambda i: by_rank(2),
        "the worst: the last K ranks": lambda i: by_rank(-1),
        "every expert's tokens to the next expert": lambda i: renumbered,
        "the chosen ones, weighted evenly": lambda i: by_rank(1, even=True),
        "the token's usual experts, by its id": lambda i: replayed(usual[i]),
        "those of another text of the domain": lambda i: of_others(i, 1),
        "those of a text of another domain": lambda i: of_others(i, 0),
    }
    every |= {f"expert {x + 1} off": lambda i, x=x: without(x) for x in range(e)}
    unit = ch.compact(work.flatten())[0]
    strata = np.zeros(int(unit.max()) + 1, np.int64)
    strata[unit] = np.repeat(np.arange(len(ids)), ids.shape[1])

    def cost(change: str, changed: dict[int, Change], layer: int | None) -> Counterfactual:
        with overruled(model, changed):
            more = (token_losses(model, texts)[0] - nats).double().mean(dim=1).cpu().numpy()
        sums = np.bincount(unit, more), np.bincount(unit)
        return Counterfactual(change, layer, ch.bootstrap_rate(*sums, strata, seed, 1000))

    found: list[Counterfactual] = []
    for name, make in every.items():
        changes = {layer: make(i) for i, layer in enumerate(layers)}
        if not name.endswith("off"):  # the same number in several layers means nothing
            found.append(cost(name, changes, None))
        found += [cost(name, {layer: change}, layer) for layer, change in changes.items()]
    return tuple(found)


# --- saturation -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Saturation(ch.Result):
    """How much of a token's experts is decided at P validations of a training run; [P, L] each."""

    step: npt.NDArray[np.int64]  #: [P]
    #: share of the K experts that are those of the last validation (OLMoE: Muennighoff et al. 2024, sec. 5.1)
    overlap: ch.Floats
    chance: ch.Floats  #: what tokens that only share the loads of their window would show
    beyond: ch.Floats  #: (overlap − chance) / (1 − chance); NaN where chance is 1
    #: share of the K experts that are those of the next validation; it rises as the learning rate falls, so part of
    #: `overlap` is the schedule
    next: ch.Floats


def saturation(step: Experts, expert: Experts, windows: int, num_experts: int) -> Saturation:
    """Saturation of the same T tokens, in `windows` texts of one length, at each validation's step [P].

    Their experts [P, T, L, K] are as probe.safetensors has them.
    """
    p, t, layers, k = expert.shape
    if t % windows or p < 2:
        raise TraceError(f"{t} tokens at {p} validations are not {windows} windows at two or more")
    member = (expert[..., None] == np.arange(num_experts)).any(axis=3).astype(np.float64)
    of_window = member.reshape(p, windows, t // windows, layers, num_experts).mean(axis=2)
    overlap = np.einsum("ptle,tle->pl", member, member[-1]) / (t * k)
    chance = np.einsum("pwle,wle->pl", of_window, of_window[-1]) / (windows * k)
    following = np.full((p, layers), np.nan)
    following[:-1] = np.einsum("ptle,ptle->pl", member[:-1], member[1:]) / (t * k)
    less = np.full_like(chance, np.nan)
    beyond = np.divide(overlap - chance, 1 - chance, out=less, where=chance < 1)
    return Saturation(np.asarray(step, np.int64), overlap, chance, beyond, following)


# --- one token in other meanings ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Meaning(ch.Result):
    """Whether one token takes other experts in texts of other topics."""

    layer: int  #: from 1
    same: float  #: mean overlap of the experts of one token in two documents of one topic, as a share of K
    other: float  #: the same for two documents of different topics
    difference: ch.Band  #: same − other, beside its null: topics permuted over documents
    tokens: int  #: how many tokens were compared


def meaning(trace: RoutingTrace, layer: int, *, draws: int = 199, seed: int = 0) -> Meaning:
    """Pairs of documents that hold the same token, of one topic or of two (after Olson et al. 2025).

    A document counts once for each token, with the mean of its occurrences; a token, which must stand in ten
    documents with a topic, counts by its documents. One permutation of the topics, of `draws`, serves all tokens,
    because a document with loads of its own has them for all its tokens.

    Raises TraceError: no topics, or no token in so many documents of several topics.
    """
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    names, label = ch.document_labels(trace, "topic")
    label = label[c.source]
    rows = np.flatnonzero(label[c.document] >= 0)
    if not len(rows):
        raise TraceError("no document of the trace has a topic; there is nothing to compare")
    cell, codes = ch.compact(c.token[rows] * len(c.source) + c.document[rows])
    token, document = ch.compact(codes // len(c.source))[0], codes % len(c.source)
    held = ch.count_experts(cell, len(codes), c.expert[rows], c.num_experts)
    mean = held / np.bincount(cell)[:, None]
    kept = np.bincount(token)[token] >= HOLDERS
    if not kept.any():
        raise TraceError(f"no token stands in {HOLDERS} documents with a topic; record more text")
    (token, _), document, mean = ch.compact(token[kept]), document[kept], mean[kept]
    holders = np.bincount(token)
    whole = np.stack([np.bincount(token, x) for x in mean.T], axis=1)
    alone = np.bincount(token, (mean**2).sum(axis=1))
    every = (whole**2).sum(axis=1) - alone

    def compared(label: ch.Ints) -> tuple[float, float, int]:
        """Mean overlap of pairs of one topic and of two, over tokens that have both, and how many these are."""
        pair, _ = ch.compact(token * len(names) + label[document])
        first = np.zeros(int(pair.max()) + 1, np.int64)
        first[pair] = token
        parts = np.stack([np.bincount(pair, x) for x in mean.T], axis=1)
        within = np.bincount(first, (parts**2).sum(axis=1)) - alone
        n_within = np.bincount(first, np.bincount(pair).astype(float) ** 2) - holders
        n_across = holders * (holders - 1.0) - n_within
        both = (n_within > 0) & (n_across > 0)
        if not both.any():
            return np.nan, np.nan, 0
        weight = holders[both] / holders[both].sum() / c.k
        same = (weight * (within / np.maximum(n_within, 1))[both]).sum()
        across = (weight * ((every - within) / np.maximum(n_across, 1))[both]).sum()
        return float(same), float(across), int(both.sum())

    same, other, tokens = compared(label)
    if not tokens:
        raise TraceError("no token stands in documents of one topic and of two; record more text")
    with_topic, moved, null = np.flatnonzero(label >= 0), label.copy(), np.zeros(draws)
    for i in range(draws):
        moved[with_topic] = label[rng.permutation(with_topic)]
        null[i] = np.subtract(*compared(moved)[:2])
    return Meaning(layer, same, other, ch.against(same - other, null), tokens)


# --- what is read, what comes, what is said -------------------------------------------------------


@torch.no_grad()
def beginnings(
    model: MixtralModel, tokens: Tokens, begin: int | None
) -> Iterator[tuple[npt.NDArray[Any], ModelOutput]]:
    """Of each text the ids that fit one window after `begin`, and the output for them, one text at a time."""
    before: list[int] = [] if begin is None else [begin]
    with evaluating(model):
        for x in tokens:
            ids = x[: model.config.max_position_embeddings - len(before)]
            yield ids, model(torch.tensor([[*before, *ids.tolist()]]))


def with_outputs(
    model: MixtralModel, documents: Sequence[TraceDocument], tokens: Tokens, begin: int | None
) -> dict[str, RoutingTrace]:
    """The beginnings of texts, a window each, keyed three ways: by the token read, by the next, by the predicted one.

    The last token of a text, which has no next one, is left out of all three.
    """
    cut, predicted = list[npt.NDArray[Any]](), list[npt.NDArray[Any]]()
    for ids, out in beginnings(model, tokens, begin):
        cut.append(ids)
        predicted.append(np.append(out.logits[0, -len(ids) : -1].argmax(dim=1).numpy(), -1))
    trace = record_documents(model, documents, cut, end_of_text=begin)
    following = np.concatenate([np.append(ids[1:], -1) for ids in cut])
    read = np.where(following < 0, -1, trace.token)
    keys = {"read": read, "next": following, "predicted": np.concatenate(predicted)}
    return {k: dataclasses.replace(trace, token=v.astype(np.int32)) for k, v in keys.items()}


# --- parallel texts -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parallel(ch.Result):
    """Divergence in bits between the mean router probabilities of articles in two languages; [L] each."""

    matched: ch.Floats  #: of articles with the same title
    unmatched: ch.Floats  #: of articles of one topic and different titles
    gap: ch.Band  #: unmatched − matched; the interval is over titles
    titles: int  #: how many there are


def mean_probabilities(model: MixtralModel, tokens: Tokens, begin: int | None) -> ch.Floats:
    """[documents, L, E] router probabilities, averaged over the first window of each text."""
    rows: list[ch.Floats] = []
    for ids, out in beginnings(model, tokens, begin):
        probs = [r.probs[-len(ids) :] for r in out.routings if r.probs is not None]
        if len(probs) < len(out.routings):
            raise TraceError("a router of the model has no probabilities to compare")
        rows.append(np.stack([p.double().mean(dim=0).numpy() for p in probs]))
    return np.stack(rows)


def parallel(first: ch.Floats, second: ch.Floats, topic: ch.Ints, *, seed: int = 0) -> Parallel:
    """Whether articles on one thing are routed alike in two languages, beyond their topic (Bandarkar et al. 2026).

    `mean_probabilities` [titles, L, E] of the same titles in both, and the number of each one's topic [titles]; a title
    alone in its topic is left out.
    """
    kept = np.flatnonzero(np.bincount(topic)[topic] > 1)
    if not len(kept):
        raise TraceError("no two titles share a topic; there is nothing to compare")
    others = [(i, kept[(topic[kept] == topic[i]) & (kept != i)]) for i in kept]
    a = ch.jensen_shannon(first[kept], second[kept])
    b, back = (
        np.stack([ch.jensen_shannon(x[i], y[j]).mean(axis=0) for i, j in others])
        for x, y in ((first, second), (second, first))
    )
    strata, rng = ch.compact(topic[kept])[0], np.random.default_rng(seed)
    # a title is in its own mean and, by its second text, in those of the others
    told = b + back - b.mean(axis=0) - a
    draws = ch.bootstrap(told, strata, 1000, rng) / len(kept)
    ends = ch.percentile(draws) if len(kept) >= ch.MIN_DOCUMENTS else ch.NOTHING
    return Parallel(a.mean(axis=0), b.mean(axis=0), ch.Band((b - a).mean(axis=0), *ends), len(kept))


def same_titles(corpus: Corpus, first: str, second: str) -> tuple[ch.Ints, Tokens, Tokens]:
    """Titles that two domains share and one of them held out: [titles] number of the topic, and the tokens in both."""
    found: dict[str, dict[str, tuple[Any, npt.NDArray[Any]]]] = {first: {}, second: {}}
    held: set[str] = set()
    for split in (corpus.train, corpus.heldout):
        for document, ids in zip(*documents_of(split, (first, second)), strict=True):
            found[document.domain][document.id] = document.topic, ids
            held |= {document.id} if split is corpus.heldout else set()
    titles = [t for t in found[first] if t in found[second] and t in held and found[first][t][0]]
    topics = [str(found[first][t][0]) for t in titles]
    number = np.unique(topics, return_inverse=True)[1].astype(np.int64)
    return number, [found[first][t][1] for t in titles], [found[second][t][1] for t in titles]


# --- all of them ----------------------------------------------------------------------------------


def windows_of(
    split: TokenSplit, domains: Sequence[str], size: int, texts: int
) -> tuple[Any, Any, Any]:
    """[D, W, size] first tokens of W texts of each domain, [D, W] their works; [B, size] those of later texts."""
    chosen, others, works = list[list[Any]](), list[Any](), dict[tuple[str, str], int]()
    numbers: list[list[int]] = []
    for domain in domains:
        texts_of = zip(*documents_of(split, (domain,)), strict=True)
        long = [((domain, d.work or d.id), x[:size]) for d, x in texts_of if len(x) >= size]
        if (there := len(long)) < texts:
            raise TraceError(f"{domain} holds out {there} texts of {size} tokens; {texts} needed")
        chosen.append([ids for _, ids in long[:texts]])
        numbers.append([works.setdefault(work, len(works)) for work, _ in long[:texts]])
        others += [ids for work, ids in long[texts : 4 * texts] if work not in works]
    ids, other = (torch.from_numpy(np.array(x).astype(np.int64)) for x in (chosen, others))
    return ids, np.array(numbers), other


def further(model: str | Path, out: Path, *, seed: int = 0) -> str:
    """Make all five analyses of one of minimoe's own models, and write them to `out` as JSON; returns what was written.

    Raises MinimoeError: a model or a text that cannot be had, or a router without logits.
    """
    folder, found = pretrained_path(model), find_minimoe(model)
    loaded: Any = found.load()
    corpus = load_corpus(tokenizer=folder, vocab_size=found.vocab_size)
    domains = [d for d in corpus.domains if d != "questions"]
    ids, work, other = windows_of(corpus.heldout, domains, SIZE, TEXTS)
    result: dict[str, Any] = {
        "command": f"python -m minimoe study --model {model} --further {out}",
        "date": today(), "hardware": processor_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "texts": {"domains": domains, "each": TEXTS, "tokens": SIZE, "other": len(other)},
    }  # fmt: skip
    rows = counterfactuals(loaded, ids, work, other, layers=found.layers, seed=seed)
    result |= {"counterfactuals": [row.to_dict() for row in rows], "saturation": None}
    if (probe := folder / "probe.safetensors").exists():
        seen = {name: value.numpy() for name, value in read_tensors(probe).items()}
        rate = saturation(seen["step"], seen["expert"], len(seen["token"]), found.num_experts)
        result["saturation"] = rate.to_dict()
    english = documents_of(corpus.heldout, ("wiki_en",))
    articles = record_documents(loaded, *english, end_of_text=found.begin)
    result["meaning"] = [meaning(articles, n, seed=seed).to_dict() for n in found.layers]
    read = documents_of(corpus.heldout, domains, 4000)
    result["outputs"] = {
        key: [x.token.to_dict() for x in information(trace, seed=seed)]
        for key, trace in with_outputs(loaded, *read, found.begin).items()
    }
    result["parallel"] = {}
    for second in ("wiki_fr", "wiki_es"):
        topic, *both = same_titles(corpus, "wiki_en", second)
        a, b = (mean_probabilities(loaded, tokens, found.begin) for tokens in both)
        result["parallel"][second] = parallel(a, b, topic, seed=seed).to_dict()
    write_text(out, json.dumps(result, indent=1) + "\n")
    return f"{out}: {len(rows)} counterfactuals, and four analyses more"
