"""The families of models of Hugging Face transformers: those that are read and written, and those that are counted.

They stand in families.toml, because they are data: the names of fields on disk, what these mean, and what transformers
takes where config.json leaves one out. A family that is `like` another has its entries where it says nothing else.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers whose folders can be read and written."""

    architecture: str  #: the class that config.json names
    #: every field that is translated, with its value in transformers where config.json leaves it out
    defaults: Mapping[str, Any]
    #: what the family is without a field that says so
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    dense: bool = False  #: there are no experts in any layer; such a model can be upcycled
    num_experts: str = "num_experts"  #: the name that the family has for this field
    block: str = "mlp"  #: name of the sparse layer on disk
    #: names of gate, up and down on disk
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Counted:
    """One `model_type` that `minimoe.cost` counts and `MixtralModel` does not build."""

    #: fields, beside those that all have, without which nothing can be counted
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()  #: fields that may be left out, or be off
    #: what the family is without a field that says so, in the fields of `ModelConfig`
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    output_bias: bool = True  #: `attention_bias` is of the output projection too
    other: str | None = None  #: what `layer_types` may name beside full attention
    #: without `layer_types`, every how many layers is full attention: the field that says so, and its default
    every: tuple[str, int] | None = None
    #: name of the mixer of the layers without attention, in `minimoe.hf.counted`
    state: str | None = None
    tied: bool = False  #: the output projection is the embedding where config.json does not say


def _read(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of families.toml with what it takes over; 'none' stands for None, which TOML does not have."""
    own = dict(tables[name])
    base = _read(tables, own.pop("like")) if "like" in own else {}
    fields = base.get("defaults", {}) | own.pop("defaults", {})
    fields = {
        k: None if v == "none" else v for k, v in fields.items() if k not in own.get("without", ())
    }
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k != "without"}
    return base | own | ({"defaults": fields} if fields else {})


_TABLES = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))

FAMILIES = {
    name: Family(**_read(_TABLES["parts"] | _TABLES["built"], name)) for name in _TABLES["built"]
}

FIELDS: dict[str, Any] = _TABLES["fields"]  # by what they mean

COUNTED = {name: Counted(**_read(_TABLES["counted"], name)) for name in _TABLES["counted"]}
