"""The book's machinery: pages load nothing from elsewhere, and generated parts say what their source says."""

import doctest
import importlib
import inspect
import json
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docutils.core
import nbformat
import pytest
import yaml
from docutils import nodes
from PIL import Image
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.ext.autosummary import autosummary_table
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

from book import check_pages, extension, filled, npm, plain, reference, terms
from tests.small import refuses

ROOT = Path(__file__).resolve().parent.parent


def problems(folder: Path, html: str, name: str = "page.html") -> list[str]:
    """What is wrong in a folder with this page."""
    (folder / name).write_text(html)
    return check_pages.problems(folder)


@pytest.fixture(autouse=True)
def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """A book that has no repository."""
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)


@pytest.fixture
def page() -> Any:
    """An empty page as docutils knows it."""
    return docutils.core.publish_doctree("")


def test_pictures_and_links_of_a_page_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "_images").mkdir()
    for picture in ("a.png", "_images/a.png"):
        (tmp_path / picture).touch()
    top = '<h1 id="top">x</h1><a href="#top">up</a><img src="a.png" alt="Two bars">'
    assert problems(tmp_path, top, "good.html") == []
    html = '<img src="_images/a.png" alt="_images/a.png"><img src="a.png">'
    links = '<a href="gone.html">x</a><a href="good.html#no">y</a>'
    assert len(problems(tmp_path, html + links)) == 4
    assert check_pages.problems(tmp_path / "empty") != []


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="http://cdn.example/x.css">',
        '<link rel="preload" as="font" href="https://cdn.example/x.woff2">',
        '<link rel="icon" href="https://cdn.example/x.svg">',
        '<img alt="x" src="https://cdn.example/x.png">',
        '<img alt="" srcset="a.png 1x, https://cdn.example/x.png 2x" src="a.png">',
        '<iframe src="https://cdn.example/"></iframe>',
        '<style>@import "https://cdn.example/x.css";</style>',
        '<style>p { background: url(https://cdn.example/x.png) }</style>',
        '<p style="background: url(\'https://cdn.example/x.png\')">x</p>',
        '<svg aria-label="x"><image href="https://cdn.example/x.png"/></svg>',
    ],
)  # fmt: skip
def test_what_a_page_loads_from_elsewhere_is_found(tmp_path: Path, html: str) -> None:
    (tmp_path / "a.png").touch()
    found = [line for line in problems(tmp_path, html) if "from elsewhere" in line]
    assert len(found) == 1


def test_what_a_page_names_or_has_itself_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "x.js").touch()
    links = (
        '<a href="https://doi.example/1">x</a><link rel="canonical" href="https://book.example/">'
    )
    scripts = "<script src='x.js?v=1'></script><script>const url = 'https://example';</script>"
    picture = "<img alt='' src='data:image/png;base64,//8='>"
    assert problems(tmp_path, links + scripts + picture) == []


def test_the_search_page_and_style_sheets_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("a{src:url(https://cdn.example/x.woff2)} a{b:url(y.png)}")
    script = '<script src="https://cdn.example/x.js"></script>'
    assert len(problems(tmp_path, script, "search.html")) == 2


def test_a_missing_script_is_an_error_where_the_registry_must_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = '<script src="_static/npm/mathjax/x.js"></script>'
    monkeypatch.setenv("CI", "true")
    assert ["not there" in line for line in problems(tmp_path, html)] == [True]
    monkeypatch.delenv("CI")
    assert problems(tmp_path, html) == []


def test_without_the_registry_a_build_says_so_and_fails_in_ci(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(package: str, folder: Path) -> Path:
        raise npm.NpmError(f"npm could not fetch {package}")

    app, said = SimpleNamespace(minimoe_npm=True), list[str]()
    monkeypatch.setattr(npm, "fetch", unreachable)
    monkeypatch.setattr(extension.logger, "info", lambda m, *a, **k: said.append(m % a))
    monkeypatch.setenv("CI", "true")
    refuses(ExtensionError, "could not fetch mathjax", extension.fetch_packages, app)
    monkeypatch.delenv("CI")
    extension.fetch_packages(app)
    assert not app.minimoe_npm
    assert len(said) == 1 and "formulas stay TeX" in said[0]


def test_every_script_of_the_configuration_is_in_a_package() -> None:
    config = yaml.safe_load((ROOT / "book/_config.yml").read_text())["sphinx"]["config"]
    paths = [config["mathjax_path"], *config["nb_ipywidgets_js"]]
    folders = {folder: wanted for folder, wanted in extension.SCRIPTS.values()}
    for top, folder, name in (path.split("/", 2) for path in paths):
        assert top == "npm" and any(re.fullmatch(pattern, name) for pattern in folders[folder])
    assert set(extension.SCRIPTS) <= set(npm.PACKAGES)


def test_ballast_is_taken_out_of_a_page_and_nothing_else() -> None:
    kept = '<script src="_static/doctools.js"></script><p>fontawesome.js THEBE_JS_URL</p>'
    ballast = (
        '<script src="_static/scripts/fontawesome.js?digest=1"></script>'
        '<script>const THEBE_JS_URL = "https://cdn.example"; const x = 1</script>'
        '<script async="async" src="_static/sphinx-thebe.js?v=1"></script>'
    )
    assert extension.slim(ballast + kept) == kept
    twice = "<script>var togglebuttonSelector = 'x';</script>" * 2
    assert extension.slim(twice) == twice[: len(twice) // 2]


def test_mathjax_is_loaded_where_there_is_a_formula() -> None:
    scripts = '<script>window.MathJax = {"options": {}}</script>'
    scripts += '<script defer="defer" src="../_static/npm/mathjax/es5/tex-mml-chtml.js"></script>'
    formula = '<p>so <span class="math notranslate nohighlight">\\(x\\)</span></p>'
    assert extension.slim(f"{scripts}<p>none</p>") == "<p>none</p>"
    assert extension.slim(scripts + formula) == scripts + formula


def test_the_first_page_offers_colab_with_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled.first_cell, "repository", lambda: "")
    shown = filled.front()
    assert "Colab" not in shown and "Teach it" in shown and 'data-starts="live_router"' in shown
    monkeypatch.setenv("GITHUB_REPOSITORY", "a/b")
    colab = "https://colab.research.google.com/github/a/b/blob/main/notebooks/01_dense_mlp.ipynb"
    assert f'href="{colab}"' in filled.front()
    # the picture says what the stored result says
    (recipes,) = [d for d in filled.read("live_router.json")["domains"] if d["name"] == "cooking"]
    assert f">{100 * recipes['load'][5][2]:.0f}</text>" in shown


def test_the_repository_is_in_the_environment_or_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.repository("") == ""
    assert extension.repository("a/b") == "a/b"
    monkeypatch.setenv("GITHUB_REPOSITORY", "c/d.e")
    assert extension.repository("a/b") == "c/d.e"
    monkeypatch.setenv("GITHUB_REPOSITORY", "https://example/c/d")
    refuses(ExtensionError, "owner/name", extension.repository, "")


def test_without_a_repository_there_are_no_buttons(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(minimoe_repository="", html_theme_options={}, html_context={})
    extension.theme_options(None, config)
    assert not {"repository_url", "launch_buttons"} & config.html_theme_options.keys()
    monkeypatch.setenv("GITHUB_REPOSITORY", "a/b")
    extension.theme_options(None, config)
    assert config.html_theme_options["repository_url"] == "https://github.com/a/b"
    assert config.html_theme_options["launch_buttons"]["colab_url"].startswith("https://")


def test_marks_are_replaced_and_unknown_ones_named() -> None:
    shown = filled.fill("a <!-- filled: citation --> b")
    assert shown.startswith("a > ") and shown.endswith(" b") and "filled" not in shown
    entry = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert entry["title"] in shown and entry["version"] in shown
    refuses(ValueError, "'weather'", filled.fill, "<!-- filled: weather -->")


def test_every_stored_result_is_listed_with_the_command_that_makes_it() -> None:
    rows = filled.provenance().splitlines()[2:]
    assert len(rows) == len(list((ROOT / "book/results").glob("*.json")))
    assert all(re.search(r"\| `(?:\w+=\S+ )?(?:make|python) [^`]+` \|$", row) for row in rows)


def test_a_table_gives_range_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"cure": "x", "strength": 0.1, "loss": v, "max_vio": 1.0} for v in (1.0, 2.0, 6.0)]
    (tmp_path / "balance.json").write_text(json.dumps({"points": points}))
    monkeypatch.setattr(filled, "RESULTS", tmp_path)
    assert "| x | 0.1 | 3.000 (1.000 to 6.000) | 1.000 (1.000 to 1.000) | 3 |" in filled.balance()


def test_every_module_of_the_library_is_on_one_page_of_the_reference() -> None:
    pages = "".join(p.read_text() for p in (ROOT / "book/api").glob("*.md"))
    shown = re.findall(r"automodule:: (\S+)", filled.fill(pages))
    paths = [p.relative_to(ROOT).with_suffix("").parts for p in (ROOT / "minimoe").rglob("*.py")]
    there = {".".join(parts).removesuffix(".__init__") for parts in paths}
    assert sorted(shown) == sorted(there - {"minimoe.__main__"})


@pytest.mark.parametrize("docstring", ["A *b* and |c|.", "`x`, and x_ too.", "Sum over `a * b`"])
def test_a_plain_docstring_stays_what_it_is_but_for_the_marks_of_code(docstring: str) -> None:
    text, strict = reference.as_restructured(docstring), {"halt_level": 2, "report_level": 2}
    shown = docutils.core.publish_doctree(text, settings_overrides=strict).astext()
    assert shown == docstring.replace("`", "")


def test_code_and_tables_in_a_docstring_are_kept_as_they_are() -> None:
    text = "Does it.\n\n    with x as y:\n        y.pop(**z)\n\nArgs:\n    a: one.\n\n    b: two."
    shown = reference.as_restructured(text)
    assert "::\n\n    with x as y:\n        y.pop(**z)\n" in shown
    assert shown.count("::") == 1


def prose(path: Path) -> str:
    """The Markdown of a page or notebook."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


PAGES = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "book").glob("*.md"))]


def test_the_glossary_is_in_order_and_every_link_to_it_is_there() -> None:
    names = terms.terms()
    assert names == sorted(names, key=str.lower) and len(names) > 30
    known = {terms.anchor(name) for name in names}
    assert len(known) == len(names), "a term stands twice"
    for path in PAGES:
        assert set(terms.LINK.findall(prose(path))) <= known, path.name


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem[0].isdigit()], ids=lambda p: p.stem)
def test_every_term_of_a_lesson_is_linked_at_its_first_use(path: Path) -> None:
    assert terms.LINK.search(prose(path)), "no term is linked yet; run: python book/terms.py"
    assert terms.unlinked(path) == [], "run: python book/terms.py"


def test_first_uses_are_found_in_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "glossary.md"
    page.write_text("# Glossary\n\n## expert\n\nOne.\n\n## expert choice\n\nTwo.\n")
    monkeypatch.setattr(terms, "GLOSSARY", page)
    first = "# Experts\n\n`experts` and $expert$ and [expert](x.md): see *expert\nchoice*."
    cells = [first, "**Figure 03.1.** An expert.", "Experts. An expert."]
    lesson = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(c) for c in cells])
    path = tmp_path / "lesson.ipynb"
    nbformat.write(lesson, path)
    assert sorted(terms.unlinked(path)) == ["Experts", "expert\nchoice"]
    assert terms.link(path) == 2
    texts = [c.source for c in nbformat.read(path, as_version=4).cells]
    linked = first.replace("expert\nchoice", "[expert choice](../book/glossary.md#expert-choice)")
    assert texts == [linked, cells[1], "[Experts](../book/glossary.md#expert). An expert."]
    assert terms.unlinked(path) == [] and terms.link(path) == 0


def test_every_lesson_that_prose_names_is_a_link() -> None:
    text = "See lesson 03, and lessons 12 to 13; Lesson 5 and ``lesson 03``, lesson 07, lesson 5b, 12c."
    document: Any = docutils.core.publish_doctree(text)
    names = ("03_routing", "05_zoo", "05b_judged", "12_a", "12b_c", "13_b")
    found = {f"notebooks/{name}" for name in names}
    table = autosummary_table("")  # a table of the reference; to docutils it is a comment
    table += nodes.paragraph("", "As in lesson 03.")
    document += table
    app = SimpleNamespace(env=SimpleNamespace(found_docs=found, docname="notebooks/05_zoo"))
    extension.link_lessons(app, document)
    links = [f"{n.astext()}: {n['reftarget']}" for n in document.findall(addnodes.pending_xref)]
    third, second_page = "lesson 03: /notebooks/03_routing", "lesson 5b: /notebooks/05b_judged"
    two = ["lessons 12: /notebooks/12_a", "13: /notebooks/13_b"]
    assert links == [third, *two, second_page, third]
    assert document.astext().startswith("See lesson 03, and lessons 12 to 13; Lesson 5 and lesson")


def test_a_lesson_that_is_named_without_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/03_routing.html").write_text("<p>This is lesson 03.</p>")
    (tmp_path / "notebooks/03b_more.html").write_text("<p>This is lesson 03b.</p>")
    html = (
        "<h2>Lesson 03</h2><p>In <a href='notebooks/03_routing.html'>lesson 03</a>, in lesson 3"
        " and lesson 3b and in lesson 07, not here yet.</p><pre>lesson 03</pre>"
    )
    said = [f"page.html: '{x}' is no link" for x in ("lesson 3", "lesson 3b")]
    assert problems(tmp_path, html) == said


def test_the_study_says_the_same_on_every_page() -> None:
    """Verdicts and numbers: results page, lessons 12 to 14 and README have those that the report stored."""
    stored, shown = filled.read("study.json"), filled.findings().replace("\\|", "|")
    pages = (ROOT / "notebooks").glob("1[234]*.ipynb")
    cells: list[Any] = [c for path in pages for c in nbformat.read(path, as_version=4).cells]
    outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
    lines = "\n".join(o.get("text/markdown", "") for o in outputs).splitlines()
    known = set[str]()
    for f in stored["findings"]:
        rows = [[p["what"], p["found"], p["verdict"]] for p in f["parts"]]
        for text in (f["short"], *(found for _, found, _ in rows)):
            assert filled.plain(text).replace("\\|", "|") in shown
        rows.append([f["claim"], f["title"], f["short"], f["verdict"]])
        known |= {f"| {' | '.join(row)} |" for row in rows}
        known.add(f"**{f['claim']}: {f['verdict']}.** {f['short']}.")
    said = {x for x in lines if re.match(r"\*\*C1\d|.*\| (agrees|cannot.*|dis.*|mat.*) \|$", x)}
    assert said <= known
    assert {x[2:5] for x in said if x[0] == "*"} >= {f"C{claim}" for claim in range(10, 17)}
    readme, bits = (ROOT / "README.md").read_text("utf-8"), stored["measurements"]["information"]
    token, domain = ([one[kind]["value"] for one in bits] for kind in ("token", "domain"))
    assert f"falls from {token[0]:.1f} to {token[-1]:.1f} bits" in readme
    assert f"rises from {domain[0]:.2f} to {domain[-1]:.2f} bits" in readme


def test_the_page_on_trust_says_where_bits_depend_on_how_much_was_read() -> None:
    """The text halved four times: less than the interval in the first two layers shown, more in the last."""
    m, shown = filled.read("study.json")["measurements"], filled.halved()
    small, grown = m["information_halved"][-3:], list[bool]()
    assert m["information_halved"][0]["tokens"] > 6 * small[0]["tokens"]
    for one in small:
        half, whole = one["token"], m["information"][one["layer"] - 1]["token"]
        grown.append(half["value"] - whole["value"] > half["high"] - half["value"])
        assert filled.interval(half, 3) in shown and filled.interval(whole, 3) in shown
    page = (ROOT / "book/trust.md").read_text("utf-8")
    assert "In the first two of these layers the value moves by less than its interval" in page
    assert "In the last layer it rises" in page and grown == [False, False, True]


def test_the_page_on_trust_says_what_the_simulations_gave() -> None:
    """A thousand studies each, every rate within its bound, and the intervals that hold less often are those named."""
    rows = filled.read("rates.json")["rows"]
    page = " ".join((ROOT / "book/trust.md").read_text("utf-8").split())
    assert {r["runs"] for r in rows} == {1000} and all(r["date"] for r in rows)
    for row in rows:
        ends = [float(x) / 100 for x in re.findall(r"[\d.]+", row["wanted"])]
        ends = [*ends, 1] if re.match("at least|above", row["wanted"]) else [0, *ends]
        assert ends[-2] <= row["rate"] <= ends[-1], row
    rates = {r["what"]: r["rate"] for r in rows if r["kind"] == "coverage"}
    low = {x: rate for x, rate in rates.items() if rate < 0.9}
    even = low["max/min within a domain, domains alike"]
    weak = low["the domain beyond the token, a weak effect"]
    assert len(low) == 2 and "With two exceptions, all hold the truth in at least 90 %" in page
    assert "an eighth of the intervals start above it" in page and round(8 * (1 - even)) == 1
    assert "misses in slightly more than a tenth of" in page and 0.88 < weak < 0.9
    assert "hold the truth nearly always" in page
    assert min(rate for x, rate in rates.items() if "path" in x) > 0.98


def test_links_to_references_are_citations() -> None:
    fedus, jiang = "(../book/references.md#fedus2022)", "(references.md#jiang2024)"
    text = (
        f"[Fedus et al. (2022)]{fedus} say ([Fedus et\nal., 2022]{fedus}; [Jiang et al., 2024]{jiang})."
        f"\n\n<!-- references -->\n- one\n- two\n<!-- end of references -->\n[elsewhere](references.md)"
    )
    cited = "{cite:t}`fedus2022` say {cite:p}`fedus2022,jiang2024`.\n\n```{bibliography}\n```\n"
    assert plain.cited(text) == f"{cited}[elsewhere](references.md)"


def caption(text: str = "Figure 03.2.") -> nodes.paragraph:
    """A paragraph as a caption is written."""
    return nodes.paragraph("", "", nodes.strong("", text), nodes.Text(" A load."))


def test_a_paragraph_below_a_figure_is_its_caption(page: Any) -> None:
    text = nodes.container("", nodes.paragraph("", "printed"), nb_element="mime_bundle")
    drawn = nodes.container("", nodes.image(uri="a.png"), nb_element="mime_bundle")
    page += nodes.container("", drawn, text, nb_element="cell_code")
    page += caption()
    page += nodes.paragraph("", "", nodes.image(uri="b.svg"))
    page += caption("Figure 03.3.")
    plain.captions(None, page)
    cell, shown = page.children
    assert [type(node) for node in cell.children] == [nodes.figure, nodes.container]
    for figure, number in ((cell[0], 2), (shown, 3)):
        assert isinstance(figure, nodes.figure) and figure["ids"] == [f"figure-03-{number}"]
        assert len(list(figure.findall(nodes.image))) == 1
        assert figure[-1].astext() == f"Figure 03.{number}. A load."


@pytest.mark.parametrize("above", [None, nodes.paragraph("", "prose"), nodes.container()])
def test_a_caption_below_no_figure_is_refused(page: Any, above: nodes.Element | None) -> None:
    page += [above] if above else []
    page += caption()
    said = r"'Figure 03.2.' is the caption of no figure"
    refuses(ExtensionError, said, plain.captions, None, page)


def test_a_table_that_stayed_text_is_found(tmp_path: Path) -> None:
    html = (
        "<p>| router | loss |\n|—|—|\n| top-k | 1.7 |</p><p>so:\n| a | b |</p>"
        "<table><tr><td>x</td></tr></table><p>P(a | b) and |x|</p><p>|x| is small</p><pre>| a | b |</pre>"
    )
    lines = ("| router | loss |", "| a | b |")
    said = [f"page.html: '{x}' is a table's text, no table" for x in lines]
    assert problems(tmp_path, html) == said


def test_a_formula_of_several_lines_keeps_its_number(page: Any) -> None:
    cases = r"a = \begin{cases} 1 \\ 2 \end{cases} \tag{2}"
    for text in (r"a = b \\tag{1}", cases, r"a \\ b"):
        page += nodes.math_block(text, text)
    extension.keep_tags(None, page)
    shown = [(n.astext(), bool(n.get("nowrap"))) for n in page.findall(nodes.math_block)]
    whole = rf"\begin{{equation*}}{cases}\end{{equation*}}"
    assert shown[1:] == [(whole, True), (r"a \\ b", False)]


def test_a_figure_keeps_its_place_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "_images").mkdir()
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}"/>'
    (tmp_path / "_images/a.svg").write_text(svg.format("432", "470.4"))
    (tmp_path / "_images/b.svg").write_text(svg.format("504pt", "216pt"))
    Image.new("L", (440, 220)).save(tmp_path / "_images/c.png", dpi=(220, 220))
    names = ("a.svg", "b.svg", "c.png")
    html = "".join(f'<img alt="x" src="_images/{name}" />' for name in names)
    shown = extension.sized(html, tmp_path / "x.html")
    sizes = re.findall(r'width="(\d+)" height="(\d+)" />', shown)
    assert sizes == [("432", "470"), ("672", "288"), ("220", "110")]


def test_pictures_that_are_dark_by_themselves_are_marked(page: Any) -> None:
    images = [nodes.image(uri="book/assets/pictures/block.svg"), nodes.image(uri="a.png")]
    page += images
    extension.keep_colours(None, page)
    assert [image["classes"] for image in images] == [["dark-light"], []]


def test_what_the_theme_forgets_for_the_keyboard_is_put_in() -> None:
    summary = '<summary><span class="toctree-toggle"></span></summary>'
    boxes = (
        '<div class="math notranslate nohighlight" id="x"></div><div role="doc-biblioentry"></div>'
    )
    html = extension.mended(summary + boxes)
    assert '<summary aria-label="Pages below">' in html
    assert '<div tabindex="0" class="math notranslate nohighlight" id="x">' in html
    assert "doc-biblioentry" not in html
    assert extension.mended(html) == html


def test_every_test_that_the_page_of_bugs_names_exists() -> None:
    lines = (ROOT / "book/bugs.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("|").split(" | ") for line in lines if line.startswith("| [")]
    rows = [[cell.strip() for cell in row] for row in table]
    assert len(rows) > 30
    for reports, said, tests in rows:
        for repository, number, address in re.findall(r"\[([^]#]+)#(\d+)\]\((\S+?)\)", reports):
            assert address == f"https://github.com/{repository}/issues/{number}"
        assert said.endswith(".")
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", tests)
        assert len(named) == tests.count("`") / 2 > 0, tests
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


OBJECTS = reference.objects()
EXAMPLES = {n.rpartition(".")[2]: o for n, o in OBJECTS.items() if ">>> " in (o.__doc__ or "")}

CONFIG = yaml.safe_load((ROOT / "book/_config.yml").read_text())["sphinx"]["config"]
SETTINGS: Any = Config(**{k: v for k, v in CONFIG.items() if k.startswith("napoleon")})


def read(*objects: Any) -> list[tuple[dict[str, str], list[str]]]:
    """Of each object the names that the reference shows with their texts, and what is wrong: as a build does."""
    made: list[tuple[list[str], list[str]]] = []
    for obj in objects:
        text = reference.as_restructured(inspect.getdoc(obj) or "")
        what = "class" if inspect.isclass(obj) else "function"
        lines = str(GoogleDocstring(text, SETTINGS, what=what, obj=obj)).split("\n")
        made.append((lines, reference.complete(obj, lines)))
    # one document: docutils takes longer to begin than to read
    boxes = [textwrap.indent("\n".join(["A box.", "", *lines]), "   ") for lines, _ in made]
    page = "".join(f".. container:: box\n\n{box}\n\n" for box in boxes)
    shown = docutils.core.publish_doctree(page, settings_overrides={"report_level": 5})
    found: list[tuple[dict[str, str], list[str]]] = []
    for box, (lines, wrong) in zip(shown.findall(nodes.container), made, strict=True):
        pairs = [(field[0].astext(), field[1].astext()) for field in box.findall(nodes.field)]
        fields = {n.partition(" ")[2]: t for n, t in pairs if n.startswith(("param ", "ivar "))}
        assert list(fields) == [name for name, _ in reference.entries(lines)]
        silent = [name for name in fields if not fields[name].strip()]
        found.append((fields, wrong + [f"'{name}' is shown without a text" for name in silent]))
    return found


def test_every_parameter_and_field_has_its_own_name_and_text() -> None:
    found = zip(OBJECTS, read(*OBJECTS.values()), strict=True)
    assert {name: wrong for name, (_, wrong) in found if wrong} == {}


def test_the_fields_of_a_routing_stand_under_their_names() -> None:
    ((shown, _),) = read(OBJECTS["minimoe.routing.Routing"])
    assert shown["expert"].startswith("[N] int64, its expert")
    assert shown["kept"].startswith("[N] bool, False where capacity dropped")
    assert " ".join(shown) == "token expert weight shape kept k valid sequence logits probs"


@dataclass
class Pair:
    """Two.

    Attributes:
        {}
    """

    low: int
    high: int


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("low [N]: the lower.\n    high: the upper.", "'low [N]' is no name"),
        ("low, high: both.", "'low, high' is no name"),
        ("low: lower. high: upper.", "the text of 'low' describes 'high'"),
        ("low: an end.\n    high: an end.", "'low' shares its text"),
        ("low: the lower.", "'high' has no text"),
        ("low:\n    high: the upper.", "'low' has no text"),
        ("low: the lower.\n    high: the upper.\n    middle: none.", "'middle' is described"),
    ],
)
def test_a_name_without_a_text_of_its_own_is_refused(
    entries: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pair, "__doc__", f"Two.\n\nAttributes:\n    {entries}\n")
    ((_, wrong),) = read(Pair)
    assert any(line.startswith(expected) for line in wrong), wrong


def test_a_name_that_means_the_same_everywhere_is_explained_once() -> None:
    ((shown, wrong),) = read(OBJECTS["minimoe.model.MixtralModel"])
    assert wrong == [] and shown["config"] == reference.shared("minimoe.model")["config"]
    tables = {"minimoe": tomllib.loads((ROOT / "book/parameters.toml").read_text())["minimoe"]}
    while tables:
        module, table = tables.popitem()
        names = [name for name, value in table.items() if isinstance(value, str)]
        assert importlib.import_module(module), module
        assert names == sorted(names), f"{module}: in alphabetical order"
        tables |= {f"{module}.{k}": v for k, v in table.items() if isinstance(v, dict)}


def test_the_ten_names_that_people_start_with_have_an_example() -> None:
    assert set(EXAMPLES) >= {
        "ModelConfig", "MixtralModel", "Routing", "TopKRouter", "Experts", "MoELayer", "loop",
        "switch_loss", "limit_capacity", "RoutingRecorder",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_happens(name: str) -> None:
    obj = EXAMPLES[name]
    names = dict(vars(importlib.import_module(obj.__module__)))
    found, said = doctest.DocTestFinder(recurse=False).find(obj, name, globs=names), list[str]()
    for example in found:
        doctest.DocTestRunner().run(example, out=said.append)
    assert found and said == []
