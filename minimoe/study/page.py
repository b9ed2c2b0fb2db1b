"""The report as one HTML page that needs nothing else: images inside, style inside, no script."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from minimoe.study.chance import GENERATED, MMLU, TEXT
from minimoe.study.claims import Finding, beside, counted
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
from minimoe.study.measurements import SUBJECTS, TOPICS, Measurements, chosen_topics
from minimoe.study.paths import draw_coactivation, draw_paths, draw_repeats, judge_paths
from minimoe.study.vocabulary import draw_ranked, draw_token, judge_frequent, judge_preferred

_CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #56616b; --paper: #fff; --sheet: #f5f6f8; --line: #d9dee3;
  --link: #0b5ea8; --agrees: #00694d; --disagrees: #a34700; --unknown: #56616b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #a9b3bd; --paper: #14181c; --sheet: #1d2329;
  --line: #38424c; --link: #7cb8ee; --agrees: #4cc39b; --disagrees: #f0985a; --unknown: #a9b3bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 748px; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .6rem 0 .4rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; } a { color: var(--link); } .soft { color: var(--soft); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
td:first-child { min-width: 2.6rem; } .parts td:first-child { min-width: 9.5rem; }
sup { line-height: 0; font-size: .75em; } td.n, th.n { text-align: right; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.verdict.agrees { color: var(--agrees); } .verdict.disagrees { color: var(--disagrees); }
.verdict.cannot { color: var(--unknown); }
.aside td, .aside th { color: var(--soft); }
dl.claim { margin: .6rem 0; } dl.claim dt { font-weight: 600; margin-top: .5rem; }
dl.claim dd { margin: 0; }
figure { margin: 1.6rem 0; } .sheet { overflow-x: auto; background: #fff; border-radius: 6px; padding: 6px; }
figure img { display: block; width: 100%; min-width: 560px; max-width: 700px; height: auto; margin: 0 auto; }
figcaption { font-size: .86rem; line-height: 1.45; color: var(--soft); margin-top: .45rem; }
code { font-size: .86em; overflow-wrap: anywhere; }
.box { background: var(--sheet); border-radius: 6px; padding: .7rem 1rem; }
"""

HELDOUT = (
    "Text of works that training never saw. For whatever is said about all text together the domains have nearly equal "
    "shares, as in training."
)

CONTROLLED = (
    "Beside each number stands what the same rule gives for random weights of the same configuration on the same text. "
    "Whatever they show as well is no sign of learning: a random router sends equal vectors to equal experts, so it "
    "has preferred experts for tokens, hence for domains that use other tokens, and repeats paths. A claim about what "
    "training made agrees only where its effect is clearly larger."
)

ANOTHER = "It studies Mixtral 8x7B; here the same questions are put to another model."


@dataclass(frozen=True)
class Page:
    """What the page is made of.

    `corpus`: (name, title, documents, tokens, note) a domain, or whatever `label` says it is; `facts`: (label, value).
    `read` says what text that is, `model` how the model is related to the article's, `stored` where the trace is.
    Without a control by random weights the page says why there is none: `uncontrolled`.
    """

    title: str
    summary: str
    findings: Sequence[Finding]
    figures: Mapping[str, Figure]
    corpus: Sequence[tuple[str, str, int, int, str]]
    left_out: Sequence[str]
    facts: Sequence[tuple[str, str]]
    label: str = "domain"
    read: str = HELDOUT
    model: str = ANOTHER
    stored: str = "trace.npz"
    uncontrolled: str = CONTROLLED


def page(p: Page) -> str:
    """The whole document."""
    used = {name for f in p.findings for name in f.figures}
    rest = [figure for name, figure in p.figures.items() if name not in used]
    body = [
        f"<h1>{_t(p.title)}</h1>",
        f'<p class="soft">{_t(p.summary)}</p>',
        _overview(p),
        _material(p),
        *(_finding(f, p.figures) for f in p.findings),
    ]
    if rest:
        together = any(figure.name == "coactivation" for figure in rest)
        title = "Neighbouring tokens" + (", and experts chosen together" if together else "")
        body += [f"<h2>{title}</h2>", _REPEATS, *(figure.to_html() for figure in rest)]
    body.append(f'<h2 id="control">Control: untrained weights</h2><p>{_t(p.uncontrolled)}</p>')
    body.append(_provenance(p.facts, p.stored))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_t(p.title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


_REPEATS = (
    '<p>Do neighbours go to the same expert? Published (Jiang et al. 2024, <a href="https://arxiv.org/abs/2401.04088">'
    "arXiv:2401.04088</a>, Table 5), Mixtral 8x7B: the same first choice in 13.6–14.9 % of pairs in the first layer, "
    "23.6–28.4 % in layer 16, 19.7–26.3 % in the last, where equal loads give 12.5 %; either expert in common in "
    "44.9–49.9 %, 61.6–67.0 % and 44.5–53.6 %, where equal loads give 46.4 %.</p>"
)


def _overview(p: Page) -> str:
    findings = p.findings
    rows = "".join(
        f'<tr><td><a href="#{f.claim}">{f.claim}</a></td><td>{_t(f.title)}</td><td>{_t(f.short)}</td>'
        f"<td>{_verdict(f.verdict)}</td></tr>"
        for f in findings
    )
    return (
        f"<p>Of the article's claims: {_t(counted(findings))}. A verdict is about this model on this text; each "
        "follows from a rule that stands beside it.</p>"
        '<div class="wide"><table><thead><tr>'
        "<th>claim</th><th>the article says</th><th>found here</th><th>verdict</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        '<p class="soft">The article: K. Kranen and V. Nguyen, '
        '<a href="https://developer.nvidia.com/blog/applying-mixture-of-experts-in-llm-architectures/">'
        "Applying Mixture of Experts in LLM Architectures</a>, NVIDIA, 14 March 2024. "
        f"{_t(p.model)} Intervals are at 95 % and come from resampling whole works.</p>"
    )


def _material(p: Page) -> str:
    rows = "".join(
        f'<tr><td>{_t(title)}</td><td class="n">{documents:,}</td><td class="n">{tokens:,}</td><td>{_t(note)}</td></tr>'
        for _, title, documents, tokens, note in p.corpus
    )
    missing = "".join(f"<p>{_t(line)}</p>" for line in p.left_out)
    return (
        f"<h2>What was read</h2><p>{_t(p.read)}</p>"
        f'<div class="wide"><table><thead><tr><th>{_t(p.label)}</th><th class="n">documents</th>'
        f'<th class="n">tokens</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>{missing}'
    )


def _finding(f: Finding, figures: Mapping[str, Figure]) -> str:
    rows = "".join(
        f"<tr{'' if part.decides else ' class=aside'}><td>{_t(part.what)}</td><td>{_t(part.found)}</td>"
        f"<td>{_verdict(part.verdict)}</td></tr>"
        for part in f.parts
    )
    aside = (
        ""
        if all(p.decides for p in f.parts)
        else '<p class="soft">Rows in grey are for comparison and decide nothing.</p>'
    )
    drawn = "".join(figures[name].to_html() for name in f.figures if name in figures)
    remarks = "".join(f"<p>{_t(line)}</p>" for line in f.remarks)
    return (
        f'<h2 id="{f.claim}">{f.claim} · {_t(f.title)}: {_verdict(f.verdict)}</h2>'
        f'<dl class="claim"><dt>The article</dt><dd>{_t(f.article)}</dd><dt>Published elsewhere</dt>'
        f"<dd>{_linked(f.published)}"
        f"</dd><dt>Its words</dt><dd>{_t(f.words)}</dd><dt>Rule</dt><dd>{_t(f.rule)}</dd></dl>"
        '<div class="wide"><table class="parts"><thead><tr>'
        "<th>measured</th><th>found here</th><th>verdict</th></tr></thead><tbody>"
        f"{rows}</tbody></table></div>{aside}{remarks}{drawn}"
    )


def _provenance(facts: Sequence[tuple[str, str]], stored: str) -> str:
    rows = "".join(
        f"<tr><th>{_t(label)}</th><td><code>{_t(value)}</code></td></tr>" for label, value in facts
    )
    return (
        '<h2>Where these numbers come from</h2><div class="wide"><table><tbody>'
        f"{rows}</tbody></table></div>"
        '<p class="soft">All numbers are in summary.json beside this page; the recorded choices are '
        f"in {_t(stored)}.</p>"
    )


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {verdict.split()[0]}">{_t(verdict)}</span>'


def _linked(text: str) -> str:
    """Escaped text in which 'arXiv:NNNN.NNNNN' is a link."""
    words = [
        f'<a href="https://arxiv.org/abs/{word[6:16]}">{_t(word[:16])}</a>{_t(word[16:])}'
        if word.startswith("arXiv:")
        else _t(word)
        for word in text.replace("(arXiv", "( arXiv").split(" ")
    ]
    return " ".join(words).replace("( <a", "(<a")


def _t(text: str) -> str:
    """Escaped; powers raised, no line break between a number and its unit."""
    raised = re.sub(r"(\d)\^(\d+(?:\.\d+)?)", r"\1<sup>\2</sup>", html.escape(text))
    return raised.replace(" %", "\u00a0%")


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
        drawn.append(draw_load(shown, num_layers=n, text=text, name=name))
    drawn.append(draw_load_by_depth(m.load))
    if m.topics:
        sizes = dict(zip(m.topics[0].names, m.topics[0].documents.tolist(), strict=True))
        note = (
            ""
            if m.of_questions
            else "Articles of one encyclopaedia, so of one format, language and source. "
        ) + "Counterpart of the article's Figs. 4 to 6."
        chosen = chosen_topics(sizes, wanted=SUBJECTS if m.of_questions else TOPICS)
        spelt = {s: spell(s) for s in sizes} if m.of_questions else None
        drawn.append(draw_labels(m.topics, chosen, titles=spelt, num_layers=n, note=note))
        drawn.append(draw_skew(m.topics, titles=spelt, num_layers=n))
    if m.domains and len(m.domains[0].names) > 1:
        drawn.append(
            draw_labels(
                m.domains[-1:], titles=titles, num_layers=n, name="domains", note=CONFOUNDED
            )
        )
        drawn.append(
            draw_skew(m.domains, titles=titles, num_layers=n, name="domain-skew", note=CONFOUNDED)
        )
    if m.subjects and all(s in m.subjects[-1].names for s in SUBJECTS):
        title = {s: spell(s) for s in SUBJECTS}
        note = "The subjects of the article's Figs. 4 to 6, in the few real questions at hand."
        drawn.append(
            draw_labels(
                m.subjects[-1:], SUBJECTS, titles=title, num_layers=n, name="subjects", note=note
            )
        )
    decode = decoder(tokenizer)
    for frequent, characteristic in zip(m.frequent, m.characteristic, strict=True):
        name = f"tokens-{frequent.layer}"
        drawn.append(draw_ranked(frequent, characteristic, decode, num_layers=n, name=name))
    for token in m.tokens:
        apart = m.apart if m.apart and _occurs(m, token.apart_token) else None
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


def _occurs(m: Measurements, token: int) -> bool:
    first = m.apart[0]
    row = np.flatnonzero(first.token == token)
    return bool(len(row) and first.occurrences[row[0]])


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
    return made if untrained is None else beside(made, findings(untrained, titles))
