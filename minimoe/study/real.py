"""The article's experiment on a model of one's own: questions by subject, recorded to disk, measured, one page.

run_real_study("mistralai/Mixtral-8x7B-v0.1", "study")    # study/report.html, PNGs, summary.json, trace/

What is recorded is kept as it goes (`stream`), so after an interruption the same call goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minimoe.errors import MinimoeError
from minimoe.io import write_text
from minimoe.study.loading import find_model, kind_of
from minimoe.study.question_measurements import measure_questions
from minimoe.study.question_recording import encoded, layers_to_record, record_questions
from minimoe.study.question_sets import question_set
from minimoe.study.report import writable
from minimoe.study.sources import spans
from minimoe.study.stages import Stages
from minimoe.study.summary import material, rounded, surroundings, today, trimmed

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
    from minimoe.study.drawing import draw, spell  # needs matplotlib: says so before the work
    from minimoe.study.findings import findings
    from minimoe.study.report_html import Page, page

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
            trained=None,
            control=None,
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
