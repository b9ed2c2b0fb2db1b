"""The atlas: what the article's claims come to in each model, a row of JSON for each model and text.

    python -m book.atlas                              the rows of what the repository holds, in book/results/atlas
    python -m book.atlas STUDY/summary.json NAME      a row of a study: of weights at home, or of a server

A cell holds a value and, if works are known, its 95 % interval; the claims that a source cannot tell have the reason.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.io import write_text  # noqa: E402
from minimoe.study.counts import REFUSED, CountTable, published  # noqa: E402
from minimoe.study.measurements import three_layers  # noqa: E402

RESULTS = ROOT / "book" / "results"
ATLAS = RESULTS / "atlas"
NUMBER = ("value", "low", "high")
QUANTITIES = {
    "C10": "tokens that repeat a path, %",
    "C12": "max/min of the load",
    "C13": "the label tells of the expert, % of the most",
    "C14": "the token tells of the expert, % of the most",
    "C15": "choices from a token's preferred set beyond chance, %",
}
"""What a cell of each claim holds, at the first, the middle and the last layer but for C10."""
NO_TOKENS = "tokens are not told apart"
COUNTED = {
    "mixtral": ("mixtral_8x7b_mmlu", 32, "subject"),
    "mixtral_instruct": ("mixtral_8x7b_instruct_mmlu", 32, "subject"),
    "mixtral_domains": ("mixtral_8x7b_domains", 32, "domain"),
    "olmoe": ("olmoe_1b_7b_domains", 16, "domain"),
    "v2_lite": ("deepseek_v2_lite_tasks", 26, "task"),
}
"""Rows of published counts: the file, the layers with experts, and what its labels are."""


def cell(found: dict[str, Any], by: float = 1, layer: int | None = None) -> dict[str, Any]:
    """A value with its interval, times `by`, at a layer; six digits."""
    numbers = {end: found.get(end) for end in NUMBER}
    return {"layer": layer} | {
        end: None if x is None else float(f"{by * x:.6g}") for end, x in numbers.items()
    }


def of_counts(table: CountTable, layers: int, label: str) -> dict[str, Any]:
    """A row of counts, which have no intervals."""
    load = [cell({"value": table.load(x).value}, layer=x) for x in three_layers(table.layers)]
    bits = [(x, table.information(x)) for x in three_layers(table.layers)]
    told = [cell({"value": b["domain_equal"]}, 100 / b["limit"], x) for x, b in bits]
    return {
        "format": "minimoe-atlas",
        "version": 1,
        **table.about,
        "experts": table.counts.shape[3],
        "experts_per_token": table.k,
        "layers": layers,
        "tokens": int(table.num_tokens.sum()),
        "labels": f"{len(table.domains)} {label}s",
        "cells": {"C12": load, "C13": told},
        "cannot_be_told": {"C10": REFUSED["paths"], "C14": NO_TOKENS, "C15": NO_TOKENS},
        "no_interval": REFUSED["intervals"],
    }


def of_study(summary: dict[str, Any], part: str = "measurements", **about: str) -> dict[str, Any]:
    """A row of a study's summary.json, or of the `control` in it: the same text with weights that nobody trained."""
    m = summary[part]
    load = {x["layer"]: x for x in m["load"][m["text"]]}
    bits = {x["layer"]: x for x in m["information"]}
    experts, limit = len(load[m["layers"][0]]["share"]["value"]), m["information"][0]["limit"]
    sets = [p for p in m["paths"] if p["kind"] == "set"]
    kept = [p for p in m["preferred"] if p["layer"] in m["layers"]]
    cells = {
        "C10": [cell(p["repeated"], 100) for p in sets],
        "C12": [cell(load[x]["ratio"], layer=x) for x in m["layers"]],
        "C13": [cell(bits[x]["domain"], 100 / limit, x) for x in m["layers"]],
        "C14": [cell(bits[x]["token"], 100 / limit, x) for x in m["layers"]],
        "C15": [cell(p["excess"], 100, p["layer"]) for p in kept],
    }
    missing = {claim: "see what the report leaves out" for claim, row in cells.items() if not row}
    verdicts = {} if part == "control" else {f["claim"]: f["verdict"] for f in summary["findings"]}
    by = m["information"][0]["by"]
    named = next((x["names"] for x in m[f"{by}s"] if x["by"] == by), ())
    label = by if by == "domain" else "subject"
    return {
        "format": "minimoe-atlas",
        "version": 1,
        **about,
        "date": summary["date"],
        "experts": experts,
        "experts_per_token": round(experts / 2**limit),
        "layers": m["num_layers"],
        "tokens": load[m["layers"][0]]["tokens"],
        "labels": f"{len(named)} {label}s",
        "cells": {claim: row for claim, row in cells.items() if row},
        "cannot_be_told": missing,
        "verdicts": {claim: v for claim, v in verdicts.items() if claim in QUANTITIES},
    }


def rows() -> dict[str, dict[str, Any]]:
    """Every row that follows from files of the repository."""
    made: dict[str, dict[str, Any]] = {}
    for name, (file, layers, label) in COUNTED.items():
        made[name] = of_counts(published(file), layers, label) | {"counts": file}
    bits = json.loads((RESULTS / "published_bits.json").read_text(encoding="utf-8"))["rows"]
    for name, model in (("mixtral_domains", "Mixtral-8x7B"), ("olmoe", "OLMoE-1B-7B")):
        told = [b for b in bits if b["model"] == model]
        values = [cell({"value": b["token"]}, 100 / b["limit"], b["layer"]) for b in told]
        made[name]["cells"]["C14"] = values
        made[name]["cannot_be_told"] = {
            "C10": REFUSED["paths"],
            "C15": "counts of tokens do not say in which document one stood",
        }
    other = json.loads((RESULTS / "v2_lite.json").read_text(encoding="utf-8"))
    row, limit = made["v2_lite"], np.log2(other["experts"] / other["experts_per_token"])
    known = [x for x in other["intervals"] if x["layer"] in three_layers(range(1, 27))]
    row["cells"] = {
        "C10": [cell(other["paths"]["set"]["repeated"], 100)],
        "C12": [cell(x["ratio"], layer=x["layer"]) for x in known],
        "C13": [cell(x["domain"], 100 / limit, x["layer"]) for x in known],
    }
    del row["cannot_be_told"]["C10"], row["no_interval"]
    study = json.loads((RESULTS / "study.json").read_text(encoding="utf-8"))
    text = "held-out text of nine domains; `make study`"
    made["mini"] = of_study(study, model="mini", text=text)
    made["mini_untrained"] = of_study(study, "control", model="mini, random weights", text=text)
    return made


def read() -> dict[str, dict[str, Any]]:
    """The stored rows: ours in their order, then those that others added."""
    stored = {
        x.stem: json.loads(x.read_text(encoding="utf-8")) for x in sorted(ATLAS.glob("*.json"))
    }
    order = [*COUNTED, "mini", "mini_untrained"]
    return {name: stored[name] for name in [*order, *(x for x in stored if x not in order)]}


def store(name: str, row: dict[str, Any]) -> None:
    """Write a row."""
    write_text(ATLAS / f"{name}.json", json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def written(row: dict[str, Any], claim: str) -> str:
    """A cell in words: values by layer, each with its interval, and the verdict of a study."""
    if claim not in row["cells"]:
        return "cannot be told"
    values: list[str] = []
    for one in row["cells"][claim]:
        value, low, high = ("" if one[x] is None else f"{one[x]:.3g}" for x in NUMBER)
        where = f"layer {one['layer']}: " if one["layer"] else ""
        values.append(f"{where}{value}{f' [{low}–{high}]' if low else ''}")
    verdict = row.get("verdicts", {}).get(claim)
    known = any(one["low"] is not None for one in row["cells"][claim])
    after = f"**{verdict}**" if verdict else "" if known else "*interval cannot be told*"
    return "<br>".join([*values, after] if after else values)


def main(arguments: list[str]) -> None:
    """Make the rows of the repository, or one of a study."""
    if not arguments:
        for name, row in rows().items():
            store(name, row)
        return
    path, name = arguments
    summary = json.loads(Path(path).read_text(encoding="utf-8"))
    if summary.get("format") != "minimoe-study" or not name.isidentifier():
        sys.exit("expected the summary.json of a study and a name of letters, digits and _")
    model = summary.get("model") or summary.get("checkpoint")
    said = summary["measurements"]["text"]
    store(name, of_study(summary, model=model, text=said))
    print(f"{ATLAS / name}.json: say in it who measured, on what, and propose it")


if __name__ == "__main__":
    main(sys.argv[1:])
