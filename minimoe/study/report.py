"""The routing study from end to end: record, measure, draw, judge, and write one page.

run_study("mini", "study")     # study/report.html, its PNGs, summary.json, trace.npz
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from minimoe.checkpoint import pretrained_path, read_family
from minimoe.errors import MinimoeError, TraceError
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.study.measurements import measure
from minimoe.study.recordings import (
    EQUAL_TOKENS,
    control,
    identity_of,
    recorded_heldout,
    recorded_questions,
)
from minimoe.study.stages import Stages
from minimoe.study.summary import (
    absent,
    checkpoint_name,
    circumstances,
    material,
    rounded,
    trimmed,
)
from minimoe.train.corpus import DOMAINS, begin_of_text_id, load_corpus, load_tokenizer


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
    begin = begin_of_text_id(tokenizer, own=read_family(path) is None)
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
    trained, untrained = control(model, heldout, equal, seed, begin)
    titles = {name: DOMAINS[name].title for name in heldout.domains if name in DOMAINS}
    made = findings(m, titles)

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
        "control": {"trained": trained.to_dict(), "untrained": untrained.to_dict()},
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
            trained=trained,
            control=untrained,
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
