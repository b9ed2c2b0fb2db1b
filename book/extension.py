"""What this book adds to Jupyter Book: scripts served from the book itself, lesson numbers, pages filled from files.

Sphinx loads it as a local extension (book/_config.yml). Each part is a few lines and stands by itself:

- scripts and fonts of npm packages are put into _static/npm (`fetch_packages`, `place_packages`);
- the scripts and files of the explorables are put into _static/explorables (`place_explorables`);
- a page says its title and what it is about to those who link to it (`describe`);
- the theme makes its list of pages from their titles alone (`list_pages_quickly`);
- what the theme loads and the book does not need is taken out of the pages, and what it forgot for readers with a
  keyboard or a screen reader is put in (`slim`, `mended`);
- a lesson's chapter number is the number in its file's name (`number_chapters`);
- launch buttons point to the repository of the setting, and are left out without one (`theme_options`);
- marks such as <!-- filled: citation --> are replaced by what book/filled.py makes of files (`fill`);
- links to references are citations, and paragraphs below figures are captions (book/plain.py);
- what prose calls 'lesson 03', or 'lesson 06b' where a lesson has two pages, is a link to it (`link_lessons`), and
  search puts lessons first (search_scorer.js);
- docstrings, written in plain text, are made fit for Sphinx (`plain_docstring`), and what they take has names and
  texts (`named_parameters`).
"""

import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.addnodes import index, pending_xref, toctree
from sphinx.domains.python import PyObject  # pyright: ignore[reportPrivateImportUsage]
from sphinx.errors import ExtensionError
from sphinx.ext import autosummary
from sphinx.util import logging
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book import filled, npm, plain, reference  # noqa: E402

logger = logging.getLogger(__name__)

# Package -> its folder under _static/npm, and the files that pages load. The paths are those of _config.yml.
SCRIPTS = {
    "mathjax@3.2.2": ("mathjax", ["es5/tex-mml-chtml\\.js", "es5/input/tex/.*", "es5/a11y/assistive-mml\\.js",
                                  "es5/output/chtml/fonts/.*", "LICENSE"]),
    "requirejs@2.3.7": ("require", ["require\\.js"]),
    "@jupyter-widgets/html-manager@1.0.14": ("widgets", ["dist/embed-amd\\.js", "dist/.*\\.woff2", "LICENSE"]),
}  # fmt: skip

FRONT_PICTURE = "information.png"  # in book/assets
FRONT_TITLE = "minimoe: a course about Mixture-of-Experts language models"

# --- scripts from the book itself -----------------------------------------------------------------


def fetch_packages(app: Any) -> None:
    """Have every package in the cache before anything is built.

    Raises:
        ExtensionError: one cannot be had, and CI is true.
    """
    app.minimoe_npm = True
    try:
        for package in SCRIPTS:
            npm.archive(package)
    except npm.NpmError as error:
        if os.environ.get("CI") == "true":
            raise ExtensionError(f"{error}; without it pages would show raw TeX") from error
        app.minimoe_npm = False
        message = "%s\nThe book is built without MathJax and widgets: formulas stay TeX. Build once with a network."
        logger.info(message, error, color="red")


def place_packages(app: Any) -> None:
    """Unpack the packages into _static/npm, once for each version."""
    folder = Path(app.outdir) / "_static" / "npm"
    for package, (name, wanted) in SCRIPTS.items():
        done = folder / name / f".{package.replace('/', '-')}"
        if app.minimoe_npm and not done.exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            npm.unpack(package, folder / name, wanted)
            done.touch()


def place_explorables(app: Any) -> None:
    """Write each explorable's script and files to _static/explorables; book/assets/explorables.js loads them."""
    from minimoe.widgets import EXPLORABLES
    from minimoe.widgets.explorable import file_script, script

    folder = Path(app.outdir) / "_static" / "explorables"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, make in EXPLORABLES.items():
        (folder / f"{name}.js").write_text(script(name), encoding="utf-8")
        for file, content in make().files.items():
            (folder / name).mkdir(exist_ok=True)
            text = file_script(name, file, content())
            (folder / name / f"{file}.js").write_text(text, encoding="ascii")


def load_explorables(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Let the pages that hold an explorable, or the test, load the script that starts them."""
    if "minimoe-explorable" in context.get("body", ""):
        app.add_js_file("explorables.js", priority=900, loading_method="defer")  # after page.js
    if 'class="questions"' in context.get("body", ""):
        app.add_js_file("questions.js", loading_method="defer")


# --- the list of pages on the left ------------------------------------------------------------------


def titles_only(toc: nodes.Element) -> nodes.Element:
    """A page's contents without its sections: its title, and the lists of pages below it."""
    short = toc.copy()
    for item in toc:
        kept: Any = item.copy()
        if isinstance(item, nodes.list_item):
            kept += item[0].deepcopy()
            if below := [pages.copy() for pages in item.findall(toctree)]:
                kept += nodes.bullet_list("", *below)
        short += kept
    return short


def list_pages_quickly(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Have the theme make its list from the titles alone: it copies every section of every page, for each page.

    The list stays as it was, for its template asks for titles only; a third of the time of a build goes.
    """
    env, make = app.env, context["toctree"]
    if not hasattr(app, "minimoe_titles"):
        app.minimoe_titles = {name: titles_only(toc) for name, toc in env.tocs.items()}

    def make_quickly(**kwargs: Any) -> Any:
        env.tocs, whole = app.minimoe_titles if kwargs.get("titles_only") else env.tocs, env.tocs
        try:
            return make(**kwargs)
        finally:
            env.tocs = whole

    context["toctree"] = make_quickly


# --- what others say of a page ---------------------------------------------------------------------


def describe(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Title, description and OpenGraph of a page: its heading and the beginning of its first paragraph."""
    if doctree is None:
        return
    paragraph = next(iter(doctree.findall(nodes.paragraph)), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    if len(text) > 200:
        text = text[:200].rsplit(" ", 1)[0] + " …"
    first = pagename == app.config.root_doc
    title = FRONT_TITLE if first else f"{without_tags(context['title'])} · {app.config.html_title}"
    tags = {"og:title": title, "og:description": text, "og:type": "website" if first else "article",
            "og:site_name": app.config.html_title}  # fmt: skip
    if base := app.config.html_baseurl:
        tags["og:url"] = f"{base.rstrip('/')}/{app.builder.get_target_uri(pagename)}"
        tags["og:image"] = f"{base.rstrip('/')}/_static/{FRONT_PICTURE}"
    lines = [
        f'<meta property="{name}" content="{escape(value)}" />' for name, value in tags.items()
    ]
    lines.append(f'<meta name="description" content="{escape(text)}" />')
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])
    if first:
        context["docstitle"] = None  # else the name stands in the page's title twice
        context["title"] = title


def without_tags(title: str) -> str:
    """A title without its mark-up."""
    return unescape(re.sub(r"<[^>]+>", "", title))


# --- pages that load no more than they need ------------------------------------------------------

# The icons as a script (1.5 MB; the theme's stylesheet has them as fonts, too), live code from a foreign server, and
# the second and third time that the same thing is said.
UNUSED = [
    re.compile(r"<!-- So that users can add custom icons -->\s*"),
    re.compile(r"<script src=\"[^\"]*scripts/fontawesome\.js[^\"]*\"></script>\s*"),
    re.compile(r"<script>const THEBE_JS_URL[^<]*</script>\s*"),
    re.compile(r"<script[^>]*sphinx-thebe\.js[^>]*></script>\s*"),
    re.compile(r"<link[^>]*sphinx-thebe\.css[^>]*/>\s*"),
    re.compile(r"<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" ?/>\s*"),
    re.compile(
        r"<script>var togglebuttonSelector[^<]*</script>\s*(?=[\s\S]*<script>var togglebuttonSelector)"
    ),
]
# Files that no page asks for then.
UNUSED_FILES = ["_static/scripts/fontawesome.js", "_static/sphinx-thebe.*", "_static/**/*.map",
                "_static/locales", "_static/vendor/fontawesome/webfonts/*.ttf",
                "_static/webpack-macros.html", "_static/sbt-webpack-macros.html"]  # fmt: skip


# MathJax, and its settings, on a page without a formula.
MATHJAX = re.compile(
    r"<script>window\.MathJax[^<]*</script>\s*|<script[^>]*/mathjax/[^>]*></script>\s*"
)


def slim(html: str) -> str:
    """A page without what the theme loads for nothing."""
    for pattern in UNUSED if re.search(r'class="[^"]*\bmath\b', html) else [*UNUSED, MATHJAX]:
        html = pattern.sub("", html)
    return html


# What people who do not see the page, or do not use a mouse, need: what a button does, and reach for what scrolls.
MENDED = [
    (re.compile(r' role="doc-biblioentry"'), ""),  # withdrawn from the standard
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),  # of no list items
    (re.compile(r"<summary>(<span class=\"toctree-toggle\")"), r'<summary aria-label="Pages below">\1'),
    (re.compile(r"<div class=\"(pst-scrollable-table-container|math notranslate nohighlight)\""),
     r'<div tabindex="0" class="\1"'),
]  # fmt: skip


def mended(html: str) -> str:
    """A page that can be used with a keyboard and a screen reader."""
    for pattern, replacement in MENDED:
        html = pattern.sub(replacement, html)
    return html


DOTS = 110  # an inch, of a figure of minimoe.course.style on the screen


def sized(html: str, page: Path) -> str:
    """A page whose figures keep their place while they load: shown with `DOTS` an inch, however many they have, or at
    the size that a drawing states."""

    def one(found: re.Match[str]) -> str:
        picture = page.parent / found[1]
        if "width=" in found[0] or not picture.is_file():
            return found[0]  # it says its size itself
        if picture.suffix == ".svg":
            root = ET.parse(picture).getroot().attrib
            points = (
                4 / 3 if root["width"].endswith("pt") else 1
            )  # 72 of them, and 96 pixels, are an inch
            width, height = (
                round(points * float(root[k].rstrip("ptx"))) for k in ("width", "height")
            )
        else:
            with Image.open(picture) as drawn:
                width, height = (round(n * DOTS / drawn.info["dpi"][0]) for n in drawn.size)
        return f'{found[0].rstrip("/> ")} width="{width}" height="{height}" />'

    return re.sub(r'<img\b[^>]*\bsrc="([^"]*_images/[^"]+\.(?:png|svg))"[^>]*>', one, html)


def finish(app: Any, error: Exception | None) -> None:
    """After the build: packages in, ballast out."""
    if error is not None or app.builder.format != "html":
        return
    place_packages(app)
    place_explorables(app)
    out = Path(app.outdir)
    for page in out.rglob("*.html"):
        if "_static" not in page.relative_to(out).parts:
            before = page.read_text(encoding="utf-8")
            if (after := sized(mended(slim(before)), page)) != before:
                page.write_text(after, encoding="utf-8")
    for pattern in UNUSED_FILES:
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# --- numbers --------------------------------------------------------------------------------------


def number_chapters(app: Any, env: Any, docnames: list[str]) -> None:
    """Let a chapter's number be the lesson's own: 12 for notebooks/12_..., also where lessons before it are missing."""
    assign = TocTreeCollectorWithStyles.assign_section_numbers

    def assign_lesson_numbers(self: TocTreeCollectorWithStyles, env: Any) -> list[str]:
        changed = assign(self, env)
        for docname, numbers in env.toc_secnumbers.items():
            lesson = re.fullmatch(r"notebooks/(\d\d)_\w+", docname)
            if not lesson:
                continue
            for anchor, number in numbers.items():
                if number:
                    numbers[anchor] = (int(lesson[1]), *number[1:])
            if "secnumber" in env.titles[docname]:
                env.titles[docname]["secnumber"] = [int(lesson[1])]
        for toc in [*env.tocs.values()]:
            for link in toc.findall(lambda n: n.tagname == "reference"):
                of_page = re.fullmatch(r"notebooks/(\d\d)_\w+", link.get("refuri", ""))
                if of_page and link.get("secnumber"):
                    link["secnumber"] = [int(of_page[1]), *link["secnumber"][1:]]
        return changed

    if not getattr(assign, "of_lessons", False):
        assign_lesson_numbers.of_lessons = True  # type: ignore[attr-defined]
        TocTreeCollectorWithStyles.assign_section_numbers = assign_lesson_numbers  # type: ignore[method-assign]


# --- launch buttons -------------------------------------------------------------------------------


def repository(setting: str) -> str:
    """'owner/name' of the repository on GitHub: the environment's GITHUB_REPOSITORY, else the setting, else ''."""
    name = os.environ.get("GITHUB_REPOSITORY") or setting
    if name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ExtensionError(
            f"the repository is {name!r}; expected 'owner/name' (GITHUB_REPOSITORY, or "
            "minimoe_repository in book/_config.yml)"
        )
    return name


def theme_options(app: Any, config: Any) -> None:
    """Buttons to Colab, Binder and the repository, if there is one; and what the theme wants to be told."""
    config.html_search_scorer = str(ROOT / "book" / "search_scorer.js")
    # Readers get the theme that their system asks for; without a word the theme's script complains.
    config.html_context.setdefault("default_mode", "auto")
    config.html_theme_options["logo"] = {
        "image_light": "_static/wordmark.svg",
        "image_dark": "_static/wordmark-dark.svg",
        "alt_text": "minimoe, to the first page",
    }
    name = repository(config.minimoe_repository)
    if name:
        config.html_theme_options |= {
            "repository_url": f"https://github.com/{name}",
            "repository_branch": "main",
            "use_repository_button": True,
            "launch_buttons": {
                "colab_url": "https://colab.research.google.com",
                "binderhub_url": "https://mybinder.org",
                "notebook_interface": "jupyterlab",
            },
        }


# --- text -----------------------------------------------------------------------------------------


def fill(app: Any, docname: str, source: list[str]) -> None:
    """Replace the marks of a page by what they stand for."""
    if docname.startswith("book/"):
        source[0] = filled.fill(source[0])


def keep_colours(app: Any, document: Any) -> None:
    """Tell the theme and book.css which pictures are light and dark by themselves (book/pictures.py)."""
    for image in document.findall(nodes.image):
        if "assets/pictures/" in image["uri"]:
            image["classes"].append("dark-light")


def keep_tags(app: Any, document: Any) -> None:
    r"""Let a formula of several lines keep its number: Sphinx would put it into `split`, which forbids \tag."""
    for node in document.findall(nodes.math_block):
        text = node.astext()
        if r"\tag" in text and r"\\" in text and not node.get("nowrap"):
            node.children[:] = [nodes.Text(rf"\begin{{equation*}}{text.strip()}\end{{equation*}}")]
            node["nowrap"] = True


def plain_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings of minimoe are plain text; Sphinx wants reStructuredText."""
    lines[:] = reference.as_restructured("\n".join(lines)).split("\n")


def named_parameters(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """After napoleon: every parameter and field has its own name and text, or the build says which has not."""
    if what in ("class", "exception", "function", "method"):
        for wrong in reference.complete(obj, lines):
            logger.warning("%s: %s", name, wrong)


# Where a lesson's number is no word of the text: it is a link already, a heading, code, or a name in an index.
NO_PROSE = (
    nodes.reference, nodes.title, nodes.literal, nodes.literal_block, nodes.doctest_block, nodes.math, nodes.math_block,
    nodes.raw, pending_xref, index,
)  # fmt: skip
LESSONS = re.compile(r"\b[Ll]essons?\s+\d\d?b?\b(?:(?:,| and|, and| to| or|–)\s?\d\d?b?\b)*")
LESSON = re.compile(r"(?:[Ll]essons?\s+)?\b(\d\d?)(b?)\b")


def link_lessons(app: Any, document: Any) -> None:
    """Make a link of 'lesson 03', wherever prose says it, docstrings included; of lessons that are there."""
    pages = [name for name in app.env.found_docs if name.startswith("notebooks/")]
    there = {name[len("notebooks/") :].split("_")[0]: name for name in pages}
    for text in list(document.findall(nodes.Text)):
        if not LESSONS.search(text) or any(isinstance(p, NO_PROSE) for p in above(text)):
            continue
        parts: list[Any] = []
        at = 0
        for said in LESSONS.finditer(text):
            for one in LESSON.finditer(text, said.start(), said.end()):
                page = there.get(one[1].zfill(2) + one[2])
                if page and page != app.env.docname:
                    link = pending_xref(
                        "", nodes.inline("", one[0]), refdomain="std", reftype="doc",
                        reftarget=f"/{page}", refexplicit=True, refwarn=True, refdoc=app.env.docname,
                    )  # fmt: skip
                    parts += [nodes.Text(text[at : one.start()]), link]
                    at = one.end()
        text.parent.replace(text, [*parts, nodes.Text(text[at:])])


def above(node: Any) -> Iterator[Any]:
    """What a node is in, from the inside out."""
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_config_value("minimoe_repository", "", "html")
    app.connect("config-inited", theme_options)
    app.connect("builder-inited", fetch_packages)
    # After the extensions that number chapters by themselves.
    app.connect("env-before-read-docs", number_chapters)
    app.connect("source-read", fill, priority=100)
    app.connect("source-read", plain.citations)
    app.connect("doctree-read", plain.captions)
    app.connect("config-inited", plain.unnumbered, priority=900)
    app.connect("doctree-read", keep_colours)
    app.connect("doctree-read", keep_tags)
    app.connect("doctree-read", link_lessons)
    app.connect("html-page-context", load_explorables)
    # Sentences do not end here, and what a dataclass holds are its fields.
    autosummary.WELL_KNOWN_ABBREVIATIONS += ("eq.", "Fig.", "Figs.")
    next(f for f in PyObject.doc_field_types if f.name == "variable").label = "Fields"
    app.connect("html-page-context", list_pages_quickly, priority=100)  # before the theme
    app.connect("html-page-context", describe)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    app.connect("autodoc-process-docstring", named_parameters, priority=900)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
