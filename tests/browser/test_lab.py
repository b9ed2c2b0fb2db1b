"""JupyterLab: lessons read as they are meant; lesson 03 runs all its cells and its slider moves the figure; every
explorable is alive."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from pybtex.database import parse_file

from book.lessons import KERNELSPEC
from minimoe.widgets import EXPLORABLES
from tests.browser.conftest import ROOT, picture, wait

pytestmark = pytest.mark.browser

LESSON = "03_routing.ipynb"
WITH_FOLDS = "12_recording_routing.ipynb"
LINKS = [("router", "router"), ("Fedus et al., 2022", "fedus2022")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the JupyterLab of these tests keeps its files."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(home: Path) -> Iterator[str]:
    """The address of a JupyterLab of its own, set up as by `make lab`, on copies; only tests may let root in."""
    (home / "notebooks").mkdir()
    for lesson in (LESSON, WITH_FOLDS):
        shutil.copy(ROOT / "notebooks" / lesson, home / "notebooks")
    # without its three cells that train for a minute, which nbval runs
    lesson_03: Any = nbformat.read(ROOT / "notebooks" / LESSON, as_version=4)
    trains = re.compile(r"\b(KINDS|losses|difference)\b")
    lesson_03.cells = [
        c for c in lesson_03.cells if c.cell_type == "code" and not trains.search(c.source)
    ]
    assert len(lesson_03.cells) > 20
    nbformat.write(lesson_03, home / "notebooks/slider.ipynb")
    cells = [
        nbformat.v4.new_code_cell(f"from minimoe import widgets\nwidgets.{name}()")
        for name in EXPLORABLES
    ]
    metadata = {"kernelspec": KERNELSPEC}  # without one JupyterLab asks
    notebook: Any = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, home / "notebooks" / "explorables.ipynb")
    (home / "book").mkdir()
    (home / "book/results").symlink_to(ROOT / "book/results")
    log = (home / "lab.log").open("w+")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--IdentityProvider.token=", f"--notebook-dir={home}",
    ]  # fmt: skip
    for page in ("start_here.ipynb", "glossary.md", "references.md"):
        shutil.copy(ROOT / "book" / page, home / "book")
    shutil.copytree(ROOT / "book/assets/pictures", home / "book/assets/pictures")
    own = {"JUPYTER_CONFIG_PATH": str(ROOT / "book/lab"),
           "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"),
           "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython")}  # fmt: skip
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own})
    address, deadline = None, time.monotonic() + 300
    while address is None and server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        said = (home / "lab.log").read_text(encoding="utf-8")
        address = re.search(r"http://127\.0\.0\.1:[1-9]\d+/", said)
    try:
        assert address is not None, (home / "lab.log").read_text(encoding="utf-8")
        yield address[0]
    finally:
        server.terminate()
        server.wait(60)
        log.close()


@pytest.fixture
def page(context: Any, home: Path) -> Iterator[Any]:
    """A browser window, for which nothing was open in JupyterLab before; its kernels end with it."""
    shutil.rmtree(home / "spaces", ignore_errors=True)
    made = context.new_page()
    made.set_viewport_size({"width": 1400, "height": 1000})
    yield made
    made.evaluate("window.jupyterapp?.serviceManager.sessions.shutdownAll().then(() => null)")
    made.close()


NOTEBOOK = "window.jupyterapp.shell.currentWidget"
CELLS = f"{NOTEBOOK}.content.model.sharedModel.cells.filter(c => c.cell_type === 'code')"


def run_all(page: Any, address: str) -> None:
    """Open a notebook and run its cells; none fails."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    # Ready is when the kernel has said so, not when the page shows an idle one.
    page.evaluate(f"{NOTEBOOK}.context.sessionContext.ready.then(() => null)")
    wait(page, f"{NOTEBOOK}.context.sessionContext.session?.kernel?.status === 'idle'")
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells').then(r => { window.ran = [r]; }); }"
    )
    wait(page, "window.ran", timeout=600_000)
    broken = f"{CELLS}.filter(c => c.outputs.some(o => o.output_type === 'error'))"
    assert page.evaluate(f"() => {CELLS}.every(c => c.execution_count !== null)")
    assert page.evaluate(f"() => {broken}.map(c => c.source.slice(0, 80))") == []


def test_lab_opens_on_the_first_notebook_and_nothing_else(page: Any, lab: str) -> None:
    """No launcher, no question about news, none of the buttons that teachers need."""
    run_all(page, lab)
    page.wait_for_timeout(3000)  # news would come late
    assert page.evaluate(f"{NOTEBOOK}.context.path") == "book/start_here.ipynb"
    shown = "[...window.jupyterapp.shell.widgets('main')].map(w => w.title.label)"
    assert page.evaluate(shown) == ["start_here.ipynb"]
    assert page.locator(".jp-Launcher, .Toastify__toast").count() == 0
    teachers = "window.jupyterapp.commands.listCommands().filter(c => c.startsWith('nbgrader'))"
    assert page.evaluate(teachers) == []
    assert page.locator("[class*=nbgrader], [data-command*=nbgrader]").count() == 0
    assert "experts of each token" in page.inner_text(".jp-OutputArea-output")
    picture(page, "jupyterlab-start")


@pytest.fixture
def whole(home: Path) -> Iterator[None]:
    """Let JupyterLab put all cells of a notebook into the page, not only those in sight."""
    settings = home / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('{"windowingMode": "none"}')
    yield
    settings.unlink()


def open_whole(page: Any, address: str) -> None:
    """Open a notebook and wait until all of its Markdown is shown."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-MarkdownCell")
    wait(
        page,
        f"""() => {NOTEBOOK}.content.widgets.every(w => w.node.isConnected && (w.model.type !== 'markdown'
             || w.node.querySelector('.jp-RenderedMarkdown img')?.naturalWidth
             || w.node.querySelector('.jp-RenderedMarkdown')?.innerText.trim()))""",
    )
    page.wait_for_selector(".jp-Notebook mjx-container")


@pytest.mark.parametrize("lesson", [LESSON, WITH_FOLDS])
@pytest.mark.usefixtures("whole")
def test_a_lesson_reads_as_it_is_meant(page: Any, lab: str, lesson: str) -> None:
    """No mark-up is left as text, and a caption stands below each figure."""
    open_whole(page, f"{lab}lab/tree/notebooks/{lesson}")
    text = page.evaluate(
        "[...document.querySelectorAll('.jp-RenderedMarkdown')].map(e => e.innerText).join('\\n')"
    )
    keys = "|".join(parse_file(str(ROOT / "book/references.bib")).entries)
    assert re.findall(rf"\{{[\w:]+\}}|:::|\b(?:{keys})\b|\\tag|\$\$|</?\w+>", text) == []
    assert lesson != WITH_FOLDS or page.locator("details mjx-container").count()  # maths in a fold
    below = page.evaluate(
        """() => [...document.querySelectorAll('.jp-CodeCell, .jp-MarkdownCell')].map(cell => {
             const picture = cell.querySelector('.jp-RenderedImage img, .jp-RenderedMarkdown img');
             if (!picture?.naturalWidth) return null;
             const next = cell.nextElementSibling;
             return [next.innerText.trim(), next.getBoundingClientRect().top
               >= picture.getBoundingClientRect().bottom - 1]; }).filter(Boolean)"""
    )
    assert len(below) >= 4
    for number, (caption, is_below) in enumerate(below, start=1):
        assert caption.startswith(f"Figure {lesson[:2]}.{number}. ") and is_below
    # a link leads to its place, in the glossary and in the list of references
    shown = page.evaluate(f"{NOTEBOOK}.id")
    for link, place in LINKS if lesson == LESSON else []:
        page.evaluate("shown => window.jupyterapp.shell.activateById(shown)", shown)
        page.locator(".jp-RenderedMarkdown a", has_text=re.compile(f"^{link}$")).first.click()
        wait(
            page,
            """place => [...document.querySelectorAll(`.jp-MarkdownViewer [data-jupyter-id='${place}']`)].some(e => {
                 const y = e.getBoundingClientRect().top; return 0 < y && y < innerHeight; })""",
            place,
        )


@pytest.mark.corpus
def test_every_explorable_is_alive(page: Any, lab: str) -> None:
    run_all(page, f"{lab}lab/tree/notebooks/explorables.ipynb")
    for index, name in enumerate(EXPLORABLES):
        page.evaluate(
            f"""() => {{ const n = {NOTEBOOK}.content;
                 n.activeCellIndex = {index}; n.scrollToItem({index}, 'start'); }}"""
        )
        here = f".jp-CodeCell[data-windowed-list-index='{index}'] .mm-explorable"
        page.wait_for_selector(here)
        shown = f"document.querySelector(`{here}`).innerHTML.replace(/<input[^>]*>/g, '')"
        before = page.evaluate(shown)
        control = page.locator(f"{here} input[type=range]").first
        control.focus()
        page.keyboard.press("Home" if control.evaluate("e => e.value === e.max") else "End")
        wait(page, f"before => {shown} !== before", before)
        picture(page.locator(here), f"jupyterlab-{name}")
    assert page.locator(".mm-failed").count() == 0


@pytest.mark.corpus
def test_lesson_03_runs_and_its_slider_moves_the_figure(page: Any, lab: str) -> None:
    run_all(page, f"{lab}lab/tree/notebooks/slider.ipynb")
    page.evaluate(
        """() => { const n = window.jupyterapp.shell.currentWidget.content;
             const i = n.widgets.findIndex(w => w.model.type === 'code' && /interact/.test(w.model.sharedModel.source));
             n.activeCellIndex = i; n.scrollToItem(i, 'center'); }"""
    )
    handle = page.wait_for_selector(".widget-slider .noUi-handle")
    figure = ".jp-OutputArea:has(.widget-slider) img"
    before = page.wait_for_selector(figure).get_attribute("src")
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait(
        page,
        "([where, old]) => { const now = document.querySelector(where); return now && now.src && now.src !== old; }",
        [figure, before],
    )
    picture(page, "jupyterlab-03")
