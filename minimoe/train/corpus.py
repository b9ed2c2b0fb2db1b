"""The corpus: real text by domain, as tokens, split by whole works, cached.

    corpus = load_corpus()                    # fetches what is missing, reads, splits, encodes
    corpus.train.tokens[corpus.train.domain_slice("law")]

This module is the front door of the text: what `documents`, `domains`, `fetch`, `questions` and `tokens`
define is found here too.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from minimoe.errors import CorpusError
from minimoe.io import write_text
from minimoe.train.documents import (
    HELD_OUT_SHARE,
    MAX_DOCUMENT_CHARACTERS,
    MAX_HELDOUT_CHARACTERS,
    SPLIT_SALT,
    Document,
    DocumentInfo,
    is_held_out,
    sample,
    shorten,
)
from minimoe.train.domains import DOMAINS, Domain, attributions, read_domain, resolve
from minimoe.train.fetch import (
    PACKAGES,
    Log,
    Package,
    cache_dir,
    fetch_packages,
    in_ci,
    print_to_stderr,
    wheel_path,
)
from minimoe.train.questions import generated_questions, mmlu_dev_questions
from minimoe.train.sources import fingerprint
from minimoe.train.store import Corpus, open_corpus, save_corpus
from minimoe.train.table import DomainRow, describe, table
from minimoe.train.tokens import (
    END_OF_TEXT,
    TokenSplit,
    begin_of_text_id,
    digest,
    encode,
    end_of_text_id,
    load_tokenizer,
    plain,
    text_ids,
    train_tokenizer,
)

__all__ = [
    "DOMAINS",
    "END_OF_TEXT",
    "PACKAGES",
    "Corpus",
    "Document",
    "DocumentInfo",
    "Domain",
    "DomainRow",
    "FetchReport",
    "Package",
    "TokenSplit",
    "attributions",
    "begin_of_text_id",
    "cache_dir",
    "describe",
    "encode",
    "end_of_text_id",
    "fetch",
    "generated_questions",
    "is_held_out",
    "load_corpus",
    "load_tokenizer",
    "mmlu_dev_questions",
    "plain",
    "read_domain",
    "table",
    "text_ids",
    "train_tokenizer",
]

# Counts up when the readers or the split change what a corpus of the same sources holds.
FORMAT = 1
MIN_DOMAINS = 3


@dataclass(frozen=True)
class FetchReport:
    """Packages fetched now, packages that were there, and why domains have to be left out."""

    fetched: tuple[str, ...]
    cached: tuple[str, ...]
    skipped: dict[str, str]
    attributions: str


def _require_enough(wanted: Sequence[str], skipped: dict[str, str]) -> None:
    left = len(wanted) - len(skipped)
    if skipped and left < min(MIN_DOMAINS, len(wanted)):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise CorpusError(
            f"only {left} of {len(wanted)} domains could be had, at least {min(MIN_DOMAINS, len(wanted))} "
            f"are needed ({reasons}); connect to a network and run `python -m minimoe corpus fetch`, "
            "or ask for tier 0, which needs none"
        )


def fetch(domains: Iterable[str] | str | None = None, *, log: Log | None = None) -> FetchReport:
    """Bring the packages of the domains into the cache and write ATTRIBUTIONS.md beside them.

    Default: every domain of tier 1, the MMLU questions among them. A package that cannot be had costs its
    domains one line of log each.

    Raises:
        CorpusError: an unknown domain; fewer than three domains are left; pip is missing; the cache cannot be
            written; or, where CI=true, any package could not be fetched.
    """
    log = log or print_to_stderr
    everything = [d.name for d in DOMAINS.values() if d.package is not None]
    names = resolve(everything if domains is None else domains)
    needs = {name: package for name in names if (package := DOMAINS[name].package) is not None}
    report = fetch_packages([package.name for package in needs.values()], log)
    skipped = {
        name: f"{package.name} {package.version}: {report.failed[package.name]}"
        for name, package in needs.items()
        if package.name in report.failed
    }
    for name, reason in skipped.items():
        log(f"skipping the domain {name}: {reason}")
    _require_enough(names, skipped)
    here = [name for name in needs if name not in skipped]
    if here:
        _write_attributions(log)
    return FetchReport(report.fetched, report.cached, skipped, attributions(here) if here else "")


def _write_attributions(log: Log) -> None:
    """Name the sources of all that lies in the cache, in a file beside it."""
    here = [d.name for d in DOMAINS.values() if d.package and wheel_path(d.package).is_file()]
    path = cache_dir() / "packages" / "ATTRIBUTIONS.md"
    text = attributions(here)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    try:
        write_text(path, text)
    except OSError as error:
        log(f"cannot write {path} ({error.strerror})")


def load_corpus(
    domains: Iterable[str] | str | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int = 4096,
    tier: int = 1,
    max_train_bytes: int | None = 2_600_000,
    max_heldout_bytes: int | None = 400_000,
    log: Log | None = None,
) -> Corpus:
    """Read, split and encode text by domain; what is missing is fetched, what was made before is reused.

    Args:
        domains: names from DOMAINS; default, the training mix of `tier` (0 needs no network).
        tokenizer: a tokenizer, or a path to one; default, train one on the training split.
        vocab_size: size of the vocabulary if a tokenizer is trained.
        tier: 0 or 1, used where `domains` is not given.
        max_train_bytes: cap a domain on the training side, in bytes of UTF-8; None for no cap.
        max_heldout_bytes: the same on the held-out side.
        log: called with each line of progress; default, standard error.

    Raises:
        CorpusError: an unknown domain; fewer than three domains are left after skipping; in CI, any domain that
            had to be skipped; a tokenizer that cannot be used; a cache that cannot be written.
    """
    log = log or print_to_stderr
    wanted = resolve(domains, tier)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is not None:
        tokenizer = plain(tokenizer)
    skipped = dict(fetch(wanted, log=log).skipped)
    names = [name for name in wanted if name not in skipped]
    fingerprints: dict[str, str] = {}
    for name in list(names):
        package = DOMAINS[name].package
        try:
            fingerprints[name] = package.sha256 if package else fingerprint(name)
        except CorpusError as error:
            _skip(name, str(error), names, skipped, log)
    _require_enough(wanted, skipped)

    recipe = {
        "format": FORMAT,
        "domains": fingerprints,
        "max_train_bytes": max_train_bytes,
        "max_heldout_bytes": max_heldout_bytes,
        "split": [HELD_OUT_SHARE, SPLIT_SALT],
        "max_characters": [MAX_DOCUMENT_CHARACTERS, MAX_HELDOUT_CHARACTERS],
        "tokenizer": (
            ["bpe", vocab_size, tokenizers.__version__]
            if tokenizer is None
            else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        ),
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "corpora" / f"{key[:24]}.npz"
    if path.is_file():
        try:
            return open_corpus(path, skipped)
        except CorpusError as error:
            log(f"making {path} again: it cannot be used ({error})")

    train: list[Document] = []
    heldout: list[Document] = []
    for name in list(names):
        try:
            documents = read_domain(name)
        except CorpusError as error:
            _skip(name, str(error), names, skipped, log)
            continue
        held = [is_held_out(name, d.work) for d in documents]
        train += sample((d for d, h in zip(documents, held, strict=True) if not h), max_train_bytes)
        short = (
            shorten(d, MAX_HELDOUT_CHARACTERS) for d, h in zip(documents, held, strict=True) if h
        )
        heldout += sample(short, max_heldout_bytes)
        log(f"read {name}: {len(documents):,} documents")
    _require_enough(wanted, skipped)
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in train), vocab_size)
    splits = encode(tokenizer, train), encode(tokenizer, heldout)
    corpus = Corpus(tuple(names), tokenizer, *splits, digest(*splits), skipped)
    if len(names) == len(
        fingerprints
    ):  # a domain that failed to read must be tried again next time
        try:
            save_corpus(path, corpus, recipe)
        except OSError as error:
            log(
                f"cannot keep the corpus in {path.parent} ({error.strerror}); it is made anew each time"
            )
    return corpus


def _skip(name: str, reason: str, names: list[str], skipped: dict[str, str], log: Log) -> None:
    if in_ci():
        raise CorpusError(f"the domain {name} cannot be had: {reason}")
    names.remove(name)
    skipped[name] = reason
    log(f"skipping the domain {name}: {reason}")
