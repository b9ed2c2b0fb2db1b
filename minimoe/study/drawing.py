"""Which figures the report shows, drawn from its measurements."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from minimoe.study import figures
from minimoe.study.figures import Figure
from minimoe.study.measurements import (
    GENERATED,
    MMLU,
    SUBJECTS,
    TEXT,
    TOPICS,
    Measurements,
    chosen_topics,
)

CONFOUNDED = (
    "Packages differ in format, language and source as well as in subject: these are confounded."
)


def draw(m: Measurements, tokenizer: Tokenizer, titles: dict[str, str]) -> dict[str, Figure]:
    """All figures by name; one whose material is missing is left out. `titles` spells out the names of domains."""
    n = m.num_layers
    drawn: list[Figure] = []
    names = {
        TEXT: ("load", TEXT),
        GENERATED: ("load-questions", GENERATED),
        MMLU: ("load-mmlu", "the real MMLU questions"),
    }
    for kind, loads in m.load.items():
        name, text = names.get(kind, ("load", kind))
        shown = [x for x in loads if x.layer in m.layers]
        drawn.append(figures.load(shown, num_layers=n, text=text, name=name))
    drawn.append(figures.load_by_depth(m.load))
    if m.topics:
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        note = (
            ""
            if m.of_questions
            else "Articles of one encyclopaedia, so of one format, language and source. "
        ) + "Counterpart of the article's Figs. 4 to 6."
        chosen = chosen_topics(sizes, wanted=SUBJECTS if m.of_questions else TOPICS)
        spelt = {s: spell(s) for s in sizes} if m.of_questions else None
        drawn.append(figures.label_load(m.topics, chosen, titles=spelt, num_layers=n, note=note))
        drawn.append(figures.skew(m.topics, titles=spelt, num_layers=n))
    if m.domains and len(m.domains[0].names) > 1:
        drawn.append(figures.labels_at(m.domains[-1], titles=titles, num_layers=n, note=CONFOUNDED))
        drawn.append(
            figures.skew(
                m.domains, titles=titles, num_layers=n, name="domain-skew", note=CONFOUNDED
            )
        )
    if m.subjects and all(s in m.subjects[-1].names for s in SUBJECTS):
        title = {s: spell(s) for s in SUBJECTS}
        note = "The subjects of the article's Figs. 4 to 6, in the few real questions at hand."
        drawn.append(
            figures.labels_at(
                m.subjects[-1], SUBJECTS, titles=title, num_layers=n, name="subjects", note=note
            )
        )
    decode = decoder(tokenizer)
    for frequent, characteristic in zip(m.frequent, m.characteristic, strict=True):
        name = f"tokens-{frequent.layer}"
        drawn.append(
            figures.ranked_tokens(frequent, characteristic, decode, num_layers=n, name=name)
        )
    for token in m.tokens:
        apart = m.apart if m.apart and _occurs(m, token.apart_token) else None
        drawn.append(
            figures.token_choice(
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
    drawn.append(figures.information(m.information, within=m.information_topics or None, what=what))
    if m.repeats:
        drawn.append(figures.repeats(m.repeats))
    if m.coactivation:
        drawn.append(figures.coactivation(m.coactivation, num_layers=n))
    if m.paths:
        drawn.append(figures.paths(m.paths))
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


def _occurs(m: Measurements, token: int) -> bool:
    first = m.apart[0]
    row = np.flatnonzero(first.token == token)
    return bool(len(row) and first.occurrences[row[0]])
