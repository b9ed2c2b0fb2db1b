"""What the book makes of plain Markdown: citations of links, captions of paragraphs. And the list of references.

Notebooks and pages are written so that JupyterLab, GitHub and Colab show them as they are meant:

    [Fedus et al. (2022)](../book/references.md#fedus2022)         a citation in the sentence
    ([Fedus et al., 2022](../book/references.md#fedus2022); ...)   one in parentheses
    **Figure 03.2.** What is seen.                                 a cell of its own below the figure

python book/plain.py      write the list of references in book/references.md from book/references.bib
"""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from pybtex.database import parse_file
from pybtex.plugin import find_plugin
from pybtex.richtext import Text
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent
BIBLIOGRAPHY, REFERENCES = ROOT / "book/references.bib", ROOT / "book/references.md"

LIST = re.compile(r"<!-- references -->\n.*\n<!-- end of references -->", re.DOTALL)
TARGET = r"\((?:\.\./book/)?references\.md#(\w+)\)"
LINK = re.compile(rf"\[([^\]]+)\]{TARGET}")
TEXTUAL = re.compile(rf"\[[^\]]+\s\(\d{{4}}\)\]{TARGET}")
PARENTHETICAL = rf"\[[^\]]+,\s\d{{4}}\]{TARGET}"
GROUP = re.compile(rf"\({PARENTHETICAL}(?:;\s{PARENTHETICAL})*\)")
CAPTION = re.compile(r"Figure (\d\d)\.(\d+)\.$")


# --- citations ------------------------------------------------------------------------------------


def texts(entry: Any) -> tuple[str, str]:
    """How an entry is cited: 'Fedus et al. (2022)' and 'Fedus et al., 2022'."""
    last = [
        str(Text.from_latex(" ".join(p.prelast_names + p.last_names)))
        for p in entry.persons["author"]
    ]
    who = " and ".join(last) if len(last) < 3 else f"{last[0]} et al."
    return f"{who} ({entry.fields['year']})", f"{who}, {entry.fields['year']}"


def wrong_citations(text: str) -> list[str]:
    """Links to references whose text is not how the entry is cited, or that have no entry."""
    entries = parse_file(str(BIBLIOGRAPHY)).entries
    return [
        link[0]
        for link in LINK.finditer(text)
        if link[2] not in entries or " ".join(link[1].split()) not in texts(entries[link[2]])
    ]


def cited(text: str) -> str:
    """Markdown whose citations are MyST's roles, and whose list of references is Sphinx's own."""
    text = LIST.sub("```{bibliography}\n```", text)
    text = GROUP.sub(
        lambda group: "{cite:p}`" + ",".join(link[2] for link in LINK.finditer(group[0])) + "`",
        text,
    )
    return TEXTUAL.sub(r"{cite:t}`\1`", text)


def citations(app: Any, docname: str, source: list[str]) -> None:
    """Let a page, or the Markdown cells of a notebook, cite."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = cited(source[0])
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = cited("".join(cell["source"]))
    source[0] = json.dumps(notebook)


# --- captions -------------------------------------------------------------------------------------


def unnumbered(app: Any, config: Any) -> None:
    """A caption says its number; Jupyter Book's extension for LaTeX asks for another whatever _config.yml says."""
    config.numfig = False


def is_figure(node: nodes.Node) -> bool:
    """Whether a node is a picture: one that a cell has drawn, or one of the text by itself in its paragraph."""
    if isinstance(node, nodes.paragraph):
        return [type(child) for child in node.children] == [nodes.image]
    return (
        isinstance(node, nodes.container)
        and node.get("nb_element") == "mime_bundle"
        and next(node.findall(nodes.image), None) is not None
    )


def captions(app: Any, document: nodes.document) -> None:
    """Make a paragraph 'Figure 03.2. ...' the caption of the figure that stands above it, with an id.

    Raises:
        ExtensionError: what stands above it shows no figure.
    """
    for paragraph in list(document.findall(nodes.paragraph)):
        begins = next((child for child in paragraph.children if child.astext()), None)
        if not isinstance(begins, nodes.strong) or not (name := CAPTION.match(begins.astext())):
            continue
        parent, place = paragraph.parent, paragraph.parent.index(paragraph)
        above = parent.children[place - 1] if place else None
        drawn = list(above.findall(is_figure)) if above is not None else []
        if not drawn:
            raise ExtensionError(
                f"{document['source']}: '{begins.astext()}' is the caption of no figure; it has to stand "
                "directly below the cell that draws it, or below the picture"
            )
        parent.remove(paragraph)
        figure = nodes.figure(ids=[f"figure-{name[1]}-{name[2]}"])
        drawn[-1].parent.replace(drawn[-1], figure)
        figure += drawn[-1].children if isinstance(drawn[-1], nodes.paragraph) else drawn[-1]
        figure += nodes.caption("", "", *paragraph.children)


# --- the list of references -----------------------------------------------------------------------


def references() -> str:
    """Every entry of the bibliography as Markdown, each with the place that citations lead to."""
    style = find_plugin("pybtex.style.formatting", "plain")()
    markdown = find_plugin("pybtex.backends", "markdown")()
    return "\n".join(
        f'- <a id="{entry.key}"></a>'
        + re.sub(
            r"\\([.()-])", r"\1", " ".join(entry.text.render(markdown).split())
        )  # needs no escape
        for entry in style.format_bibliography(parse_file(str(BIBLIOGRAPHY)))
    )


def listed(page: str) -> str:
    """The page of references with its list as it has to be."""
    return LIST.sub(
        lambda _: f"<!-- references -->\n{references()}\n<!-- end of references -->", page
    )


if __name__ == "__main__":
    REFERENCES.write_text(listed(REFERENCES.read_text(encoding="utf-8")), encoding="utf-8")
