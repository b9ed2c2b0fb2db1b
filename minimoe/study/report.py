"""One study: record what a model does with text, measure it, judge it, and write the report.

The report is one HTML page that needs nothing else: images inside, style inside, no script.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

from minimoe import __version__
from minimoe.errors import ConfigError, MinimoeError, explained
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.study import claims as say
from minimoe.study import depth, domains, load, paths, vocabulary
from minimoe.study import measurements as ms
from minimoe.study import questions as qs
from minimoe.study.chance import GENERATED, MIN_DOCUMENTS, MMLU, STATISTICS, document_labels
from minimoe.study.claims import Finding, Part, told
from minimoe.study.counts import published
from minimoe.study.drawing import Figure, require_matplotlib
from minimoe.study.engines.replies import checks
from minimoe.study.engines.server import Server
from minimoe.study.models import FoundModel, Stages, find_minimoe, kind_of
from minimoe.study.record import record_documents, spans
from minimoe.study.trace import RoutingTrace
from minimoe.train.environment import provenance, today


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
    server: Server | None = None,
    recorded: Path | None = None,
    progress: bool = True,
) -> Path:
    """Record and study a model's routing on held-out text, or on questions alone; write the report into `out`.

    Args:
        model: a folder or 'mini'; with questions whatever `find_model` takes, with device, dtype and revision.
        questions: see `question_set`; None: held-out text, with the real questions of MMLU beside it, unless the model
            is of transformers or the hub and no `domains` are given: then 'mmlu'.
        domains: of held-out text: names from `DOMAINS`; default, the training mix.
        layers: of questions, see `layers_to_record`; held-out text is studied in all.
        max_tokens: of a domain or subject, one document at least. Default, EQUAL_TOKENS or more; all questions.
        batch_tokens: tokens a forward pass, padding included.
        chunk_tokens: what a crash costs at most.
        seed: of all draws, and of the untrained weights or routers beside the model.
        server: has the model, of which only configuration and tokenizer are read here.
        recorded: a folder that `minimoe record` wrote, in place of model and text.
        progress: print stages and a bar on standard error.

    Returns the path of report.html. What `out`/trace holds of the same model, text and options is not recorded again.
    Raises MinimoeError: an option that cannot work, a package that is missing, a model or text that cannot be had, a
    trace of other questions in `out`, too little memory; each in one line, the cheap ones before any work.
    """
    require_matplotlib()
    sizes = {"batch_tokens": batch_tokens, "chunk_tokens": chunk_tokens}
    for name, value in {"max_tokens": max_tokens, **sizes}.items():
        if value is not None and value < 1:
            raise MinimoeError(f"{name} is {value}, expected a positive number of tokens")
    stage, out = Stages(not progress), Path(out)
    if recorded is not None:
        writable(out)
        stage("reading the trace")
        found, read, trace = qs.reopened(recorded)
    else:
        # a name that leads nowhere is found before any text is
        theirs, of_text = kind_of(model) != "minimoe", questions is None
        if of_text and domains is None and theirs:
            questions = "mmlu"
        find: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision}
        if questions is None:
            asked_only = {"layers": layers, **find}
            for name in (n for n, value in asked_only.items() if value not in (None, "auto")):
                raise ConfigError(
                    f"--{name} belongs to the study of questions: give --questions too"
                )
        writable(out)
        if questions is None:
            stage("loading the model and the text")
            found = find_minimoe(model)
            read = qs.heldout_text(model, found, domains, max_tokens)
        else:
            stage("finding the questions and the model")
            find |= {"server": server, "seed": seed}
            found, read = qs.found_and_asked(model, questions, layers, max_tokens, **find)
            said = told(f"left_out.{'theirs' if of_text else 'asked'}")
            read = dataclasses.replace(read, left_out=[said, *read.left_out])
        trace = qs.recorded(found, read, out / "trace", stage, **sizes)
    options: dict[str, Any] = {
        "others": read.others,
        "title": read.title,
        "equal_tokens": qs.EQUAL_TOKENS if max_tokens is None else max_tokens,
        "num_layers": found.num_layers,
        "whole": read.layers == found.layers,
        "seed": seed,
        "tokenizer": found.tokenizer,
    }

    def nobodys() -> ms.Measurements | None:
        if trace.control is None and (server or recorded):
            return None
        asked = trace.control is not None
        model = trace.untrained() if asked else random_weights(found, read, seed)
        return ms.measure(model, judged=True, **options)[0]

    with ThreadPoolExecutor(1) as pool:  # statistics and figures leave all cores but one idle
        control = pool.submit(nobodys)
        m, missing = ms.measure(trace, say=lambda x: stage(f"measuring {x}"), **options)
        left_out = [*read.left_out, *missing, *checks(recorded or out / "trace")]
        stage("drawing")
        titles = {d.topic or "": spell(d.topic or "") for d in trace.documents} | {**read.titles}
        drawn = draw(m, found.tokenizer, titles)
        for name, figure in drawn.items():
            figure.save(out / f"{name}.png")
        stage("the end of the control: the same with untrained routers")
        untrained = control.result()
    kind = "" if untrained is None else "weights" if trace.control is None else "routers"
    made, others = findings(m, titles), None
    if untrained is None:
        learnt = [f.claim for f in made if say.claims()[f.claim].get("learnt")]
        left_out.append(told("uncontrolled.study", claims=learnt))
    else:
        others = findings(untrained, titles)
    made = say.beside(made, others, f"Random {kind}")
    itself = mixtral_itself(made, m)
    stage("writing")
    gpu = read.of_questions and device != "cpu" and torch.cuda.is_available()
    here = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "cpu"
    facts = {
        "date": today(),
        **read.facts,
        "device": here if server is None and recorded is None else "of the recording",
        "seed": str(seed),
        **surroundings(),
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
        "control": None if untrained is None else trimmed(untrained),
        "figures": {f.name: {"caption": f.caption, "alt": f.alt} for f in drawn.values()},
    }
    text = json.dumps(rounded(summary), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(out / "summary.json", text + "\n")
    words: Any = {"found": found, "read": read, "trace": trace, "layers": spans(read.layers)}
    words |= {"facts": facts, "left_out": left_out, "control": kind, "published": itself}
    words["corpus"] = material(trace, read.of_questions, titles)
    write_text(out / "report.html", page(made, drawn, **words))
    stage("done")
    return out / "report.html"


def random_weights(found: FoundModel, read: qs.Reading, seed: int) -> RoutingTrace:
    """What random weights of a minimoe model's configuration do with what is read."""
    model: Any = found.load()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = MixtralModel(model.config).eval()
    return record_documents(random, read.documents, read.tokens, end_of_text=found.begin)


def writable(out: Path) -> None:
    """Make the folder and try it, so that nobody waits minutes for an error."""
    fault = f"the output folder {out} cannot be written"
    with explained(MinimoeError, lambda e: f"{fault} ({e.strerror}); give another with --out"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        remove_leftovers(out, ".*.????????.tmp")


def material(trace: RoutingTrace, asked: bool, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The text that was read: title, documents, tokens and a note, of each domain, or subject of what was asked."""
    names, label = document_labels(trace, "topic" if asked else "domain")
    held = np.bincount(label, minlength=len(names)).tolist()
    tokens = np.bincount(label[trace.document], minlength=len(names)).tolist()
    rows: list[dict[str, Any]] = []
    for name, documents, count in zip(names, held, tokens, strict=True):
        few = f"fewer than {MIN_DOCUMENTS} documents: no intervals" * (documents < MIN_DOCUMENTS)
        row = {"title": titles.get(name, name), "documents": documents, "tokens": count}
        rows.append({**row, "note": few})
    return sorted(rows, key=lambda row: row["title"]) if asked else rows


def surroundings() -> dict[str, str]:
    """The machine and the libraries."""
    here = {k: str(v) for k, v in provenance(torch.device("cpu")).items() if k != "device"}
    return here | {"minimoe": __version__, "numpy": np.__version__}


def trimmed(m: ms.Measurements) -> dict[str, Any]:
    """All numbers except the thousands of single tokens, of which the means are kept."""
    values = m.to_dict()
    for layer in values["preferred"]:
        layer["tokens"] = len(layer.pop("token"))
        for key in ("occurrences", "expert", "share", "chance"):
            del layer[key]
    return values


def rounded(value: Any) -> Any:
    """Six significant digits; what JSON has no word for becomes null."""
    digits: Any = {"parse_float": lambda x: float(f"{float(x):.6g}")}
    return json.loads(json.dumps(value), parse_constant=lambda _: None, **digits)


# --- the page -------------------------------------------------------------------------------------


def page(made: Sequence[Finding], drawn: Mapping[str, Figure], **words: Any) -> str:
    """The whole document from templates/report.html; `words` is what else the template names.

    Figures come by name, and each is shown once, under the first finding that names it.
    """
    jinja2: Any = importlib.import_module("jinja2")
    Markup: Any = importlib.import_module("markupsafe").Markup
    shown: set[str] = set()

    def figure(name: str) -> Any:
        if name in shown:
            return Markup(f'<p class="soft">See the <a href="#{name}">figure above</a>.</p>')
        shown.add(name)
        return Markup(drawn[name].to_html())

    strict: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    strict |= {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("minimoe.study"), **strict)
    environment.filters["written"] = lambda text: Markup(written(text))
    words |= {"findings": made, "figures": drawn, "figure": figure, "shown": shown}
    text = environment.get_template("report.html").render(counted=say.counted(made), **words)
    return text.lstrip() + "\n"


def written(text: str) -> str:
    """Escaped; powers raised, arXiv numbers as links, no line break between a number and its unit."""
    text = re.sub(r"(\d)\^(\d+(?:\.\d+)?)", r"\1<sup>\2</sup>", html.escape(text))
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'
    return re.sub(r"arXiv:(\d{4}\.\d{5})", link, text).replace(" %", "\u00a0%")


def mixtral_itself(made: Sequence[Finding], m: ms.Measurements) -> dict[str, dict[str, Any]]:
    """What the published counts of Mixtral 8x7B tell of C12 and C13: in short, part by part, and their source.

    Its first, middle and last layer stand beside those of the model. No part of it has a verdict of its own: documents
    are not given, so there are no intervals.
    """
    table, last = published(), m.layers[-1]
    three = ms.three_layers(table.layers)
    own = dict(zip(m.layers, (*three[: len(m.layers) - 1], three[-1]), strict=True))

    def cell(f: Finding, part: Part) -> str:
        layer = next((x for x in m.layers if say.of_layers(x, m.num_layers) in part.what), last)
        kinds = {"packages": "", "fivefold": "five", "all ": "all", "": "moved"}
        kind = next(kinds[start] for start in kinds if part.what.startswith(start))
        if not kind:
            return "not read"
        by = table.domain_load(own[layer])
        widest, steepest = (max(by, key=lambda d: by[d][what]) for what in ("tv", "ratio"))
        fill: dict[str, Any] = {"wide": by[widest]["tv"], "steep": by[steepest]["ratio"]}
        fill |= {"widest": spell(widest), "steepest": spell(steepest), "labels": len(by)}
        fill |= {"pooled": table.load(own[layer]).value, "less": table.less_even(own[layer])}
        text = told(f"published.{'ratio' if f.claim == 'C12' else kind}", **fill)
        return told("published.cell", layer=own[layer], told=text)

    ratios = ", ".join(say.times(table.load(x).value) for x in own.values())
    fill = {"ratios": ratios, "less": table.less_even(own[last]), "labels": len(table.domains)}
    source = told("published.source", tokens=int(table.num_tokens.sum()), about=table.about)

    def itself(f: Finding) -> dict[str, Any]:
        cells = [cell(f, part) for part in f.parts]
        return {"short": told(f"published.{f.claim}", **fill), "cells": cells, "source": source}

    return {f.claim: itself(f) for f in made if f.claim in ("C12", "C13")}


def draw(m: ms.Measurements, tokenizer: Tokenizer, titles: dict[str, str]) -> dict[str, Figure]:
    """All figures by name; one whose material is missing is left out. `titles` spells out the names of domains."""
    of: Any = {"num_layers": m.num_layers}
    names = {GENERATED: "load-questions", MMLU: "load-mmlu"}
    said = {MMLU: "the real MMLU questions"}
    words: Any = {"titles": titles, **of}
    drawn = [
        load.draw_load(say.at_layers(m, k), text=said.get(k, k), name=names.get(k, "load"), **of)
        for k in m.load
    ]
    drawn.append(load.draw_load_by_depth(m.load))
    if m.topics:
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        chosen = ms.chosen_topics(sizes, ms.SUBJECTS if m.of_questions else ms.TOPICS)
        note = told(f"notes.{m.nouns[1]}")
        drawn.append(domains.draw_labels(m.topics, chosen, note=note, **words))
        drawn.append(domains.draw_skew(m.topics, **words))
    if m.subjects and all(s in m.subjects[-1].names for s in ms.SUBJECTS):
        last, note = m.subjects[-1:], told("notes.real")
        drawn.append(domains.draw_labels(last, ms.SUBJECTS, name="subjects", note=note, **words))
    if m.domains and len(m.domains[0].names) > 1:
        words["note"] = told("notes.packages")
        drawn.append(domains.draw_labels(m.domains[-1:], (), name="domains", **words))
        drawn.append(domains.draw_skew(m.domains, name="domain-skew", **words))
    decode = decoder(tokenizer)
    ranked = zip(m.frequent, m.characteristic, strict=True)
    drawn += [vocabulary.draw_ranked(often, apart, decode, **of) for often, apart in ranked]
    drawn += [vocabulary.draw_token(m.shares, t, m.apart, **of) for t in m.tokens]
    what = "subject" if m.of_questions else "domain"
    drawn.append(depth.draw_information(m.information, within=m.information_topics, what=what))
    drawn += [s.draw(m) for name, s in STATISTICS.items() if s.draw and m.own.get(name)]
    drawn += [paths.draw_paths(m.paths)] if m.paths else []
    return {figure.name: figure for figure in drawn}


def spell(subject: str) -> str:
    """'high_school_us_history' -> 'High school US history'."""
    text = " ".join("US" if word == "us" else word for word in subject.split("_"))
    return text[:1].upper() + text[1:]


def decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Token id -> its text; bytes that are no character by themselves as <E2>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # printable bytes stand for themselves, the others in order for the characters from 256 on
    byte = {c: ord(c) for c in alphabet if ord(c) < 256}
    byte |= zip(alphabet[len(byte) :], sorted({*range(256)}.difference(byte.values())), strict=True)

    def decode(token: int) -> str:
        piece = tokenizer.id_to_token(token) or ""
        if piece.startswith("▁"):  # a space, which SentencePiece's decoder drops at the start
            return piece.replace("▁", " ")
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):  # a single byte to SentencePiece
            return f"<{piece[3:5]}>"
        return "<" + "".join(f"{byte.get(c, ord(c) & 255):02X}" for c in piece) + ">"

    return decode


def findings(m: ms.Measurements, titles: Mapping[str, str]) -> list[Finding]:
    """C10 to C16 and others in order; `titles` spells out the names of domains."""
    made = (
        *(one.judge(m) for one in STATISTICS.values() if one.judge),
        paths.judge_paths(m),
        load.judge_material(m),
        load.judge_balance(m),
        domains.judge_subjects(m, titles),
        vocabulary.judge_frequent(m),
        load.judge_imbalance(m),
    )
    return sorted((f for f in made if f.parts), key=lambda f: f.claim)
