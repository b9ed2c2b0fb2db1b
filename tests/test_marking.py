"""The teacher's path: release, autograde, grades and feedback, with a class that hands in everything."""

import copy
import csv
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat
from nbgrader.api import Gradebook

from book import class_pages, judge, marking, marks, submissions, vetting
from book.mending import Cell, Exercise, Mended, mend
from book.sandbox import Child, Sandboxes
from tests.teacher.kinds import KINDS, find, put_after, write

ROOT = Path(__file__).resolve().parent.parent
CLASS = ROOT / "tests" / "teacher" / "submissions"
PERFECT = CLASS / "ada_perfect" / "03_routing" / "03_routing.ipynb"
EXERCISE = "03_routing"
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own
LIMIT = 15.0  # seconds for a cell, of which the first plot takes some; the one endless loop of the class costs as much


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course folder with one exercise handed out."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        # causes may be others with another secret; how one is drawn is in test_exercises.py
        patch.setattr(vetting, "draw", lambda *_: 7)
        assert marking.release(["03"], folder) == [EXERCISE]
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


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
HARM = re.compile(r"os\.(_exit|getcwd)|step >= 0|10\*\*8|torch\.equal =")


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
    assert len(lines) == len(list(folder.iterdir())) >= 20
    return course


@pytest.mark.parametrize("name", ["grades.csv", "mistakes.csv"])
def test_a_class_gets_its_points(marked: Path, name: str) -> None:
    marking.grades(marked)
    expected = (ROOT / "tests/teacher" / name).read_text(encoding="utf-8")
    assert (marked / name).read_text(encoding="utf-8") == expected


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
    with (ROOT / "tests/teacher/grades.csv").open(encoding="utf-8", newline="") as file:
        assert set(pages) == {row["student"] for row in csv.DictReader(file)}
    assert "You renormalise always." in pages["ben_partial"]
    assert "lesson 03, section 2" in pages["ben_partial"]
    assert "known by text or name" in pages["ned_changes_ids"]


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


RELEASED: dict[str, Any] = {
    path.stem: nbformat.read(path, as_version=4)
    for path in sorted((ROOT / "exercises").glob("*.ipynb"))
}
EXERCISES = {name: Exercise(notebook) for name, notebook in RELEASED.items()}
ROUTING = EXERCISES["03_routing"]


@pytest.fixture
def right() -> Any:
    """A notebook with the right answers, as JSON."""
    return json.loads(PERFECT.read_text(encoding="utf-8"))


def handed_in(folder: Path) -> submissions.HandedIn:
    """What is in a folder for exercise 03."""
    return submissions.handed_in([folder], EXERCISES)["03_routing"]


def names(notebook: Any) -> list[str]:
    """The ids by which nbgrader knows the cells, without others."""
    ids = [c.metadata.get("nbgrader", {}).get("grade_id", "") for c in notebook.cells]
    return [i for i in ids if i]


def cells(notebook: Any) -> list[Cell]:
    """The cells of a notebook as they are read."""
    found = [submissions.cell_of(c) for c in notebook["cells"]]
    return [c for c in found if c is not None]


# --- finding and reading, whatever it is called and however it is written --------------------------


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", []),
        ("utf-8-sig", ["read as UTF-8 with a byte-order mark"]),
        ("utf-16", ["read as UTF-16"]),
        ("utf-16-be", ["read as UTF-16"]),
        ("utf-32", ["read as UTF-32"]),
        ("cp1252", ["read as Windows-1252"]),
    ],
)
def test_any_encoding_is_read(encoding: str, said: list[str]) -> None:
    raw = json.dumps({"cells": [{"cell_type": "code", "source": "'ä–'"}]}, ensure_ascii=False)
    file = submissions.read("a.ipynb", raw.encode(encoding))
    assert [c.source for c in file.cells] == ["'ä–'"] and list(file.notes) == said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b" \n", "an empty file"),
        (b"not JSON", "not a notebook"),
        (b"[1, 2]", "not a notebook"),
        (b'{"cells": 3}', "not a notebook"),
        (b"\xff\xfe\x00", "not a notebook"),
        (b"[" * 100_000, "not a notebook"),
    ],
)
def test_what_is_no_notebook_is_told(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submissions.read("a.ipynb", data)


def test_cells_that_are_none_cost_nothing_else() -> None:
    odd: list[Any] = [
        None,
        {"cell_type": "code", "source": [1]},
        {"cell_type": 5, "source": "text", "metadata": None},
        {"cell_type": "code", "source": ["a\r\n", "b \ud800"], "metadata": {"nbgrader": "x"}},
        {"cell_type": "code", "source": "c", "metadata": {"nbgrader": {"grade_id": {}}}},
    ]
    file = submissions.read("a.ipynb", json.dumps({"cells": odd}).encode())
    found = [(c.kind, c.source) for c in file.cells]
    assert found == [("markdown", "text"), ("code", "a\nb \ufffd"), ("code", "c")]
    assert submissions.read("a.ipynb", b'{"worksheets": [3]}').cells == []
    nbformat.validate(mend(file.cells, ROUTING).notebook)
    assert file.notes == ("left out, since it is no cell: 1, 2",)


def test_a_notebook_with_the_marks_of_a_merge_is_read_cell_by_cell(right: Any) -> None:
    lines = json.dumps(right, indent=1).split("\n")
    at = next(i for i, line in enumerate(lines) if "def choose_then_weigh" in line)
    lines.insert(at, "<<<<<<< HEAD")
    file = submissions.read("a.ipynb", "\n".join(lines).encode())
    assert len(file.cells) == len(right["cells"]) - 1
    assert file.notes == (f"damaged; {len(file.cells)} cells could be read",)


def test_a_script_that_does_not_compile_is_cut_at_empty_lines() -> None:
    script = b"import torch\n\n\ndef f(:\n    pass\n\n\ndef g():\n    a = 1\n\n    return a\n"
    assert [c.source for c in submissions.read("a.py", script).cells] == [
        "import torch",
        "def f(:\n    pass",
        "def g():\n    a = 1\n\n    return a\n",
    ]


def test_of_many_cells_the_first_are_read() -> None:
    many = json.dumps({"cells": [{"cell_type": "code", "source": f"{i}"} for i in range(3000)]})
    for name, data in (("a.ipynb", many), ("a.py", "\n".join(map(str, range(3000))))):
        file = submissions.read(name, data.encode())
        assert [c.source for c in file.cells] == [str(i) for i in range(2000)]
        assert file.notes == ("of more than 2000 cells the first 2000 were read",)


def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "LARGEST", 100)
    (tmp_path / "large.ipynb").write_text(" " * 101)
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("03_routing.ipynb", " " * 1_000)
    (tmp_path / "no.zip").write_bytes(b"PK")
    assert handed_in(tmp_path).notes[1:] == [
        "large.ipynb: larger than 0 MB",
        "large.zip: larger than 0 MB",
        "no.zip: not a zip file",
    ]


def test_what_is_in_a_file_decides_which_exercise_it_is(tmp_path: Path, right: Any) -> None:
    """A worked exercise 03 under the name of 04, which has a helper from 01 in it."""
    put_after(right, "given-03", {"cell_type": "code", "metadata": {}, "source": "swiglu = None"})
    write(tmp_path, right, "04_load_balancing.ipynb")
    found = submissions.handed_in([tmp_path], EXERCISES)
    assert [name for name, one in found.items() if one.there] == ["03_routing"]
    assert found["03_routing"].notes == ["handed in as 04_load_balancing.ipynb"]


def test_of_several_files_the_one_with_answers_is_marked(tmp_path: Path, right: Any) -> None:
    write(tmp_path, right, "03_routing (1).ipynb")
    fewer = copy.deepcopy(right)
    fewer["cells"].remove(find(fewer, "answer-03-5"))
    write(tmp_path, fewer, "03_routing-copy.ipynb")
    assert handed_in(tmp_path).notes[:1] == [
        "marked is 03_routing (1).ipynb, not 03_routing-copy.ipynb"
    ]
    write(tmp_path, fewer)  # the right name counts for more than one answer
    assert "answer-03-5" not in names(handed_in(tmp_path).notebook)


def mended(notebook: Any) -> Mended:
    """A notebook of exercise 03, mended."""
    return mend(cells(notebook), ROUTING)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_what_was_handed_out_is_left_as_it_is(exercise: str) -> None:
    found = mend(cells(RELEASED[exercise]), EXERCISES[exercise])
    assert names(found.notebook) == names(RELEASED[exercise])
    assert (found.notes, found.written) == ([], set())
    assert found.present == set(EXERCISES[exercise].answers)


def test_checks_follow_all_that_was_written_for_them(right: Any) -> None:
    """An answer whose cell has lost its marks, and its check: both are there, in this order."""
    find(right, "answer-03-1")["metadata"] = {}
    right["cells"].remove(find(right, "check-03-1"))
    found = mended(right)
    assert names(found.notebook) == list(ROUTING.cells)
    assert found.notes == ["known by text or name: answer-03-1", "put back: check-03-1"]
