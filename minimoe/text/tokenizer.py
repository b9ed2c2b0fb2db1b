"""From documents to token arrays: the byte-level BPE tokenizer, the splits that it makes, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minimoe.errors import ConfigError, CorpusError, explained
from minimoe.text.documents import Document, DocumentInfo

END_OF_TEXT = "<|eot|>"

# and what other tokenizers call it, for studies with their models
_ENDS = (END_OF_TEXT, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

_BATCH = 256

Tokens = npt.NDArray[np.uint16 | np.uint32]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE; `<|eot|>` has id 0 and every byte has a token, so any text can be encoded.

    The vocabulary is smaller than asked for if the texts do not hold enough different pairs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise CorpusError(
            f"vocab_size is {vocab_size}, but 256 bytes and {END_OF_TEXT} need at least {len(alphabet) + 1}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path | Tokenizer) -> Tokenizer:
    """A tokenizer, or the one in a tokenizer.json or a folder that holds one, as `plain` leaves it.

    A CorpusError where there is no such file, or it is not a tokenizer.
    """
    if isinstance(path, Tokenizer):
        return plain(path)
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CorpusError(f"no tokenizer at {file}")
    # the library raises a bare Exception for a malformed file
    with explained(CorpusError, lambda e: f"{file} is not a tokenizer.json: {e}", Exception):
        return plain(Tokenizer.from_file(str(file)))


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither cuts nor pads, as trainers leave them, and reads the spelling of a special token as text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def text_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, nothing before it and nothing after it; `tokenizer` as `plain` returns it.

    A CorpusError where the tokenizer has no token for a part of a text.
    """
    # the library raises a bare Exception
    with explained(CorpusError, lambda e: f"the tokenizer cannot encode a text: {e}", Exception):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def begin_of_text_id(tokenizer: Tokenizer, *, own: bool) -> int | None:
    """The id that a model reads before a text; None: none.

    A model that minimoe trained (`own`) has read the end of another text there. For any other model it is the special
    token that its tokenizer puts before a text by itself, as in transformers.
    """
    if own:
        return end_of_text_id(tokenizer)
    encoding = plain(tokenizer).encode("a")
    special = encoding.special_tokens_mask
    return encoding.ids[0] if special and special[0] and not all(special) else None


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends every document: 0 for minimoe's own tokenizers."""
    for name in _ENDS:
        if (number := tokenizer.token_to_id(name)) is not None:
            return int(number)
    raise CorpusError(f"the tokenizer has no end-of-text token; looked for {', '.join(_ENDS)}")


@dataclass(frozen=True)
class Size:
    """How much text: documents, their UTF-8 bytes, and their tokens with the end-of-text ones."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class TokenSplit:
    """One side of the split as one long run of tokens.

    Attributes:
        tokens: [N] uint16, or uint32 if the vocabulary has more than 65,535 ids. Each document's tokens are
            followed by one end-of-text token that belongs to it.
        documents: one entry a document; documents of one domain are contiguous.
    """

    tokens: Tokens
    documents: tuple[DocumentInfo, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def document(self) -> npt.NDArray[np.int32]:
        """[N] index into `documents`; non-decreasing."""
        numbers = np.arange(len(self.documents), dtype=np.int32)
        return np.repeat(numbers, np.diff(self.offsets))

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[documents + 1]: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
        lengths = np.array([0, *(d.tokens for d in self.documents)], np.int64)
        return np.cumsum(lengths)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in order of appearance."""
        return tuple(dict.fromkeys(d.domain for d in self.documents))

    def document_slice(self, domain: str) -> slice:
        """Where the documents of a domain are in `documents`; empty if there are none."""
        indices = [i for i, d in enumerate(self.documents) if d.domain == domain]
        return slice(indices[0], indices[-1] + 1) if indices else slice(0, 0)

    def domain_slice(self, domain: str) -> slice:
        """Where the tokens of a domain are in `tokens`; empty if there are none."""
        documents = self.document_slice(domain)
        return slice(int(self.offsets[documents.start]), int(self.offsets[documents.stop]))

    def size(self, domain: str | None = None) -> Size:
        """How much text of the domain there is; None: of all domains."""
        documents = self.documents[slice(None) if domain is None else self.document_slice(domain)]
        return Size(
            len(documents), sum(d.bytes for d in documents), sum(d.tokens for d in documents)
        )


class Batches:
    """Random windows of the training text; batch(step) depends on the seed and the step alone."""

    def __init__(
        self, split: TokenSplit, domains: Sequence[str], *, batch_size: int, seq_len: int, seed: int
    ) -> None:
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.streams = [split.tokens[split.domain_slice(name)] for name in domains]
        for name, stream in zip(domains, self.streams, strict=True):
            if len(stream) < seq_len:
                raise ConfigError(
                    f"domain {name} has {len(stream)} training tokens, fewer than one sequence of {seq_len}: "
                    "leave it out or lower seq_len"
                )

    def __call__(self, step: int) -> npt.NDArray[np.int64]:
        """input_ids [B, S] of step `step`; the domain of a row goes round in turn."""
        rng = np.random.default_rng((self.seed, step))
        rows: list[Tokens] = []
        for row in range(step * self.batch_size, (step + 1) * self.batch_size):
            stream = self.streams[row % len(self.streams)]
            start = int(rng.integers(len(stream) - self.seq_len + 1))
            rows.append(stream[start : start + self.seq_len])
        return np.stack(rows).astype(np.int64)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> TokenSplit:
    """Encode documents in order. Text that spells a special token is encoded as the text it is."""
    end = end_of_text_id(tokenizer)
    tokenizer = plain(tokenizer)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 65_535 else np.uint32
    chunks: list[Tokens] = [np.zeros(0, dtype)]
    infos: list[DocumentInfo] = []
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        for d, text in zip(batch, text_ids(tokenizer, [d.text for d in batch]), strict=True):
            chunks.append(np.array([*text, end], dtype))
            size, tokens = len(d.text.encode()), len(chunks[-1])
            infos.append(DocumentInfo(d.domain, d.id, d.topic, size, tokens, d.work))
    return TokenSplit(np.concatenate(chunks), tuple(infos))


def digest(*splits: TokenSplit) -> str:
    """sha256 of the tokens and document numbers of the splits, the same on every byte order."""
    total = hashlib.sha256()
    for split in splits:
        total.update(len(split).to_bytes(8, "little"))
        total.update(split.tokens.astype("<u4").tobytes())
        total.update(split.document.astype("<i4").tobytes())
    return total.hexdigest()
