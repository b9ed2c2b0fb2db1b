"""The API reference: every name of a docstring has its own text, and the examples say what happens."""

import doctest
import importlib
import inspect
import tomllib
from dataclasses import dataclass
from typing import Any

import docutils.core
import pytest
import yaml
from docutils import nodes
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

from book import reference
from tests.test_book import ROOT

OBJECTS = reference.objects()
EXAMPLES = {n.rpartition(".")[2]: o for n, o in OBJECTS.items() if ">>> " in (o.__doc__ or "")}

CONFIG = yaml.safe_load((ROOT / "book/_config.yml").read_text())["sphinx"]["config"]
SETTINGS: Any = Config(**{k: v for k, v in CONFIG.items() if k.startswith("napoleon")})


def read(obj: Any) -> tuple[dict[str, str], list[str]]:
    """The names that the reference shows of an object with their texts, and what is wrong: as a build does."""
    text = reference.as_restructured(inspect.getdoc(obj) or "")
    what = "class" if inspect.isclass(obj) else "function"
    lines = str(GoogleDocstring(text, SETTINGS, what=what, obj=obj)).split("\n")
    wrong = reference.complete(obj, lines)
    shown = docutils.core.publish_doctree("\n".join(lines), settings_overrides={"report_level": 5})
    fields = {
        field[0].astext().partition(" ")[2]: field[1].astext()
        for field in shown.findall(nodes.field)
        if field[0].astext().startswith(("param ", "ivar "))
    }
    assert list(fields) == [name for name, _ in reference.entries(lines)]
    return fields, wrong + [
        f"'{name}' is shown without a text" for name in fields if not fields[name].strip()
    ]


def test_every_parameter_and_field_has_its_own_name_and_text() -> None:
    assert {name: wrong for name, obj in OBJECTS.items() if (wrong := read(obj)[1])} == {}


def test_the_fields_of_a_routing_stand_under_their_names() -> None:
    shown = read(OBJECTS["minimoe.routing.Routing"])[0]
    assert shown["expert"].startswith("[N] int64, its expert")
    assert shown["kept"].startswith("[N] bool, False where capacity dropped")
    assert list(shown) == [
        "token", "expert", "weight", "shape", "kept", "k", "valid", "sequence", "logits", "probs",
    ]  # fmt: skip


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
    wrong = read(Pair)[1]
    assert any(line.startswith(expected) for line in wrong), wrong


def test_a_name_that_means_the_same_everywhere_is_explained_once() -> None:
    shown, wrong = read(OBJECTS["minimoe.model.MixtralModel"])
    assert wrong == [] and shown["config"] == reference.shared("minimoe.model")["config"]
    for module, names in tables():
        assert importlib.import_module(module), module
        assert names == sorted(names), f"{module}: in alphabetical order"


def tables() -> list[tuple[str, list[str]]]:
    """The tables of book/parameters.toml: module, names."""

    def below(path: str, table: dict[str, Any]) -> list[tuple[str, list[str]]]:
        found = [(path, [k for k, v in table.items() if isinstance(v, str)])]
        for key, value in table.items():
            found += below(f"{path}.{key}", value) if isinstance(value, dict) else []
        return found

    return below("minimoe", tomllib.loads((ROOT / "book/parameters.toml").read_text())["minimoe"])


def test_the_ten_names_that_people_start_with_have_an_example() -> None:
    assert set(EXAMPLES) >= {
        "ModelConfig", "MixtralModel", "Routing", "TopKRouter", "Experts", "MoELayer", "loop",
        "switch_loss", "limit_capacity", "RoutingRecorder",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_happens(name: str) -> None:
    obj = EXAMPLES[name]
    found = doctest.DocTestFinder(recurse=False).find(
        obj, name, globs=dict(vars(importlib.import_module(obj.__module__)))
    )
    said: list[str] = []
    for example in found:
        doctest.DocTestRunner().run(example, out=said.append)
    assert found and said == []
