"""The notebooks as they are stored: run to the end, in normal form, every figure described, and their first cell."""

import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image
from pybtex.database import parse_string

from book import first_cell, lessons, plain
from tests import lessons_plugin
from tests.small import refuses

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
NOTEBOOKS = [*LESSONS, *EXERCISES, *SOLUTIONS, ROOT / "book/start_here.ipynb"]
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
SHORTEST_DESCRIPTION = 20


def read(path: Path) -> dict[str, Any]:
    """A notebook as the JSON that it is."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The code cells that are not empty."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return [c for c in cells if "".join(c["source"]).strip()]


def unfinished(notebook: dict[str, Any]) -> list[str]:
    """Cells not run, run out of order, failed or noisy; and what the metadata lacks. One line each."""
    found: list[str] = []
    for key, value in (("kernelspec", "python3"), ("language_info", "python")):
        if notebook["metadata"].get(key, {}).get("name") != value:
            found.append(f"{key} is not {value}")
    for number, cell in enumerate(code_cells(notebook), start=1):
        where = f"code cell {number}"
        if cell["execution_count"] != number:
            found.append(f"{where}: execution count {cell['execution_count']}")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{where}: {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"{where}: writes to stderr: {''.join(output['text'])[:60]!r}")
        # With nothing stored there is nothing to compare with, and nbval would pass whatever came.
        if "nbval-check-output" in cell["metadata"].get("tags", []) and not cell["outputs"]:
            found.append(f"{where}: nbval-check-output, but no output is stored")
    return found


class Pictures(HTMLParser):
    """Pictures in HTML that no text describes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.silent: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img" and values.get("alt") is None:
            self.silent.append("img without alt")
        described = {"aria-label", "aria-labelledby"} & values.keys()
        if tag == "svg" and not described and values.get("aria-hidden") != "true":
            self.silent.append("svg without aria-label")


def drawn(cell: dict[str, Any]) -> list[str]:
    """The kinds of the pictures that are stored with a cell."""
    return [k for o in cell.get("outputs", []) for k in o.get("data", {}) if k in PICTURES]


def undescribed(notebook: dict[str, Any]) -> list[str]:
    """Figures without alternative text: in outputs, in outputs of HTML and in the text. One line each.

    The text of a figure that a cell draws is in the cell's metadata: {"mystnb": {"image": {"alt": "..."}}}.
    """
    found: list[str] = []
    for number, cell in enumerate(notebook["cells"], start=1):
        text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
        said = [f"{picture} says nothing" for picture in re.findall(r"!\[\s*\]\([^)]*\)", text)]
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if drawn(cell) and len(alt) < SHORTEST_DESCRIPTION:
            said.append("draws a figure and has no mystnb.image.alt that says what is seen")
        if len(drawn(cell)) > 1:
            said.append("draws several figures, of which one text can describe one")
        for output in cell.get("outputs", []):
            said += Pictures("".join(output.get("data", {}).get("text/html", ""))).silent
        found += [f"cell {number}: {problem}" for problem in said + Pictures(text).silent]
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_lesson_is_stored_as_it_ran_in_normal_form_with_figures_described(path: Path) -> None:
    assert unfinished(read(path)) + undescribed(read(path)) == []
    assert lessons.is_normal(path), "run `make notebooks`"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_source_that_a_lesson_shows_is_the_library_s(path: Path) -> None:
    """Every function that a cell shows with `source(...)` stands in the package as the stored output has it."""

    def bare(text: str) -> str:
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    package = bare("\n".join(p.read_text("utf-8") for p in (ROOT / "minimoe").rglob("*.py")))
    cells = [c for c in code_cells(read(path)) if "source(" in "".join(c["source"])]
    outputs = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    shown = "\n".join("".join(data.get("text/markdown", "")) for data in outputs)
    blocks = re.findall(r"(?s)```python\n(.*?)```", shown)
    parts = [part for block in blocks for part in re.split(r"(?m)^(?=@|class |def )", block)]
    stale = [part for part in parts if bare(part) not in package]
    run = f"run `make notebooks LESSONS={path.name[:2]}`"
    assert not stale, f"{run}: the library has changed\n{stale[0]}"


def test_the_first_notebook_leads_to_every_lesson_and_exercise() -> None:
    path = ROOT / "book/start_here.ipynb"
    links = set(re.findall(r"\]\(\.\./([^)]+)\)", path.read_text(encoding="utf-8")))
    pages = {f"{p.parent.name}/{p.name}" for p in [*LESSONS, *EXERCISES]}
    assert links == pages | {"book/glossary.md"}
    assert lessons.is_normal(path)


def test_exercises_come_without_outputs() -> None:
    cells = [(path.name, cell) for path in EXERCISES for cell in code_cells(read(path))]
    run = [(name, c["id"]) for name, c in cells if c["outputs"] or c["execution_count"]]
    assert run == []


@pytest.mark.parametrize(
    "path", [*LESSONS, *EXERCISES, *SOLUTIONS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_notebook_begins_with_the_first_cell_and_the_book_leaves_it_out(path: Path) -> None:
    cell = nbformat.read(path, as_version=4).cells[0]
    source = first_cell.source(first_cell.repository())
    assert cell.source == source, "run: python book/lessons.py setup"
    assert "remove-cell" in cell.metadata.tags and cell.outputs == []


def test_the_contents_name_pages_that_exist_and_every_lesson() -> None:
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text())
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    files = [c["file"] for chapter in chapters for c in (chapter, *chapter.get("sections", []))]
    pages = [contents["root"], *files]
    there = [ROOT / (page + end) for page in pages for end in (".md", ".ipynb")]
    assert sum(path.exists() for path in there) == len(pages)
    assert {f"notebooks/{path.stem}" for path in LESSONS} <= set(pages)


def test_every_citation_names_the_authors_and_the_year_of_its_entry() -> None:
    bibliography = (ROOT / "book/references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,\s]+),", bibliography, re.MULTILINE)
    assert len(entries) == len(set(entries))
    cells = [text for path in NOTEBOOKS for text in markdown(read(path))]
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "book").glob("*.md")]
    assert sum(len(plain.LINK.findall(text)) for text in cells) > 50
    assert plain.wrong_citations("\n".join(cells + pages)) == []
    assert plain.wrong_citations("[Fedus (2022)](references.md#fedus2022)") != []
    assert plain.wrong_citations("[Nobody (2022)](references.md#nobody2022)") != []


def test_the_list_of_references_is_that_of_the_bibliography() -> None:
    page = plain.REFERENCES.read_text(encoding="utf-8")
    assert plain.listed(page) == page, "run: python book/plain.py"
    assert page.count("<a id=") > 30


NOT_PLAIN = {
    "a role": re.compile(r"\{[\w:.-]+\}`"),
    "a directive": re.compile(r":::|^ *```\{", re.MULTILINE),
    "HTML": re.compile(r"<(?!/?(?:details|summary|br|img)\b|https?://)/?[a-zA-Z!][^>\n]*>"),
    "a formula outside $$": re.compile(r"\\begin\{(?:equation|align|gather)\*?\}"),
    "a fold without blank lines": re.compile(r"</summary>(?! *\n *\n)|(?<!\n)\n *</details>"),
}
NO_MARKDOWN = re.compile(r"```.*?```|(?<!`)`[^`\n]+`(?!`)|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
FIGURE = re.compile(r"\*\*Figure (\d\d)\.(\d+)\.\*\* \S[^\n]+(?:\n[^\n]+)*")


def markdown(notebook: dict[str, Any]) -> list[str]:
    """The texts of a notebook's Markdown cells."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]


def not_plain(notebook: dict[str, Any]) -> list[str]:
    """What of a notebook's Markdown only the book could show, one line each."""
    found: list[str] = []
    for text in markdown(notebook):
        # a role is a brace before code, so it is looked for before code is left out
        prose = {"a role": text, "a directive": text}
        for kind, pattern in NOT_PLAIN.items():
            here = pattern.search(prose.get(kind, NO_MARKDOWN.sub("x", text)))
            found += [f"{kind}: {here[0]!r}"] if here else []
    return found


def uncaptioned(notebook: dict[str, Any]) -> list[str]:
    """Figures without a caption below them, and captions that stand below no figure or are hidden. One line each."""
    found: list[str] = []
    cells = notebook["cells"]
    for number, cell in enumerate(cells):
        if "figure" in cell["metadata"].get("mystnb", {}):
            found.append(f"cell {number}: its caption is hidden in its metadata")
        after = "".join(cells[number + 1]["source"]) if number + 1 < len(cells) else ""
        told = "alt" in cell["metadata"].get("mystnb", {}).get("image", {})
        if told and not FIGURE.fullmatch(after):
            found.append(f"cell {number}: no caption below its figure")
        own = re.match(r"\*\*Figure", "".join(cell["source"]))
        above = cells[max(number - 1, 0)]
        pictured = "![" in "".join(above["source"]) or drawn(above)
        if cell["cell_type"] == "markdown" and own and not pictured:
            found.append(f"cell {number}: a caption below no figure")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_markdown_of_a_notebook_is_plain(path: Path) -> None:
    assert not_plain(read(path)) + uncaptioned(read(path)) == []


def test_figures_of_a_lesson_are_counted() -> None:
    """From 1 in each lesson, on through its pages."""
    counted: dict[str, list[int]] = {}
    for path in LESSONS:
        texts = "\n\n".join(markdown(read(path)))
        for lesson, number in re.findall(r"(?m)^\*\*Figure (\d\d)\.(\d+)\.\*\*", texts):
            assert path.name.startswith(lesson)
            counted.setdefault(lesson, []).append(int(number))
    assert len(counted) >= 8
    for lesson, numbers in counted.items():
        assert numbers == list(range(1, len(numbers) + 1)), lesson


@pytest.mark.parametrize(
    "text",
    [
        "a {term}`router`",
        "as {cite:t}`fedus2022` say",
        ":::{note}\nx\n:::",
        "```{note}\nx\n```",
        "a <b>word</b>",
        '<div class="x">\n\nx\n\n</div>',
        "\\begin{equation*}\nx \\tag{1}\n\\end{equation*}",
        "<details><summary>Answer</summary>$x$</details>",
        "<details><summary>Answer</summary>\n$x$\n\n</details>",
        "<details><summary>Answer</summary>\n\n$x$\n</details>",
    ],
)
def test_markdown_that_is_not_plain_is_found(text: str) -> None:
    assert not_plain(notebook_of(words(text))) != []


def test_a_caption_belongs_to_a_figure() -> None:
    caption = words("**Figure 03.1.** A load.")
    hidden = code("plot()", mystnb={"figure": {"caption": "A load."}})
    cases = [(picture("Bars."), caption), (picture("Bars."),), (code("1"), caption), (hidden,)]
    assert [len(uncaptioned(notebook_of(*cells))) for cells in cases] == [0, 1, 1, 1]


DOI = re.compile(r"10\.\d{4,9}/[^\s\"<>{}]+")
ARXIV = re.compile(r"https://arxiv\.org/abs/(?:0[7-9]|[12]\d)(?:0[1-9]|1[0-2])\.\d{4,5}")


def unfindable(bibliography: str) -> list[str]:
    """Entries with neither a DOI nor an arXiv id, nor a reason why not (the field `nodoi`)."""
    found = []
    for key, entry in parse_string(bibliography, "bibtex").entries.items():
        fields = entry.fields
        doi, url = DOI.fullmatch(fields.get("doi", "")), ARXIV.fullmatch(fields.get("url", ""))
        if not (doi or url or len(fields.get("nodoi", "").split()) > 3):
            found.append(key)
    return found


def test_every_entry_of_the_bibliography_can_be_found_or_says_why_not() -> None:
    assert unfindable((ROOT / "book/references.bib").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "field",
    [
        "url = {https://example.org/paper.pdf}",
        "url = {https://arxiv.org/abs/1771.06538}",
        "doi = {https://doi.org/10.1162/neco.1991.3.1.79}",
        "nodoi = {}",
    ],
)
def test_an_entry_that_nobody_can_find_is_seen(field: str) -> None:
    assert unfindable(f"@misc{{x,\n  title = {{A}},\n  {field}\n}}") == ["x"]


def notebook_of(*cells: Any) -> Any:
    """A notebook with the metadata that a lesson has."""
    notebook: Any = nbformat.v4.new_notebook(cells=list(cells))
    lessons.normalise(notebook)
    return notebook


def code(source: str, *outputs: Any, count: int | None = 1, **metadata: Any) -> Any:
    """A code cell with stored outputs."""
    more: Any = {"execution_count": count, "outputs": list(outputs), "metadata": metadata}
    return nbformat.v4.new_code_cell(source, **more)


words = nbformat.v4.new_markdown_cell


def png(image: Image.Image, **how: Any) -> str:
    """An image as a notebook stores it."""
    made = io.BytesIO()
    image.save(made, "PNG", **how)
    return base64.b64encode(made.getvalue()).decode()


def picture(alt: str = "") -> Any:
    """A cell that has drawn a figure."""
    data = {"image/png": png(Image.new("P", (1, 1)))}
    output = nbformat.v4.new_output("display_data", data=data)
    return code("plot()", output, mystnb={"image": {"alt": alt}})


def stream(text: str, name: str = "stdout") -> Any:
    """Something printed."""
    return nbformat.v4.new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (code("1", count=None), "execution count None"),
        (code("1/0", nbformat.v4.new_output("error", ename="ZeroDivisionError")), "ZeroDivision"),
        (code("f()", stream("a warning", "stderr")), "stderr"),
        (code("x = 1", tags=["nbval-check-output"]), "no output is stored"),
    ],
)
def test_an_unfinished_lesson_is_found(cell: Any, message: str) -> None:
    assert [message in line for line in unfinished(notebook_of(cell))] == [True]


@pytest.mark.parametrize(
    "cell",
    [
        picture(),
        picture("figure"),
        words("![](load.png)"),
        words('<img src="load.png">'),
        code("f()", nbformat.v4.new_output("display_data", data={"text/html": "<svg></svg>"})),
    ],
)
def test_a_figure_without_words_is_found(cell: Any) -> None:
    assert len(undescribed(notebook_of(cell))) == 1


def stored(folder: Path, *cells: Any) -> tuple[Path, Any]:
    """A notebook as somebody left it, and where."""
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(notebook, folder / "lesson.ipynb")
    return folder / "lesson.ipynb", notebook


def test_normal_form_is_one_form(tmp_path: Path) -> None:
    pieces = [stream("a"), stream("b\n")]
    cell = code("print('ab')", *pieces, count=7, execution={"at": "noon"})
    path, notebook = stored(tmp_path, cell)
    assert not lessons.is_normal(path)
    lessons.normalise(notebook)
    lessons.write(notebook, path)
    assert lessons.is_normal(path)
    cell = read(path)["cells"][0]
    assert (cell["execution_count"], cell["metadata"]) == (1, {})
    assert "".join(cell["outputs"][0]["text"]) == "ab\n"


def test_a_figure_is_stored_in_few_colours_and_no_pixel_is_far_off() -> None:
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    few = lessons.in_few_colours(png(Image.fromarray(ramp), dpi=(220, 220)))
    shown = Image.open(io.BytesIO(base64.b64decode(few)))
    assert shown.mode == "P" and round(shown.info["dpi"][0]) == 220
    assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - ramp).max() <= 2
    assert lessons.in_few_colours(few) == few


def test_a_lesson_that_fails_is_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = stored(tmp_path, code("1/0", count=None))
    before = path.read_bytes()
    assert lessons.main(["run", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["lesson.ipynb"]


def test_figures_have_twice_the_dots_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    begin = "from minimoe.course import style\nimport matplotlib.pyplot as plt\nstyle.use()"
    notebook = notebook_of(code(begin), code("plt.plot([1, 2])\nplt.show()"))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[1].outputs
    with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as drawn:
        assert drawn.width == pytest.approx(2 * output.metadata["image/png"]["width"], abs=2)
        assert drawn.info["dpi"][0] == pytest.approx(220, abs=1)


class Colab:
    """A machine on which the cell is run: commands are noted, and cloning makes the folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.course, self.has_library = folder / "course", False
        self.commands: list[list[str]] = []
        self.moved: list[str] = []
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(subprocess, "run", self.do)
        monkeypatch.setattr(os, "chdir", lambda folder: self.moved.append(str(folder)))
        monkeypatch.setattr(importlib.util, "find_spec", self.find)

    def do(self, command: list[str], *, check: bool) -> None:
        assert check, "a command that fails must stop the notebook"
        self.commands.append(command)
        if command[0] == "git":
            self.clone()

    def clone(self) -> None:
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
    course, address = str(colab.course), "https://github.com/someone/some.course"
    clone, install = colab.commands
    assert clone == ["git", "clone", "--quiet", "--depth", "1", address, course]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
    assert install == [*pip, course, "anywidget>=0.9,<1"]
    assert sys.path[0] == str(colab.course)
    assert colab.moved == [str(colab.course / "notebooks")]


def test_what_is_installed_beside_the_library_is_what_the_course_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r'str\(course\), "([^"]+)"', first_cell.source(""))
    assert asked and set(asked) <= set(project["optional-dependencies"]["course"])


@pytest.mark.parametrize("installed", [True, False])
def test_a_second_run_installs_what_was_interrupted(colab: Colab, installed: bool) -> None:
    colab.clone()
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


def test_the_address_is_that_of_the_setting_and_put_in_once(setting: Any, tmp_path: Path) -> None:
    path, _ = stored(tmp_path, words("# A"), code("1"))
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
    refuses(ValueError, "expected 'owner/name'", first_cell.repository)


def test_a_kernel_that_dies_as_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lived: list[str] = []

    def start(name: str) -> str:
        lived.append(name)
        if len(lived) % 4:  # three die
            raise RuntimeError("Kernel died before replying to kernel_info")
        return "kernel"

    monkeypatch.setattr(lessons_plugin, "START", start)
    refuses(RuntimeError, "died", lessons_plugin.started, "python")
    assert lessons_plugin.started("python") == "kernel" and lived == ["python"] * 4


def test_what_is_repeated_less_under_test_stands_once_in_its_lesson() -> None:
    for stem, texts in lessons_plugin.FEWER.items():
        [path] = [p for p in LESSONS if p.stem == stem]
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(c.source for c in cells if c.cell_type == "code")
        assert [code.count(text) for text in texts] == [1] * len(texts), stem
