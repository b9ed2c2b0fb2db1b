"""Multiple-choice questions: made from encyclopaedia articles, and the development questions of MMLU.

Both have the layout in which MMLU is usually shown to a language model (Hendrycks et al., 2021,
arXiv:2009.03300): a question, four lettered choices, and a line for the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence

from minimoe.errors import CorpusError
from minimoe.text.documents import Document, is_held_out
from minimoe.text.fetch import PACKAGES, Log, fetch_packages, open_package

LETTERS = "ABCD"

MASK = "____"

MAX_CHOICE_CHARACTERS = 200


# The head noun of a description that makes its article one about somebody.
_SOMEBODY = re.compile(
    "god|goddess|deity|demigod|demigoddess|king|queen|emperor|empress|monarch|prophet|hero|heroine|"
    "philosopher|ruler|pharaoh|saint|apostle|patriarch|matriarch|titan|nymph|sorceress|angel"
)

_HEAD_ENDS = re.compile(r"\b(?:of|in|for|to|from|with|by|associated|that|who|known|and)\b|[,;(]")


def _number(*parts: object) -> int:
    """A whole number that depends on the parts alone, on every platform and version of Python."""
    return int.from_bytes(hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()[:8], "big")


def title_of(article: Document) -> str:
    """The title: the first line of an article's text."""
    return article.text.split("\n", 1)[0]


def _first_sentence(article: Document) -> str:
    body = article.text.split("\n", 1)[-1].strip()
    match = re.match(r".+?[.!?](?=\s+[A-Z]|$)", body, re.DOTALL)
    return " ".join((match[0] if match else body).split())


def choice_text(article: Document) -> str | None:
    """What an article is about in one line, its own title masked; None where there is no such line."""
    text = article.description or _first_sentence(article).rstrip(".")
    title = title_of(article)
    for name in sorted({title, re.sub(r" \([^()]*\)$", "", title)}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", MASK, text, flags=re.IGNORECASE)
    if not text.replace(MASK, "").strip() or len(text) > MAX_CHOICE_CHARACTERS:
        return None
    return text[0].upper() + text[1:]


def _is_somebody(article: Document) -> bool:
    if article.topic == "People":
        return True
    head = _HEAD_ENDS.split(article.description or "", maxsplit=1)[0].split()
    return bool(head) and _SOMEBODY.fullmatch(head[-1].casefold()) is not None


def _named(article: Document) -> str:
    """The title as the first sentence writes it: 'the Iran–Iraq War', 'a cotton gin', 'Ada Lovelace'."""
    title = title_of(article)
    match = re.match(rf"(The|An?) ({re.escape(title)})\b", _first_sentence(article), re.IGNORECASE)
    return f"{match[1].lower()} {match[2]}" if match else title


def stem(article: Document) -> str:
    """'Who was Ada Lovelace?', 'What is a comet?': who or what it is, is or was by its first sentence."""
    verb = re.search(r"\b(is|are|was|were)\b", _first_sentence(article))
    word = "Who" if _is_somebody(article) else "What"
    return f"{word} {verb[1] if verb else 'is'} {_named(article)}?"


def layout(question: str, choices: Sequence[str], answer: str | None) -> str:
    """The text of one question; with no answer it ends where a model would have to give it."""
    lines = [f"Question: {question}"]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join(lines) + ("\nAnswer:" if answer is None else f"\nAnswer: {answer}")


def generated_questions(articles: Iterable[Document]) -> list[Document]:
    """One question for each article that has a topic, a description and three others to set beside it.

    The wrong choices describe articles of the same topic, the same question word and the same side of
    the split, so a held-out article is in no training question. A question has the id, topic and work of
    its article; everything is decided by hashes of ids.
    """
    pools: dict[tuple[str, str, bool], list[tuple[Document, str]]] = defaultdict(list)
    for article in sorted(articles, key=lambda a: a.id):
        choice = choice_text(article)
        if article.topic is None or choice is None:
            continue
        word = "Who" if _is_somebody(article) else "What"
        pools[article.topic, word, is_held_out(article.domain, article.work)].append(
            (article, choice)
        )
    questions: list[Document] = []
    for pool in pools.values():
        for article, right in pool:
            wrong = _wrong_choices(article, right, pool)
            if wrong is None:
                continue
            place = _number("place", article.id) % len(LETTERS)
            choices = [*wrong[:place], right, *wrong[place:]]
            text = layout(stem(article), choices, LETTERS[place])
            questions.append(
                Document("questions", article.id, text, article.topic, work=article.work)
            )
    return sorted(questions, key=lambda q: q.id)


def _wrong_choices(
    article: Document, right: str, pool: Sequence[tuple[Document, str]]
) -> list[str] | None:
    """Three different descriptions of other articles, none naming this one; None if there are not three."""
    title = title_of(article).casefold()
    wrong: list[str] = []
    for draw in range(20 * len(LETTERS)):
        _, choice = pool[_number("wrong", article.id, draw) % len(pool)]
        if choice != right and choice not in wrong and title not in choice.casefold():
            wrong.append(choice)
            if len(wrong) == len(LETTERS) - 1:
                return wrong
    return None


_MMLU_MEMBER = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"


def read_mmlu() -> list[Document]:
    """The development questions of MMLU from the wheel in the cache, worked answers stripped.

    Topic: the subject, one of 57. A CorpusError says so if the wheel is absent or has another layout.
    """
    with zipfile.ZipFile(open_package("lm-eval")) as archive:
        prompts: dict[str, str] = json.loads(archive.read(_MMLU_MEMBER))
    documents: list[Document] = []
    for subject, prompt in sorted(prompts.items()):
        for number, part in enumerate(re.split(r"(?:^|\n)Q: ", prompt)[1:], 1):
            asked = part.split("\nA: ", 1)[0]
            match = re.fullmatch(
                r"(.*?)\s*\n\(A\) (.*?)\s*\(B\) (.*?)\s*\(C\) (.*?)\s*\(D\) (.*?)\s*",
                asked,
                re.DOTALL,
            )
            if match is None:
                raise CorpusError(
                    f"question {number} of {subject} in {_MMLU_MEMBER} has no four choices"
                )
            question, *choices = match.groups()
            text = layout(question, choices, None)
            documents.append(Document("mmlu", f"{subject}/{number}", text, subject))
    return documents


def mmlu_dev_questions(log: Log | None = None) -> list[Document]:
    """The MMLU development questions, fetched if need be; domain 'mmlu', topic the subject, no answers.

    A CorpusError where the package cannot be fetched.
    """
    report = fetch_packages(["lm-eval"], log)
    if report.failed:
        package = PACKAGES["lm-eval"]
        reason = report.failed["lm-eval"]
        raise CorpusError(f"the MMLU questions need {package.name} {package.version}: {reason}")
    return read_mmlu()
