"""The report as one HTML page that needs nothing else: images inside, style inside, no script."""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from minimoe.study.chance import GENERATED, MMLU, TEXT
from minimoe.study.claims import Finding, Part, beside, counted, of_layers, percent, times
from minimoe.study.counts import published
from minimoe.study.depth import draw_information
from minimoe.study.domains import draw_labels, draw_skew, judge_subjects
from minimoe.study.drawing import Figure
from minimoe.study.load import (
    draw_load,
    draw_load_by_depth,
    judge_balance,
    judge_imbalance,
    judge_material,
)
from minimoe.study.measurements import SUBJECTS, TOPICS, Measurements, chosen_topics, three_layers
from minimoe.study.paths import draw_coactivation, draw_paths, draw_repeats, judge_paths
from minimoe.study.vocabulary import draw_ranked, draw_token, judge_frequent, judge_preferred

CONTROLLED = (
    "random weights",
    "Beside each number stands what the same rule gives for random weights of the same configuration on the same text. "
    "Whatever they show as well is no sign of learning: a random router sends equal vectors to equal experts, so it "
    "has preferred experts for tokens, hence for domains that use other tokens, and repeats paths. A claim about what "
    "training made agrees only where its effect is clearly larger.",
)

RANDOM_ROWS = (
    "random routers",
    "Beside each number stands what the same rule gives for routers that nobody trained: their rows point in random "
    "directions, each as long as the row that it replaces, and they read the same hidden states as the model's own. "
    "Whatever they show as well is no sign of a router's learning; what the states themselves have learnt they share. "
    "A claim about what training made agrees only where its effect is clearly larger.",
)


def page(
    made: Sequence[Finding], drawn: Mapping[str, Figure], pngs: Mapping[str, bytes], **words: Any
) -> str:
    """The whole document from templates/report.html.

    Args:
        drawn: figures by name; each is shown once, under the first finding that names it.
        pngs: the same figures as they were rendered.
        words: what else the template names.
    """
    jinja2: Any = importlib.import_module("jinja2")
    Markup: Any = importlib.import_module("markupsafe").Markup
    shown: set[str] = set()

    def figure(name: str) -> Any:
        if name in shown:
            return Markup(f'<p class="soft">See the <a href="#{name}">figure above</a>.</p>')
        shown.add(name)
        return Markup(drawn[name].to_html(png=pngs[name]))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minimoe.study"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["written"] = lambda text: Markup(written(text))
    text = environment.get_template("report.html").render(
        findings=made, figures=drawn, figure=figure, shown=shown, counted=counted(made), **words
    )
    return text.lstrip() + "\n"


def written(text: str) -> str:
    """Escaped; powers raised, arXiv numbers as links, no line break between a number and its unit."""
    text = re.sub(r"(\d)\^(\d+(?:\.\d+)?)", r"\1<sup>\2</sup>", html.escape(text))
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'
    return re.sub(r"arXiv:(\d{4}\.\d{5})", link, text).replace(" %", "\u00a0%")


def mixtral_itself(made: Sequence[Finding], m: Measurements) -> dict[str, dict[str, Any]]:
    """What the published counts of Mixtral 8x7B tell of C12 and C13: in short, part by part, and their source.

    Its first, middle and last layer stand beside those of the model. No part of it has a verdict of its own: documents
    are not given, so there are no intervals.
    """
    table = published()
    places = {1: (2,), 2: (0, 2), 3: (0, 1, 2)}[len(m.layers)]
    own = {x: three_layers(table.layers)[i] for x, i in zip(m.layers, places, strict=True)}
    labels = len(table.domains)

    def cell(f: Finding, part: Part) -> str:
        layer = next((x for x in m.layers if of_layers(x, m.num_layers) in part.what), m.layers[-1])
        theirs = own[layer]
        where, by = f"layer {theirs}: ", table.domain_load(theirs)
        widest = max(by, key=lambda d: by[d]["tv"])
        steepest = max(by, key=lambda d: by[d]["ratio"])
        pooled = times(table.load(theirs).value)
        if f.claim == "C12":
            told = f"max/min {pooled}"
        elif part.what.startswith("fivefold"):
            told = f"largest max/min {times(by[steepest]['ratio'])} ({spell(steepest)})"
        elif part.what.startswith("all "):
            told = f"max/min of all {pooled}; {table.less_even(theirs)} of {labels} subjects are less even"
        elif "packages" in part.what:
            return "not read"
        else:
            told = f"most moved: {spell(widest)}, {percent(by[widest]['tv'])} of the assignments"
        return f"{where}{told}. Interval and verdict cannot be told"

    ratios = [table.load(x).value for x in own.values()]
    last = own[m.layers[-1]]
    short = {
        "C12": f"max/min {', '.join(map(times, ratios))}",
        "C13": f"{table.less_even(last)} of {labels} subjects less even than all together",
    }
    a = table.about
    source = (
        f"computed here from published counts, {int(table.num_tokens.sum()):,} tokens of {a['text']} ({a['source']}, "
        f"commit {a['commit'][:8]}, {a['licence']}). The documents are not given, so no interval can be."
    )
    return {
        f.claim: {"short": short[f.claim], "cells": [cell(f, p) for p in f.parts], "source": source}
        for f in made
        if f.claim in short
    }


CONFOUNDED = (
    "Packages differ in format, language and source as well as in subject: these are confounded."
)


def draw(m: Measurements, tokenizer: Tokenizer, titles: dict[str, str]) -> dict[str, Figure]:
    """All figures by name; one whose material is missing is left out. `titles` spells out the names of domains."""
    n = m.num_layers
    names = {
        TEXT: ("load", TEXT),
        GENERATED: ("load-questions", GENERATED),
        MMLU: ("load-mmlu", "the real MMLU questions"),
    }
    drawn: list[Figure] = []
    for kind, loads in m.load.items():
        name, text = names.get(kind, ("load", kind))
        shown = [x for x in loads if x.layer in m.layers]
        drawn.append(draw_load(shown, num_layers=n, text=text, name=name))
    drawn.append(draw_load_by_depth(m.load))
    if m.topics:
        note = "Counterpart of the article's Figs. 4 to 6."
        if not m.of_questions:
            note = f"Articles of one encyclopaedia, so of one format, language and source. {note}"
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        chosen = chosen_topics(sizes, wanted=SUBJECTS if m.of_questions else TOPICS)
        spelt = {s: spell(s) for s in sizes} if m.of_questions else None
        drawn.append(draw_labels(m.topics, chosen, titles=spelt, num_layers=n, note=note))
        drawn.append(draw_skew(m.topics, titles=spelt, num_layers=n))
    if m.domains and len(m.domains[0].names) > 1:
        words: dict[str, Any] = {"titles": titles, "num_layers": n, "note": CONFOUNDED}
        drawn.append(draw_labels(m.domains[-1:], name="domains", **words))
        drawn.append(draw_skew(m.domains, name="domain-skew", **words))
    if m.subjects and all(s in m.subjects[-1].names for s in SUBJECTS):
        title = {s: spell(s) for s in SUBJECTS}
        note = "The subjects of the article's Figs. 4 to 6, in the few real questions at hand."
        words = {"titles": title, "num_layers": n, "note": note}
        drawn.append(draw_labels(m.subjects[-1:], SUBJECTS, name="subjects", **words))
    decode = decoder(tokenizer)
    for frequent, characteristic in zip(m.frequent, m.characteristic, strict=True):
        name = f"tokens-{frequent.layer}"
        drawn.append(draw_ranked(frequent, characteristic, decode, num_layers=n, name=name))
    for token in m.tokens:
        apart = (
            m.apart
            if m.apart and token.apart_token in m.apart[0].token[m.apart[0].occurrences > 0]
            else None
        )
        drawn.append(
            draw_token(
                m.shares,
                token.token,
                token.text,
                apart=apart,
                apart_token=token.apart_token,
                apart_text=f"{token.apart_text} in the generated questions",
                num_layers=n,
                name=token.name,
            )
        )
    what = "subject" if m.of_questions else "domain"
    drawn.append(draw_information(m.information, within=m.information_topics or None, what=what))
    if m.repeats:
        drawn.append(draw_repeats(m.repeats))
    if m.coactivation:
        drawn.append(draw_coactivation(m.coactivation, num_layers=n))
    if m.paths:
        drawn.append(draw_paths(m.paths))
    return {figure.name: figure for figure in drawn}


def spell(subject: str) -> str:
    """'high_school_us_history' -> 'High school US history'."""
    text = " ".join("US" if word == "us" else word for word in subject.split("_"))
    return text[:1].upper() + text[1:]


def decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Token id -> its text; bytes that are no character by themselves as <E2>."""

    def decode(token: int) -> str:
        piece = tokenizer.id_to_token(token) or ""
        if piece.startswith(
            "▁"
        ):  # a space to SentencePiece, whose decoder drops it at the start of a text
            return piece.replace("▁", " ")
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):  # a single byte to SentencePiece
            return f"<{piece[3:5]}>"
        return "<" + "".join(f"{_byte(c):02X}" for c in piece) + ">"

    return decode


def _byte(character: str) -> int:
    """The byte that a byte-level BPE writes as this character: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    code = ord(character)
    if code in plain:
        return code
    return (
        [b for b in range(256) if b not in plain][code - 256]
        if 256 <= code < 256 + 68
        else code & 255
    )


def findings(
    m: Measurements,
    titles: Mapping[str, str] | None = None,
    untrained: Measurements | None = None,
) -> tuple[Finding, ...]:
    """C10 to C16 in order, beside random weights on the same text; `titles` spells out the names of domains."""
    made = tuple(
        f
        for f in (
            judge_paths(m),
            judge_material(m),
            judge_balance(m),
            judge_subjects(m, titles or {}),
            judge_frequent(m),
            judge_preferred(m),
            judge_imbalance(m),
        )
        if f.parts
    )
    control = "Random routers" if m.of_questions else "Random weights"
    return made if untrained is None else beside(made, findings(untrained, titles), control)
