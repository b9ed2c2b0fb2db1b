"""Paths, repeats and pairs of experts in DeepSeek-V2-Lite, by the library's statistics from published choices.

    git clone https://github.com/deepseek-ai/ESFT
    python -m book.v2_lite ESFT/results/expert_scores      into book/results/v2_lite.json

The counts of all layers go into minimoe/study/published.

A file is one sparse layer's choices for a task's texts, a line each: experts, two tabs, their weights; six of 64
experts for a token, in no order of weight, so they are sorted here. Which tokens were read is not published.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from book.published import store
from minimoe.bench.timing import environment
from minimoe.io import write_text
from minimoe.study import chance as ch
from minimoe.study.counts import CountTable, intervals
from minimoe.study.depth import layer_dependence
from minimoe.study.domains import domain_load
from minimoe.study.paths import coactivation, paths, repeats
from minimoe.study.trace import RoutingTrace, TraceDocument

SOURCE = {
    "model": "DeepSeek-V2-Lite",
    "source": "https://github.com/deepseek-ai/ESFT, results/expert_scores",
    "commit": "579a7711e4b332b4c57b47e378a0cf240d85caa6",
    "licence": "MIT for the code; none is named for these files, so only statistics of them are kept",
    "command": "python -m book.v2_lite FOLDER",
}
TASKS = ("intent", "law", "summary", "translation")
LAYERS, E, K = tuple(range(1, 27)), 64, 6
DEPTHS = (1, 2, 4, 8, 13, 26)
THREE = (1, 13, 26)


def lines(path: Path) -> list[tuple[Any, Any]]:
    """Of each text of a file [n, K] experts and their weights, the largest weight first."""
    found = list[tuple[Any, Any]]()
    for line in path.read_text(encoding="utf-8").strip().split("\n"):
        experts, weights = (
            np.array(part.split(), float).reshape(-1, K) for part in line.split("\t\t")
        )
        order = np.argsort(-weights, axis=1, kind="stable")
        pair = (np.take_along_axis(x, order, axis=1) for x in (experts, weights))
        found.append(tuple(pair))  # type: ignore[arg-type]
    return found


def read(folder: Path) -> RoutingTrace:
    """All files as one trace."""
    layers = [
        [text for task in TASKS for text in lines(folder / task / f"expert_weights_{n}.txt")]
        for n in LAYERS
    ]
    count = [len(lines(folder / task / "expert_weights_1.txt")) for task in TASKS]
    length = np.array([len(experts) for experts, _ in layers[0]])
    documents = tuple(
        TraceDocument(task, str(i)) for task, n in zip(TASKS, count, strict=True) for i in range(n)
    )
    expert, weight = (
        np.stack([np.concatenate([t[i] for t in x]) for x in layers], axis=1) for i in (0, 1)
    )
    document = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(document)) - np.repeat(np.cumsum(length) - length, length)
    meta = {"tokens": "not given"}
    every: Any = (0 * document, document, position, expert, weight, documents, E, LAYERS, meta)
    kinds: Any = (np.int32, np.int32, np.int32, np.int16, np.float32)
    return RoutingTrace(*(x.astype(t) for x, t in zip(every, kinds)), *every[5:])  # noqa: B905


def shared_beginning(path: ch.Ints, document: ch.Ints) -> ch.Mask:
    """[n] whether an earlier document began with the same paths up to and with this token's."""
    inside, seen, story = np.zeros(len(path), bool), set[tuple[int, ...]](), ()
    for i, (code, d) in enumerate(zip(path.tolist(), document.tolist(), strict=True)):
        story = (hash((*story, code)),) if i and d == document[i - 1] else (code, -1)
        inside[i] = story in seen
        seen.add(story)
    return inside


def main(folder: Path) -> None:
    """Compute and store."""
    trace = read(folder)
    about = {x: SOURCE[x] for x in ("model", "source", "commit", "licence")}
    text = "texts of four tasks, of which two have Chinese prompts; all 26 layers with experts"
    store(CountTable.of(trace), "deepseek_v2_lite_tasks", text=text, **about)
    made = {kind: paths(trace, kind=kind, permutations=9).to_dict() for kind in ("first", "set")}
    steps = [ch.set_codes(trace.layer(n).astype(np.int64))[0] for n in LAYERS]
    path, document = ch.join(steps), trace.document.astype(np.int64)
    again = np.ones(len(path), bool)
    again[np.unique(path, return_index=True)[1]] = False
    begun, domain = shared_beginning(path, document), trace.domain
    result = environment(torch.device("cpu"), 1) | SOURCE
    result |= {
        "tokens": len(trace), "documents": len(trace.documents), "experts": E, "experts_per_token": K,
        "paths": made,
        "pairs_on_one_path": int((np.bincount(path) * (np.bincount(path) - 1) // 2).sum()),
        "pairs_outside_beginnings": int((np.bincount(path[~begun]) * (np.bincount(path[~begun]) - 1) // 2).sum()),
        "tokens_outside_beginnings": int((~begun).sum()),
        "by_task": {
            task: {"tokens": int((m := domain == d).sum()), "repeated": float(again[m].mean()),
                   "in_shared_beginning": float((again & begun)[m].mean())}
            for d, task in enumerate(trace.domains)
        },
        "distinct_by_layers": {n: len(np.unique(ch.join(steps[:n]))) for n in DEPTHS},
        "repeats": [repeats(trace, n).to_dict() for n in LAYERS],
        "coactivation": [
            {x: y for x, y in coactivation(trace, n, permutations=20).to_dict().items()
             if x not in ("conditional", "chance")}
            for n in THREE
        ],
        "intervals": [
            {x: y if x == "layer" else y.to_dict() for x, y in row.items()} for row in intervals(trace)
        ],
        "tasks": [
            {x: y for x, y in domain_load(trace, n).to_dict().items() if x not in ("pooled", "share")}
            for n in THREE
        ],
        "dependence": layer_dependence(trace.of_layers((1, 2, 13, 14, 25, 26))).to_dict(),
    }  # fmt: skip
    write_text(Path(__file__).parent / "results/v2_lite.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
