"""Which answers are listed as alike, and which are not."""

import re

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

from book.likeness import likeness, parts, published, rows
from book.marks import Mark, TaskMark

ANSWER = '''
def gate_gradient(z, g, k, renormalise):
    """The gradient."""
    p = z.softmax(dim=-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k, dim=-1).indices, 1.0)
    weight = inside * p
    if renormalise:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    mean = (weight * g).sum(dim=-1, keepdim=True)
    return weight * (g - mean) if renormalise else p * (inside * g - mean)
'''
# the same with other names, comments, annotations and line breaks
COPY = re.sub(
    r"inside|weight|mean|\bp\b",
    lambda name: f"my_{name[0]}",
    ANSWER.replace('"""The gradient."""', "# mine").replace("(z, g, k,", "(z: Tensor, g, k: int,"),
)
OTHER = """
def gate_gradient(z, g, k, renormalise):
    z = z.clone().requires_grad_()
    w, expert = z.softmax(-1).topk(k)
    if renormalise:
        w = w / w.sum(-1, keepdim=True)
    (w * g.gather(1, expert)).sum().backward()
    return z.grad
"""


def mark(student: str, answer: str) -> Mark:
    """Somebody's answer to task 03.3."""
    return Mark(student, "03_routing", 3, [TaskMark("03.3", 3, 3, None, answer)], "", [])


def test_a_copy_with_other_names_is_alike_and_another_way_is_not() -> None:
    assert likeness(parts(ANSWER), parts(COPY)) == 1
    assert likeness(parts(ANSWER), parts(OTHER)) < 0.5
    assert not parts("def f(:") and not parts("")


def test_pairs_and_what_is_published_are_listed() -> None:
    near = COPY.replace("return", "unused = 1\n    return")
    answers = {"ann": ANSWER, "bob": COPY, "cia": OTHER, "dee": "x =", "eli": near}
    listed = rows([mark(name, answer) for name, answer in answers.items()])
    assert [(r["task"], r["answer of"], r["and of"], r["likeness"]) for r in listed] == [
        ("03.3", "ann, bob, solutions/", "", "1.00"),
        ("03.3", "ann, bob, solutions/", "eli", "0.96"),
    ]


def test_short_answers_are_not_listed() -> None:
    short = "def f(x):\n    return x + 1"
    assert rows([mark("ann", short), mark("bob", short)]) == []


def test_the_references_of_checks_are_among_what_is_published() -> None:
    found = published("03_routing")
    assert set(found) == {f"03.{i}" for i in range(1, 6)}
    assert {len(known) for task, known in found.items() if task != "03.4"} == {2}
