"""Every number of the report, computed from traces: what the figures draw and the findings judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minimoe.errors import TraceError
from minimoe.study import chance, depth, vocabulary
from minimoe.study import paths as routes
from minimoe.study.chance import ENCYCLOPAEDIA, GENERATED, MIN_DOCUMENTS, MMLU, QUESTIONS, TEXT
from minimoe.study.claims import told
from minimoe.study.domains import DomainLoad, domain_load
from minimoe.study.load import Load, expert_load
from minimoe.study.trace import RoutingTrace, TraceDocument, first_documents

# Chosen before any result was seen, of the topics with fifty held-out documents: one each of nature, of things made and
# of people living together. Where they are absent, the three largest topics.
TOPICS = ("Biology and health sciences", "Technology", "Society and social sciences")

# of the article's Figs. 4 to 6
SUBJECTS = ("abstract_algebra", "professional_law", "world_religions")

LABEL_DRAWS = 20_000  # the verdict on eleven topics must not hang on the seed: the smallest p is 1 / (draws + 1)
SUBJECT_DRAWS = 2000  # of fifty-seven subjects, few questions of each, which are tested together


@dataclass(frozen=True, eq=False)
class Measurements(chance.Result):
    """All results. Those of a layer are in a tuple: of every layer, or of `layers`.

    Where questions alone are read, `text` is their title, `topics` and `information` are of their subjects, and what
    needs other text is empty.
    """

    layers: tuple[int, ...]  #: the three shown (first, middle, last), numbered from 1
    num_layers: int  #: L
    load: dict[str, tuple[Load, ...]]  #: by kind of text; every layer
    domains: tuple[DomainLoad, ...]  #: of each package
    topics: tuple[DomainLoad, ...]  #: of each topic of the encyclopaedia
    subjects: tuple[DomainLoad, ...]  #: of each subject of the real questions
    questions_against_text: tuple[DomainLoad, ...]  #: each against all three together
    information: tuple[depth.Information, ...]  #: of tokens and domains on the expert; every layer
    #: of the text halved once, twice, ..., at each of `layers`: whether it depends on how much was read
    information_halved: tuple[depth.Information, ...]
    information_topics: tuple[depth.Information, ...]  #: the same with topics
    #: of the text, by the names of `chance.STATISTICS`; JSON has them among the others
    own: dict[str, tuple[Any, ...]]
    tokens: tuple[vocabulary.StudiedToken, ...]  #: the article's, as this model has them
    shares: tuple[vocabulary.TokenShares, ...]  #: of these tokens on natural text
    apart: tuple[vocabulary.TokenShares, ...]  #: of these tokens on generated questions
    frequent: tuple[vocabulary.ExpertTokens, ...]  #: tokens most often sent to each expert
    characteristic: tuple[vocabulary.ExpertTokens, ...]  #: tokens that set an expert apart
    paths: tuple[routes.Paths, ...]  #: of first choices, then of sets
    dependence: depth.LayerDependence  #: between the first choices of layers
    text: str = TEXT  #: what is not said to be of another kind is of this, a key of `load`

    def to_dict(self) -> dict[str, Any]:
        """See `Result`."""
        values = super().to_dict()
        return values | values.pop("own")

    @property
    def of_questions(self) -> bool:
        """Whether only questions were read."""
        return self.text != TEXT

    @property
    def nouns(self) -> tuple[str, str]:
        """What `topics` are called, one and many."""
        return ("subject", "subjects") if self.of_questions else ("topic", "topics")


def three_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """First, middle and last: of 32 layers the article's 1, 16 and 32."""
    count = len(layers)
    return tuple(dict.fromkeys((layers[0], layers[(count - 1) // 2], layers[-1])))


def first_tokens(trace: RoutingTrace, limit: int | None) -> RoutingTrace:
    """The first documents of each domain up to `limit` tokens: domains in nearly equal shares, as in training."""
    length = np.bincount(trace.document, minlength=len(trace.documents))
    keep = first_documents([d.domain for d in trace.documents], length, limit)
    return trace if limit is None else trace.select(documents=keep)


def measure(
    trace: RoutingTrace,
    tokenizer: Tokenizer,
    *,
    others: int = 0,
    title: str = TEXT,
    equal_tokens: int | None = None,
    num_layers: int | None = None,
    whole: bool = True,
    judged: bool = False,
    seed: int = 0,
    say: Callable[[str], object] = str,
) -> tuple[Measurements, list[str]]:
    """Everything that the text can tell, and a sentence for each analysis that it cannot support.

    Args:
        trace: held-out text, generated questions among it; or questions, the topic of each its subject.
        others: how many of the last documents are real questions beside held-out text.
        title: what the questions are, in a few words; `TEXT`: it is held-out text.
        equal_tokens: tokens a domain for whatever is said about all held-out text together.
        num_layers: of the model; default, as many as the last one's number.
        whole: whether every layer with experts was recorded, so that paths go through all of the model.
        judged: without what only figures and the material show.
        say: told what is measured.
    """
    left_out: list[str] = []

    def at(
        numbers: Sequence[int], compute: Any, part: RoutingTrace | None, *args: Any, **options: Any
    ) -> tuple[Any, ...]:
        """The statistic at each layer; nothing of a text that is not there."""
        return tuple(compute(part, x, *args, seed=seed, **options) for x in numbers if part)

    def of_own(one: chance.Statistic) -> tuple[Any, ...]:
        """At the layers that it is of; nothing of a text that is too small."""
        numbers = (every if one.every else layers) if one.judge or not judged else ()
        try:
            return at(numbers, one.compute, text)
        except TraceError as error:
            left_out.append(told("left_out.analysis", what=one.what, error=error))
            return ()

    asked, mmlu, read = title != TEXT, None, trace
    if others:
        own = np.arange(len(trace.documents)) < len(trace.documents) - others
        read, mmlu = trace.select(documents=own), trace.select(documents=~own)
    every, layers = read.layers, three_layers(read.layers)
    drawn = () if judged else layers
    apart = QUESTIONS in read.domains and not asked
    generated = read.select(domains=[QUESTIONS]) if apart else None
    natural = read.select(domains=[d for d in read.domains if d != QUESTIONS]) if apart else read
    text = first_tokens(natural, None if asked else equal_tokens)
    labelled = natural
    if not asked:  # topics of one source, which differ in nothing else
        labelled = natural.select(documents=[d.domain == ENCYCLOPAEDIA for d in natural.documents])
    topics = {d.topic for d in labelled.documents} - {None}
    compared = len(topics) > (1 if asked else 0)

    say("load")
    kinds = {title: text, GENERATED: generated, MMLU: mmlu}
    load = {kind: at(every, expert_load, part) for kind, part in kinds.items() if part}
    say("subjects" if asked else "domains and topics")
    draws = SUBJECT_DRAWS if asked else LABEL_DRAWS
    by_topic = at(layers if compared else (), domain_load, labelled, by="topic", resamples=draws)
    sides = {"text": text, "questions": generated, "mmlu": mmlu}
    renamed = [_renamed(part, name) for name, part in sides.items() if part]
    against = RoutingTrace.concat(renamed) if len(renamed) > 1 else None
    if asked and not compared:
        left_out.append(told("left_out.subjects"))
    elif asked and (few := int(by_topic[0].few_documents.sum())):
        left_out.append(told("left_out.within", few=few, count=len(topics), least=MIN_DOCUMENTS))
    if asked and not load[title][0].ratio.known:
        left_out.append(told("left_out.over", units=load[title][0].units, least=MIN_DOCUMENTS))
    say("information")
    label = "topic" if asked and compared else "domain"
    about = depth.information(text, by=label, seed=seed)
    halves = depth.halved(text.of_layers(layers), by=label, seed=seed) if drawn else ()
    nested = compared and not asked and not judged
    within = depth.information(labelled, by="topic", seed=seed) if nested else ()
    say("tokens")
    tokens = vocabulary.studied_tokens(natural, generated, tokenizer)
    some, ids = layers if tokens else (), [t.token for t in tokens]
    apart_ids = list(dict.fromkeys(t.apart_token for t in tokens))
    say("neighbours, co-activation and paths")
    left_out += [told(f"left_out.{x}") for x in ["paths"] * (not whole) + ["compared"] * asked]
    kinds = ("first", "set") if text.ranked else ("set",)
    none = chance.Band(*np.full((3, 0, 0), np.nan))
    dependence = depth.LayerDependence((), none, np.zeros(0))
    if text.ranked:
        dependence = depth.layer_dependence(text.of_layers(layers) if asked else text, seed=seed)
    else:
        left_out.append(told("left_out.ranks"))
    measured = Measurements(
        layers=layers,
        num_layers=num_layers or every[-1],
        load=load,
        domains=at(() if asked else layers, domain_load, text),
        topics=by_topic,
        subjects=at(drawn, domain_load, mmlu, by="topic", resamples=SUBJECT_DRAWS),
        questions_against_text=at(drawn, domain_load, against),
        information=about,
        information_halved=halves,
        information_topics=within,
        own={name: of_own(one) for name, one in chance.STATISTICS.items()},
        tokens=tokens,
        shares=at(some, vocabulary.token_shares, natural, ids),
        apart=at(some if drawn else (), vocabulary.token_shares, generated, apart_ids),
        frequent=tuple(vocabulary.frequent_tokens(text, x) for x in layers),
        characteristic=at(drawn, vocabulary.characteristic_tokens, text),
        paths=tuple(routes.paths(text, kind=k, seed=seed) for k in kinds if whole),
        dependence=dependence,
        text=title,
    )
    return measured, left_out


def _renamed(trace: RoutingTrace, domain: str) -> RoutingTrace:
    """The trace as one domain."""
    documents = tuple(
        TraceDocument(domain, f"{d.domain}/{d.id}", None, f"{d.domain}/{d.work or d.id}")
        for d in trace.documents
    )
    return replace(trace, documents=documents)


def chosen_topics(topics: Mapping[str, int], wanted: Sequence[str] = TOPICS) -> tuple[str, ...]:
    """Those `wanted` where they all exist, else the three largest; `topics` gives each its number of documents."""
    if all(name in topics for name in wanted):
        return tuple(wanted)
    return tuple(sorted(topics, key=lambda name: (-topics[name], name))[:3])
