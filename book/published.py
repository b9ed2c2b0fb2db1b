"""Bits that token and domain tell of an expert in Mixtral and OLMoE, by the library's formula from published counts.

    git clone https://github.com/allenai/OLMoE
    python -m book.published OLMoE/scripts/routing_output      into book/results/published_bits.json

The counts are of three layers each. Those with token ids (eid2token) and those without (expert_counts) are of different
runs. They are stored as pickles, which can run code when they are read: here only dictionaries, counters and NumPy's
numbers are let in, and the numbers alone are kept. Those of domains go into minimoe/study/published, and so do those of
OLMoE before and after its tuning, on one text.
"""

import collections
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimoe.bench.timing import environment
from minimoe.io import write_text
from minimoe.study.counts import PUBLISHED, CountTable

SOURCE = {
    "source": "https://github.com/allenai/OLMoE, scripts/routing_output",
    "commit": "357454f4f647385839c0ff6b99a688dc7cd9c13f",
    "licence": "Apache-2.0",
    "command": "python -m book.published FOLDER",
}
LAYERS = (1, 8, 16)
MODELS = {"mistral": ("Mixtral-8x7B", 8, 2), "olmoe": ("OLMoE-1B-7B", 64, 8)}  # name, E, K
STAGES = {"base": "olmoe", "SFT": "olmoe-sft", "DPO": "olmoe-dpo"}  # on conversations of Tulu
TEXT = {
    "domains": "text of five domains, cut to 2,048 tokens; layers 1, 8 and 16 of {layers}",
    "stages": "one set of conversations of Tulu, read before and after tuning; layers 1, 8 and 16 of 16",
}
ALLOWED = {
    ("collections", "Counter"): collections.Counter,
    ("collections", "defaultdict"): collections.defaultdict,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype)[0],
}


class Numbers(pickle.Unpickler):
    """Reads dictionaries, counters and numbers; anything else is a pickle.UnpicklingError."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What a pickle may name."""
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return ALLOWED[module_name, global_name]


def read(path: Path) -> list[dict[int, Any]]:
    """The three layers of a file: by expert a number, or numbers by token id."""
    with path.open("rb") as file:
        return Numbers(file).load()


def table(folder: Path, experts: int, k: int) -> CountTable:
    """The counts of all domains in a folder; those of tokens where the files tell them apart."""
    files = {path.stem: read(path) for path in sorted(folder.glob("*.pkl")) if path.stem != "tulu"}
    counted = [c for layers in files.values() for layer in layers for c in layer.values()]
    ids = sorted(set().union(*counted)) if isinstance(counted[0], dict) else None
    place = {token: i for i, token in enumerate(ids or [])}
    counts = np.zeros((len(LAYERS), len(files), max(len(place), 1), experts), np.int64)
    for d, layers in enumerate(files.values()):
        for x, layer in enumerate(layers):
            for expert, seen in layer.items():
                if ids is None:
                    counts[x, d, 0, expert] = seen
                else:
                    counts[x, d, [place[t] for t in seen], expert] = list(seen.values())
    token = None if ids is None else np.array(ids, np.int64)
    return CountTable(counts, tuple(files), LAYERS, k, token)


def store(table: CountTable, name: str, **about: str) -> None:
    """Counts of domains as a JSON file that `CountTable.read` reads, a layer a line."""
    head = {**about, "experts_per_token": table.k, "layers": list(table.layers)}
    lines = ["{", *(f" {json.dumps(x)}: {json.dumps(y)}," for x, y in head.items()), ' "counts": {']
    for d, domain in enumerate(table.domains):
        rows = ",\n   ".join(json.dumps(row) for row in table.counts[:, d, 0].tolist())
        end = "," if d < len(table.domains) - 1 else ""
        lines.append(f"  {json.dumps(domain)}: [\n   {rows}\n  ]{end}")
    write_text(PUBLISHED / f"{name}.json", "\n".join([*lines, " }", "}"]) + "\n")


def main(folder: Path) -> None:
    """Compute and store."""
    said = {x: SOURCE[x] for x in ("source", "commit", "licence")}
    for short, name, model, layers in (
        ("mistral", "mixtral_8x7b", "Mixtral-8x7B-v0.1 (base)", 32),
        ("olmoe", "olmoe_1b_7b", "OLMoE-1B-7B-0924 (base)", 16),
    ):
        counted = table(folder / short / "expert_counts", *MODELS[short][1:])
        text = TEXT["domains"].format(layers=layers)
        store(counted, f"{name}_domains", model=model, text=text, **said)
    read_by = {x: read(folder / y / "expert_counts/tulu.pkl") for x, y in STAGES.items()}
    counts = np.array([[[n[e] for e in range(64)] for n in by] for by in read_by.values()])
    tuned = CountTable(counts.swapaxes(0, 1)[:, :, None], tuple(STAGES), LAYERS, 8)
    about = {"model": "OLMoE-1B-7B-0924", "text": TEXT["stages"]} | said
    store(tuned, "olmoe_1b_7b_stages", **about)
    rows: list[dict[str, Any]] = []
    for short, (name, experts, k) in MODELS.items():
        by_token, by_domain = (
            table(folder / short / kind, experts, k) for kind in ("eid2token", "expert_counts")
        )
        for layer in LAYERS:
            told, domains = by_token.information(layer), by_domain.information(layer)
            row = {"model": name, "layer": layer, "limit": told["limit"]}
            row |= {"token": told["token"], "domain": domains["domain"]}
            row |= {"load": by_domain.load(layer).value}
            rows.append({x: round(v, 4) if isinstance(v, float) else v for x, v in row.items()})
            print(rows[-1])
        rows[-1] |= {
            "token_domains": list(by_token.domains), "domain_domains": list(by_domain.domains),
            "tokens": int(by_token.num_tokens.sum()),
        }  # fmt: skip
    result = environment(torch.device("cpu"), 1) | SOURCE | {"rows": rows}
    write_text(
        Path(__file__).parent / "results/published_bits.json", json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
