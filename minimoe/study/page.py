"""The report as one HTML page that needs nothing else: images inside, style inside, no script."""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from minimoe.study import domains, load, paths, vocabulary
from minimoe.study.chance import GENERATED, MMLU
from minimoe.study.claims import Finding, Part, at_layers, beside, counted, of_layers, times, told
from minimoe.study.counts import published
from minimoe.study.depth import draw_information
from minimoe.study.drawing import Figure
from minimoe.study.measurements import SUBJECTS, TOPICS, Measurements, chosen_topics, three_layers


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

    loader = jinja2.PackageLoader("minimoe.study")
    strict: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    tight: Any = {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **strict, **tight)
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
    table, last = published(), m.layers[-1]
    places = {1: (2,), 2: (0, 2), 3: (0, 1, 2)}[len(m.layers)]
    own = {x: three_layers(table.layers)[i] for x, i in zip(m.layers, places, strict=True)}

    def cell(f: Finding, part: Part) -> str:
        layer = next((x for x in m.layers if of_layers(x, m.num_layers) in part.what), last)
        kinds = {"fivefold": "five", "all ": "all"}
        kind = next((kinds[start] for start in kinds if part.what.startswith(start)), "moved")
        if f.claim == "C12":
            kind = "ratio"
        elif "packages" in part.what:
            return "not read"
        by = table.domain_load(own[layer])
        widest, steepest = (max(by, key=lambda d: by[d][what]) for what in ("tv", "ratio"))
        fill: dict[str, Any] = {"wide": by[widest]["tv"], "steep": by[steepest]["ratio"]}
        fill |= {"widest": spell(widest), "steepest": spell(steepest), "labels": len(by)}
        fill |= {"pooled": table.load(own[layer]).value, "less": table.less_even(own[layer])}
        return told("published.cell", layer=own[layer], told=told(f"published.{kind}", **fill))

    tokens, less = int(table.num_tokens.sum()), table.less_even(own[last])
    ratios = ", ".join(times(table.load(x).value) for x in own.values())
    fill = {"ratios": ratios, "less": less, "labels": len(table.domains)}
    source = told("published.source", tokens=tokens, about=table.about)
    return {
        f.claim: {
            "short": told(f"published.{f.claim}", **fill),
            "cells": [cell(f, part) for part in f.parts],
            "source": source,
        }
        for f in made
        if f.claim in ("C12", "C13")
    }


def draw(m: Measurements, tokenizer: Tokenizer, titles: dict[str, str]) -> dict[str, Figure]:
    """All figures by name; one whose material is missing is left out. `titles` spells out the names of domains."""
    depth: Any = {"num_layers": m.num_layers}
    names, said = (
        {GENERATED: "load-questions", MMLU: "load-mmlu"},
        {MMLU: "the real MMLU questions"},
    )
    drawn: list[Figure] = []
    for kind in m.load:
        name, text = names.get(kind, "load"), said.get(kind, kind)
        drawn.append(load.draw_load(at_layers(m, kind), text=text, name=name, **depth))
    drawn.append(load.draw_load_by_depth(m.load))
    if m.topics:
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        chosen = chosen_topics(sizes, SUBJECTS if m.of_questions else TOPICS)
        words: Any = {"titles": {s: spell(s) for s in sizes} if m.of_questions else None, **depth}
        note = told(f"notes.{m.nouns[1]}")
        drawn.append(domains.draw_labels(m.topics, chosen, note=note, **words))
        drawn.append(domains.draw_skew(m.topics, **words))
    if m.domains and len(m.domains[0].names) > 1:
        words = {"titles": titles, "note": told("notes.packages"), **depth}
        drawn.append(domains.draw_labels(m.domains[-1:], name="domains", **words))
        drawn.append(domains.draw_skew(m.domains, name="domain-skew", **words))
    if m.subjects and all(s in m.subjects[-1].names for s in SUBJECTS):
        words = {"titles": {s: spell(s) for s in SUBJECTS}, "note": told("notes.real"), **depth}
        drawn.append(domains.draw_labels(m.subjects[-1:], SUBJECTS, name="subjects", **words))
    decode = decoder(tokenizer)
    for often, apart in zip(m.frequent, m.characteristic, strict=True):
        name = f"tokens-{often.layer}"
        drawn.append(vocabulary.draw_ranked(often, apart, decode, name=name, **depth))
    asking = m.apart[0].token[m.apart[0].occurrences > 0].tolist() if m.apart else []
    for t in m.tokens:
        words = {"apart_token": t.apart_token, "name": t.name, **depth}
        words["apart_text"] = f"{t.apart_text} in the generated questions"
        apart = m.apart if t.apart_token in asking else None
        drawn.append(vocabulary.draw_token(m.shares, t.token, t.text, apart=apart, **words))
    what = "subject" if m.of_questions else "domain"
    drawn.append(draw_information(m.information, within=m.information_topics or None, what=what))
    if m.repeats:
        drawn.append(paths.draw_repeats(m.repeats))
    if m.coactivation:
        drawn.append(paths.draw_coactivation(m.coactivation, **depth))
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
