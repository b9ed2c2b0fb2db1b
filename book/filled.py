"""The parts of pages that follow from files of the repository: how to cite, stored results, the library's modules.

A page holds the mark <!-- filled: NAME -->, or <!-- filled: NAME ARGUMENTS -->; the build puts the Markdown that the
function of that name returns in its place.
"""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from book import first_cell
from book.questions import questions
from book.teaching import lessons

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "book" / "results"
MARK = re.compile(r"<!-- filled: (\w+)(?: ([\w. ]+))? -->")


def fill(text: str) -> str:
    """A page with its marks replaced.

    Raises:
        ValueError: a mark names nothing that is known.
    """

    def one(found: re.Match[str]) -> str:
        if found[1] not in PARTS:
            raise ValueError(f"no part is called {found[1]!r}; there are {', '.join(PARTS)}")
        return PARTS[found[1]](*(found[2] or "").split())

    return MARK.sub(one, text)


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines
    )


def citation() -> str:
    """CITATION.cff as a sentence and as BibTeX."""
    entry = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    authors = " and ".join(
        a.get("name") or f"{a['given-names']} {a['family-names']}" for a in entry["authors"]
    )
    address = entry.get("doi") or entry.get("repository-code") or entry.get("url") or ""
    fields = {"author": f"{{{authors}}}", "title": entry["title"], "version": entry["version"]}
    if released := str(entry.get("date-released", "")):
        fields["year"] = released[:4]
    if address:
        fields["howpublished"] = address
    bibtex = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    said = f"{authors}: *{entry['title']}*, version {entry['version']}."
    return f"> {said}\n\n```bibtex\n@misc{{minimoe,\n{bibtex}\n}}\n```"  # fmt: skip


# --- stored results -------------------------------------------------------------------------------


def read(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def provenance() -> str:
    """Every stored result: what it was run on and the command that runs it again."""
    from minimoe.bench.tables import thread_count

    rows: list[list[Any]] = []
    for path in sorted(RESULTS.glob("*.json")):
        result = read(path.name)
        command = "make study" if path.name == "study.json" else result["command"]
        rows.append(
            [
                f"`{path.name}`",
                result.get("date", ""),
                f"{result['hardware']}, {thread_count(result['threads'])}",
                result.get("torch", ""),
                f"`{command}`",
            ]
        )
    return table(["file", "date", "machine", "torch", "made by"], rows)  # fmt: skip


def plain(text: str) -> str:
    """A text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]$<>|^])", r"\\\1", text)


def findings(name: str = "study.json") -> str:
    """The claims of the article that a stored result tests."""
    return judged(read(name)["findings"])


def serving() -> str:
    """The claims about serving, by their rules, from the stored measurement."""
    from book.serving import judge
    from book.verdicts import as_object

    return judged(list(map(as_object, judge(read("serve.json")))))


def judged(found: list[dict[str, Any]]) -> str:
    """Findings: verdict and main number; folded, what it rests on."""
    rows = [
        [f["claim"], *map(plain, (f["title"], f["article"], f["short"])), f["verdict"]]
        for f in found
    ]
    lines = [table(["claim", "in short", "the article", "measured here", "verdict"], rows)]
    for f in found:
        verdicts = [f"**{p['verdict']}**" if p["decides"] else p["verdict"] for p in f["parts"]]
        parts = [
            [plain(p["what"]), plain(p["found"]), verdict]
            for p, verdict in zip(f["parts"], verdicts, strict=True)
        ]
        lines += [
            f"::::{{dropdown}} {f['claim']}: {plain(f['title'])}",
            plain(f["rule"]),
            table(["measured", "result, with 95 % intervals", "by the rule"], parts),
            *map(plain, f["remarks"]),
            "::::",
        ]
    return "\n\n".join(lines)


def by_setting(points: list[dict[str, Any]], keys: list[str], values: list[str]) -> list[list[Any]]:
    """Rows of settings with mean and range over seeds of each value."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(point[k] for k in keys), []).append(point)
    rows: list[list[Any]] = []
    for setting, members in groups.items():
        cells: list[Any] = [f"{s:g}" if isinstance(s, float) else s for s in setting]
        for value in values:
            got = [m[value] for m in members]
            cells.append(f"{sum(got) / len(got):.3f} ({min(got):.3f} to {max(got):.3f})")
        rows.append([*cells, len(members)])
    return rows


def balance() -> str:
    """Lesson 04: the cures at each strength."""
    heads = ["cure", "strength", "loss, nats per character", "MaxVio", "seeds"]
    rows = by_setting(read("balance.json")["points"], ["cure", "strength"], ["loss", "max_vio"])
    return table(heads, rows)


def routers() -> str:
    """Lesson 05: every router on the same task."""
    if not (RESULTS / "router_zoo.json").exists():
        return "*No run is stored yet.*"
    heads = ["router", "loss, nats per character", "MaxVio", "runs"]
    rows = by_setting(read("router_zoo.json")["rows"], ["router"], ["loss", "max_vio"])
    return table(heads, rows)


def rates(kind: str) -> str:
    """How often tests alarm, intervals hold the truth, effects are found and rules agree in simulated studies."""
    rows = [
        [r["what"], f"{100 * r['rate']:.1f} %", f"{r['runs']:,}", r["wanted"]]
        for r in read("rates.json")["rows"]
        if r["kind"] == kind
    ]
    return table(["statistic", "rate", "studies", "bound"], rows)


def halved() -> str:
    """What the token tells of its expert, of all of the study's text and of every second document, again and again."""
    m = read("study.json")["measurements"]
    layers = m["layers"]
    every = [x for x in m["information"] if x["layer"] in layers] + m["information_halved"]
    rows = [
        [f"{row[0]['tokens']:,}", row[0]["units"], *(interval(x["token"], 3) for x in row)]
        for row in zip(*[iter(every)] * len(layers), strict=True)
    ]
    return table(["tokens", "works", *(f"layer {n}" for n in layers)], rows)


def atlas(part: str = "cells") -> str:
    """The atlas: claims by model; or where each row comes from, with its files."""
    from book import atlas as made  # it reads the library's counts

    stored, shown = made.read(), made.QUANTITIES
    if part == "cells":
        heads = ["model, text", *(f"{claim}: {what}" for claim, what in shown.items())]
        named = [(f"**{r['model']}**, {r['labels']}", r) for r in stored.values()]
        return table(heads, [[name, *(made.written(r, c) for c in shown)] for name, r in named])
    rows: list[list[Any]] = []
    missing: dict[tuple[str, str], list[str]] = {}
    for name, row in stored.items():
        files = [f"[row](results/atlas/{name}.json)"]
        if "counts" in row:
            files.append(f"[counts](../minimoe/study/published/{row['counts']}.json)")
        shape = f"{row['experts_per_token']} of {row['experts']}, {row['layers']} layers"
        source = row.get("source", "") or f"measured here, {row['date']}"
        if "commit" in row:
            source += f", commit {row['commit'][:8]}; {row['licence']}"
        # long paths may break
        source = re.sub(r"(?<=[/_])", "<wbr>", source.removeprefix("https://"))
        reasons = dict(row["cannot_be_told"])
        if "no_interval" in row:
            reasons["Intervals"] = row["no_interval"]
        for what, why in reasons.items():
            missing.setdefault((what, why), []).append(f"{row['model']}, {row['labels']}")
        text = f"{row['tokens']:,} tokens: {row['text']}"
        rows.append([row["model"], text, shape, source, ", ".join(files)])
    heads = ["model", "text", "experts", "source and licence", "files"]
    told = [f"- *{what}*, of {'; '.join(of)}: {why}." for (what, why), of in missing.items()]
    return "\n".join([table(heads, rows), "", "What cannot be told, and why:", "", *told])


def further(part: str) -> str:
    """One of the analyses beyond the article's claims: counterfactuals, saturation, meaning, outputs or parallel."""
    found, layers = read("further.json"), list(range(1, 7))
    heads = [f"layer {n}" for n in layers]
    if part == "counterfactuals":
        cost: dict[str, dict[Any, dict[str, float]]] = {}
        for row in found["counterfactuals"]:
            cost.setdefault(row["change"], {})[row["layer"]] = row["loss"]
        off = [by for change, by in cost.items() if change.endswith("off")]
        rows = [
            [change, interval(by[None], 2), *(number(by[n]["value"], 3) for n in layers)]
            for change, by in cost.items()
            if not change.endswith("off")
        ]
        means = (sum(by[n]["value"] for by in off) / len(off) for n in layers)
        rows.append([f"one expert off (mean of {len(off)})", "–", *(f"{m:.3f}" for m in means)])
        return table(["experts of a token", "all layers", *heads], rows)
    if part == "saturation":
        seen = found["saturation"]
        rows = [
            [f"{100 * step / seen['step'][-1]:.0f} %", *(f"{x:.2f}" for x in seen["beyond"][i])]
            for i, step in enumerate(seen["step"])
            if 10 * step % seen["step"][-1] == 0 and step < seen["step"][-1]
        ]
        return table(["of training", *heads], rows)
    if part == "meaning":
        rows = [
            [m["layer"], f"{m['same']:.3f}", f"{m['other']:.3f}", f"{m['difference']['value']:.3f}",
             f"{m['difference']['null_high']:.3f}"]
            for m in found["meaning"]
        ]  # fmt: skip
        return table(
            ["layer", "same topic", "different topics", "difference", "by chance up to"], rows
        )
    if part == "outputs":
        rows = [[key, *(interval(x, 2) for x in by)] for key, by in found["outputs"].items()]
        return table(["token", *heads], rows)
    rows = []
    for second, by in found["parallel"].items():
        gap = [{k: by["gap"][k][i] for k in ("value", "low", "high")} for i in range(len(layers))]
        name = {"wiki_fr": "English and French", "wiki_es": "English and Spanish"}[second]
        rows.append([f"{name}, {by['titles']} titles", *(interval(x, 4) for x in gap)])
    return table(["languages", *heads], rows)


def interval(band: dict[str, float], digits: int) -> str:
    """A number with its interval."""
    value, low, high = (number(band[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def number(value: float, digits: int) -> str:
    """With a minus sign, and zero without one."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def benchmark(part: str) -> str:
    """A part of the benchmark page."""
    from book import benchmarks  # it needs the benchmark's own code, and the library

    return benchmarks.benchmark(part)


# --- the library ----------------------------------------------------------------------------------


def api(*packages: str) -> str:
    """Every module of the packages, made from its docstrings."""
    from book import reference  # it imports the library

    return reference.page(*packages)


def with_examples() -> str:
    """The objects of the library that have an example."""
    from book import reference

    return reference.with_examples()


# --- the first page -------------------------------------------------------------------------------


def front() -> str:
    """The first screen: the router at work, what to do next, and what experts do."""
    from book import extension  # it fills pages with this module
    from minimoe.widgets.live_router import live_router

    name = extension.repository(first_cell.repository())
    colab = (
        f"https://colab.research.google.com/github/{name}/blob/main/notebooks/01_dense_mlp.ipynb"
    )
    links = [
        '<a class="front-button front-first" href="explorables.html#explorable-live-router" '
        'data-starts="live_router">Start</a>',
        f'<a class="front-button" href="{colab}">Open in Colab</a>' if name else "",
        '<a class="front-button" href="teaching.html">Teach it</a>',
        '<a href="../notebooks/01_dense_mlp.html">Lesson 1</a>',
    ]
    router = live_router(compact=True).html()
    return f'\n{router}\n\n<p class="front-actions">{" ".join(filter(None, links))}</p>\n\n{subjects()}\n'


def subjects(layer: int = 6) -> str:
    """What experts do: the share of each domain's choices that each expert gets at a layer, as a heat map. One line."""
    from minimoe.text.domains import DOMAINS

    domains = read("live_router.json")["domains"]
    load = {DOMAINS[d["name"]].title: d["load"][layer - 1] for d in domains}
    experts = len(next(iter(load.values())))
    wide, high, left, top = 42, 18, 12 + 13 * max(map(len, load)) // 2, 20
    parts = [
        f'<text x="{left + (e + 0.5) * wide:g}" y="13" text-anchor="middle">{e + 1}</text>'
        for e in range(experts)
    ]
    for row, (title, shares) in enumerate(load.items()):
        y = top + row * high
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(title)}</text>')  # fmt: skip
        for e, share in enumerate(shares):
            strength = min(1, share / 0.5)
            size = f'width="{wide - 1}" height="{high - 1}" style="--p: {strength:.2f}"'
            middle = f'x="{left + (e + 0.5) * wide:g}" y="{y + 13}" text-anchor="middle"'
            parts.append(f'<rect x="{left + e * wide}" y="{y}" {size}/>')
            parts.append(f"<text {middle}>{100 * share:.0f}</text>")
    size = f"0 0 {left + experts * wide} {top + len(load) * high}"
    strongest = sorted(((max(s), s.index(max(s)) + 1, t) for t, s in load.items()), reverse=True)
    said = "; ".join(f"{title}: {share:.0%} to expert {e}" for share, e, title in strongest[:3])
    alt = f"Share of the choices at layer {layer} that each of {experts} experts gets, for each kind of text. {said}."
    share, expert, title = strongest[0]
    caption = (
        f"What experts do: at layer {layer} of the course's model, the share (%) of each kind of text that each of its "
        f"{experts} experts reads. An even share would be {100 / experts:.1f}; of “{title}”, expert {expert} gets "
        f"{share:.0%}. "
        'How much of this is more than chance is <a href="../notebooks/13_domains_and_tokens.html">lesson 13</a>.'
    )
    picture = (
        f'<svg viewBox="{size}" role="img" aria-label="{html.escape(alt)}">{"".join(parts)}</svg>'
    )
    return f'<figure class="front-picture">{picture}<figcaption>{caption}</figcaption></figure>'


# --- many machines --------------------------------------------------------------------------------


def wire() -> str:
    """Time of the wire over that of the products, forward, with 2 bytes, 400 TFLOP/s and 50 GB/s."""
    from minimoe.presets import PRESETS

    shown = {
        "Mixtral 8x7B": "mixtral-8x7b", "DeepSeek-V3": "deepseek-v3", "OLMoE": "olmoe-1b-7b",
        "Qwen3-30B-A3B": "qwen3-30b-a3b",
    }  # fmt: skip
    rows: list[list[Any]] = []
    for name, preset in shown.items():
        width = PRESETS[preset].expert_size
        shares = [2 * left / (3 * width) * 400e12 / 50e9 for left in (7 / 8, 1)]
        rows.append([name, f"{width:,}", *(f"{share:.2g}" for share in shares)])
    return table(["model", "F", "R = 8", "many ranks"], rows)


def many_machines() -> str:
    """Rates, and the bytes that crossed, of the stored run."""
    result = json.loads((RESULTS / "many_machines.json").read_text(encoding="utf-8"))
    rows = [[name, f"{rate:,.0f}"] for name, rate in result["tokens_per_second"].items()]
    crossed, formula = result["bytes_crossed"]["ep 2"], result["bytes_by_formula"]
    return (
        f"{table(['', 'tokens per second'], rows)}\n\nMedians of {result['rounds']} rounds on {result['hardware']}, "
        f"{result['date']}. In a step of `--ep 2`, {crossed:,.0f} bytes of experts' rows crossed between the ranks. "
        f"The formula, for an even load, gives {formula:,.0f}."
    )


def rank_faults() -> str:
    """How long two ranks take to end after a fault of one, of the stored run."""
    result = json.loads((RESULTS / "rank_faults.json").read_text(encoding="utf-8"))
    rows = [[name, f"{seconds:.1f}"] for name, seconds in result["seconds"].items()]
    head = ["rank 1 of two is", "seconds until all have ended"]
    load = result["load_average"][0]
    return f"{table(head, rows)}\n\nOn {result['hardware']}, {result['date']}; load average when it ended {load:.1f}."


# --- explorables ----------------------------------------------------------------------------------


def explorable(name: str) -> str:
    """An explorable with its static figure; it starts when the reader scrolls to it."""
    from minimoe.widgets import EXPLORABLES

    return f"\n{EXPLORABLES[name]().html()}\n"


PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part
    for part in (
        citation,
        provenance,
        findings,
        serving,
        balance,
        routers,
        rates,
        halved,
        atlas,
        further,
        benchmark,
        api,
        with_examples,
        lessons,
        explorable,
        front,
        questions,
        wire,
        many_machines,
        rank_faults,
    )
}
