"""Questions read with a model under study, recorded to disk as it goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from minimoe.errors import MinimoeError, TraceError
from minimoe.study.loading import FoundModel
from minimoe.study.measurements import three_layers
from minimoe.study.question_sets import QuestionSet
from minimoe.study.sources import chosen_layers
from minimoe.study.stages import Stages
from minimoe.study.stream import TraceWriter, record_stream
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.study.windows import Window
from minimoe.train.corpus import Document, text_ids

WINDOW = 4096
"""Longest stretch of a text that is read at once, in tokens; no question of MMLU is as long."""


@dataclass(frozen=True)
class Encoded:
    """Questions as a model reads them: a record and the token ids of each. `empty` counts those without a token."""

    documents: tuple[TraceDocument, ...]
    tokens: tuple[npt.NDArray[np.int32], ...]
    empty: int

    @property
    def num_tokens(self) -> int:
        """Of all questions."""
        return sum(len(ids) for ids in self.tokens)


def encoded(asked: QuestionSet, found: FoundModel, max_tokens: int | None = None) -> Encoded:
    """Questions in the set's order, of each subject the first ones up to `max_tokens`, one at least.

    Raises:
        TraceError: none of them holds a token, or the tokenizer gives ids that the model does not have.
    """
    documents: list[TraceDocument] = []
    tokens: list[npt.NDArray[np.int32]] = []
    used: dict[str | None, int] = {}
    empty = 0
    for question, ids in _ids(asked.questions, found.tokenizer):
        if not len(ids):
            empty += 1
            continue
        # more tokens in the vocabulary than rows in the embedding do no harm while no text needs them
        if ids.max() >= found.vocab_size:
            raise TraceError(
                f"the tokenizer of {found.name} makes token {ids.max()}, but the model has {found.vocab_size}; give a "
                "folder where they belong together"
            )
        # a subject ends at the first question that does not fit: going on would fill the rest with short ones
        total = used[question.topic] = used.get(question.topic, 0) + len(ids)
        if max_tokens is None or total <= max_tokens or total == len(ids):
            documents.append(TraceDocument(question.domain, question.id, question.topic))
            tokens.append(ids)
    if not documents:
        raise TraceError(f"{asked.title} hold no token, so there is nothing to record")
    return Encoded(tuple(documents), tuple(tokens), empty)


def _ids(
    questions: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, npt.NDArray[np.int32]]]:
    for start in range(0, len(questions), 256):
        part = questions[start : start + 256]
        for question, ids in zip(part, text_ids(tokenizer, [q.text for q in part]), strict=True):
            yield question, np.array(ids, dtype=np.int32)


def layers_to_record(found: FoundModel, wanted: Sequence[int] | str | None) -> tuple[int, ...]:
    """Numbers, counted from 1; None: first, middle and last of those with experts; 'all': all of them.

    Raises:
        TraceError: another word, or a layer without experts.
    """
    if wanted is None:
        return three_layers(found.layers)
    if isinstance(wanted, str):
        if wanted != "all":
            raise TraceError(f"layers are {wanted!r}; give numbers counted from 1, or 'all'")
        return found.layers
    return chosen_layers(found.layers, wanted)


def record_questions(
    found: FoundModel,
    questions: Encoded,
    folder: Path,
    *,
    identity: dict[str, Any],
    layers: tuple[int, ...],
    batch_tokens: int,
    chunk_tokens: int,
    stage: Stages,
) -> RoutingTrace:
    """The trace of these questions, from `folder` as far as it is there, else recorded into it.

    The model is loaded only if something is missing, and let go of before the trace is read.

    Raises:
        TraceError: `folder` holds something else, or is damaged. CheckpointError: the model cannot be loaded.
        MinimoeError: a batch does not fit the memory.
    """
    there = TraceWriter(folder, identity)
    reading: dict[str, Any] = {"end_of_text": found.begin, "max_length": WINDOW}
    done = there.check(questions.documents, questions.tokens, layers, **reading)
    if done == len(questions.documents):
        stage("the recorded choices are there already")
        return TraceWriter.read(folder)
    stage("loading the model")
    model = found.load()
    total = questions.num_tokens
    stage(f"recording {total - there.tokens:,} of {total:,} tokens in layers {list(layers)}")
    bar = tqdm(
        total=total, initial=there.tokens, unit="tok", unit_scale=True, disable=stage.quiet, mininterval=1.0
    )  # fmt: skip

    def watched(batches: Iterable[list[Window]]) -> Iterator[list[Window]]:
        for batch in batches:
            yield batch
            bar.update(sum(len(w.tokens) - w.context for w in batch))

    try:
        with bar:
            record_stream(
                model,
                questions.documents,
                questions.tokens,
                folder,
                identity=identity,
                layers=layers,
                chunk_tokens=chunk_tokens,
                **reading,
                batch_tokens=batch_tokens,
                progress=watched,
            )
    except torch.OutOfMemoryError as error:
        raise MinimoeError(
            f"{batch_tokens} tokens a batch do not fit the memory of the GPU; give a smaller --batch-tokens: what was "
            "recorded is kept and gone on with"
        ) from error
    del model
    return TraceWriter.read(folder)
