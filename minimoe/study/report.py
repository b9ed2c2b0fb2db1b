"""The routing study from end to end: record, measure, draw, judge, and write one page.

run_study("mini", "study")     # study/report.html, its PNGs, summary.json, trace.npz
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from minimoe import __version__
from minimoe.checkpoint import pretrained_path
from minimoe.errors import CorpusError, MinimoeError, TraceError
from minimoe.io import write_text
from minimoe.model import MixtralModel
from minimoe.study.measurements import (
    ENCYCLOPAEDIA,
    QUESTIONS,
    Headline,
    Measurements,
    first_tokens,
    headline,
    measure,
)
from minimoe.study.recorder import record_documents, record_split
from minimoe.study.statistics import MIN_DOCUMENTS
from minimoe.study.trace import RoutingTrace
from minimoe.train.corpus import (
    DOMAINS,
    Corpus,
    encode,
    end_of_text_id,
    load_corpus,
    load_tokenizer,
    mmlu_dev_questions,
)
from minimoe.train.loop import processor_name

EQUAL_TOKENS = 40_000
"""Held-out tokens a domain, for what is said about all text together."""
MORE_TOKENS = {ENCYCLOPAEDIA: 1_000_000, "drama": 100_000}
"""The encyclopaedia is read whole, for its topics need their documents; plays hold 'What' and 'Who'."""
CONTROL_TOKENS = 12_000
CONTROL_ENCYCLOPAEDIA = 60_000


class _Stages:
    """One line a stage on standard error, with the seconds since the start; remembers how long each took."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.start = self.last = time.perf_counter()
        self.name = ""
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + now - self.last, 1)
        self.name, self.last = name, now
        if name and not self.quiet:
            print(f"[{now - self.start:5.1f} s] {name}", file=sys.stderr, flush=True)


def run_study(
    checkpoint: str | Path,
    out: str | Path,
    *,
    domains: Sequence[str] | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Record and study a model's routing on held-out text and on questions; write the report into `out`.

    Args:
        checkpoint: 'mini' or a folder with weights, configuration and tokenizer.
        domains: names from `DOMAINS`; default, the training mix.
        max_tokens: held-out tokens a domain; default, EQUAL_TOKENS and more of some.
        progress: print the stages on standard error.

    Returns:
        The path of report.html. A trace.npz of the same weights, text and options in `out` is used again.

    Raises:
        MinimoeError: matplotlib is missing, or `out` cannot be written; both are found before any work is done.
        CheckpointError: no such checkpoint. CorpusError: unknown domain, or too little text.
    """
    from minimoe.study.drawing import draw  # needs matplotlib: says so before the work
    from minimoe.study.findings import findings
    from minimoe.study.report_html import Page, page

    if max_tokens is not None and max_tokens < 1:
        raise MinimoeError(
            f"max_tokens is {max_tokens}, expected a positive number of tokens a domain"
        )
    stage = _Stages(not progress)
    out = _writable(Path(out))
    path = pretrained_path(checkpoint)
    stage("loading the model and the text")
    model = MixtralModel.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    corpus = load_corpus(domains, tokenizer=tokenizer)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise TraceError(
            f"the tokenizer beside {checkpoint} has {tokenizer.get_vocab_size()} tokens, the model "
            f"{model.config.vocab_size}; give a folder where they belong together"
        )
    identity = {
        "checkpoint_sha256": _sha256(
            path / "model.safetensors", path / "config.json", path / "tokenizer.json"
        ),
        "data_sha256": corpus.sha256,
        "options": json.dumps({"domains": sorted(corpus.domains), "max_tokens": max_tokens}),
    }
    heldout = _recorded(model, corpus, out / "trace.npz", max_tokens, identity, stage)
    stage("recording the real MMLU questions")
    mmlu, why_not = _questions(model, tokenizer)
    equal = EQUAL_TOKENS if max_tokens is None else max_tokens
    m = measure(
        heldout,
        mmlu,
        tokenizer,
        equal_tokens=equal,
        seed=seed,
        say=lambda what: stage(f"measuring {what}"),
    )
    stage("control: the same with untrained weights")
    trained, control = _control(model, corpus, heldout, equal, seed)
    titles = {name: DOMAINS[name].title for name in heldout.domains if name in DOMAINS}
    made = findings(m, titles)

    stage("drawing")
    drawn = draw(m, tokenizer, titles)
    for name, figure in drawn.items():
        figure.save(out / f"{name}.png")
    stage("writing")
    left_out = [f"Left out: {name}: {reason}." for name, reason in corpus.skipped.items()]
    left_out += _absent(heldout, why_not)
    facts = _facts(checkpoint, model, identity, corpus, max_tokens, seed)
    summary = {
        "format": "minimoe-study",
        "version": 1,
        **dict(facts),
        "left_out": left_out,
        "findings": [{**dataclasses.asdict(f), "verdict": f.verdict} for f in made],
        "measurements": _trimmed(m),
        "control": {"trained": trained.to_dict(), "untrained": control.to_dict()},
        "figures": {f.name: {"caption": f.caption, "alt": f.alt} for f in drawn.values()},
    }
    stage("")
    summary["seconds"] = stage.seconds
    _write(
        out / "summary.json",
        json.dumps(_rounded(summary), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    )
    config = model.config
    name = _name(checkpoint)
    document = page(
        Page(
            title=f"What the experts of {name} do",
            summary=(
                f"{name}: {config.num_hidden_layers} layers with {config.num_experts} experts, "
                f"{config.num_experts_per_tok} "
                f"for each token; {model.num_parameters():,} parameters. Studied on {len(heldout):,} tokens of "
                f"{len(heldout.documents):,} held-out documents, {facts[0][1]}."
            ),
            findings=made,
            figures=drawn,
            corpus=_material(heldout, mmlu),
            left_out=left_out,
            trained=trained,
            control=control,
            facts=facts,
        )
    )
    report = out / "report.html"
    _write(report, document)
    if progress:
        print(f"[{time.perf_counter() - stage.start:5.1f} s] done", file=sys.stderr, flush=True)
    return report


def _writable(out: Path) -> Path:
    """Make the folder and try it, so that nobody waits minutes for an error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise MinimoeError(
            f"the output folder {out} cannot be written ({error.strerror}); give another with --out"
        ) from error
    return out


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise MinimoeError(
            f"{path} could not be written ({error.strerror}); what was there is unchanged"
        ) from error


def _sha256(*paths: Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


def _recorded(
    model: MixtralModel,
    corpus: Corpus,
    path: Path,
    max_tokens: int | None,
    identity: dict[str, str],
    stage: _Stages,
) -> RoutingTrace:
    if path.is_file():
        try:
            stored = RoutingTrace.load(path)
            if {key: stored.meta.get(key) for key in identity} == identity:
                stage("the recorded choices are there already")
                return stored
        except TraceError:
            pass  # damaged or foreign: it is replaced below
    limits = {name: max_tokens or MORE_TOKENS.get(name, EQUAL_TOKENS) for name in corpus.domains}
    stage(f"recording held-out text of {len(limits)} domains")
    end = end_of_text_id(corpus.tokenizer)
    parts = [
        record_split(
            model, corpus.heldout, domains=[name], max_tokens=limit, end_of_text=end, meta=identity
        )
        for name, limit in limits.items()
        if corpus.heldout.domain_slice(name).stop > corpus.heldout.domain_slice(name).start
    ]
    trace = RoutingTrace.concat(parts)
    try:
        trace.save(path)
    except OSError as error:
        raise MinimoeError(
            f"{path} could not be written ({error.strerror}); what was there is unchanged"
        ) from error
    return trace


def _questions(model: MixtralModel, tokenizer: Tokenizer) -> tuple[RoutingTrace | None, str]:
    """The real questions, or None and the reason."""
    try:
        documents = mmlu_dev_questions()
    except CorpusError as error:
        return None, str(error)
    split = encode(tokenizer, documents)
    return record_split(model, split, end_of_text=end_of_text_id(tokenizer)), ""


def _control(
    model: MixtralModel, corpus: Corpus, heldout: RoutingTrace, equal: int, seed: int
) -> tuple[Headline, Headline]:
    """The headline statistics of the model and of random weights of its configuration, on the same documents."""
    names = [d for d in heldout.domains if d != QUESTIONS]
    limits = {
        d: min(equal, CONTROL_ENCYCLOPAEDIA if d == ENCYCLOPAEDIA else CONTROL_TOKENS)
        for d in names
    }
    same = RoutingTrace.concat(
        [first_tokens(heldout.select(domains=[d]), limits[d]) for d in names]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = MixtralModel(model.config).eval()
    starts = np.searchsorted(same.document, np.arange(1, len(same.documents)))
    end = end_of_text_id(corpus.tokenizer)
    untrained = record_documents(
        random, same.documents, np.split(same.token, starts), end_of_text=end
    )
    least = min(limits.values())
    return headline(same, equal_tokens=least, seed=seed), headline(
        untrained, equal_tokens=least, seed=seed
    )


def _absent(heldout: RoutingTrace, why_not: str) -> list[str]:
    lines: list[str] = []
    if why_not:
        lines.append(f"The real MMLU questions are left out: {why_not}.")
    if QUESTIONS not in heldout.domains:
        lines.append("The generated questions are left out: the domain 'questions' was not read.")
    if ENCYCLOPAEDIA not in heldout.domains:
        lines.append("The topics are left out: the English encyclopaedia was not read.")
    return lines


def _material(
    heldout: RoutingTrace, mmlu: RoutingTrace | None
) -> list[tuple[str, str, int, int, str]]:
    rows: list[tuple[str, str, int, int, str]] = []
    for trace in (heldout, mmlu) if mmlu else (heldout,):
        tokens = np.bincount(trace.domain, minlength=len(trace.domains))
        for name, count in zip(trace.domains, tokens, strict=True):
            documents = sum(d.domain == name for d in trace.documents)
            title = DOMAINS[name].title if name in DOMAINS else name
            note = (
                ""
                if documents >= MIN_DOCUMENTS
                else f"fewer than {MIN_DOCUMENTS} documents: no intervals"
            )
            rows.append((name, title, documents, int(count), note))
    return rows


def _name(checkpoint: str | Path) -> str:
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else str(checkpoint)


def _facts(
    checkpoint: str | Path,
    model: MixtralModel,
    identity: dict[str, str],
    corpus: Corpus,
    max_tokens: int | None,
    seed: int,
) -> list[tuple[str, str]]:
    limit = (
        str(max_tokens)
        if max_tokens
        else f"{EQUAL_TOKENS} ({', '.join(f'{k}: {v}' for k, v in MORE_TOKENS.items())})"
    )
    return [
        ("date", datetime.now(UTC).strftime("%Y-%m-%d")),
        ("checkpoint", _name(checkpoint)),
        ("checkpoint_sha256", identity["checkpoint_sha256"]),
        ("data_sha256", identity["data_sha256"]),
        ("domains", ", ".join(corpus.domains)),
        ("tokens_a_domain", limit),
        ("seed", str(seed)),
        ("hardware", processor_name()),
        ("threads", str(torch.get_num_threads())),
        ("minimoe", __version__),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("python", platform.python_version()),
        ("configuration", json.dumps(model.config.to_dict())),
    ]


def _trimmed(m: Measurements) -> dict[str, Any]:
    """All numbers except the thousands of single tokens, of which the means are kept."""
    values = m.to_dict()
    for layer in values["preferred"]:
        for key in [key for key, value in layer.items() if isinstance(value, list)]:
            layer[key] = len(layer[key]) if key == "token" else None
            if layer[key] is None:
                del layer[key]
    return values


def _rounded(value: Any) -> Any:
    """Six significant digits; what JSON has no word for becomes null."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
