"""The domains: where each kind of text comes from, under which licence (domains.toml), and how it is read."""

from __future__ import annotations

import sqlite3
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minimoe.errors import CorpusError, did_you_mean, explained
from minimoe.text import sources
from minimoe.text.documents import ALWAYS_HELD_OUT, Document, drop_exact_copies, drop_near_copies
from minimoe.text.fetch import PACKAGES
from minimoe.text.questions import generated_questions, read_mmlu


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    It is read from `package`, a key of PACKAGES, or (None) from this Python installation. `mixed` says whether it is
    in the default training mix. `max_overlap`: documents that share more than this part of their 8-grams with the
    documents kept are dropped as copies; None compares whole texts only.
    """

    name: str
    title: str
    licence: str
    attribution: str
    mixed: bool
    read: Callable[[], list[Document]]
    package: str | None = None
    max_overlap: float | None = None


_READERS: dict[str, Callable[[], list[Document]]] = {
    "law": sources.read_law,
    "religion": sources.read_religion,
    "drama": sources.read_drama,
    "code": sources.read_code,
    "math": sources.read_math,
    "cooking": sources.read_cooking,
    "wiki_en": partial(sources.read_wiki, "wiki_en", "en-us"),
    "wiki_fr": partial(sources.read_wiki, "wiki_fr", "fr-fr"),
    "wiki_es": partial(sources.read_wiki, "wiki_es", "es-es"),
    "questions": lambda: generated_questions(read_domain("wiki_en")),
    "mmlu": read_mmlu,
    "help": sources.read_help,
    "licences": sources.read_licences,
}

DOMAINS: dict[str, Domain] = {
    name: Domain(name=name, read=_READERS[name], **fields)
    for name, fields in tomllib.loads(
        Path(__file__).with_name("domains.toml").read_text(encoding="utf-8")
    ).items()
}


def resolve(names: Iterable[str] | str | None) -> tuple[str, ...]:
    """Names of domains in the order of DOMAINS; None: the training mix. An unknown one is a CorpusError."""
    if names is None:
        return tuple(name for name, domain in DOMAINS.items() if domain.mixed)
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in DOMAINS:
            near = did_you_mean(name, DOMAINS)
            raise CorpusError(f"unknown domain {name!r}; {near}known: {', '.join(DOMAINS)}")
    if not wanted:
        raise CorpusError(f"no domain was given; known: {', '.join(DOMAINS)}")
    return tuple(name for name in DOMAINS if name in set(wanted))


def read_domain(name: str) -> list[Document]:
    """All documents of a domain, copies removed, in the order of the source.

    A CorpusError where the domain is unknown, or its package is not in the cache or is not the pinned one.
    """
    domain = DOMAINS[resolve([name])[0]]
    fault, kinds = (
        f"cannot read the domain {name!r}",
        (KeyError, ValueError, OSError, sqlite3.Error),
    )
    with explained(CorpusError, lambda e: f"{fault}: {type(e).__name__}: {e}", *kinds):
        documents = domain.read()
    if name not in ALWAYS_HELD_OUT:  # a published set of questions stays as it was published
        documents = drop_exact_copies(documents)
    if domain.max_overlap is not None:
        documents = drop_near_copies(documents, domain.max_overlap)
    if not documents:
        raise CorpusError(f"the domain {name!r} has no documents in this installation")
    return documents


def attributions(names: Iterable[str] | None = None) -> str:
    """Whose text the domains hold, under which licence and from which package, as Markdown."""
    lines = ["# Whose text this is", ""]
    for name in resolve(names):
        domain = DOMAINS[name]
        lines.append(f"- **{name}** ({domain.title}): {domain.licence}. {domain.attribution}")
        if domain.package is not None:
            lines.append(f"  Read from {PACKAGES[domain.package]}.")
    return "\n".join(lines) + "\n"
