"""Text of the reader's own: plain text, JSON lines or Parquet, in a file or a folder, split by document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minimoe.errors import CorpusError, explained
from minimoe.io import json_lines
from minimoe.text import documents as docs
from minimoe.text.corpus import Corpus
from minimoe.text.tokenizer import encode, load_tokenizer, train_tokenizer

DOMAIN = "text"  # the one domain of such a corpus
PLAIN, LINES, TABLES = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson"), (".parquet",)
MAX_TOKENIZER_BYTES = 50_000_000  # what a tokenizer is trained on


def own_corpus(
    path: str | Path, *, tokenizer: Tokenizer | str | Path | None = None, vocab_size: int = 4096
) -> Corpus:
    """Read, split and encode own text, as one domain 'text'.

    A file of plain text is a document; so is each line of a .jsonl, an object with a "text", and each row of a .parquet
    with a column `text` (by the package datasets). A tenth of the documents is held out, one at least, by their names
    alone; copies are left out. Of a single document, its parts of 8,000 characters are split.

    Args:
        path: a file, or a folder that is searched with its subfolders.
        tokenizer: a tokenizer, or a path to one; default, train one on the training side, of `vocab_size` ids.

    Raises:
        CorpusError: nothing there, no text in it, a file or line that cannot be read, or too little to hold a part out.
    """
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"there is no file or folder {path}; --text takes one that holds text")
    kinds = (*PLAIN, *LINES, *TABLES)
    files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in kinds and p.is_file()]
    whole = [text for p in ([path] if path.is_file() else files) for text in _texts(p, path)]
    documents = docs.drop_exact_copies(
        docs.Document(DOMAIN, f"{name}:{i}", part, work="" if len(whole) == 1 else name)
        for name, text in whole
        for i, part in enumerate(_parts(text))
    )
    works = docs.in_order(DOMAIN, {d.work for d in documents})
    if len(works) < 2:
        found = "too little text to hold a part of it out" if works else "no text"
        raise CorpusError(
            f"{path} holds {found}; expected a file or a folder of {', '.join(kinds)}"
        )
    share = sum(docs.is_held_out(DOMAIN, work) for work in works)
    held = {*works[: min(max(share, 1), len(works) - 1)]}
    train, heldout = ([d for d in documents if (d.work in held) == side] for side in (False, True))
    if tokenizer is None:
        read = docs.sample(train, MAX_TOKENIZER_BYTES) or train[:1]
        tokenizer = train_tokenizer((d.text for d in read), vocab_size)
    tokenizer = load_tokenizer(tokenizer)
    splits = encode(tokenizer, train), encode(tokenizer, heldout)
    return Corpus((DOMAIN,), tokenizer, *splits, {})


def _texts(file: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each document of a file."""
    name = file.relative_to(root).as_posix() if root.is_dir() else file.name
    rows: list[dict[str, Any]] = []
    if file.suffix.lower() in TABLES:
        missing = f"{file} is read by the package datasets: pip install datasets"
        with explained(CorpusError, missing, ImportError):
            from datasets import Dataset  # pyright: ignore
        # whatever its parts raise
        with explained(CorpusError, lambda e: f"{file} is no Parquet table: {e}", Exception):
            rows = list(Dataset.from_parquet(str(file)))  # pyright: ignore
    elif file.suffix.lower() in LINES:
        rows = [row for _, row in json_lines(file, CorpusError)]
    else:
        kind, fault = UnicodeDecodeError, f"{file} is not UTF-8 text"
        with explained(CorpusError, lambda e: f"{fault} ({e.reason}); convert it", kind):
            yield name, file.read_text(encoding="utf-8-sig")
    for number, row in enumerate(rows, 1):
        if not isinstance(text := row.get("text"), str):
            raise CorpusError(f"{file}: document {number} has no 'text' that is a text")
        yield f"{name}:{number}", text


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most MAX_HELDOUT_CHARACTERS, cut after a paragraph, a line or a word where there is one."""
    while text:
        most = (
            len(text) if len(text) <= docs.MAX_HELDOUT_CHARACTERS else docs.MAX_HELDOUT_CHARACTERS
        )
        cuts = (text.rfind(mark, 0, most) + len(mark) for mark in ("\n\n", "\n", " "))
        cut = most if most == len(text) else next((c for c in cuts if c > most // 2), most)
        if part := docs.clean(text[:cut]):
            yield part
        text = text[cut:]
