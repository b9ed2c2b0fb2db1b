"""The test before and after the course: its form, its numbers, and the sections that it sends readers to."""

import json
import math
import re
from pathlib import Path

import pytest

from book.questions import options, questions, read
from minimoe.cost import count_parameters, experts_touched
from minimoe.presets import PRESETS
from minimoe.routing import expert_capacity

ROOT = Path(__file__).resolve().parent.parent
ALL = read()
MIXTRAL = count_parameters(PRESETS["mixtral-8x7b"])


def right(number: int, form: str) -> str:
    (found,) = [text for text, wrong in options(ALL[number - 1], form) if not wrong]
    return found


@pytest.mark.parametrize("form", "ab")
def test_each_question_has_one_right_answer_and_three_mistakes_with_a_reason(form: str) -> None:
    assert len(ALL) == 20
    places = [0] * 4
    for question in ALL:
        found = options(question, form)
        assert len({text for text, _ in found}) == 4 and question[form].endswith(("?", "."))
        assert sorted(len(wrong) > 20 for _, wrong in found) == [False, True, True, True]
        places[[wrong for _, wrong in found].index("")] += 1
    assert max(places) < 10  # nobody passes by always choosing one place
    page = questions(form)
    assert page.count("<fieldset>") == page.count("<details>") == 20 and "\n" not in page.strip()
    assert page.count("data-wrong") == 60
    assert {q["a"] for q in ALL}.isdisjoint(q["b"] for q in ALL)


def test_the_sections_to_reread_exist() -> None:
    for question in ALL:
        lesson, _, section = question["reread"].partition(" §")
        (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        assert re.search(rf"^## {section}\. ", text, re.M), question["reread"]


def test_the_numbers_are_those_of_the_library() -> None:
    assert right(1, "a") == str(3 * 4 * 10) and right(1, "b") == str(3 * 8 * 6)
    assert right(2, "a") == f"{2 * 5} million" and right(2, "b") == f"{6 * 20} million"
    assert right(7, "a") == str(expert_capacity(64, 8, 1, 1.0))
    assert right(7, "b") == str(expert_capacity(120, 6, 2, 1.25))
    assert experts_touched(1, 8, 2) / 8 == 1 / 4 and right(11, "a") == "A quarter"
    assert experts_touched(64, 8, 2) / 8 > 0.99 and right(11, "b") == "Nearly all"
    assert right(12, "a") == f"About {MIXTRAL.total / 1e9:.0f} billion"
    assert right(12, "b") == f"About {MIXTRAL.active / 1e9:.0f} billion"
    assert right(14, "a") == f"A dense model of {math.sqrt(100 * 25):.0f} billion"
    assert right(14, "b") == f"A dense model of {math.sqrt(64 * 16):.0f} billion"
    assert right(18, "b") == str(math.comb(16, 2)) and "28 pairs" in ALL[17]["a"]
    assert math.isclose(28**32, 2e46, rel_tol=0.1)
