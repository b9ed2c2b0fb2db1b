"""How much a check says of a wrong answer that is on no list: `python tests/left_out.py [task or lesson]`.

Every known mistake is handed in as an answer while its own entry is off the list of its task. So the check meets a
mistake of a kind that people make, and does not know it. The kinds of causes that come out, told lesson by lesson:

- fact: `likeness` found one. It names an argument or a size, a part of the result, or a relation to the right numbers,
  and it was measured to hold in every case;
- another: the cause of another mistake of the list, which gives the same numbers in these cases or in one number each;
- form: what every check says of an answer that is not finite, has another form or type, or gives no gradient;
- nothing: none of the common mistakes gives these numbers, and so many cases differ.

Helped are those with a fact alone. 'Too large', 'n of m cases differ', a factor between one or two numbers, and a size
that happens to be the largest of one or two cases are no facts.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("MINIMOE_PROGRESS", "off")

from minimoe import check
from minimoe.check import compare
from minimoe.check.compare import Suspect
from minimoe.check.likeness import Compared, likeness
from minimoe.check.task import TASKS


@dataclass(frozen=True)
class Told:
    """What a mistake that is off its list was told, and what the fact is about."""

    task: str
    name: str
    kind: str
    cause: str
    about: Compared | None


def left_out(start: str = "", every: int = 1) -> Iterator[Told]:
    """Every mistake, or every so-manieth, of the tasks whose id begins so."""
    asked: list[tuple[Compared, str]] = []

    def noted(x: Compared) -> str:
        asked.append((x, likeness(x)))
        return asked[-1][1]

    known = [
        (t, n) for t in TASKS for n, s in vars(TASKS[t].suspects).items() if isinstance(s, Suspect)
    ]
    compare.likeness = noted
    try:
        for task, name in [k for k in known if k[0].startswith(start)][::every]:
            suspects = TASKS[task].suspects
            all_of_them = {n: s for n, s in vars(suspects).items() if isinstance(s, Suspect)}
            delattr(suspects, name)
            asked.clear()
            try:
                TASKS[task].check(all_of_them[name].variant)
                cause = ""
            except check.CheckFailed as failed:
                cause = failed.cause
            finally:
                for n, s in all_of_them.items():  # in the order in which they were
                    if n != name:
                        delattr(suspects, n)
                    setattr(suspects, n, s)
            about = asked[0][0] if asked and asked[0][1] == cause else None
            kind = "fact" if about else "form"
            if cause in {s.cause for s in all_of_them.values()}:
                kind = "another"
            elif cause.startswith("None of the common mistakes") or not cause:
                kind = "nothing"
            yield Told(task, name, kind, cause, about)
    finally:
        compare.likeness = likeness


if __name__ == "__main__":
    counts: dict[str, Counter[str]] = {}
    for told in left_out("".join(sys.argv[1:2])):
        counts.setdefault(told.task[:2], Counter())[told.kind] += 1
        print(f"{told.task} {told.name}: {told.kind}: {told.cause}", flush=True)
    for lesson, of_kind in counts.items():
        print(
            f"lesson {lesson}: {of_kind['fact']} of {of_kind.total()} are told a fact",
            dict(of_kind),
        )
    total = sum(counts.values(), Counter[str]())
    print(
        f"all: {total['fact']} of {total.total()}, {total['fact'] / total.total():.0%}", dict(total)
    )
