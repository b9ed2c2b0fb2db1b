"""The report as one HTML page that needs nothing else: images inside, style inside, no script."""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from minimoe.study import domains, load, paths, vocabulary
from minimoe.study.chance import GENERATED, MMLU, TEXT
from minimoe.study.claims import Finding, Part, beside, counted, of_layers, percent, times
from minimoe.study.counts import published
from minimoe.study.depth import draw_information
from minimoe.study.drawing import Figure
from minimoe.study.measurements import SUBJECTS, TOPICS, Measurements, chosen_topics, three_layers


def page(
    made: Sequence[Finding], drawn: Mapping[str, Figure], pngs: Mapping[str, bytes], **words: Any
) -> str:
    """The whole document from templates/report.html; `words` is what else the template names.

    Figures come by name, and `pngs` as they were rendered; each is shown once, under the first finding that names it.
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
        loader=jinja2.PackageLoader("minimoe.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["written"] = lambda text: Markup(written(text))
    words |= {"findings": made, "figures": drawn, "figure": figure, "shown": shown}
    text = environment.get_template("report.html").render(counted=counted(made), **words)
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
        by, pooled = table.domain_load(theirs), times(table.load(theirs).value)
        widest, steepest = (max(by, key=lambda d: by[d][what]) for what in ("tv", "ratio"))
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
        return f"layer {theirs}: {told}. Interval and verdict cannot be told"

    a = table.about
    source = (
        f"computed here from published counts, {int(table.num_tokens.sum()):,} tokens of {a['text']} ({a['source']}, "
        f"commit {a['commit'][:8]}, {a['licence']}). The documents are not given, so no interval can be."
    )
    less = table.less_even(own[m.layers[-1]])
    short = {
        "C12": f"max/min {', '.join(times(table.load(x).value) for x in own.values())}",
        "C13": f"{less} of {labels} subjects less even than all together",
    }
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
        drawn.append(load.draw_load(shown, num_layers=n, text=text, name=name))
    drawn.append(load.draw_load_by_depth(m.load))
    if m.topics:
        note = "Counterpart of the article's Figs. 4 to 6."
        if not m.of_questions:
            note = f"Articles of one encyclopaedia, so of one format, language and source. {note}"
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        chosen = chosen_topics(sizes, wanted=SUBJECTS if m.of_questions else TOPICS)
        words: dict[str, Any] = {"titles": {s: spell(s) for s in sizes} if m.of_questions else None}
        drawn.append(domains.draw_labels(m.topics, chosen, num_layers=n, note=note, **words))
        drawn.append(domains.draw_skew(m.topics, num_layers=n, **words))
    if m.domains and len(m.domains[0].names) > 1:
        words = {"titles": titles, "num_layers": n, "note": CONFOUNDED}
        drawn.append(domains.draw_labels(m.domains[-1:], name="domains", **words))
        drawn.append(domains.draw_skew(m.domains, name="domain-skew", **words))
    if m.subjects and all(s in m.subjects[-1].names for s in SUBJECTS):
        note = "The subjects of the article's Figs. 4 to 6, in the few real questions at hand."
        words = {"titles": {s: spell(s) for s in SUBJECTS}, "num_layers": n, "note": note}
        drawn.append(domains.draw_labels(m.subjects[-1:], SUBJECTS, name="subjects", **words))
    decode = decoder(tokenizer)
    for often, apart in zip(m.frequent, m.characteristic, strict=True):
        words = {"num_layers": n, "name": f"tokens-{often.layer}"}
        drawn.append(vocabulary.draw_ranked(often, apart, decode, **words))
    asking = m.apart[0].token[m.apart[0].occurrences > 0].tolist() if m.apart else []
    for token in m.tokens:
        words = {
            "apart": m.apart if token.apart_token in asking else None,
            "apart_token": token.apart_token,
            "apart_text": f"{token.apart_text} in the generated questions",
        }
        drawn.append(
            vocabulary.draw_token(
                m.shares, token.token, token.text, num_layers=n, name=token.name, **words
            )
        )
    what = "subject" if m.of_questions else "domain"
    drawn.append(draw_information(m.information, within=m.information_topics or None, what=what))
    if m.repeats:
        drawn.append(paths.draw_repeats(m.repeats))
    if m.coactivation:
        drawn.append(paths.draw_coactivation(m.coactivation, num_layers=n))
    if m.paths:
        drawn.append(paths.draw_paths(m.paths))
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


def findings(
    m: Measurements, titles: Mapping[str, str] | None = None, untrained: Measurements | None = None
) -> tuple[Finding, ...]:
    """C10 to C16 in order, beside random weights on the same text; `titles` spells out the names of domains."""
    made = (
        paths.judge_paths(m),
        load.judge_material(m),
        load.judge_balance(m),
        domains.judge_subjects(m, titles or {}),
        vocabulary.judge_frequent(m),
        vocabulary.judge_preferred(m),
        load.judge_imbalance(m),
    )
    made = tuple(f for f in made if f.parts)
    control = "Random routers" if m.of_questions else "Random weights"
    return made if untrained is None else beside(made, findings(untrained, titles), control)
