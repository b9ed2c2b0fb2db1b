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
from minimoe.text import questions as made
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import read_domain
from minimoe.text.questions import choice_text, generated_questions, mmlu_dev_questions
from tests.small import refuses

LAYOUT = re.compile(
    r"Question: (Who|What) (is|are|was|were) (.+)\?\nA\. (.+)\nB\. (.+)\nC\. (.+)\nD\. (.+)\nAnswer: ([ABCD])"
)


def article(title: str, extract: str, description: str | None = None, topic="Arts") -> Document:
    """An article as the reader of the encyclopaedia makes it."""
    return Document("wiki_en", title, f"{title}\n\n{extract}", topic, description=description)


@pytest.fixture
def articles() -> list[Document]:
    """Two topics of 200 articles; each description says which article it is of."""

    def numbered(topic: str, i: int) -> Document:
        text = f"{topic} {i}x was an artist of note. More follows."
        return article(f"{topic} {i}x", text, f"Number {i} of {topic.lower()}", topic)

    return [numbered(topic, i) for topic in ("People", "Arts") for i in range(200)]


def read(question: Document) -> re.Match[str]:
    """A question in the layout of MMLU, in its parts."""
    match = LAYOUT.fullmatch(question.text)
    assert match is not None, question
    return match


def test_layout_is_that_of_mmlu_the_lettered_choice_right_and_letters_even(articles) -> None:
    by_id = {a.id: a for a in articles}
    letters: Counter[str] = Counter()
    questions = generated_questions(articles)
    assert len(questions) == len(articles)
    for question in questions:
        match = read(question)
        assert len(set(match.groups()[3:7])) == 4
        assert question.domain == "questions" and question.topic in ("People", "Arts")
        letters[match[8]] += 1
        assert match["ABCD".index(match[8]) + 4] == by_id[question.id].description
    assert set(letters) == set("ABCD") and min(letters.values()) > 70  # 100 expected, sd 8.7


def test_both_sides_of_the_split_keep_to_themselves(articles: list[Document]) -> None:
    side = {a.description: (a.topic, is_held_out("wiki_en", a.id)) for a in articles}
    seen: set[bool] = set()
    for question in generated_questions(articles):
        held = is_held_out("questions", question.work)
        seen.add(held)
        assert held == is_held_out("wiki_en", question.id)
        choices = read(question).groups()[3:7]
        assert {side[choice] for choice in choices} == {(question.topic, held)}
        others = [a.id for a in articles if a.id != question.id]
        assert not [title for title in others if title in question.text]
    assert seen == {True, False}


def test_questions_depend_on_the_articles_alone(articles: list[Document]) -> None:
    first = generated_questions(articles)
    assert generated_questions(reversed(articles)) == first
    arts = [a for a in articles if a.topic == "Arts"]
    assert generated_questions(arts) == [q for q in first if q.topic == "Arts"]


def test_articles_without_a_topic_or_without_company_give_none(articles: list[Document]) -> None:
    alone = [article(f"Alone {i}", f"Alone {i} is one.", f"One {i}", "Lonely") for i in range(3)]
    nowhere = [dataclasses.replace(a, topic=None) for a in articles]
    assert generated_questions(alone) == [] and generated_questions(nowhere) == []
    same = [article(f"Bird {i}", f"Bird {i} is a bird.", "Family of birds") for i in range(300)]
    assert generated_questions(same) == []


def test_stems() -> None:
    for expected, title, text, description, *topic in (
        ("Who was Ada Lovelace?", "Ada Lovelace", "Ada Lovelace was a writer.", "Writer", "People"),
        ("Who were The Supremes?", "The Supremes", "The Supremes were a group.", "Group", "People"),
        ("What is a comet?", "Comet", "A comet is a small body.", "Small body"),
        ("What was the Iran–Iraq War?", "Iran–Iraq War", "The Iran–Iraq War was a war.", "War"),
        ("Who is Athena?", "Athena", "Athena is a goddess.", "Ancient Greek goddess of war"),
        ("What is Theism?", "Theism", "Theism is a belief.", "Belief in a god"),
        ("What is Set?", "Set", "In mathematics, a set is a group.", "Group"),
    ):
        assert made.stem(article(title, text, description, *topic)) == expected


def test_a_choice_masks_its_own_title() -> None:
    assert choice_text(article("Oran", "x", "City in Oran Province")) == "City in ____ Province"
    assert choice_text(article("Yam (food)", "x", "Edible yam, or YAMs")) == "Edible ____, or YAMs"
    assert choice_text(article("C++", "x", "Language after C, C++")) == "Language after C, ____"
    # Without a description the first sentence stands in, up to its end and not to an initial's.
    assert choice_text(article("Peat", "Peat is soil. It burns.")) == "____ is soil"
    assert choice_text(article("Peat", "Peat " + "is " * 90)) is None
    assert choice_text(article("Peat", "x", "Peat")) is None


def test_a_wrong_choice_never_names_the_article() -> None:
    next_to = "Next to Oran, number"
    many = [article(f"Thing {i}", f"Thing {i} is.", f"{next_to} {i}") for i in range(200)]
    questions = generated_questions([*many, article("Oran", "Oran is a city.", "City in Algeria")])
    assert "Oran" not in {q.id for q in questions} and len(questions) >= 200


def test_layout_without_an_answer() -> None:
    asked = made.layout("Why?", "wxyz", None)
    assert asked == "Question: Why?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    refuses(ValueError, "zip", made.layout, "Why?", "wxy", None)


PROMPT = (
    "The following are multiple choice questions (with answers) about arts.\n\n"
    "Q: Which is\nfirst?\n(A) one (B) two (C) three\n (D) four (4)\nA: Let's think. The answer is (A).\n\n"
    "Q: A has no mark:\n(A) 1 (B) 2 (C) 3 (D) 4\nA: Let's think. Q: no. The answer is (B).\n\n"
)


@pytest.fixture
def lm_eval(own_cache: object, monkeypatch: pytest.MonkeyPatch):
    """Put a synthetic wheel with the given prompts into the cache, pinned by its own hash."""

    def put(prompts: dict[str, str]) -> None:
        package, name = fetch.PACKAGES["lm-eval"], "mmlu/flan_cot_fewshot/_cot_prompts.json"
        path = fetch.wheel_path(package)
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"lm_eval/tasks/{name}", json.dumps(prompts))
        pinned = hashlib.sha256(path.read_bytes()).hexdigest()
        own = dataclasses.replace(package, sha256=pinned)
        monkeypatch.setitem(fetch.PACKAGES, "lm-eval", own)

    return put


def test_mmlu_questions_lose_their_worked_answers(lm_eval) -> None:
    lm_eval({"arts": PROMPT, "aardvarks": PROMPT})
    questions = mmlu_dev_questions(log=lambda line: pytest.fail(line))
    named = [(f"{topic}/{i}", topic, "mmlu") for topic in ("aardvarks", "arts") for i in (1, 2)]
    assert [(q.id, q.topic, q.domain) for q in questions] == named
    first = "Question: Which is\nfirst?\nA. one\nB. two\nC. three\nD. four (4)\nAnswer:"
    assert questions[2].text == first
    assert questions[3].text == "Question: A has no mark:\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert all(is_held_out("mmlu", q.work) for q in questions)


def test_mmlu_of_another_layout_is_refused(lm_eval) -> None:
    lm_eval({"arts": "Q: What?\n(A) one\nA: Let's think."})
    refuses(CorpusError, "question 1 of arts", made.read_mmlu)


def test_mmlu_that_cannot_be_had_says_why(own_cache, monkeypatch) -> None:
    def offline(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "WARNING: NewConnectionError")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(fetch, "run_pip", offline)
    with pytest.raises(CorpusError, match=r"the MMLU questions need lm-eval .*no network"):
        mmlu_dev_questions(log=lambda line: None)


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
        match, title = read(question), question.id.casefold()
        assert title in match[3].casefold()
        # The title is in the stem and nowhere else, as a word of its own.
        named = re.compile(rf"(?<!\w){re.escape(title)}(?!\w)")
        assert not [c for c in match.groups()[3:7] if named.search(c.casefold())]
        assert question.topic == articles[question.id].topic
