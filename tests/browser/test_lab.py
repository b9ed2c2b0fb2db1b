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
from tests.browser.conftest import ROOT, SCREENSHOTS

pytestmark = pytest.mark.browser

LESSON = "03_routing.ipynb"
WITH_FOLDS = "12_recording_routing.ipynb"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab of its own, set up as by `make lab`, on copies; only tests may let root in."""
    (tmp_path / "notebooks").mkdir()
    for lesson in (LESSON, WITH_FOLDS):
        shutil.copy(ROOT / "notebooks" / lesson, tmp_path / "notebooks")
    cells = [
        nbformat.v4.new_code_cell(f"from minimoe import widgets\nwidgets.{name}()")
        for name in EXPLORABLES
    ]
    metadata = {"kernelspec": KERNELSPEC}  # without one JupyterLab asks
    notebook: Any = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, tmp_path / "notebooks" / "explorables.ipynb")
    (tmp_path / "book").mkdir()
    (tmp_path / "book/results").symlink_to(ROOT / "book/results")
    log = (tmp_path / "lab.log").open("w+")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--IdentityProvider.token=", f"--notebook-dir={tmp_path}",
    ]  # fmt: skip
    for page in ("start_here.ipynb", "glossary.md", "references.md"):
        shutil.copy(ROOT / "book" / page, tmp_path / "book")
    shutil.copytree(ROOT / "book/assets/pictures", tmp_path / "book/assets/pictures")
    own = {"JUPYTER_CONFIG_PATH": str(ROOT / "book/lab"),
           "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "spaces"),
           "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "IPYTHONDIR": str(tmp_path / "ipython")}  # fmt: skip
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own})
    address, deadline = None, time.monotonic() + 60
    while address is None and server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        said = (tmp_path / "lab.log").read_text(encoding="utf-8")
        address = re.search(r"http://127\.0\.0\.1:[1-9]\d+/", said)
    try:
        assert address is not None, (tmp_path / "lab.log").read_text(encoding="utf-8")
        yield address[0]
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser window."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield context.new_page()
    context.close()


def picture(page: Any, name: str) -> None:
    """Keep a screenshot."""
    page.screenshot(path=str(SCREENSHOTS / f"jupyterlab-{name}.png"))


NOTEBOOK = "window.jupyterapp.shell.currentWidget"
CELLS = f"{NOTEBOOK}.content.model.sharedModel.cells.filter(c => c.cell_type === 'code')"


def run_all(page: Any, address: str) -> None:
    """Open a notebook and run its cells; none fails."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    # Ready is when the kernel has said so, not when the page shows an idle one.
    page.evaluate(f"{NOTEBOOK}.context.sessionContext.ready.then(() => null)")
    page.wait_for_function(
        f"{NOTEBOOK}.context.sessionContext.session?.kernel?.status === 'idle'", timeout=60_000
    )
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells').then(r => { window.ran = [r]; }); }"
    )
    page.wait_for_function("window.ran", timeout=170_000)
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
    picture(page, "start")


@pytest.fixture
def whole(tmp_path: Path) -> None:
    """Let JupyterLab put all cells of a notebook into the page, not only those in sight."""
    settings = tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')


def open_whole(page: Any, address: str) -> None:
    """Open a notebook and wait until all of its Markdown is shown."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-MarkdownCell", timeout=60_000)
    page.wait_for_function(
        f"""() => {NOTEBOOK}.content.widgets.every(w => w.node.isConnected && (w.model.type !== 'markdown'
             || w.node.querySelector('.jp-RenderedMarkdown img')?.naturalWidth
             || w.node.querySelector('.jp-RenderedMarkdown')?.innerText.trim()))""",
        timeout=60_000,
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


@pytest.mark.parametrize(
    ("link", "place"), [("router", "router"), ("Fedus et al., 2022", "fedus2022")]
)
@pytest.mark.usefixtures("whole")
def test_a_link_leads_to_its_place(page: Any, lab: str, link: str, place: str) -> None:
    """In the glossary, and in the list of references."""
    open_whole(page, f"{lab}lab/tree/notebooks/{LESSON}")
    page.locator(".jp-RenderedMarkdown a", has_text=re.compile(f"^{link}$")).first.click()
    page.wait_for_function(
        """place => [...document.querySelectorAll(`.jp-MarkdownViewer [data-jupyter-id='${place}']`)].some(e => {
             const y = e.getBoundingClientRect().top; return 0 < y && y < innerHeight; })""",
        arg=place,
        timeout=60_000,
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
        page.wait_for_selector(here, timeout=30_000)
        shown = f"document.querySelector(`{here}`).innerHTML.replace(/<input[^>]*>/g, '')"
        before = page.evaluate(shown)
        page.locator(f"{here} input[type=range]").first.focus()
        page.keyboard.press("End")
        page.wait_for_function(f"before => {shown} !== before", arg=before, timeout=20_000)
        picture(page.locator(here), name)
    assert page.locator(".mm-failed").count() == 0


@pytest.mark.corpus
def test_lesson_03_runs_and_its_slider_moves_the_figure(page: Any, lab: str) -> None:
    run_all(page, f"{lab}lab/tree/notebooks/{LESSON}")
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
    page.wait_for_function(
        "([where, old]) => { const now = document.querySelector(where); return now && now.src && now.src !== old; }",
        arg=[figure, before],
        timeout=30_000,
    )
    picture(page, "03")
