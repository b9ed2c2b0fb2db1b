"""Every number of the report, computed from traces: what the figures draw and the findings judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from minimoe.errors import TraceError
from minimoe.study.chance import (
    ENCYCLOPAEDIA,
    GENERATED,
    MIN_DOCUMENTS,
    MMLU,
    QUESTIONS,
    TEXT,
    Result,
)
from minimoe.study.depth import Information, LayerDependence, information, layer_dependence
from minimoe.study.domains import DomainLoad, domain_load
from minimoe.study.load import Load, expert_load
from minimoe.study.paths import CoActivation, Paths, Repeats, coactivation, paths, repeats
from minimoe.study.trace import RoutingTrace, TraceDocument, first_documents
from minimoe.study.vocabulary import (
    ExpertTokens,
    PreferredExperts,
    TokenShares,
    characteristic_tokens,
    frequent_tokens,
    preferred_experts,
    token_shares,
)

# Chosen before any result was seen: of the topics of the encyclopaedia with fifty held-out documents, one each of
# nature, of things made and of people living together. Where they are absent, the three largest topics.
TOPICS = ("Biology and health sciences", "Technology", "Society and social sciences")

# The subjects of the article's Figs. 4 to 6.
SUBJECTS = ("abstract_algebra", "professional_law", "world_religions")

# The tokens of the article's Figs. 8 to 11, as they are spelt at the start of a line and after a space, which
# byte-level vocabularies write as Ġ and those made by SentencePiece as ▁.
TOKENS = {
    name: (word, f"Ġ{word}", f"▁{word}")
    for name, word in zip(
        ("colon", "full-stop", "what", "what-within", "who"),
        (":", ".", "What", "what", "Who"),
        strict=True,
    )
}

# So many draws that the verdict on eleven topics does not hang on the seed: the smallest p is 1 / (draws + 1).
LABEL_DRAWS = 20_000
# Fifty-seven subjects of questions, few of each: all of them are tested together.
SUBJECT_DRAWS = 2000

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class StudiedToken(Result):
    """One of the article's tokens: the variant read off natural text, and the one the generated questions hold most.

    `variants` counts every spelling: natural text, generated questions.
    """

    name: str
    text: str
    token: int
    apart_text: str
    apart_token: int
    variants: dict[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Measurements(Result):
    """All results. Tuples over `layers` (first, middle, last) or, where said, over every layer.

    Attributes:
        layers: the three layers shown, numbered from 1.
        num_layers: L.
        load: by kind of text, every layer.
        domains: load of each package.
        topics: load of each topic of the encyclopaedia.
        subjects: load of each subject of the real questions.
        questions_against_text: load of 'text', 'questions' and 'mmlu' against all three together.
        information: what tokens and domains say of the expert, every layer.
        information_topics: the same with topics instead of domains, every layer.
        repeats: same expert as the token before, every layer.
        preferred: experts of the article's tokens, every layer.
        tokens: the article's tokens, as this model has them.
        shares: of these tokens on natural text.
        apart: of these tokens on generated questions.
        frequent: tokens most often sent to each expert.
        characteristic: tokens that set an expert apart.
        coactivation: experts chosen together.
        paths: first choices, then sets.
        dependence: between the first choices of layers.
        text: the kind of text, a key of `load`, that whatever is not said to be of another is of.

    Of a study that reads questions alone, `text` is their title, `topics` holds the subjects, `information` is about
    them, and what needs other text is empty.
    """

    layers: tuple[int, ...]
    num_layers: int
    load: dict[str, tuple[Load, ...]]
    domains: tuple[DomainLoad, ...]
    topics: tuple[DomainLoad, ...]
    subjects: tuple[DomainLoad, ...]
    questions_against_text: tuple[DomainLoad, ...]
    information: tuple[Information, ...]
    information_topics: tuple[Information, ...]
    repeats: tuple[Repeats, ...]
    preferred: tuple[PreferredExperts, ...]
    tokens: tuple[StudiedToken, ...]
    shares: tuple[TokenShares, ...]
    apart: tuple[TokenShares, ...]
    frequent: tuple[ExpertTokens, ...]
    characteristic: tuple[ExpertTokens, ...]
    coactivation: tuple[CoActivation, ...]
    paths: tuple[Paths, ...]
    dependence: LayerDependence
    text: str = TEXT

    @property
    def of_questions(self) -> bool:
        """Whether only questions were read."""
        return self.text != TEXT

    @property
    def nouns(self) -> tuple[str, str, str]:
        """What `topics` are called, one and many, and what a document is: a word each."""
        return (
            ("subject", "subjects", "questions")
            if self.of_questions
            else ("topic", "topics", "articles")
        )


def three_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """First, middle and last: of 32 layers the article's 1, 16 and 32."""
    count = len(layers)
    return tuple(dict.fromkeys((layers[0], layers[(count - 1) // 2], layers[-1])))


def first_tokens(trace: RoutingTrace, limit: int | None) -> RoutingTrace:
    """The first documents of each domain up to `limit` tokens: domains in nearly equal shares, as in training."""
    if limit is None:
        return trace
    length = np.bincount(trace.document, minlength=len(trace.documents))
    keep = first_documents([d.domain for d in trace.documents], length, limit)
    return trace.select(documents=keep)


T = TypeVar("T")


def measure(
    read: RoutingTrace,
    mmlu: RoutingTrace | None,
    tokenizer: Tokenizer,
    *,
    title: str = TEXT,
    equal_tokens: int | None = None,
    num_layers: int | None = None,
    whole: bool = True,
    seed: int = 0,
    say: Progress = lambda _: None,
) -> tuple[Measurements, list[str]]:
    """Everything that the text can tell, and a sentence for each analysis that it cannot support.

    Args:
        read: held-out text, generated questions among it; or questions, the topic of each its subject.
        mmlu: the real questions beside held-out text, or None where they could not be had.
        title: what the questions are, in a few words; `TEXT`: it is held-out text.
        equal_tokens: tokens a domain for whatever is said about all held-out text together.
        num_layers: of the model; default, as many as the last one's number.
        whole: whether every layer with experts was recorded, so that paths go through all of the model.
        say: told what is measured.
    """
    left_out: list[str] = []

    def where_possible(what: str, compute: Callable[[], Iterable[T]]) -> tuple[T, ...]:
        try:
            return tuple(compute())
        except TraceError as error:
            left_out.append(f"Left out: {what}: {error}.")
            return ()

    asked = title != TEXT
    every, layers = read.layers, three_layers(read.layers)
    apart = QUESTIONS in read.domains and not asked
    generated = read.select(domains=[QUESTIONS]) if apart else None
    natural = read.select(domains=[d for d in read.domains if d != QUESTIONS]) if apart else read
    text = first_tokens(natural, None if asked else equal_tokens)
    labelled = natural
    if not asked:  # topics of one source, which differ in nothing else
        mask = np.array([d.domain == ENCYCLOPAEDIA for d in natural.documents])
        labelled = natural.select(documents=mask)
    topics = {d.topic for d in labelled.documents} - {None}
    compared = len(topics) > 1 if asked else bool(topics)

    say("load")
    kinds = {title: text, GENERATED: generated, MMLU: mmlu}
    load = {
        kind: tuple(expert_load(trace, x, seed=seed) for x in every)
        for kind, trace in kinds.items()
        if trace is not None
    }
    say("subjects" if asked else "domains and topics")
    draws = SUBJECT_DRAWS if asked else LABEL_DRAWS
    loads = tuple(
        domain_load(labelled, x, by="topic", resamples=draws, seed=seed)
        for x in (layers if compared else ())
    )
    subjects = [
        domain_load(mmlu, x, by="topic", resamples=SUBJECT_DRAWS, seed=seed) for x in layers if mmlu
    ]  # fmt: skip
    domains = [domain_load(text, x, seed=seed) for x in (() if asked else layers)]
    sides = [
        _renamed(t, name)
        for t, name in ((text, "text"), (generated, "questions"), (mmlu, "mmlu"))
        if t
    ]
    against = RoutingTrace.concat(sides) if len(sides) > 1 else None
    if asked:
        if not compared:
            left_out.append("Left out: the subjects: there is only one.")
        elif few := int(loads[0].few_documents.sum()):
            left_out.append(
                f"Left out: intervals within {few} of the {len(topics)} subjects: a subject with fewer than "
                f"{MIN_DOCUMENTS} questions has its null, but no interval."
            )
        if not load[title][0].ratio.known:
            left_out.append(
                f"Left out: intervals over all questions: there are {load[title][0].units}, which is fewer than "
                f"{MIN_DOCUMENTS}."
            )

    say("information")
    of_labels = information(text, by="topic" if asked and compared else "domain", seed=seed)
    within = information(labelled, by="topic", seed=seed) if compared and not asked else ()
    say("tokens")
    tokens = studied_tokens(natural, generated, tokenizer)
    ids = [t.token for t in tokens]
    apart_ids = list(dict.fromkeys(t.apart_token for t in tokens))
    preferred = where_possible(
        "the preferred experts of all tokens",
        lambda: [preferred_experts(text, x, min_count=10, seed=seed) for x in every],
    )
    say("neighbours, co-activation and paths")
    if not whole:
        left_out.append(
            "Left out: C10, the paths through the model: only some layers were recorded (--layers all)."
        )
    if asked:
        left_out.append(
            "Left out: C11, which compares questions with other text: only questions were read."
        )
    measured = Measurements(
        layers=layers,
        num_layers=num_layers or every[-1],
        load=load,
        domains=tuple(domains),
        topics=loads,
        subjects=tuple(subjects),
        questions_against_text=tuple(domain_load(against, x, seed=seed) for x in layers)
        if against
        else (),
        information=of_labels,
        information_topics=within,
        repeats=where_possible(
            "neighbouring tokens", lambda: [repeats(text, x, seed=seed) for x in every]
        ),
        preferred=preferred,
        tokens=tokens,
        shares=tuple(token_shares(natural, x, ids, seed=seed) for x in layers) if ids else (),
        apart=tuple(token_shares(generated, x, apart_ids, seed=seed) for x in layers)
        if ids and generated
        else (),
        frequent=tuple(frequent_tokens(text, x) for x in layers),
        characteristic=tuple(characteristic_tokens(text, x, seed=seed) for x in layers),
        coactivation=where_possible(
            "co-activation", lambda: [coactivation(text, x, seed=seed) for x in layers]
        ),
        paths=(paths(text, seed=seed), paths(text, kind="set", seed=seed)) if whole else (),
        dependence=layer_dependence(text, layers=layers if asked else None, seed=seed),
        text=title,
    )
    return measured, left_out


def _renamed(trace: RoutingTrace, domain: str) -> RoutingTrace:
    """The trace as one domain."""
    documents = tuple(
        TraceDocument(domain, f"{d.domain}/{d.id}", None, f"{d.domain}/{d.work or d.id}")
        for d in trace.documents
    )
    return dataclasses.replace(trace, documents=documents)


def studied_tokens(
    natural: RoutingTrace, generated: RoutingTrace | None, tokenizer: Tokenizer
) -> tuple[StudiedToken, ...]:
    """':' '.' 'What' 'Who', each in its most frequent spelling in natural text; none of one is left out."""
    found: list[StudiedToken] = []
    for name, spellings in TOKENS.items():
        ids = {s: int(i) for s in spellings if (i := tokenizer.token_to_id(s)) is not None}
        here = {s: int((natural.token == i).sum()) for s, i in ids.items()}
        there = {
            s: 0 if generated is None else int((generated.token == i).sum()) for s, i in ids.items()
        }
        if not here or not max(here.values()):
            continue
        best, apart = max(here, key=lambda s: here[s]), max(there, key=lambda s: there[s])
        shown = {s: f"'{s.replace('Ġ', ' ').replace('▁', ' ')}'" for s in ids}
        found.append(
            StudiedToken(
                name,
                shown[best],
                ids[best],
                shown[apart],
                ids[apart],
                {shown[s]: (here[s], there[s]) for s in ids},
            )
        )
    return tuple(found)


def chosen_topics(
    topics: Mapping[str, int], count: int = 3, wanted: Sequence[str] = TOPICS
) -> tuple[str, ...]:
    """Those `wanted` where they all exist, else the largest; `topics` gives each its number of documents."""
    if all(name in topics for name in wanted):
        return tuple(wanted[:count])
    return tuple(sorted(topics, key=lambda name: (-topics[name], name))[:count])
