"""What the report says about the study itself, and its numbers as plain JSON."""

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
from minimoe.checkpoint import pretrained_path, read_config, weights_fingerprint
from minimoe.errors import CorpusError, MinimoeError, TraceError
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.study.chance import ENCYCLOPAEDIA, MIN_DOCUMENTS, QUESTIONS, By, document_labels
from minimoe.study.measurements import (
    Measurements,
    Progress,
    measure,
    measure_questions,
)
from minimoe.study.models import Stages, find_model, kind_of
from minimoe.study.questions import encoded, layers_to_record, question_set, record_questions
from minimoe.study.record import record_documents, record_split, spans
from minimoe.study.trace import RoutingTrace
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.text.domains import DOMAINS
from minimoe.text.questions import mmlu_dev_questions
from minimoe.text.tokenizer import begin_of_text_id, encode, load_tokenizer
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
        layer["tokens"] = len(layer["token"])
        for key in ("token", "occurrences", "expert", "share", "chance"):
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


EQUAL_TOKENS = 40_000

"""Held-out tokens a domain, for what is said about all text together."""

MORE_TOKENS = {ENCYCLOPAEDIA: 1_000_000, "drama": 100_000}

"""The encyclopaedia is read whole, for its topics need their documents; plays hold 'What' and 'Who'."""


def identity_of(path: Path, corpus: Corpus, max_tokens: int | None) -> dict[str, str]:
    """What a trace of the checkpoint in folder `path` is recognised by: its weights, its text and the options."""
    total = hashlib.sha256(weights_fingerprint(path).encode())
    for name in ("config.json", "tokenizer.json"):
        if (path / name).is_file():
            total.update(hashlib.sha256((path / name).read_bytes()).digest())
    return {
        "checkpoint_sha256": total.hexdigest(),
        "data_sha256": corpus.sha256,
        "options": json.dumps(_limits(corpus, max_tokens), sort_keys=True),
    }


def _limits(corpus: Corpus, max_tokens: int | None) -> dict[str, int]:
    """Held-out tokens to record of each domain."""
    return {name: max_tokens or MORE_TOKENS.get(name, EQUAL_TOKENS) for name in corpus.domains}


def recorded_heldout(
    model: MixtralModel,
    corpus: Corpus,
    path: Path,
    max_tokens: int | None,
    identity: dict[str, str],
    say: Progress,
    *,
    begin: int | None,
) -> RoutingTrace:
    """The trace of the held-out text: the one at `path` where it has this identity, else recorded and saved there.

    Args:
        max_tokens: held-out tokens a domain; None, EQUAL_TOKENS and more of some.
        identity: from `identity_of`; the weights, text and options that a stored trace must be of.
        say: told what is done.
        begin: what the model reads before a text (see `begin_of_text_id`).

    Raises:
        WriteError: `path` cannot be written.
    """
    if path.is_file():
        try:
            stored = RoutingTrace.load(path)
            if {key: stored.meta.get(key) for key in identity} == identity:
                say("the recorded choices are there already")
                return stored
        except TraceError:
            pass  # damaged or foreign: it is replaced below
    limits = _limits(corpus, max_tokens)
    say(f"recording held-out text of {len(limits)} domains")
    parts = [
        record_split(
            model,
            corpus.heldout,
            domains=[name],
            max_tokens=limit,
            end_of_text=begin,
            meta=identity,
        )
        for name, limit in limits.items()
        if corpus.heldout.domain_slice(name).stop > corpus.heldout.domain_slice(name).start
    ]
    trace = RoutingTrace.concat(parts)
    trace.save(path)
    return trace


def recorded_questions(
    model: MixtralModel, tokenizer: Tokenizer, begin: int | None
) -> tuple[RoutingTrace | None, str]:
    """The real questions, or None and the reason."""
    try:
        documents = mmlu_dev_questions()
    except CorpusError as error:
        return None, str(error)
    split = encode(tokenizer, documents)
    return record_split(model, split, end_of_text=begin), ""


def random_weights(
    model: MixtralModel, traces: Sequence[RoutingTrace | None], seed: int, begin: int | None
) -> list[RoutingTrace | None]:
    """What random weights of the model's configuration do with the documents of the traces."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = MixtralModel(model.config).eval()

    def again(trace: RoutingTrace) -> RoutingTrace:
        starts = np.searchsorted(trace.document, np.arange(1, len(trace.documents)))
        tokens = np.split(trace.token, starts)
        return record_documents(random, trace.documents, tokens, end_of_text=begin)

    return [None if trace is None else again(trace) for trace in traces]


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
    from minimoe.study.page import (
        Page,
        draw,  # needs matplotlib: says so before the work
        findings,
        page,
    )

    if max_tokens is not None and max_tokens < 1:
        raise MinimoeError(
            f"max_tokens is {max_tokens}, expected a positive number of tokens a domain"
        )
    stage = Stages(not progress)
    out = writable(Path(out))
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
    begin = begin_of_text_id(tokenizer, own=read_config(path)[1] is None)
    identity = identity_of(path, corpus, max_tokens)
    heldout = recorded_heldout(
        model, corpus, out / "trace.npz", max_tokens, identity, stage, begin=begin
    )
    stage("recording the real MMLU questions")
    mmlu, why_not = recorded_questions(model, tokenizer, begin)
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
    same, same_mmlu = random_weights(model, (heldout, mmlu), seed, begin)
    assert same is not None
    untrained = measure(same, same_mmlu, tokenizer, equal_tokens=equal, seed=seed)
    titles = {name: DOMAINS[name].title for name in heldout.domains if name in DOMAINS}
    made = findings(m, titles, untrained)

    stage("drawing")
    drawn = draw(m, tokenizer, titles)
    for name, figure in drawn.items():
        figure.save(out / f"{name}.png")
    stage("writing")
    left_out = [f"Left out: {name}: {reason}." for name, reason in corpus.skipped.items()]
    left_out += absent(heldout, why_not)
    facts = circumstances(checkpoint, model, identity, corpus, max_tokens, seed)
    summary = {
        "format": "minimoe-study",
        "version": 1,
        **dict(facts),
        "left_out": left_out,
        "findings": [{**dataclasses.asdict(f), "verdict": f.verdict} for f in made],
        "measurements": trimmed(m),
        "control": trimmed(untrained),
        "figures": {f.name: {"caption": f.caption, "alt": f.alt} for f in drawn.values()},
    }
    stage("")
    summary["seconds"] = stage.seconds
    write_text(
        out / "summary.json",
        json.dumps(rounded(summary), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    )
    config = model.config
    name = checkpoint_name(checkpoint)
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
            corpus=material(heldout, mmlu),
            left_out=left_out,
            facts=facts,
        )
    )
    report = out / "report.html"
    write_text(report, document)
    if progress:
        print(f"[{time.perf_counter() - stage.start:5.1f} s] done", file=sys.stderr, flush=True)
    return report


def writable(out: Path) -> Path:
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
    return out


UNCONTROLLED = (
    "There is no control with untrained weights: it would take a second model of this size. What a random router shows "
    "as well (preferred experts of tokens, hence of subjects with words of their own) is to be kept in mind; the study "
    "of minimoe's own model has the comparison."
)


def run_real_study(
    model: str | Path,
    out: str | Path,
    *,
    questions: str | Path = "mmlu",
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
    """Record and study a model's routing on questions; write the report into `out`.

    Args:
        model: a folder, 'mini', or an id of the Hugging Face hub (see `loading.find_model`); device, dtype and revision
            are passed on.
        questions: see `question_sets.question_set`.
        layers: numbers, counted from 1; 'all'; default, the first, the middle and the last with experts: of Mixtral's
            32 the article's 1, 16 and 32.
        max_tokens: tokens a subject; its first questions up to so many, one at least. Default, all.
        batch_tokens: tokens a forward pass, padding included.
        chunk_tokens: what a crash costs at most.
        progress: print stages and a bar on standard error.

    Returns:
        The path of report.html. `out`/trace holds what was recorded; one of the same model, questions and options is
        gone on with, and used as it is when complete.

    Raises:
        MinimoeError: an option that cannot work, a package that is missing, a model or questions that cannot be had,
            a trace of something else in `out`, too little memory; each in one line.
    """
    from minimoe.study.page import (  # needs matplotlib: says so before the work
        Page,
        draw,
        findings,
        page,
        spell,
    )

    for name, value in (
        ("max_tokens", max_tokens),
        ("batch_tokens", batch_tokens),
        ("chunk_tokens", chunk_tokens),
    ):
        if value is not None and value < 1:
            raise MinimoeError(f"{name} is {value}, expected a positive number of tokens")
    stage = Stages(not progress)
    kind_of(model)  # a name that leads nowhere is found before any question is fetched
    out = writable(Path(out))
    stage("finding the questions and the model")
    asked = question_set(questions, lambda line: print(line, file=sys.stderr))
    found = find_model(model, device=device, dtype=dtype, revision=revision)
    wanted = layers_to_record(found, layers)
    read = encoded(asked, found, max_tokens)
    identity: dict[str, Any] = {
        "model": found.name,
        **found.identity,
        "questions": asked.name,
        "questions_sha256": asked.sha256,
        "max_tokens": max_tokens,
        "layers": wanted,
        "begin": found.begin,
    }
    trace = record_questions(
        found,
        read,
        out / "trace",
        identity=identity,
        layers=wanted,
        batch_tokens=batch_tokens,
        chunk_tokens=chunk_tokens,
        stage=stage,
    )

    m, left_out = measure_questions(
        trace,
        found.tokenizer,
        title=asked.title,
        num_layers=found.num_layers,
        whole=wanted == found.layers,
        seed=seed,
        say=lambda what: stage(f"measuring {what}"),
    )
    if asked.note:
        left_out.insert(0, f"{asked.note}.")
    if read.empty:
        left_out.append(f"Left out: {read.empty} questions that hold no token.")
    made = findings(m, {subject: spell(subject) for subject in asked.subjects})
    stage("drawing")
    drawn = draw(m, found.tokenizer, {})
    for name, figure in drawn.items():
        figure.save(out / f"{name}.png")
    stage("writing")
    facts = [
        ("date", today()),
        *((key, json.dumps(v) if not isinstance(v, str) else v) for key, v in identity.items()),
        ("subjects", str(len(asked.subjects))),
        ("device", _device_name(device)),
        ("seed", str(seed)),
        *surroundings(),
        ("transformers", _version("transformers")),
    ]
    summary = {
        "format": "minimoe-study",
        "version": 1,
        **dict(facts),
        "left_out": left_out,
        "findings": [{**dataclasses.asdict(f), "verdict": f.verdict} for f in made],
        "measurements": trimmed(m),
        "control": None,
        "figures": {f.name: {"caption": f.caption, "alt": f.alt} for f in drawn.values()},
    }
    stage("")
    summary["seconds"] = stage.seconds
    text = json.dumps(rounded(summary), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(out / "summary.json", text + "\n")
    document = page(
        Page(
            title=f"What the experts of {found.name} do",
            summary=(
                f"{found.name}: {found.num_layers} layers, {len(found.layers)} of them with {found.num_experts} "
                f"experts, {trace.experts_per_token} for each token; {found.parameters:,} parameters. Layers "
                f"{spans(wanted)}, counted from 1, studied on {len(trace):,} tokens of {len(trace.documents):,} "
                f"questions, {facts[0][1]}."
            ),
            findings=made,
            figures=drawn,
            corpus=[
                (n, spell(n), g, t, note)
                for n, _, g, t, note in sorted(material(trace, None, "topic"))
            ],
            left_out=left_out,
            facts=facts,
            label="subject",
            read=(
                f"{asked.title[0].upper()}{asked.title[1:]}, each read by itself. {asked.form} Whether the model's "
                "training saw them is not known here."
            ),
            model=f"It studies Mixtral 8x7B; here its questions are put to {found.name}.",
            stored="the folder trace",
            uncontrolled=UNCONTROLLED,
        )
    )
    report = out / "report.html"
    write_text(report, document)
    if progress:
        print(f"[{time.perf_counter() - stage.start:5.1f} s] done", file=sys.stderr, flush=True)
    return report


def _device_name(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return "cpu"


def _version(package: str) -> str:
    library = sys.modules.get(package)
    return "not used" if library is None else str(library.__version__)
