"""The measurements of a study that reads questions alone, as the article does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from tokenizers import Tokenizer

from minimoe.errors import TraceError
from minimoe.study import statistics as st
from minimoe.study.measurements import (
    SUBJECT_DRAWS,
    Measurements,
    Progress,
    studied_tokens,
    three_layers,
)
from minimoe.study.trace import RoutingTrace

T = TypeVar("T")


def measure_questions(
    trace: RoutingTrace,
    tokenizer: Tokenizer,
    *,
    title: str,
    num_layers: int,
    whole: bool,
    seed: int = 0,
    say: Progress = lambda _: None,
) -> tuple[Measurements, list[str]]:
    """Everything that questions by subject can tell, and a sentence for each analysis that they cannot support.

    Args:
        trace: questions; the topic of each is its subject.
        title: what they are, in a sentence.
        num_layers: of the model.
        whole: whether every layer with experts was recorded, so that paths go through all of the model.
    """
    left_out: list[str] = []

    def where_possible(what: str, compute: Callable[[], Iterable[T]]) -> tuple[T, ...]:
        try:
            return tuple(compute())
        except TraceError as error:
            left_out.append(f"Left out: {what}: {error}.")
            return ()

    every = trace.layers
    layers = three_layers(every)
    subjects = {d.topic for d in trace.documents}
    compared = len(subjects) > 1
    if not compared:
        left_out.append("Left out: the subjects: there is only one.")
    say("load")
    load = tuple(st.expert_load(trace, x, seed=seed) for x in every)
    say("subjects")
    loads = [
        st.domain_load(trace, x, by="topic", resamples=SUBJECT_DRAWS, seed=seed)
        for x in (layers if compared else ())
    ]
    if loads and loads[0].few_documents.any():
        few = int(loads[0].few_documents.sum())
        left_out.append(
            f"Left out: intervals within {few} of the {len(subjects)} subjects: a subject with fewer than "
            f"{st.MIN_DOCUMENTS} questions has its null, but no interval."
        )
    if load[0].ratio.low is None:
        left_out.append(
            f"Left out: intervals over all questions: there are {load[0].documents}, which is fewer than "
            f"{st.MIN_DOCUMENTS}."
        )
    say("information")
    information = st.information(trace, by="topic" if compared else "domain", seed=seed)
    say("tokens")
    tokens = studied_tokens(trace, None, tokenizer)
    ids = [t.token for t in tokens]
    preferred = where_possible(
        "the preferred experts of all tokens",
        lambda: [st.preferred_experts(trace, x, min_count=10, seed=seed) for x in every],
    )
    say("neighbours and co-activation")
    paths: tuple[st.Paths, ...] = ()
    if whole:
        say("paths")
        paths = (st.paths(trace, seed=seed), st.paths(trace, kind="set", seed=seed))
    else:
        left_out.append(
            "Left out: C10, the paths through the model: only some layers were recorded (--layers all)."
        )
    left_out.append(
        "Left out: C11, which compares questions with other text: only questions were read."
    )
    measured = Measurements(
        layers=layers,
        num_layers=num_layers,
        load={title: load},
        domains=(),
        topics=tuple(loads),
        subjects=(),
        questions_against_text=(),
        information=information,
        information_topics=(),
        repeats=where_possible(
            "neighbouring tokens", lambda: [st.repeats(trace, x, seed=seed) for x in every]
        ),
        preferred=preferred,
        tokens=tokens,
        shares=tuple(st.token_shares(trace, x, ids, seed=seed) for x in layers) if ids else (),
        apart=(),
        frequent=tuple(st.frequent_tokens(trace, x, seed=seed) for x in layers),
        characteristic=tuple(st.characteristic_tokens(trace, x, seed=seed) for x in layers),
        coactivation=where_possible(
            "co-activation", lambda: [st.coactivation(trace, x, seed=seed) for x in layers]
        ),
        paths=paths,
        dependence=st.layer_dependence(trace, layers=layers, seed=seed),
        text=title,
    )
    return measured, left_out
