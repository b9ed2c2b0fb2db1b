"""The teacher's path: release, autograde, grades, with a class of six, and what else students hand in."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

from book import marking, marks

ROOT = Path(__file__).resolve().parent.parent
CLASS = ROOT / "tests" / "teacher" / "submissions"
EXERCISE = "03_routing"
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own
LIMIT = 20.0  # seconds for a cell: the one endless loop of the class costs as much


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course folder with one exercise handed out."""
    folder = tmp_path_factory.mktemp("course")
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


def test_what_is_not_there_is_not_handed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert marking.main(["--course", str(tmp_path), "release", "77"]) == 2
    assert "there are no exercises 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [(["autograde", "{}"], "run `make release` first"), (["grades"], "run `make autograde")],
)
def test_the_order_of_the_commands_is_said(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = ["--course", str(tmp_path / "course")]
    assert marking.main(course + [c.format(tmp_path) for c in command]) == 2
    assert message in capsys.readouterr().err


# --- the class of six -----------------------------------------------------------------------------


def test_a_class_of_six_gets_its_points(course: Path, tmp_path: Path) -> None:
    lines = marking.autograde(CLASS, course, LIMIT)
    assert len(lines) == 6
    grades = marking.grades(course)[0]
    assert grades.read_text(encoding="utf-8") == (ROOT / "tests/teacher/grades.csv").read_text(
        encoding="utf-8"
    )


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
        assert got == {name: 0 if name[-1] in failed else value for name, value in worth.items()}
        assert float(row["points"]) == sum(got.values())
        assert float(row["of"]) == sum(worth.values())


# --- what else is handed in -----------------------------------------------------------------------


def test_what_is_no_notebook_gets_nothing_and_stops_nobody(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked one after the other, with a stand-in for the run of the one good notebook."""
    good = CLASS / "cleo_empty" / EXERCISE / f"{EXERCISE}.ipynb"
    hand_in = {
        "a_nothing": {},
        "b_text": {f"{EXERCISE}.ipynb": "not JSON"},
        "c_list": {f"{EXERCISE}.ipynb": "[1, 2]"},
        "d_other_json": {f"{EXERCISE}.ipynb": '{"cells": 3}'},
        "e_binary": {f"{EXERCISE}.ipynb": b"\xff\xfe\x00"},
        "f_crashes": {f"{EXERCISE}.ipynb": good.read_text(encoding="utf-8")},
        "g_renamed": {f"{EXERCISE} (1).ipynb": good.read_text(encoding="utf-8")},
    }
    for student, files in hand_in.items():
        (tmp_path / student).mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / student / name).write_bytes(data)

    def run(course: Path, assignment: str, student: str, limit: float, rooms: Any) -> None:
        if student == "f_crashes":
            raise RuntimeError("kernel not found")

    monkeypatch.setattr(marking, "run_and_save", run)
    lines = marking.autograde(tmp_path, course)
    said = {line.split()[0]: line for line in lines}
    assert "nothing handed in" in said["a_nothing"]
    for student in ("b_text", "c_list", "d_other_json", "e_binary"):
        assert "not a notebook" in said[student]
    assert "kernel not found" in said["f_crashes"]
    assert f"handed in as {EXERCISE} (1).ipynb (0 s)" in said["g_renamed"]
    rows = {m.student: marks.row(m) for m in marks.marks(course) if m.student in hand_in}
    assert {r["points"] for r in rows.values()} == {"0"}
    assert rows["b_text"]["remark"] == "not a notebook"
    assert (course / "submitted" / "g_renamed" / EXERCISE / f"{EXERCISE}.ipynb").is_file()
