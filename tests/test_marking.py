"""The teacher's path: release, autograde, grades and feedback, with a class that hands in everything."""

import copy
import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat
from nbgrader.api import Gradebook

from book import class_pages, judge, marking, marks, vetting
from book.sandbox import Child, Sandboxes
from tests.teacher.kinds import CHEATS, KINDS

ROOT = Path(__file__).resolve().parent.parent
CLASS = ROOT / "tests" / "teacher" / "submissions"
PERFECT = CLASS / "ada_perfect" / "03_routing" / "03_routing.ipynb"
EXERCISE = "03_routing"
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own
LIMIT = 6.0  # seconds for a cell: the one endless loop of the class costs as much


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course folder with one exercise handed out."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        # causes may be others with another secret; how one is drawn is in test_vetting.py
        patch.setattr(vetting, "draw", lambda *_: 7)
        assert marking.release(["03"], folder) == [EXERCISE]
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def table(path: Path) -> list[dict[str, str]]:
    """A CSV as rows."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- handing out ----------------------------------------------------------------------------------


def test_what_is_handed_out_is_the_exercise_under_a_header(course: Path) -> None:
    handed = read(course / "release" / EXERCISE / f"{EXERCISE}.ipynb")
    assert "Before you hand in" in "".join(handed[0]["source"])
    assert handed[1:] == read(ROOT / "exercises" / f"{EXERCISE}.ipynb")
    assert (course / "source" / "header.ipynb").is_file()
    kept = "".join(
        "".join(c["source"]) for c in read(course / "source" / EXERCISE / f"{EXERCISE}.ipynb")
    )
    assert "BEGIN SOLUTION" in kept and "BEGIN HIDDEN TESTS" in kept


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["release", "77"], "there are no exercises 77"),
        (["autograde", "."], "run `make release` first"),
        (["grades"], "run `make autograde"),
    ],
)
def test_what_cannot_be_done_yet_is_said(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert marking.main(["--course", str(tmp_path / "course"), *command]) == 2
    assert message in capsys.readouterr().err


# --- the class ------------------------------------------------------------------------------------


# What tells the submissions that spoil their process, each of which gets one of its own.
HARM = re.compile(r"os\.(_exit|getcwd)|step >= 0|10\*\*8|torch\.equal =|solved\(")


class Shared:
    """One process for all work that spoils none: it is emptied between two submissions instead of started anew."""

    def __init__(self, rooms: Sandboxes) -> None:
        self.rooms, self.child = rooms, rooms.start()
        rooms.others.add(self.child.process.pid)  # so that it is not ended with the next one

    def start(self) -> Child:
        self.child.peer.begin(20)
        self.child.peer.ask({"k": "cell", "source": "get_ipython().reset()"})
        return self.child

    def end(self, child: Child) -> None:
        """Not yet."""

    def stop(self) -> None:
        """When the class has been marked."""
        self.rooms.others.discard(self.child.process.pid)
        self.rooms.end(self.child)


@pytest.fixture(scope="module")
def marked(course: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course folder after the whole class has been marked."""
    folder = tmp_path_factory.mktemp("handed_in") / "class"
    shutil.copytree(CLASS, folder)
    right = json.loads(PERFECT.read_text(encoding="utf-8"))
    for name, kind in KINDS.items():
        (folder / name).mkdir()
        kind(folder / name, copy.deepcopy(right))
    done: dict[str, dict[int, list[Any]]] = {}
    shared: list[Any] = []
    run = judge.run

    def once(notebook: Any, exam: judge.Exam, rooms: Any, *limits: Any) -> dict[int, list[Any]]:
        """Honest work in many forms becomes the same notebook, which need not run again for each."""
        assert exam.secret == 7, "who looks answers up is not found without it"
        key = nbformat.writes(notebook)
        if not shared:
            shared.append(Shared(rooms))
        if key not in done:
            code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
            done[key] = run(notebook, exam, rooms if HARM.search(code) else shared[0], *limits)
        return copy.deepcopy(done[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "run", once)
        sandbox = {"on": True, "off": False}.get(os.environ.get("MINIMOE_TEST_SANDBOX", "auto"))
        lines = marking.autograde(folder, course, LIMIT, sandbox)
        shared[0].stop()
    assert len(lines) == len(list(folder.iterdir())) >= 25
    return course


@pytest.mark.parametrize("name", ["grades.csv", "mistakes.csv"])
def test_a_class_gets_its_points(marked: Path, name: str) -> None:
    marking.grades(marked)
    expected = (ROOT / "tests/teacher" / name).read_text(encoding="utf-8")
    assert (marked / name).read_text(encoding="utf-8") == expected


def test_no_cheat_scores(marked: Path) -> None:
    points = {m.student: m.points for m in marks.marks(marked)}
    assert {points[name] for name in CHEATS} == {0}


def test_nothing_that_is_handed_in_makes_large_files(marked: Path) -> None:
    """Whatever was printed, and whatever a zip file held."""
    for path in marked.rglob("*"):
        assert not path.is_file() or path.stat().st_size < 500_000, path


def test_one_damaged_file_costs_nobody_elses_marks(marked: Path, tmp_path: Path) -> None:
    course = tmp_path / "course"
    shutil.copytree(marked, course)
    before = {m.student: marks.row(m) for m in marks.marks(course)}
    spoilt = {"ben_partial": b'{"a": 1}', "dora_syntax": b"{", "emil_endless": b"\xff"}
    for student, data in spoilt.items():
        (course / "autograded" / student / EXERCISE / f"{EXERCISE}.ipynb").write_bytes(data)
    shutil.rmtree(course / "autograded" / "ada_perfect")
    after = {m.student: marks.row(m) for m in marks.marks(course)}
    changed = {s for s in before if before[s] != after[s]}
    assert changed == {*spoilt, "ada_perfect"}
    for student in changed:
        assert after[student]["points"] == before[student]["points"]
        assert "the marked notebook is damaged or missing" in after[student]["remark"]
    assert (course / "grades.csv") in marking.grades(course)


def test_every_student_gets_feedback(marked: Path) -> None:
    assert marking.main(["--course", str(marked), "feedback"]) == 0
    pages = {p.parts[-3]: p.read_text(encoding="utf-8") for p in marked.glob("feedback/*/*/*.html")}
    assert set(pages) == {row["student"] for row in table(ROOT / "tests/teacher/grades.csv")}
    assert "You renormalise always." in pages["ben_partial"]
    assert "lesson 03, section 2" in pages["ben_partial"]
    assert "read as UTF-16" in pages["jon_utf16"]


def test_the_expected_points_follow_from_the_exercise() -> None:
    """The stored table adds up, and what a task gives is what its check cell says."""
    worth: dict[str, float] = {}
    for cell in read(ROOT / "solutions" / f"{EXERCISE}.ipynb"):
        mine = cell["metadata"].get("minimoe", {})
        if "points" in mine:
            worth[f"task {mine['task'][-1]}"] = mine["points"]
    for row in table(ROOT / "tests/teacher/grades.csv"):
        got = {name: float(row[name]) for name in worth}
        failed = set(re.findall(r"03\.(\d): ", row["remark"]))
        if not failed and not any(got.values()):  # nothing could be read, and the remark says why
            assert row["remark"]
            continue
        assert got == {name: 0 if name[-1] in failed else value for name, value in worth.items()}
        assert float(row["points"]) == sum(got.values())
        assert float(row["of"]) == sum(worth.values())


# --- what else is handed in -----------------------------------------------------------------------


def stand_in(notebook: Any, *_: Any) -> dict[int, list[Any]]:
    """Instead of the judge: the first check passes, the second was never made, the others fail."""
    if any("crash" in cell.source for cell in notebook.cells):
        raise RuntimeError("no process could be started")
    said = nbformat.v4.new_output("stream", text="passed")
    error = nbformat.v4.new_output("error", ename="NameError", evalue="", traceback=[])
    checks = [i for i, c in enumerate(notebook.cells) if "check-" in judge.name_of(c)]
    return {checks[0]: [said], checks[1]: [], **{i: [error] for i in checks[3:]}}


def test_what_is_no_notebook_gets_nothing_and_stops_nobody(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked one after the other; students may have any name that a folder can have, or a file alone."""
    good = PERFECT.read_bytes()
    hand_in: dict[bytes, bytes] = {
        b"a_nothing": b"",
        b"b_text": b"not JSON",
        b"c_crashes": good.replace(b"import torch", b"crash()"),
        b"d_[a-z]*": good,
        b"e_%s {x}\n": good,
        b"f_\xff": good,
    }
    for student, data in hand_in.items():
        folder = tmp_path / os.fsdecode(student)
        folder.mkdir()
        (folder / f"{EXERCISE}.ipynb").write_bytes(data)
    (tmp_path / "g_alone.ipynb").write_bytes(good)
    monkeypatch.setattr(judge, "run", stand_in)
    lines = marking.autograde(tmp_path, course, sandbox=False)
    said = {line[:1]: line for line in lines}
    assert "an empty file" in said["a"] and "not a notebook" in said["b"]
    assert "no process could be started" in said["c"]
    assert said["e"].startswith(f"e_%s {{x}} {EXERCISE}: marked")
    points = {m.student: m.points for m in marks.marks(course) if m.student[1:2] == "_"}
    right = ("d_[a-z]*", "e_%s {x}\n", "f_\N{REPLACEMENT CHARACTER}", "g_alone")
    assert points == dict.fromkeys(("a_nothing", "b_text", "c_crashes"), 0) | dict.fromkeys(
        right, 2
    )


def test_points_given_by_hand_stay_and_comments_reach_the_student(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(PERFECT, tmp_path / "zora.ipynb")
    monkeypatch.setattr(judge, "run", stand_in)
    marking.autograde(tmp_path, course, sandbox=False)
    with Gradebook(marks.database(course)) as book:
        where = (EXERCISE, EXERCISE, "zora")
        grade: Any = book.find_grade("check-03-2", *where)
        comment: Any = book.find_comment("answer-03-2", *where)
        grade.manual_score, comment.manual_comment = 1.5, "Nearly."
        book.db.commit()
    marking.autograde(tmp_path, course, sandbox=False)
    mark = next(m for m in marks.marks(course) if m.student == "zora")
    assert (mark.points, mark.comments) == (3.5, ["Nearly."])
    assert "Nearly." in class_pages.feedback_page(mark)
