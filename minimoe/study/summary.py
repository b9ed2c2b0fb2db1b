"""What the report says about the study itself, and its numbers as plain JSON."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimoe import __version__
from minimoe.model import MixtralModel
from minimoe.study.measurements import ENCYCLOPAEDIA, QUESTIONS, Measurements
from minimoe.study.recordings import EQUAL_TOKENS, MORE_TOKENS
from minimoe.study.statistics import MIN_DOCUMENTS, document_labels
from minimoe.study.statistics.counts import By
from minimoe.study.trace import RoutingTrace
from minimoe.train.corpus import DOMAINS, Corpus
from minimoe.train.environment import processor_name


def absent(heldout: RoutingTrace, why_not: str) -> list[str]:
    """What the report lacks, one sentence each; `why_not` is the reason there are no real questions, or empty."""
    lines: list[str] = []
    if why_not:
        lines.append(f"The real MMLU questions are left out: {why_not}.")
    if QUESTIONS not in heldout.domains:
        lines.append("The generated questions are left out: the domain 'questions' was not read.")
    if ENCYCLOPAEDIA not in heldout.domains:
        lines.append("The topics are left out: the English encyclopaedia was not read.")
    return lines


def material(
    heldout: RoutingTrace, mmlu: RoutingTrace | None, by: By = "domain"
) -> list[tuple[str, str, int, int, str]]:
    """The text that was read: name, title, documents, tokens and a note, of each domain or topic."""
    rows: list[tuple[str, str, int, int, str]] = []
    for trace in (heldout, mmlu) if mmlu else (heldout,):
        names, label = document_labels(trace, by)
        held = np.bincount(label, minlength=len(names))
        tokens = np.bincount(label[trace.document], minlength=len(names))
        for name, documents, count in zip(names, held.tolist(), tokens, strict=True):
            title = DOMAINS[name].title if name in DOMAINS else name
            note = (
                ""
                if documents >= MIN_DOCUMENTS
                else f"fewer than {MIN_DOCUMENTS} documents: no intervals"
            )
            rows.append((name, title, documents, int(count), note))
    return rows


def checkpoint_name(checkpoint: str | Path) -> str:
    """The checkpoint's name without the folders above it."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else str(checkpoint)


def circumstances(
    checkpoint: str | Path,
    model: MixtralModel,
    identity: dict[str, str],
    corpus: Corpus,
    max_tokens: int | None,
    seed: int,
) -> list[tuple[str, str]]:
    """Of what, with what and on what the study was made, in the order in which it is shown."""
    limit = (
        str(max_tokens)
        if max_tokens
        else f"{EQUAL_TOKENS} ({', '.join(f'{k}: {v}' for k, v in MORE_TOKENS.items())})"
    )
    return [
        ("date", today()),
        ("checkpoint", checkpoint_name(checkpoint)),
        ("checkpoint_sha256", identity["checkpoint_sha256"]),
        ("data_sha256", identity["data_sha256"]),
        ("domains", ", ".join(corpus.domains)),
        ("tokens_a_domain", limit),
        ("seed", str(seed)),
        *surroundings(),
        ("configuration", json.dumps(model.config.to_dict())),
    ]


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def surroundings() -> list[tuple[str, str]]:
    """The machine and the libraries."""
    return [
        ("hardware", processor_name()),
        ("threads", str(torch.get_num_threads())),
        ("minimoe", __version__),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("python", platform.python_version()),
    ]


def trimmed(m: Measurements) -> dict[str, Any]:
    """All numbers except the thousands of single tokens, of which the means are kept."""
    values = m.to_dict()
    for layer in values["preferred"]:
        for key in [key for key, value in layer.items() if isinstance(value, list)]:
            layer[key] = len(layer[key]) if key == "token" else None
            if layer[key] is None:
                del layer[key]
    return values


def rounded(value: Any) -> Any:
    """Six significant digits; what JSON has no word for becomes null."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
