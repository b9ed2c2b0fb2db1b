"""A corpus as a value, and as one file of the cache."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minimoe.errors import CorpusError
from minimoe.io import atomic_write
from minimoe.train.documents import DocumentInfo
from minimoe.train.tokens import TokenSplit, digest, plain


@dataclass(frozen=True)
class Corpus:
    """Tokens of several domains on both sides of the split.

    `sha256` covers the token arrays. `skipped` maps each domain that was asked for and could not be had to
    the reason.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    train: TokenSplit
    heldout: TokenSplit
    sha256: str
    skipped: dict[str, str]


def save_corpus(path: Path, corpus: Corpus, recipe: Mapping[str, object]) -> None:
    """One npz, written beside `path` and moved into place: arrays, and everything else as JSON in bytes.

    Raises:
        OSError: the folder cannot be written or the disk is full; an older file is then what it was.
    """
    side = {
        "recipe": recipe,
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
    """Read what `save_corpus` wrote.

    Raises:
        CorpusError: the file is damaged, foreign or of an older layout.
    """
    try:
        return _read(path, skipped)
    except CorpusError:
        raise
    except Exception as error:  # zip, zlib, JSON and tokenizer errors have no common base
        raise CorpusError(f"{type(error).__name__}: {error}") from error


def _read(path: Path, skipped: dict[str, str]) -> Corpus:
    with np.load(path, allow_pickle=False) as arrays:
        side = json.loads(arrays["side"].tobytes())
        splits: list[TokenSplit] = []
        for name in ("train", "heldout"):
            documents = tuple(DocumentInfo(**entry) for entry in side[name])
            lengths = [d.tokens for d in documents]
            document = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
            splits.append(TokenSplit(arrays[name], document, documents))
    train, heldout = splits
    if digest(train, heldout) != side["sha256"]:
        raise CorpusError("its tokens do not match their sha256")
    tokenizer = plain(Tokenizer.from_str(side["tokenizer"]))
    return Corpus(tuple(side["domains"]), tokenizer, train, heldout, side["sha256"], skipped)
