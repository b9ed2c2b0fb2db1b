"""The first cell of lessons and exercises: the same in all, silent here, and on Colab it fetches what is missing."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml

from book import first_cell, lessons

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("notebooks", "solutions", "exercises")
NOTEBOOKS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_notebook_begins_with_it_and_the_book_leaves_it_out(path: Path) -> None:
    cell = nbformat.read(path, as_version=4).cells[0]
    source = first_cell.source(first_cell.repository())
    assert cell.source == source, "run: python book/lessons.py setup"
    assert "remove-cell" in cell.metadata.tags
    assert cell.outputs == []


# --- what it does ---------------------------------------------------------------------------------


class Colab:
    """A machine on which the cell is run: commands are noted, and cloning makes the folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.course = folder / "course"
        self.commands: list[list[str]] = []
        self.moved: list[str] = []
        self.has_library = False
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(subprocess, "run", self.do)
        monkeypatch.setattr(os, "chdir", lambda folder: self.moved.append(str(folder)))
        monkeypatch.setattr(importlib.util, "find_spec", self.find)

    def do(self, command: list[str], *, check: bool) -> None:
        assert check, "a command that fails must stop the notebook"
        self.commands.append(command)
        if command[0] == "git":
            self.course.mkdir()
            (self.course / "pyproject.toml").touch()

    def find(self, name: str) -> ModuleSpec | None:
        assert name == "minimoe"
        return ModuleSpec(name, None) if self.has_library else None

    def run(self, repository: str) -> None:
        """Run the cell with the checkout in a folder of the test's own."""
        text = first_cell.source(repository)
        assert '"/content/course"' in text
        exec(text.replace("/content/course", str(self.course)), {})


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Colab:
    return Colab(tmp_path, monkeypatch)


def test_on_colab_it_clones_installs_and_goes_to_the_lessons(colab: Colab) -> None:
    colab.run("someone/some.course")
    assert colab.commands == [
        ["git", "clone", "--quiet", "--depth", "1", "https://github.com/someone/some.course", str(colab.course)],
        [sys.executable, "-m", "pip", "install", "--quiet", "--editable", str(colab.course), "anywidget>=0.9,<1"],
    ]  # fmt: skip
    assert sys.path[0] == str(colab.course)
    assert colab.moved == [str(colab.course / "notebooks")]


def test_what_is_installed_beside_the_library_is_what_the_course_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r'str\(course\), "([^"]+)"', first_cell.source(""))
    assert asked and set(asked) <= set(project["optional-dependencies"]["course"])


@pytest.mark.parametrize("installed", [True, False])
def test_on_colab_a_second_run_goes_to_the_lessons_and_installs_what_was_interrupted(
    colab: Colab, installed: bool
) -> None:
    colab.course.mkdir()
    (colab.course / "pyproject.toml").touch()
    colab.has_library = installed
    colab.run("someone/course")
    install = [sys.executable, "-m", "pip", "install"]
    assert [command[:4] for command in colab.commands] == ([] if installed else [install])
    assert colab.moved == [str(colab.course / "notebooks")]


def test_on_colab_without_an_address_it_says_what_to_do(colab: Colab) -> None:
    with pytest.raises(SystemExit, match=r"Type its GitHub repository.*field REPOSITORY"):
        colab.run("")
    assert colab.commands == [] and colab.moved == []


def test_elsewhere_it_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    names: dict[str, Any] = {}
    before = (Path.cwd(), [*sys.path])
    exec(first_cell.source("a/b"), names)
    assert names.keys() - {"__builtins__"} == {"sys", "REPOSITORY"}
    assert (Path.cwd(), sys.path) == before
    assert capsys.readouterr() == ("", "")


# --- one setting ----------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets minimoe_repository in a configuration of the test's own."""
    config = yaml.safe_load((ROOT / "book/_config.yml").read_text(encoding="utf-8"))
    monkeypatch.setattr(first_cell, "ROOT", tmp_path)
    (tmp_path / "book").mkdir()

    def write(name: str) -> None:
        config["sphinx"]["config"]["minimoe_repository"] = name
        (tmp_path / "book/_config.yml").write_text(yaml.safe_dump(config))

    return write


def test_the_address_comes_from_the_setting_and_is_put_in_once(
    setting: Any, tmp_path: Path
) -> None:
    path = tmp_path / "lesson.ipynb"
    cells = [
        nbformat.v4.new_markdown_cell("# A"),
        nbformat.v4.new_code_cell("1", execution_count=1),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for name in ("", "some.one/course"):
        setting(name)
        lessons.set_up(path)
        notebook = nbformat.read(path, as_version=4)
        assert [c.cell_type for c in notebook.cells] == ["code", "markdown", "code"]
        assert f'REPOSITORY = "{name}"' in notebook.cells[0].source
        assert [notebook.cells[i].execution_count for i in (0, 2)] == [1, 2]
        assert lessons.is_normal(path)


def test_a_setting_that_is_no_repository_is_refused(setting: Any) -> None:
    setting("https://github.com/a/b")
    with pytest.raises(ValueError, match="expected 'owner/name'"):
        first_cell.repository()
