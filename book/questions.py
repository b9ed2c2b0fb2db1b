"""The test before and after the course: twenty questions in two forms, from book/questions.toml, as HTML.

A page marks itself (book/assets/questions.js). Without scripts each answer stands in a fold.
"""

import random
import re
import tomllib
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def read() -> list[dict[str, Any]]:
    """The questions as they stand in the file."""
    text = (ROOT / "book" / "questions.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["question"]


def options(question: dict[str, Any], form: str) -> list[tuple[str, str]]:
    """Each option with what is wrong with it, '' for the right one, in an order that the question decides."""
    found = [(o, "") if isinstance(o, str) else (o[0], o[1]) for o in question[f"{form}_options"]]
    random.Random(question[form]).shuffle(found)
    return found


def marked(text: str) -> str:
    """Text as HTML; *words* are emphasised."""
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(text))


def questions(form: str) -> str:
    """One form of the test, one line of HTML."""
    parts: list[str] = []
    for number, question in enumerate(read(), 1):
        lesson, _, section = question["reread"].partition(" §")
        page = next((ROOT / "notebooks").glob(f"{lesson}_*.ipynb")).stem
        link = f'<a href="../notebooks/{page}.html">lesson {lesson}</a>, section {section}'
        choices: list[str] = []
        answer = ""
        for i, (text, wrong) in enumerate(options(question, form)):
            answer = answer or ("" if wrong else text)
            told = f' data-wrong="{escape(wrong.replace("*", ""))}"' if wrong else ""
            choices.append(
                f'<label><input type="radio" name="{form}{number}" value="{i}"{told}> {marked(text)}</label>'
            )
        parts.append(
            f"<fieldset><legend>{number}. {marked(question[form])}</legend>{''.join(choices)}"
            f"<details><summary>Answer</summary><p>{marked(answer)}. See {link}.</p></details></fieldset>"
        )
    return f'\n<form class="questions" data-form="{form}">{"".join(parts)}</form>\n'
