"""Questions: made from articles without giving the answer away, and the MMLU ones without their answers."""

import dataclasses
import hashlib
import json
import re
import subprocess
import zipfile
from collections import Counter

import pytest

from minimoe.errors import CorpusError
from minimoe.text import fetch
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import read_domain
from minimoe.text.questions import (
    choice_text,
    generated_questions,
    layout,
    mmlu_dev_questions,
    read_mmlu,
    stem,
)
from tests.small import refuses

LAYOUT = re.compile(
    r"Question: (Who|What) (is|are|was|were) (.+)\?\nA\. (.+)\nB\. (.+)\nC\. (.+)\nD\. (.+)\nAnswer: ([ABCD])"
)


def article(
    title: str,
    extract: str,
    description: str | None = None,
    topic: str | None = "Arts",
) -> Document:
    """An article as the reader of the encyclopaedia makes it."""
    return Document("wiki_en", title, f"{title}\n\n{extract}", topic, description=description)


@pytest.fixture
def articles() -> list[Document]:
    """Two topics of 200 articles; each description says which article it is of."""
    return [
        article(
            f"{topic} {i}x",
            f"{topic} {i}x was an artist of note. More follows.",
            f"Number {i} of {topic.lower()}",
            topic,
        )
        for topic in ("People", "Arts")
        for i in range(200)
    ]


def test_layout_is_that_of_mmlu(articles: list[Document]) -> None:
    questions = generated_questions(articles)
    assert len(questions) == len(articles)
    for question in questions:
        match = LAYOUT.fullmatch(question.text)
        assert match is not None
        assert len(set(match.groups()[3:7])) == 4
        assert question.domain == "questions" and question.topic in ("People", "Arts")


def test_the_lettered_choice_is_right_and_letters_are_even(articles: list[Document]) -> None:
    by_id = {a.id: a for a in articles}
    letters: Counter[str] = Counter()
    for question in generated_questions(articles):
        match = LAYOUT.fullmatch(question.text)
        assert match is not None
        letters[match[8]] += 1
        assert match["ABCD".index(match[8]) + 4] == by_id[question.id].description
    assert set(letters) == set("ABCD") and min(letters.values()) > 70  # 100 expected, sd 8.7


def test_both_sides_of_the_split_keep_to_themselves(articles: list[Document]) -> None:
    """No question of one side names or describes an article of the other side, or of another topic."""
    side = {a.description: (a.topic, is_held_out("wiki_en", a.id)) for a in articles}
    seen: set[bool] = set()
    for question in generated_questions(articles):
        held = is_held_out("questions", question.work)
        seen.add(held)
        assert held == is_held_out("wiki_en", question.id)
        match = LAYOUT.fullmatch(question.text)
        assert match is not None
        assert {side[choice] for choice in match.groups()[3:7]} == {(question.topic, held)}
        others = [a.id for a in articles if a.id != question.id]
        assert not [title for title in others if title in question.text]
    assert seen == {True, False}


def test_questions_depend_on_the_articles_alone(articles: list[Document]) -> None:
    first = generated_questions(articles)
    assert generated_questions(reversed(articles)) == first
    assert generated_questions([a for a in articles if a.topic == "Arts"]) == [
        q for q in first if q.topic == "Arts"
    ]


def test_articles_without_a_topic_or_without_company_give_none(articles: list[Document]) -> None:
    alone = [article(f"Alone {i}", f"Alone {i} is one.", f"One {i}", "Lonely") for i in range(3)]
    nowhere = [dataclasses.replace(a, topic=None) for a in articles]
    assert generated_questions(alone) == [] and generated_questions(nowhere) == []
    same = [article(f"Bird {i}", f"Bird {i} is a bird.", "Family of birds") for i in range(300)]
    assert generated_questions(same) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            article("Ada Lovelace", "Ada Lovelace was a writer.", "Writer", "People"),
            "Who was Ada Lovelace?",
        ),
        (
            article("The Supremes", "The Supremes were a group.", "Group", "People"),
            "Who were The Supremes?",
        ),
        (article("Comet", "A comet is a small body.", "Small body"), "What is a comet?"),
        (
            article("Iran–Iraq War", "The Iran–Iraq War was a war.", "War"),
            "What was the Iran–Iraq War?",
        ),
        (
            article("Athena", "Athena is a goddess.", "Ancient Greek goddess of war"),
            "Who is Athena?",
        ),
        (article("Theism", "Theism is a belief.", "Belief in a god"), "What is Theism?"),
        (article("Set", "In mathematics, a set is a group.", "Group"), "What is Set?"),
    ],
)
def test_stems(given: Document, expected: str) -> None:
    assert stem(given) == expected


def test_a_choice_masks_its_own_title() -> None:
    assert choice_text(article("Oran", "x", "City in Oran Province")) == "City in ____ Province"
    assert choice_text(article("Yam (food)", "x", "Edible yam, or YAMs")) == "Edible ____, or YAMs"
    assert choice_text(article("C++", "x", "Language after C, C++")) == "Language after C, ____"
    # Without a description the first sentence stands in, up to its end and not to an initial's.
    assert choice_text(article("Peat", "Peat is soil. It burns.")) == "____ is soil"
    assert choice_text(article("Peat", "Peat " + "is " * 90)) is None
    assert choice_text(article("Peat", "x", "Peat")) is None


def test_a_wrong_choice_never_names_the_article() -> None:
    many = [
        article(f"Thing {i}", f"Thing {i} is.", f"Next to Oran, number {i}") for i in range(200)
    ]
    questions = generated_questions([*many, article("Oran", "Oran is a city.", "City in Algeria")])
    assert "Oran" not in {q.id for q in questions} and len(questions) >= 200


def test_layout_without_an_answer() -> None:
    assert layout("Why?", "wxyz", None) == "Question: Why?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    refuses(ValueError, "zip", layout, "Why?", "wxy", None)


# MMLU

PROMPT = (
    "The following are multiple choice questions (with answers) about arts.\n\n"
    "Q: Which is\nfirst?\n(A) one (B) two (C) three\n (D) four (4)\nA: Let's think. The answer is (A).\n\n"
    "Q: A has no mark:\n(A) 1 (B) 2 (C) 3 (D) 4\nA: Let's think. Q: no. The answer is (B).\n\n"
)


@pytest.fixture
def lm_eval(own_cache: object, monkeypatch: pytest.MonkeyPatch):
    """Put a synthetic wheel with the given prompts into the cache, pinned by its own hash."""

    def put(prompts: dict[str, str]) -> None:
        path = fetch.wheel_path(fetch.PACKAGES["lm-eval"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json", json.dumps(prompts)
            )
        pinned = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(
            fetch.PACKAGES, "lm-eval", dataclasses.replace(fetch.PACKAGES["lm-eval"], sha256=pinned)
        )

    return put


def test_mmlu_questions_lose_their_worked_answers(lm_eval) -> None:
    lm_eval({"arts": PROMPT, "aardvarks": PROMPT})
    questions = mmlu_dev_questions(log=lambda line: pytest.fail(line))
    assert [(q.id, q.topic, q.domain) for q in questions] == [
        ("aardvarks/1", "aardvarks", "mmlu"),
        ("aardvarks/2", "aardvarks", "mmlu"),
        ("arts/1", "arts", "mmlu"),
        ("arts/2", "arts", "mmlu"),
    ]
    assert questions[2].text == (
        "Question: Which is\nfirst?\nA. one\nB. two\nC. three\nD. four (4)\nAnswer:"
    )
    assert questions[3].text == "Question: A has no mark:\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert all(is_held_out("mmlu", q.work) for q in questions)


def test_mmlu_of_another_layout_is_refused(lm_eval) -> None:
    lm_eval({"arts": "Q: What?\n(A) one\nA: Let's think."})
    refuses(CorpusError, "question 1 of arts", read_mmlu)


def test_mmlu_that_cannot_be_had_says_why(own_cache, monkeypatch) -> None:
    def offline(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "WARNING: NewConnectionError")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(fetch, "run_pip", offline)
    with pytest.raises(CorpusError, match=r"the MMLU questions need lm-eval .*no network"):
        mmlu_dev_questions(log=lambda line: None)


# The real text


@pytest.mark.corpus
def test_real_mmlu_questions() -> None:
    questions = mmlu_dev_questions()
    assert len(questions) == 282 and len({q.topic for q in questions}) == 57
    assert read_domain("mmlu") == questions
    for question in questions:
        assert question.text.startswith("Question: ") and question.text.endswith("\nAnswer:")
        assert "think step by step" not in question.text and "The answer is" not in question.text
        assert len(re.findall(r"(?m)^[ABCD]\. ", question.text)) >= 4


@pytest.mark.corpus
def test_real_generated_questions() -> None:
    articles = {a.id: a for a in read_domain("wiki_en")}
    questions = read_domain("questions")
    assert len(questions) > 8_500 and len({q.topic for q in questions}) == 11
    words = Counter(q.text.split()[1] for q in questions)
    assert words["Who"] > 1_500 and words["What"] > 6_000
    for question in questions:
        match = LAYOUT.fullmatch(question.text)
        assert match is not None
        title = question.id.casefold()
        assert title in match[3].casefold()
        # The title is in the stem and nowhere else, as a word of its own.
        named = re.compile(rf"(?<!\w){re.escape(title)}(?!\w)")
        assert not [c for c in match.groups()[3:7] if named.search(c.casefold())]
        assert question.topic == articles[question.id].topic
