"""The traces that the report is about: of held-out text, of the real questions, and of untrained weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from minimoe.checkpoint import weights_fingerprint
from minimoe.errors import CorpusError, TraceError
from minimoe.model import MixtralModel
from minimoe.study.measurements import (
    ENCYCLOPAEDIA,
    QUESTIONS,
    Headline,
    Progress,
    first_tokens,
    headline,
)
from minimoe.study.recorder import record_documents, record_split
from minimoe.study.trace import RoutingTrace
from minimoe.train.corpus import Corpus, encode, mmlu_dev_questions

EQUAL_TOKENS = 40_000
"""Held-out tokens a domain, for what is said about all text together."""
MORE_TOKENS = {ENCYCLOPAEDIA: 1_000_000, "drama": 100_000}
"""The encyclopaedia is read whole, for its topics need their documents; plays hold 'What' and 'Who'."""
CONTROL_TOKENS = 12_000
CONTROL_ENCYCLOPAEDIA = 60_000


def identity_of(path: Path, corpus: Corpus, max_tokens: int | None) -> dict[str, str]:
    """What a trace of the checkpoint in folder `path` is recognised by: its weights, its text and the options."""
    total = hashlib.sha256(weights_fingerprint(path).encode())
    for name in ("config.json", "tokenizer.json"):
        if (path / name).is_file():
            total.update(hashlib.sha256((path / name).read_bytes()).digest())
    return {
        "checkpoint_sha256": total.hexdigest(),
        "data_sha256": corpus.sha256,
        "options": json.dumps(_limits(corpus, max_tokens), sort_keys=True),
    }


def _limits(corpus: Corpus, max_tokens: int | None) -> dict[str, int]:
    """Held-out tokens to record of each domain."""
    return {name: max_tokens or MORE_TOKENS.get(name, EQUAL_TOKENS) for name in corpus.domains}


def recorded_heldout(
    model: MixtralModel,
    corpus: Corpus,
    path: Path,
    max_tokens: int | None,
    identity: dict[str, str],
    say: Progress,
    *,
    begin: int | None,
) -> RoutingTrace:
    """The trace of the held-out text: the one at `path` where it has this identity, else recorded and saved there.

    Args:
        max_tokens: held-out tokens a domain; None, EQUAL_TOKENS and more of some.
        identity: from `identity_of`; the weights, text and options that a stored trace must be of.
        say: told what is done.
        begin: what the model reads before a text (see `begin_of_text_id`).

    Raises:
        WriteError: `path` cannot be written.
    """
    if path.is_file():
        try:
            stored = RoutingTrace.load(path)
            if {key: stored.meta.get(key) for key in identity} == identity:
                say("the recorded choices are there already")
                return stored
        except TraceError:
            pass  # damaged or foreign: it is replaced below
    limits = _limits(corpus, max_tokens)
    say(f"recording held-out text of {len(limits)} domains")
    parts = [
        record_split(
            model,
            corpus.heldout,
            domains=[name],
            max_tokens=limit,
            end_of_text=begin,
            meta=identity,
        )
        for name, limit in limits.items()
        if corpus.heldout.domain_slice(name).stop > corpus.heldout.domain_slice(name).start
    ]
    trace = RoutingTrace.concat(parts)
    trace.save(path)
    return trace


def recorded_questions(
    model: MixtralModel, tokenizer: Tokenizer, begin: int | None
) -> tuple[RoutingTrace | None, str]:
    """The real questions, or None and the reason."""
    try:
        documents = mmlu_dev_questions()
    except CorpusError as error:
        return None, str(error)
    split = encode(tokenizer, documents)
    return record_split(model, split, end_of_text=begin), ""


def control(
    model: MixtralModel, heldout: RoutingTrace, equal: int, seed: int, begin: int | None
) -> tuple[Headline, Headline]:
    """The headline statistics of the model and of random weights of its configuration, on the same documents."""
    names = [d for d in heldout.domains if d != QUESTIONS]
    limits = {
        d: min(equal, CONTROL_ENCYCLOPAEDIA if d == ENCYCLOPAEDIA else CONTROL_TOKENS)
        for d in names
    }
    same = RoutingTrace.concat(
        [first_tokens(heldout.select(domains=[d]), limits[d]) for d in names]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = MixtralModel(model.config).eval()
    starts = np.searchsorted(same.document, np.arange(1, len(same.documents)))
    untrained = record_documents(
        random, same.documents, np.split(same.token, starts), end_of_text=begin
    )
    least = min(limits.values())
    return headline(same, equal_tokens=least, seed=seed), headline(
        untrained, equal_tokens=least, seed=seed
    )
