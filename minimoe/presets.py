"""Configurations by name, of presets.toml: our own sizes, and those of published models."""

from __future__ import annotations

import tomllib
from pathlib import Path

from minimoe.config import ModelConfig

_TABLE = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig.from_dict(values) for name, values in tomllib.loads(_TABLE).items()
}
