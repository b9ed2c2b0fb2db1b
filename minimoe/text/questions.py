"""Multiple-choice questions: made from encyclopaedia articles, and the development questions of MMLU.

Both have the layout in which MMLU is usually shown to a language model (Hendrycks et al., 2021,
arXiv:2009.03300): a question, four lettered choices, and a line for the answer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from minimoe.errors import CorpusError
from minimoe.text.documents import Document, is_held_out, number_of
from minimoe.text.fetch import PACKAGES, Log, fetch_packages, print_to_stderr
from minimoe.text.sources import read_json

LETTERS = "ABCD"

MASK = "____"

MAX_CHOICE_CHARACTERS = 200

# The head noun of a description that makes its article one about somebody.
_SOMEBODY = re.compile(
    "god|goddess|deity|demigod|demigoddess|king|queen|emperor|empress|monarch|prophet|hero|heroine|"
    "philosopher|ruler|pharaoh|saint|apostle|patriarch|matriarch|titan|nymph|sorceress|angel"
)

_HEAD_ENDS = re.compile(r"\b(?:of|in|for|to|from|with|by|associated|that|who|known|and)\b|[,;(]")


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


def _question_word(article: Document) -> str:
    head = _HEAD_ENDS.split(article.description or "", maxsplit=1)[0].split() or [""]
    somebody = article.topic == "People" or _SOMEBODY.fullmatch(head[-1].casefold())
    return "Who" if somebody else "What"


def _named(article: Document) -> str:
    """The title as the first sentence writes it: 'the Iran–Iraq War', 'a cotton gin', 'Ada Lovelace'."""
    title = title_of(article)
    match = re.match(rf"(The|An?) ({re.escape(title)})\b", _first_sentence(article), re.IGNORECASE)
    return f"{match[1].lower()} {match[2]}" if match else title


def stem(article: Document) -> str:
    """'Who was Ada Lovelace?', 'What is a comet?': who or what it is, is or was by its first sentence."""
    verb = re.search(r"\b(is|are|was|were)\b", _first_sentence(article))
    return f"{_question_word(article)} {verb[1] if verb else 'is'} {_named(article)}?"


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
        if article.topic is not None and (choice := choice_text(article)):
            held = is_held_out(article.domain, article.work)
            pools[article.topic, _question_word(article), held].append((article, choice))
    questions: list[Document] = []
    for pool in pools.values():
        for article, right in pool:
            if wrong := _wrong_choices(article, right, pool):
                place = number_of("place", article.id) % len(LETTERS)
                choices = [*wrong[:place], right, *wrong[place:]]
                text = layout(stem(article), choices, LETTERS[place])
                question = Document("questions", article.id, text, article.topic, article.work)
                questions.append(question)
    return sorted(questions, key=lambda q: q.id)


def _wrong_choices(
    article: Document, right: str, pool: Sequence[tuple[Document, str]]
) -> list[str] | None:
    """Three different descriptions of other articles, none naming this one; None if there are not three."""
    title = title_of(article).casefold()
    wrong: list[str] = []
    for draw in range(20 * len(LETTERS)):
        _, choice = pool[number_of("wrong", article.id, draw) % len(pool)]
        if choice != right and choice not in wrong and title not in choice.casefold():
            wrong.append(choice)
            if len(wrong) == len(LETTERS) - 1:
                return wrong
    return None


_MMLU_MEMBER = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_CHOICES = r"(.*?)\s*\n\(A\) (.*?)\s*\(B\) (.*?)\s*\(C\) (.*?)\s*\(D\) (.*?)\s*"


def read_mmlu() -> list[Document]:
    """The development questions of MMLU from the wheel in the cache, worked answers stripped.

    Topic: the subject, one of 57. A CorpusError says so if the wheel is absent or has another layout.
    """
    prompts: dict[str, str] = read_json("lm-eval", _MMLU_MEMBER)
    documents: list[Document] = []
    for subject, prompt in sorted(prompts.items()):
        for number, part in enumerate(re.split(r"(?:^|\n)Q: ", prompt)[1:], 1):
            asked = part.split("\nA: ", 1)[0]
            match = re.fullmatch(_CHOICES, asked, re.DOTALL)
            if match is None:
                raise CorpusError(
                    f"question {number} of {subject} in {_MMLU_MEMBER} has no four choices"
                )
            question, *choices = match.groups()
            text = layout(question, choices, None)
            documents.append(Document("mmlu", f"{subject}/{number}", text, subject))
    return documents


def mmlu_dev_questions(log: Log = print_to_stderr) -> list[Document]:
    """The MMLU development questions, fetched if need be; domain 'mmlu', topic the subject, no answers.

    A CorpusError where the package cannot be fetched.
    """
    if reason := fetch_packages(["lm-eval"], log).failed.get("lm-eval"):
        raise CorpusError(f"the MMLU questions need {PACKAGES['lm-eval']}: {reason}")
    return read_mmlu()
