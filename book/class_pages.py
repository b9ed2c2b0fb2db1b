"""What is read after marking: a page of feedback for each student, and a map of mistakes for the teacher.

Both are single HTML files without scripts, which need no network and no server. The map counts causes and names nobody,
so that it can be shown in class; the table beside it (mistakes.csv) has the names.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from book.marks import Mark, TaskMark
from minimoe.io import write_text

PAGES = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --page: #fff; --line: #c9ccd1; --soft: #f2f4f6; --hot: #e8862e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --page: #17191c; --line: #45494f; --soft: #22262b; --hot: #b05a10; }
}
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p, dd { max-width: 46rem; }
table { border-collapse: collapse; } caption { text-align: left; padding-bottom: .5rem; }
th, td { border: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
thead th { background: var(--soft); } tbody th { font-weight: normal; } .map tbody th { min-width: 13rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.heat { text-align: center; min-width: 3rem; font-weight: 600;
  background: color-mix(in srgb, var(--hot) calc(var(--share) * 100%), transparent); }
.wide { overflow-x: auto; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
pre, dd { overflow-wrap: anywhere; }
@media print { body { max-width: none; } section { break-inside: avoid; } pre { white-space: pre-wrap; } }
</style>
</head>
<body>
"""
FEEDBACK = PAGES.from_string(
    PAGE
    + """\
<h1>{{ title }}</h1>
<p><strong>{{ "%g" | format(mark.points) }} of {{ "%g" | format(mark.of) }} points</strong></p>
{% if mark.remark %}
<p>About what you handed in: {{ mark.remark }}.</p>
{% endif %}
{% for comment in mark.comments %}
<p>From your teacher: {{ comment }}</p>
{% endfor %}
<div class="wide"><table>
<thead><tr><th scope="col">task</th><th scope="col"></th>
<th scope="col">points</th><th scope="col">result</th></tr></thead>
<tbody>
{% for task in mark.tasks %}
<tr><td>{{ task.id }}</td><th scope="row">{{ task.title }}</th>
<td class="number">{{ "%g" | format(task.points) }} of {{ "%g" | format(task.of) }}</td>
<td>{{ result(task) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% for task in mark.tasks if task.mistake and task.mistake.said != "not marked" %}
<section>
<h2>{{ task.id }} {{ task.title }}</h2>
<dl>
{% for label in ("tried", "expected", "came", "cause") if label in task.mistake.told %}
<dt>{{ label }}</dt><dd>{{ task.mistake.told[label] }}</dd>
{% endfor %}
{% if task.mistake.text and task.mistake.said != "untouched" %}
<dt>{{ task.mistake.said }}</dt><dd>{{ task.mistake.text }}</dd>
{% endif %}
<dt>reread</dt><dd>{{ task.reread }}</dd>
</dl>
{% if task.answer and task.mistake.said != "untouched" %}
<pre>{{ task.answer }}</pre>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
)
MAP = PAGES.from_string(
    PAGE
    + """\
<h1>{{ title }}</h1>
<p>How many students made which mistake in which task, and what they should reread. A cause is what the check of the
task found out; the other rows are errors that stopped an answer.</p>
{% for exercise in exercises %}
<h2>{{ exercise.name }}</h2>
<div class="wide"><table class="map">
<caption>{{ exercise.students }} student{{ "" if exercise.students == 1 else "s" }}</caption>
<thead><tr><th scope="col">cause</th>
{% for task in exercise.tasks %}
<th scope="col">{{ task.id }} {{ task.title }}</th>
{% endfor %}
<th scope="col">reread</th></tr></thead>
<tbody>
<tr><th scope="row"><strong>right</strong></th>
{% for task in exercise.tasks %}
<td class="number">{{ exercise.right[task.id] }} of {{ exercise.students }}</td>
{% endfor %}
<td></td></tr>
{% for cause in exercise.causes %}
<tr><th scope="row">{{ cause.text }}</th>
{% for task in exercise.tasks %}
{% set count = cause.students[task.id] | length %}
{% if count %}
<td class="heat" style="--share: {{ '%.2f' | format(0.15 + 0.75 * count / exercise.most) }}">{{ count }}</td>
{% else %}
<td></td>
{% endif %}
{% endfor %}
<td>{{ cause.reread }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</body>
</html>
"""
)


class Cause:
    """One cause: who made this mistake, by task, and what to reread."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.students: dict[str, list[str]] = defaultdict(list)
        self.sections: list[str] = []

    @property
    def total(self) -> int:
        """How often it was made."""
        return sum(len(s) for s in self.students.values())

    @property
    def reread(self) -> str:
        """The sections, each once."""
        return "; ".join(dict.fromkeys(self.sections))


def causes(marks: Iterable[Mark]) -> list[Cause]:
    """The causes in the marks of one exercise, the most frequent first.

    Errors and untouched tasks are not told what to reread: their cause is unknown.
    """
    found: dict[str, Cause] = {}
    for mark in marks:
        for task in mark.tasks:
            if task.mistake is not None:
                cause = found.setdefault(task.mistake.cause, Cause(task.mistake.cause))
                cause.students[task.id].append(mark.student)
                if "reread" in task.mistake.told:
                    cause.sections.append(task.reread)
    return sorted(found.values(), key=lambda c: (-c.total, min(c.students), c.text))


def by_exercise(marks: Iterable[Mark]) -> dict[str, list[Mark]]:
    """The marks of each exercise."""
    found: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        found[mark.exercise].append(mark)
    return found


def mistakes_table(marks: Iterable[Mark]) -> tuple[list[str], list[dict[str, str]]]:
    """Causes × tasks with counts, the section to reread, and who: columns and rows."""
    exercises = by_exercise(marks)
    columns = sorted({t.id for mine in exercises.values() for m in mine for t in m.tasks})
    rows = [
        {
            "exercise": name,
            "cause": cause.text,
            "reread": cause.reread,
            **{c: str(len(cause.students[c])) if c in cause.students else "" for c in columns},
            "total": str(cause.total),
            "students": ", ".join(dict.fromkeys(s for who in cause.students.values() for s in who)),
        }
        for name, mine in exercises.items()
        for cause in causes(mine)
    ]
    return ["exercise", "cause", "reread", *columns, "total", "students"], rows


def mistakes_page(marks: Iterable[Mark]) -> str:
    """The map of mistakes as a page: a heat map for each exercise."""
    exercises: list[dict[str, Any]] = []
    for name, mine in by_exercise(marks).items():
        found = causes(mine)
        tasks = mine[0].tasks
        exercises.append(
            {
                "name": name,
                "students": len(mine),
                "tasks": tasks,
                "right": {t.id: sum(full(u) for m in mine for u in m.tasks if u.id == t.id) for t in tasks},
                "causes": found,
                "most": max((len(s) for c in found for s in c.students.values()), default=1),
            }
        )  # fmt: skip
    return MAP.render(title="Map of mistakes", exercises=exercises)


def full(task: TaskMark) -> bool:
    """Whether a task has all its points."""
    return task.points == task.of


def result(task: TaskMark) -> str:
    """One or two words for a row of the table."""
    if task.mistake is not None:
        return task.mistake.said
    return "right" if full(task) else "marked by hand"


def feedback_page(mark: Mark) -> str:
    """What a student reads."""
    return FEEDBACK.render(
        title=f"{mark.exercise}: feedback for {mark.student}", mark=mark, result=result
    )


def write_feedback(course: Path, marks: Iterable[Mark]) -> list[Path]:
    """A file for each student and exercise, where nbgrader's own feedback would lie; returns the files."""
    files: list[Path] = []
    for mark in marks:
        file = course / "feedback" / mark.student / mark.exercise / f"{mark.exercise}.html"
        write_text(file, feedback_page(mark))
        files.append(file)
    return files
