"""What students hand in is found and read, whatever it is called and however it is written, and mended."""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat

from book import submissions
from book.mending import Cell, Exercise, Mended, mend
from tests.teacher.kinds import KINDS, find, put_after, text, write

ROOT = Path(__file__).resolve().parent.parent
RELEASED: dict[str, Any] = {
    path.stem: nbformat.read(path, as_version=4)
    for path in sorted((ROOT / "exercises").glob("*.ipynb"))
}
EXERCISES = {name: Exercise(notebook) for name, notebook in RELEASED.items()}
ROUTING = EXERCISES["03_routing"]
PERFECT = ROOT / "tests/teacher/submissions/ada_perfect/03_routing/03_routing.ipynb"


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


# --- finding and reading --------------------------------------------------------------------------

AS_HANDED_OUT = """
    gina_splits ivy_marks_bytes jon_utf16 kim_renames mia_percent_script ned_changes_ids olga_zips paul_colab
    quin_windows rosa_version_3 sam_version_4_2 xena_writes_below yara_two_files"""


@pytest.mark.parametrize("name", AS_HANDED_OUT.split())
def test_the_same_work_in_another_form_is_the_same_notebook(
    name: str, tmp_path: Path, right: Any
) -> None:
    KINDS[name](tmp_path, copy.deepcopy(right))
    found = handed_in(tmp_path).notebook
    nbformat.validate(found)
    assert names(found) == list(ROUTING.cells)
    for cell in found.cells:
        name_of = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if not name_of:
            continue  # one of the student's own
        wanted = text(find(right, name_of))
        if name == "mia_percent_script":  # who made a mistake of her own
            wanted = wanted.replace("if norm_topk_prob:", "if norm_topk_prob")
        assert cell.source.strip() == wanted


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", []),
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


# --- mending --------------------------------------------------------------------------------------


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
