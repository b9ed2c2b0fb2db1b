"""The API reference: a name and a text for each parameter and field, and a table of each module's objects.

Docstrings are plain text with sections ('Args:', 'Attributes:', 'Raises:') of entries 'name: text', which napoleon
turns into field lists. `complete` reads those lists. It adds the names that mean the same everywhere, from
book/parameters.toml, and `faults` says what is still wrong; the build warns of each, and a warning is an error there.
A field may have its text beside it in the code instead (`#: text`), where autodoc finds it.
"""

import dataclasses
import functools
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parent.parent
FIELD = re.compile(r":(param|ivar) ([^:]*): *(.*)")


@functools.cache
def beside(module: str) -> frozenset[tuple[str, str]]:
    """Class and name of each field of a module that has its text beside it."""
    return frozenset(ModuleAnalyzer.for_module(module).find_attr_docs())


@functools.cache
def shared(module: str) -> dict[str, str]:
    """The names that mean the same everywhere in a module, with their texts."""
    tables: Any = tomllib.loads((ROOT / "book" / "parameters.toml").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for part in module.split("."):
        tables = tables.get(part)
        if not isinstance(tables, dict):
            break
        for like in tables.get("like", []):
            found |= shared(like)
        found |= {name: text for name, text in tables.items() if isinstance(text, str)}
    return found


def modules(package: str) -> list[str]:
    """The modules of a package, itself first; a module alone is itself, and so is minimoe, whose rooms have pages."""
    folder = ROOT / package.replace(".", "/")
    if package == "minimoe" or not (folder / "__init__.py").exists():
        return [package]
    found: list[str] = []
    for path in sorted(folder.glob("**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts[-1] != "__main__":
            found.append(".".join(parts))
    return sorted(found)


def members(module: str) -> dict[str, Any]:
    """The documented classes and functions that a module defines, in its own order: what automodule shows."""
    return {
        name: obj
        for name, obj in vars(importlib.import_module(module)).items()
        if not name.startswith("_")
        and (inspect.isclass(obj) or inspect.isroutine(obj))
        and getattr(obj, "__module__", "") == module
        and obj.__doc__
    }


@functools.cache
def exported() -> frozenset[int]:
    """The ids of the objects in the `__all__` of any module, and of their public methods."""
    found: set[int] = set()
    for path in (ROOT / "minimoe").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"^__all__ =", text, re.M):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        for obj in (getattr(module, n) for n in module.__all__):
            found.add(id(obj))
            if inspect.isclass(obj):
                found |= {id(m) for n, m in vars(obj).items() if not n.startswith("_")}
    return frozenset(found)


def escaped(line: str) -> str:
    """A line of plain text with `code` in backquotes, as reStructuredText."""
    # 'E.' at the beginning of a text is no item E of a list.
    line = re.sub(r"(^\s*|: )(\w+)([.)])(?=\s|$)", r"\1\2\\\3", line)
    parts = re.split(r"(`+[^`]+`+)", line)
    return "".join(
        f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"([*|]|\\(?![.)])|_(?!\w))", r"\\\1", part)
        for part in parts
    )  # fmt: skip


def as_restructured(text: str) -> str:
    """A docstring, which is plain text, as reStructuredText; the sections (Args: ...) are for napoleon.

    A paragraph before them that is indented, or begins with a decorator, is code or a table and stays as it is, and so
    is an example (>>>).
    """
    paragraphs: list[str] = []
    in_sections = False
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        in_sections = in_sections or bool(re.match(r"\w+:\n", paragraph))
        if ">>> " in paragraph:
            paragraphs.append(paragraph)
        elif not in_sections and re.match(r" {4}|@", paragraph):
            indented = (
                paragraph
                if paragraph.startswith(" ")
                else re.sub("^", "    ", paragraph, flags=re.M)
            )
            paragraphs.append(f"::\n\n{indented}")
        else:
            paragraphs.append("\n".join(escaped(line) for line in paragraph.split("\n")))
    return "\n\n".join(paragraphs) + "\n"  # fmt: skip


def parameters(obj: Any) -> list[str]:
    """The names that an object takes: of a function its parameters, of a class those of making it, and its fields."""
    try:
        taken = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):
        return []
    names = [p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(obj, type) and dataclasses.is_dataclass(obj):
        names += [f.name for f in dataclasses.fields(obj) if f.name not in names]
        bases: list[Any] = [b for b in obj.__mro__[1:] if dataclasses.is_dataclass(b)]
        theirs = {f.name for b in bases for f in dataclasses.fields(b)}
        names = [
            n for n in names if n not in theirs
        ]  # they stand with the class that they are inherited from
    return [n for n in names if n not in ("self", "cls") and not n.startswith("_")]


def has(obj: Any, name: str) -> bool:
    """Whether an object knows a name: as a parameter, a field, or an attribute that its class sets."""
    if name in [*inspect.signature(obj).parameters, *parameters(obj)]:
        return True
    if not inspect.isclass(obj):
        return False
    known = {
        n for c in inspect.getmro(obj) for n in (*vars(c), *vars(c).get("__annotations__", {}))
    }
    return name in known or f"self.{name}" in inspect.getsource(obj)


def entries(lines: list[str]) -> list[tuple[str, str]]:
    """The names of a docstring's field lists, as napoleon leaves them, with their texts."""
    found: list[tuple[str, str]] = []
    for line in lines:
        if field := FIELD.match(line):
            found.append((field[2].replace("\\", ""), field[3].strip()))
        elif found and line.startswith(" "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}".strip())
    return found


def complete(obj: Any, lines: list[str]) -> list[str]:
    """Add the names that mean the same everywhere in their module; returns what is wrong then, one line each.

    A docstring that explains one name explains all. One that explains none is let through, because its sentences and
    the signature say enough of a small function; unless the object is exported: then they name what it takes.
    """
    found, said = entries(lines), "\n".join(lines)
    wrong = list(faults(obj, found))
    if not found and id(obj) not in exported():
        return wrong
    known, there = shared(obj.__module__), {name.lstrip("*") for name, _ in found}
    there |= {name for owner, name in beside(obj.__module__) if owner == obj.__name__}
    missing = [
        name
        for name in parameters(obj)
        if name not in there and (found or not re.search(rf"\b{name}\b", said))
    ]
    kind = "ivar" if any(line.startswith(":ivar") for line in lines) else "param"
    added = [f":{kind} {name}: {escaped(known[name])}" for name in missing if name in known]
    # With the others; else before what is raised and returned, set off from the text above it.
    starts = [i for i, line in enumerate(lines) if FIELD.match(line)]
    if starts:
        at = starts[-1] + 1
        while at < len(lines) and lines[at].startswith(" "):
            at += 1
    else:
        at = next(
            (i for i, line in enumerate(lines) if re.match(r":(raises|returns)", line)), len(lines)
        )
    lines[at:at] = added if found else ["", *added]
    return [*wrong, *(f"'{name}' has no text" for name in missing if name not in known)]


def faults(obj: Any, found: list[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with the entries of a docstring: no name, no text, or another's."""
    names = parameters(obj)
    texts = [text for _, text in found]
    for name, text in found:
        others = re.findall(r"[.;,] (?:`*\w+`*, )*`*(\w+)`*: ", text)
        if not name.lstrip("*").isidentifier():
            yield f"'{name}' is no name; write 'name: [shape] text', one name an entry"
        elif not has(obj, name.lstrip("*")):
            yield f"'{name}' is described, but is no parameter or field"
        elif not text:
            yield f"'{name}' has no text"
        elif texts.count(text) > 1:
            yield f"'{name}' shares its text with another name"
        elif other := next((n for n in others if n in names), None):
            yield f"the text of '{name}' describes '{other}', which needs an entry of its own"


def objects() -> dict[str, Any]:
    """Every class, function and public method that the reference shows, by its name in full."""
    found: dict[str, Any] = {}
    rooms = [p.parent for p in sorted((ROOT / "minimoe").glob("*/__init__.py"))]
    alone = [p.with_suffix("") for p in sorted((ROOT / "minimoe").glob("[!_]*.py"))]
    for module in [m for p in [*rooms, *alone] for m in modules(f"minimoe.{p.name}")]:
        for name, obj in members(module).items():
            found[f"{module}.{name}"] = obj
            for key, value in vars(obj).items() if inspect.isclass(obj) else ():
                method = getattr(value, "__func__", value)
                if not key.startswith("_") and inspect.isfunction(method) and method.__doc__:
                    found[f"{module}.{name}.{key}"] = method
    return found


def table(names: list[str], indent: str = "") -> list[str]:
    """A table of objects with their first sentences, each a link."""
    return [
        f"{indent}{line}"
        for line in (".. autosummary::", "   :nosignatures:", "", *(f"   {n}" for n in names))
    ]


def with_examples() -> str:
    """A table of the objects whose docstrings have an example: those that people start with."""
    names = [f"~{name}" for name, obj in objects().items() if ">>> " in (obj.__doc__ or "")]
    return "\n".join(["```{eval-rst}", *table(names), "```"])


def page(*packages: str) -> str:
    """Every module of the packages as Sphinx reads it from the code: docstring, table of its objects, and these."""
    lines: list[str] = []
    for module in [m for package in packages for m in modules(package)]:
        lines += [f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", "   :members:"]
        lines += ["   :member-order: bysource", "   :ignore-module-all:", ""]
        if names := members(module):
            lines += table(list(names), indent="   ")
        lines += ["```", ""]
    return "\n".join(lines)
