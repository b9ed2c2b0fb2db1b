"""How often the live router's int8 weights choose as the full weights do, and the load of each domain.

python book/live_router.py     writes book/results/live_router.json: a minute on one core, with the text fetched
python book/live_router.py --checkpoint FOLDER     your own model: live_router.json and live_router.html in its folder
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.checkpoint import pretrained_path  # noqa: E402
from minimoe.course.recording import record_split  # noqa: E402
from minimoe.hf.lazy import quantize_experts  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.model import MixtralModel  # noqa: E402
from minimoe.study.questions import EQUAL_TOKENS, identity_of  # noqa: E402
from minimoe.study.report import rounded, surroundings  # noqa: E402
from minimoe.text.corpus import load_corpus  # noqa: E402
from minimoe.text.tokenizer import begin_of_text_id, load_tokenizer  # noqa: E402
from minimoe.train.environment import today  # noqa: E402
from minimoe.widgets.explorable import Explorable, file_script, script  # noqa: E402
from minimoe.widgets.live_router import live_router  # noqa: E402

RESULT = ROOT / "book" / "results" / "live_router.json"


def measure(checkpoint: str = "mini", max_tokens: int = EQUAL_TOKENS) -> dict[str, Any]:
    """Both models on the first held-out documents of each domain, up to `max_tokens` tokens, as the study reads them.

    Shares are by layer, [L]: `same_set`, tokens with the same experts, in whatever order; `same_first`, with the same
    first one. `load` and `load_full`, [domain][layer][expert], are the shares of all assignments, of int8 and of the
    full weights.
    """
    path = pretrained_path(checkpoint)
    full = MixtralModel.from_pretrained(path)
    models = {"int8": quantize_experts(full), "full": full}
    tokenizer = load_tokenizer(path)
    corpus = load_corpus(tokenizer=tokenizer)
    identity = identity_of(path, corpus, max_tokens)
    domains: list[dict[str, Any]] = []
    for name in corpus.domains:
        expert = {
            kind: record_split(
                model, corpus.heldout, domains=[name], max_tokens=max_tokens,
                end_of_text=begin_of_text_id(tokenizer, own=True),
            ).expert
            for kind, model in models.items()
        }  # fmt: skip
        domains.append(
            {
                "name": name,
                "tokens": len(expert["full"]),
                **agreement(expert["int8"], expert["full"]),
                "load": load(expert["int8"], full.config.num_experts),
                "load_full": load(expert["full"], full.config.num_experts),
            }
        )
    tokens = [d["tokens"] for d in domains]
    return {
        "date": today(),
        "command": "python book/live_router.py"
        + (f" --checkpoint {path.name}" if checkpoint != "mini" else ""),
        "checkpoint": checkpoint,
        "checkpoint_sha256": identity["checkpoint_sha256"],
        "data_sha256": identity["data_sha256"],
        **surroundings(),
        "tokens": sum(tokens),
        **{
            key: np.average([d[key] for d in domains], axis=0, weights=tokens).tolist()
            for key in ("same_set", "same_first")
        },
        "domains": domains,
    }


def agreement(a: npt.NDArray[np.int16], b: npt.NDArray[np.int16]) -> dict[str, list[float]]:
    """Shares [L] of tokens to which a and b [T, L, K] give the same experts, and the same first one."""
    return {
        "same_set": (np.sort(a, axis=2) == np.sort(b, axis=2)).all(axis=2).mean(axis=0).tolist(),
        "same_first": (a[:, :, 0] == b[:, :, 0]).mean(axis=0).tolist(),
    }


def load(expert: npt.NDArray[np.int16], num_experts: int) -> list[list[float]]:
    """Share of the assignments that each expert gets, from expert [T, L, K] -> [L][E]."""
    return [
        (np.bincount(chosen.ravel(), minlength=num_experts) / chosen.size).tolist()
        for chosen in expert.transpose(1, 0, 2)
    ]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The live router</title></head>
<body style="max-width: 46rem; margin: 1rem auto; padding: 0 0.5rem">
%(place)s
<script>
var minimoe = {};
%(script)s
const place = document.querySelector(".minimoe-explorable");
const el = place.appendChild(document.createElement("div"));
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const data = JSON.parse(place.querySelector("script").textContent);
const given = { data, files: async (file) => bytes(minimoe[`live_router/${file}`]) };
minimoe.live_router.render({ model: { get: (key) => given[key] }, el }).then(() => {
  if (!el.dataset.failed) place.querySelector("figure").remove();
  place.dataset.state = el.dataset.failed ? "failed" : "ready";
});
</script></body></html>
"""


def alone(explorable: Explorable) -> str:
    """A page of its own that needs no other file."""
    files = [file_script(explorable.name, name, make()) for name, make in explorable.files.items()]
    return PAGE % {"place": explorable.html(), "script": script(explorable.name) + "".join(files)}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="mini", metavar="FOLDER")
    given = parser.parse_args().checkpoint
    result, folder = rounded(measure(given)), pretrained_path(given)
    path = RESULT if given == "mini" else folder / RESULT.name
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for key in ("same_set", "same_first"):
        print(key, *(f"{share:.4f}" for share in result[key]))
    if given != "mini":
        write_text(path.with_suffix(".html"), alone(live_router(given)))
        print(f"open {path.with_suffix('.html')} in a browser")


if __name__ == "__main__":
    main()
