"""Watching balance train: the load of every expert over the steps of stored runs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimoe.balance import Load
from minimoe.checkpoint import pretrained_path, read_tensors
from minimoe.course import style
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT = Path(__file__).resolve().parents[3] / "book" / "results" / "balance_films.json"
FRAME = 5  # steps of lesson 04 in a frame
FULL = 4  # times the fair share at which the colour is darkest
TITLES = {
    "nothing": "no balancing",
    "Switch loss, 0.1": "Switch loss, weight 0.1",
    "importance, 0.1": "importance, weight 0.1",
    "bias, 0.01": "bias, rate 0.01",
    "capacity, 1.25": "capacity factor 1.25",
    "z-loss, 0.01": "z-loss, weight 0.01",
}


def mini_run() -> dict[str, Any]:
    """The shipped model's training: the experts of the same held-out tokens at every validation, and its log.

    counts [L][30][10][E]: assignments by layer, validation and domain; the loss is the mean of the log since the
    validation before; `log` holds MaxVio of every tenth step's batch, by layer.
    """
    folder = pretrained_path("mini")
    probe = read_tensors(folder / "probe.safetensors")
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    domains, experts = recipe["data"]["domains"], recipe["model"]["num_experts"]
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [row for row in map(json.loads, lines) if "max_vio" in row]
    chosen = probe["expert"].long()  # [30, T, L, K]
    frames, tokens, layers, k = chosen.shape
    chosen = chosen.view(frames, len(domains), -1, layers, k)
    hot = torch.nn.functional.one_hot(chosen, experts)  # [30, domains, T / domains, L, K, E]
    steps = probe["step"].tolist()
    return {
        "title": "the shipped model, mini",
        "about": f"The mini model of the later lessons. Each frame: {tokens:,} held-out tokens, "
        f"{tokens // len(domains)} of each domain and the same each time; each token has {k} of {experts} experts.",
        "unit": "nats per token",
        "steps": steps,
        "counts": hot.sum(dim=(2, 4)).permute(2, 0, 1, 3).tolist(),
        "groups": [str(domain).replace("_", " ") for domain in domains],
        "loss": [
            round(fmean([r["lm_loss"] for r in log if before < r["step"] <= step]), 3)
            for before, step in zip([0, *steps], steps, strict=False)
        ],
        "log": {
            "steps": [r["step"] for r in log],
            "max_vio": [[round(r["max_vio"][layer], 2) for r in log] for layer in range(layers)],
        },
    }


def lesson_runs() -> list[dict[str, Any]]:
    """The films of lesson 04, `FRAME` steps to a frame; none where its stored runs are not installed."""
    if not RESULT.is_file():
        return []
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    made: list[dict[str, Any]] = []
    for run in result["runs"]:
        counts = torch.tensor(run["counts"])  # [steps, E]
        frames = counts.view(-1, FRAME, counts.shape[1]).sum(dim=1)
        losses = torch.tensor(run["training_loss"]).view(-1, FRAME).mean(dim=1)
        made.append(
            {
                "title": f"{TITLES[run['cure']]}, seed {run['seed']}",
                "about": "The small model of lesson 04. Each frame: the "
                f"{FRAME * result['tokens_per_step']:,} characters of {FRAME} steps, each with one of "
                f"{counts.shape[1]} experts, before any drop.",
                "unit": "nats per character",
                "steps": list(range(FRAME, len(counts) + 1, FRAME)),
                "counts": [[[frame] for frame in frames.tolist()]],
                "groups": [],
                "loss": [round(loss, 3) for loss in losses.tolist()],
                "log": None,
            }
        )
    return made


def film(run: dict[str, Any], layer: int = 0, group: int | None = None) -> Tensor:
    """Counts of one layer [frames, E], of one group of tokens or of all."""
    counts = torch.tensor(run["counts"][layer])
    return counts.sum(dim=1) if group is None else counts[:, group]


def panels() -> list[tuple[str, list[int], Tensor]]:
    """Title, steps and counts of the films in the static figure."""
    mini = mini_run()
    last, law = len(mini["counts"]) - 1, mini["groups"].index("law")
    shown = [(run["title"], run["steps"], film(run)) for run in lesson_runs()[:2]]
    shown.append((f"mini, layer {last + 1}, all tokens", mini["steps"], film(mini, last)))
    return [*shown, (f"mini, layer {last + 1}, law alone", mini["steps"], film(mini, last, law))]


def draw() -> Figure:
    """Films as heat maps, expert by step."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    films = panels()
    rows = len(films) // 2
    figure, grid = style.panels(rows, 2, height=1.7 * rows)
    axes: list[Axes] = list(grid.flat)
    colours = Normalize(0, FULL)
    for axis, (title, steps, counts) in zip(axes, films, strict=True):
        share = counts / counts.sum(dim=1, keepdim=True)
        experts = share.shape[1]
        axis.imshow(
            (share.T * experts).numpy(), aspect="auto", cmap="Blues", norm=colours, interpolation="nearest",
            extent=(0, steps[-1], experts + 0.5, 0.5),
        )  # fmt: skip
        axis.set(title=title, xlabel="training step", ylabel="expert", yticks=range(1, experts + 1, 2))  # fmt: skip
    figure.colorbar(
        ScalarMappable(colours, "Blues"),
        ax=axes,
        label="times the fair share",
        ticks=range(FULL + 1),
        shrink=0.8,
    )
    return figure


def balance_film() -> Explorable:
    """The load of each expert over training, step by step: the mini model and the films of lesson 04."""
    shown: list[str] = []
    for title, steps, counts in panels():
        first, end = Load.from_counts(counts[0]), Load.from_counts(counts[-1])
        busiest = max(range(len(end.share)), key=end.share.__getitem__)
        shown.append(
            f"{title}: MaxVio {first.max_vio:.2f} at step {steps[0]} and {end.max_vio:.2f} at step {steps[-1]}, "
            f"where expert {busiest + 1} has {end.share[busiest]:.0%}."
        )
    alt = (
        "Share of the assignments of each expert over the steps of training, as heat maps. "
        + " ".join(shown)
    )
    data = {"full": FULL, "runs": [*lesson_runs(), mini_run()]}
    return Explorable("balance_film", data=data, draw=draw, alt=alt)
