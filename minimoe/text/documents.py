"""Documents: what a domain is made of, which of them are held out, and which are copies of another.

A document is the unit of the statistics (bootstrap, permutation). A *work* is the unit of the split: all
documents of one work are on the same side, so that no scene of a training play is ever held out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minimoe.errors import CorpusError

HELD_OUT_SHARE = 0.10

# The first whole number with which every domain of few works (law, religion, drama, code, math) holds out
# 9 to 12 % of its text in at least 50 documents: with 38 plays and 66 books of the Bible, chance alone can
# leave a domain with next to nothing held out. Chosen on these sizes only, before any training.
SPLIT_SALT = 806

MAX_DOCUMENT_CHARACTERS = 40_000

# Statistics resample held-out documents, so a given number of bytes should be many documents.
MAX_HELDOUT_CHARACTERS = 8_000

SHINGLE_WORDS = 8

# Questions are made from articles, so they follow the split of the articles.
_SPLIT_WITH = {"questions": "wiki_en"}

# Never trained on, whatever the hash says.
ALWAYS_HELD_OUT = frozenset({"mmlu"})


@dataclass(frozen=True)
class Document:
    """One text of one domain.

    `id` is unique within the domain. `topic` is a finer label where the source has one. `work` is what the document
    belongs to for the split (a play, a book, a module) and is the id itself if not given. `description` is a short
    account of what the document is about, where the source has one. A CorpusError where one of them holds a lone
    surrogate, which tokenizers and UTF-8 refuse.
    """

    domain: str
    id: str
    text: str
    topic: str | None = None
    work: str = ""
    description: str | None = None

    def __post_init__(self) -> None:
        if not self.work:
            object.__setattr__(self, "work", self.id)
        for name in ("domain", "id", "text", "topic", "work", "description"):
            if half := re.search("[\ud800-\udfff]", getattr(self, name) or ""):
                raise CorpusError(
                    f"the {name} of document {self.id!a} of {self.domain!a} holds {half[0]!a}, which is half of a "
                    "character (a lone surrogate) and no text: remove it"
                )


@dataclass(frozen=True)
class DocumentInfo:
    """What is kept of a document once it is tokens: UTF-8 bytes, and tokens with the end-of-text one."""

    domain: str
    id: str
    topic: str | None
    bytes: int
    tokens: int
    work: str = ""


def number_of(*parts: object) -> int:
    """A number below 2⁶⁴ that depends on the parts alone, on every platform and version of Python."""
    return int.from_bytes(hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()[:8], "big")


def _hash(domain: str, key: str) -> int:
    return number_of(SPLIT_SALT, domain, key)


def is_held_out(domain: str, work: str) -> bool:
    """Whether a work is held out: one in ten, by sha256 of domain and work, so it never changes."""
    if domain in ALWAYS_HELD_OUT:
        return True
    return _hash(_SPLIT_WITH.get(domain, domain), work) < HELD_OUT_SHARE * 2**64


def in_order(domain: str, works: Iterable[str]) -> list[str]:
    """Works in the order of the hash that holds them out: `is_held_out` is true of the first of them."""
    return sorted(works, key=lambda work: (_hash(domain, work), work))


def clean(text: str) -> str:
    """Newlines as `\\n`, composed characters, no trailing blanks, at most two newlines in a row, cut."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "\n".join(line.rstrip() for line in text.replace("\x00", "").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")[:MAX_DOCUMENT_CHARACTERS]


def sample(documents: Iterable[Document], max_bytes: int | None) -> list[Document]:
    """Whole documents in hash order until the next would pass the cap: a random sample, always the same.

    The draw stops at the first document that does not fit. Skipping it and going on would fill the rest
    with short documents.
    """
    ordered = sorted(documents, key=lambda d: (_hash(d.domain + "/order", d.id), d.id))
    limit = math.inf if max_bytes is None else max_bytes
    total = itertools.accumulate(len(document.text.encode()) for document in ordered)
    return [d for d, size in zip(ordered, total, strict=True) if size <= limit]


def drop_exact_copies(documents: Iterable[Document]) -> list[Document]:
    """The first of each group of documents whose text is equal but for case and white space."""
    kept: dict[bytes, Document] = {}
    for document in documents:
        words = " ".join(document.text.casefold().split())
        kept.setdefault(hashlib.sha256(words.encode()).digest(), document)
    return list(kept.values())


def drop_near_copies(documents: Sequence[Document], max_overlap: float) -> list[Document]:
    """Drop each document of a domain that shares more than `max_overlap` of its 8-grams of words with those kept.

    The longest come first, so that a text contained in a longer one is the one that goes. The order of
    the input is kept in the result.
    """
    vocabulary: dict[str, int] = {}
    # A fixed odd multiplier: 64-bit wrap-around makes this a polynomial hash of eight word numbers.
    powers = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(SHINGLE_WORDS)], np.uint64)
    seen: set[int] = set()
    kept: set[str] = set()
    for document in sorted(documents, key=lambda d: (-len(d.text), d.id)):
        words = document.text.casefold().split()
        numbers = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words]
        numbers += [0] * (SHINGLE_WORDS - len(numbers))
        windows = np.lib.stride_tricks.sliding_window_view(
            np.array(numbers, np.uint64), SHINGLE_WORDS
        )
        shingles: set[int] = set((windows * powers).sum(axis=1, dtype=np.uint64).tolist())
        if len(shingles & seen) <= max_overlap * len(shingles):
            kept.add(document.id)
            seen |= shingles
    return [document for document in documents if document.id in kept]
