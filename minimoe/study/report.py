"""One study: record what a model does with text, measure it, judge it, and write the report."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimoe import __version__
from minimoe.errors import MinimoeError
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.study import page
from minimoe.study.chance import MIN_DOCUMENTS, document_labels
from minimoe.study.drawing import require_matplotlib
from minimoe.study.measurements import Measurements, measure
from minimoe.study.models import FoundModel, Stages, find_minimoe, find_model, kind_of
from minimoe.study.questions import (
    EQUAL_TOKENS,
    Reading,
    asked_questions,
    heldout_text,
    layers_to_record,
    question_set,
    recorded,
)
from minimoe.study.record import record_documents, spans
from minimoe.study.trace import RoutingTrace
from minimoe.text.domains import DOMAINS
from minimoe.train.environment import processor_name


def run_study(
    model: str | Path,
    out: str | Path,
    *,
    questions: str | Path | None = None,
    domains: Sequence[str] | None = None,
    layers: Sequence[int] | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    chunk_tokens: int = 65_536,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Record and study a model's routing on held-out text, or on questions alone; write the report into `out`.

    Args:
        model: a folder or 'mini'; with questions whatever `find_model` takes, with device, dtype and revision.
        questions: see `question_set`; None: held-out text, with the real questions of MMLU beside it.
        domains: of held-out text: names from `DOMAINS`; default, the training mix.
        layers: of questions, see `layers_to_record`; held-out text is studied in all.
        max_tokens: of a domain or subject, one document at least. Default, EQUAL_TOKENS or more; all questions.
        batch_tokens: tokens a forward pass, padding included.
        chunk_tokens: what a crash costs at most.
        seed: of all draws, and of the untrained weights or routers beside the model.
        progress: print stages and a bar on standard error.

    Returns:
        The path of report.html. What `out`/trace holds of the same model, text and options is not recorded again.

    Raises:
        MinimoeError: an option that cannot work, a package that is missing, a model or text that cannot be had, a trace
            of other questions in `out`, too little memory; each in one line, the cheap ones before any work.
    """
    require_matplotlib()
    sizes = {"max_tokens": max_tokens, "batch_tokens": batch_tokens, "chunk_tokens": chunk_tokens}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise MinimoeError(f"{name} is {value}, expected a positive number of tokens")
    stage, out = Stages(not progress), Path(out)
    if questions is None:
        writable(out)
        stage("loading the model and the text")
        found = find_minimoe(model)
        read = heldout_text(model, found, domains, max_tokens)
    else:
        kind_of(model)  # a name that leads nowhere is found before any question is fetched
        writable(out)
        stage("finding the questions and the model")
        asked = question_set(questions)
        found = find_model(model, device=device, dtype=dtype, revision=revision)
        read = asked_questions(asked, found, layers_to_record(found, layers), max_tokens, seed)
    sizes = {"batch_tokens": batch_tokens, "chunk_tokens": chunk_tokens}
    trace = recorded(found, read, out / "trace", stage, **sizes)
    options: dict[str, Any] = {
        "others": read.others,
        "title": read.title,
        "equal_tokens": EQUAL_TOKENS if max_tokens is None else max_tokens,
        "num_layers": found.num_layers,
        "whole": read.layers == found.layers,
        "seed": seed,
    }
    tokenizer = found.tokenizer

    def nobodys() -> Measurements:
        model = trace.untrained() if read.of_questions else random_weights(found, trace, seed)
        return measure(model, tokenizer, judged=True, **options)[0]

    with ThreadPoolExecutor(1) as pool:  # statistics and figures leave all cores but one idle
        control = pool.submit(nobodys)
        m, missing = measure(trace, tokenizer, say=lambda x: stage(f"measuring {x}"), **options)
        left_out = [*read.left_out, *missing]
        stage("drawing")
        drawn = page.draw(m, tokenizer, dict(read.titles))
        for name, figure in drawn.items():
            figure.save(out / f"{name}.png")
        stage("the end of the control: the same with untrained routers")
        untrained = control.result()
    titles = read.titles or {d.topic or "": page.spell(d.topic or "") for d in trace.documents}
    made = page.findings(m, titles, untrained)
    itself = page.mixtral_itself(made, m)
    stage("writing")
    gpu = read.of_questions and device != "cpu" and torch.cuda.is_available()
    facts = {
        "date": today(),
        **read.facts,
        "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "cpu",
        "seed": str(seed),
        **dict(surroundings()),
        "transformers": getattr(sys.modules.get("transformers"), "__version__", "not used"),
    }
    summary = {
        "format": "minimoe-study",
        "version": 1,
        **facts,
        "left_out": left_out,
        "findings": [{**dataclasses.asdict(f), "verdict": f.verdict} for f in made],
        "mixtral_itself": itself,
        "measurements": trimmed(m),
        "control": trimmed(untrained),
        "figures": {f.name: {"caption": f.caption, "alt": f.alt} for f in drawn.values()},
    }
    text = json.dumps(rounded(summary), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(out / "summary.json", text + "\n")
    words = {"found": found, "read": read, "trace": trace, "layers": spans(read.layers)}
    words |= {"facts": facts, "corpus": material(trace, read), "left_out": left_out}
    write_text(out / "report.html", page.page(made, drawn, published=itself, **words))
    stage("done")
    return out / "report.html"


def random_weights(found: FoundModel, trace: RoutingTrace, seed: int) -> RoutingTrace:
    """What random weights of a minimoe model's configuration do with the documents of the trace."""
    model: Any = found.load()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = MixtralModel(model.config).eval()
    starts = np.searchsorted(trace.document, np.arange(1, len(trace.documents)))
    tokens = np.split(trace.token, starts)
    return record_documents(random, trace.documents, tokens, end_of_text=found.begin)


def writable(out: Path) -> None:
    """Make the folder and try it, so that nobody waits minutes for an error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        remove_leftovers(out, ".*.????????.tmp")
    except OSError as error:
        raise MinimoeError(
            f"the output folder {out} cannot be written ({error.strerror}); give another with --out"
        ) from error


def material(trace: RoutingTrace, read: Reading) -> list[dict[str, Any]]:
    """The text that was read: title, documents, tokens and a note, of each domain or subject."""
    names, label = document_labels(trace, "topic" if read.of_questions else "domain")
    held = np.bincount(label, minlength=len(names)).tolist()
    tokens = np.bincount(label[trace.document], minlength=len(names)).tolist()
    rows: list[dict[str, Any]] = []
    for name, documents, count in zip(names, held, tokens, strict=True):
        domain = DOMAINS[name].title if name in DOMAINS else name
        few = f"fewer than {MIN_DOCUMENTS} documents: no intervals" * (documents < MIN_DOCUMENTS)
        row = {"title": page.spell(name) if read.of_questions else domain}
        rows.append({**row, "documents": documents, "tokens": count, "note": few})
    return sorted(rows, key=lambda row: row["title"]) if read.of_questions else rows


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
        layer["tokens"] = len(layer["token"])
        for key in ("token", "occurrences", "expert", "share", "chance"):
            del layer[key]
    return values


def rounded(value: Any) -> Any:
    """Six significant digits; what JSON has no word for becomes null."""
    known: Any = {
        "parse_float": lambda x: float(f"{float(x):.6g}"),
        "parse_constant": lambda _: None,
    }
    return json.loads(json.dumps(value), **known)
