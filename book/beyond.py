"""The comparison of lesson 19: images, speech and series; its runs, and what the rule of claim C18 says of them.

python -m book.beyond    the pieces that book/results/beyond/plan.toml asks for and its folder lacks, then
                         book/results/beyond.json; needs the packages that book/beyond_data.py fetches
python -m book.beyond --stored    only the latter, of the pieces that are there

There is no verdict before three seeds of every arm are there in every field.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.beyond_data import SERIES, arrays  # noqa: E402
from book.verdicts import about, as_object  # noqa: E402
from minimoe.config import ModelConfig  # noqa: E402
from minimoe.course.beyond import (  # noqa: E402
    Batch,
    Loss,
    Training,
    VectorModel,
    digits,
    fit,
    patches,
    with_capacity,
)
from minimoe.course.plan import (  # noqa: E402
    Numbers,
    Piece,
    read_pieces,
    read_tables,
    recipe,
    run_missing,
    stored,
)
from minimoe.course.seeds import difference as paired  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.routing import Routing  # noqa: E402
from minimoe.study import claims as say  # noqa: E402
from minimoe.study.chance import Band, mutual_information  # noqa: E402

FOLDER = ROOT / "book" / "results" / "beyond"
RESULT = FOLDER.with_suffix(".json")
FIELDS = {"digits": "share of wrong images", "speech": "L1", "series": "squared error"}
ARMS = ("dense", "moe")
DRAWS = 20  # of each null
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is held out: n sequences, of G documents and U units that are resampled."""

    x: Tensor  #: [n, S, inputs]
    y: Tensor
    valid: Tensor  #: [n, S] whether a place is one of the sequence
    document: Ints  #: [n] whose labels are permuted together
    unit: Ints  #: [n]
    whole: dict[str, Ints]  #: labels [n] of whole documents
    each: dict[str, Ints]  #: labels [n, S] of tokens
    titles: tuple[str, ...] = ()  #: of the units


@dataclasses.dataclass(frozen=True)
class Field:
    """Data of a field, its shape and its losses; `judge` gives a number for each sequence [n] of a part."""

    inputs: int
    outputs: int
    length: int
    causal: bool
    pooled: bool
    batch: Callable[[int], Batch]  #: by the size of a batch
    loss: Loss
    judge: dict[str, Callable[[Tensor, Part], Tensor]]  #: the first tunes, the last decides
    parts: dict[str, Part]


def quantile(x: npt.NDArray[Any], parts: int) -> Ints:
    """Which of so many equal parts each number belongs to."""
    return np.digitize(x, np.quantile(x, np.arange(1, parts) / parts))


def digits_field() -> Field:
    """Images of digits as 16 patches."""
    images, y = digits(FOLDER / "digits.csv.gz")
    x = patches(images, 2)
    x = (x - x[:1000].mean()) / x[:1000].std()

    def batch(size: int) -> Batch:
        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            i = torch.randint(1000, (size,), generator=generator)
            return x[i], y[i]

        return draw

    def part(low: int, high: int) -> Part:
        own, n = x[low:high], high - low
        place = np.tile(np.arange(16), (n, 1))
        each = {"place": place, "ink": quantile(own.mean(-1).numpy(), 4)}
        valid = torch.ones(n, 16, dtype=torch.bool)
        whole = {"digit": y[low:high].numpy()}
        return Part(own, y[low:high], valid, np.arange(n), np.arange(n), whole, each)

    judge = {
        "nats": lambda out, p: F.cross_entropy(out, p.y, reduction="none"),
        "wrong": lambda out, p: (out.argmax(-1) != p.y).float(),
    }
    parts = {"validation": part(1000, 1250), "test": part(1250, len(x))}
    return Field(4, 10, 16, False, True, batch, F.cross_entropy, judge, parts)


AHEAD, WINDOW = 2, 32  # tokens of 40 ms


def speech_field() -> Field:
    """Recorded prompts, a token every 40 ms."""
    z = arrays("speech")
    x, length = torch.from_numpy(z["x"].astype(np.float32)), z["length"].astype(np.int64)
    start = np.concatenate(([0], length.cumsum()[:-1]))
    span = WINDOW + AHEAD
    groups = [
        np.flatnonzero((z["part"] == 0) & (z["language"] == k) & (length >= span)) for k in range(5)
    ]

    def batch(size: int) -> Batch:
        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            pick = torch.rand(size, 3, generator=generator).double().numpy()
            group = (pick[:, 0] * 5).astype(int)
            file = [
                groups[g][int(p * len(groups[g]))] for g, p in zip(group, pick[:, 1], strict=True)
            ]
            first = start[file] + (pick[:, 2] * (length[file] - span + 1)).astype(int)
            rows = x[torch.from_numpy(first)[:, None] + torch.arange(span)]
            return rows[:, :WINDOW], rows[:, AHEAD:]

        return draw

    def part(number: int) -> Part:
        rows, files, sizes = [], [], []
        for file in np.flatnonzero((z["part"] == number) & (length > AHEAD)):
            for at in range(0, length[file] - AHEAD, WINDOW):
                size = min(span, length[file] - at)
                row = torch.zeros(span, x.shape[1])
                row[:size] = x[start[file] + at : start[file] + at + size]
                rows.append(row)
                files.append(file)
                sizes.append(size - AHEAD)
        all_rows, file = torch.stack(rows), np.array(files)
        valid = torch.arange(WINDOW) < torch.tensor(sizes)[:, None]
        titles, unit = np.unique(z["name"][file], return_inverse=True)
        loud = all_rows[:, :WINDOW].mean(-1).numpy()
        edges = np.quantile(loud[valid.numpy()], np.arange(1, 5) / 5)
        each, whole = (
            {"loudness": np.digitize(loud, edges)},
            {"language": z["language"][file].astype(np.int64)},
        )
        x_y = all_rows[:, :WINDOW], all_rows[:, AHEAD:]
        return Part(*x_y, valid, file, unit, whole, each, tuple(map(str, titles)))

    def off(out: Tensor, p: Part) -> Tensor:
        one = (out - p.y).abs().mean(-1) * p.valid
        return one.sum(1) / p.valid.sum(1)

    parts = {"validation": part(1), "test": part(2)}
    width = x.shape[1]
    return Field(width, width, WINDOW, True, False, batch, F.l1_loss, {"l1": off}, parts)


HOURS, WEEK, BLOCK = 6, 28, 28  # of a patch; patches of context; days of a unit


def series_field() -> Field:
    """Hourly series as patches of six hours, a week of context."""
    z = arrays("series")
    names, size = list(SERIES), HOURS * (WEEK + 1)

    def starts(name: str, low: float, high: float) -> Ints:
        a = z[name]
        first, last = int(low * len(a)) // 24 * 24, int(high * len(a)) - size
        return np.array([i for i in range(first, last, 24) if not np.isnan(a[i : i + size]).any()])

    def windows(name: str, at: Ints) -> Tensor:
        w = z[name][at[:, None] + np.arange(size)]
        context = w[:, :-HOURS]
        w = (w - context.mean(1, keepdims=True)) / (context.std(1, keepdims=True) + 1e-6)
        return torch.from_numpy(w.astype(np.float32)).view(len(at), WEEK + 1, HOURS)

    train = [windows(name, starts(name, 0, 0.6)) for name in names]

    def batch(size: int) -> Batch:
        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            pick = torch.rand(size, 2, generator=generator).tolist()
            own = [train[int(a * len(train))] for a, _ in pick]
            rows = torch.stack([o[int(b * len(o))] for o, (_, b) in zip(own, pick, strict=True)])
            return rows[:, :-1], rows[:, 1:]

        return draw

    def part(low: float, high: float) -> Part:
        at = [starts(name, low, high) for name in names]
        rows = torch.cat([windows(name, a) for name, a in zip(names, at, strict=True)])
        series = np.repeat(np.arange(len(names)), [len(a) for a in at])
        day = np.concatenate(at) // 24
        block = np.unique(series * 10_000 + day // BLOCK, return_inverse=True)[1]
        patch = np.arange(WEEK)
        weekday = (z["weekday"].astype(np.int64)[series][:, None] + day[:, None] + patch // 4) % 7
        quarter = np.tile(patch % 4, (len(day), 1))
        each = {"quarter of the day": quarter, "weekend": (weekday >= 5).astype(np.int64)}
        valid = torch.ones(len(rows), WEEK, dtype=torch.bool)
        return Part(rows[:, :-1], rows[:, 1:], valid, block, block, {"series": series}, each)

    def off(out: Tensor, p: Part) -> Tensor:
        return (out[:, -1] - p.y[:, -1]).square().mean(-1)

    parts = {"validation": part(0.6, 0.75), "test": part(0.75, 1)}
    return Field(HOURS, HOURS, WEEK, True, False, batch, F.huber_loss, {"mse": off}, parts)


MAKERS = {"digits": digits_field, "speech": speech_field, "series": series_field}


def build(config: ModelConfig, field: Field, seed: int) -> VectorModel:
    """The model of a run, made from the seed."""
    torch.manual_seed(seed)
    sizes = field.inputs, field.outputs, field.length
    return VectorModel(config, *sizes, causal=field.causal, pooled=field.pooled)


@torch.no_grad()
def answers(model: VectorModel, part: Part) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """Outputs for all sequences, and experts [n, S, L, K] of their tokens, L = 0 where all is dense."""
    outs, chosen = [], []
    for x in part.x.split(256):
        out, routings = model(x)
        outs.append(out)
        own = [r.expert.view(*x.shape[:2], -1) for r in routings]
        chosen.append(torch.stack(own, 2) if own else torch.zeros(*x.shape[:2], 0, 1))
    return torch.cat(outs), torch.cat(chosen).to(torch.uint8).numpy()


def over_groups(value: npt.NDArray[Any], group: Ints, by: Ints | None = None) -> list[float]:
    """Mean of the values [n] of each group; with `by`, weighted so that each of `by` counts alike."""
    weight = np.ones(len(value)) if by is None else 1 / np.bincount(by)[by]
    weight = weight / weight.sum()
    sums = np.bincount(group, weight * value)
    return [round(s, 7) for s in (sums * len(sums)).tolist()]


def over(value: npt.NDArray[Any], group: Ints) -> list[float]:
    """Mean of the values [n] of each group."""
    return [round(x, 5) for x in (np.bincount(group, value) / np.bincount(group)).tolist()]


def shown(field: str, part: Part) -> dict[str, npt.NDArray[Any]]:
    """What the lesson needs of a part beside its choices: labels; of speech one phrase in five languages as sound
    (sixteenths of a standard deviation), of series eight weeks of the road's traffic."""
    labels = {k: v.astype(np.uint8) for k, v in (part.whole | part.each).items()}
    document = np.unique(part.document, return_inverse=True)[1].astype(np.uint16)
    kept = {"valid": part.valid.numpy(), "document": document, **labels}
    if field == "digits":
        kept["image"] = np.round(part.x.numpy() * 32).astype(np.int8)
    if field == "speech":
        rows = [np.flatnonzero(part.unit == u) for u in range(len(part.titles))]
        sizes = part.valid.sum(1).numpy()
        whole = [r for r in rows if len(r) == 5 and len(set(part.whole["language"][r])) == 5]
        best = max(whole, key=lambda r: int(sizes[r].min()))
        kept |= {"phrase": best, "title": np.array(part.titles[part.unit[best[0]]])}
        kept["sound"] = np.clip(np.round(part.x[best].numpy() * 16), -127, 127).astype(np.int8)
    if field == "series":
        kept["hours"] = arrays("series")["road traffic"][-24 * 56 :]
    return kept


def information(label: Ints, expert: Ints, experts: int) -> float:
    """I(label; expert) in bits of [n] labels and [n, K] choices, each of the K counted alike."""
    table = np.zeros((label.max() + 1, experts))
    np.add.at(table, (np.repeat(label, expert.shape[1]), expert.ravel()), 1)
    return float(mutual_information(table))


def by_depth(
    part: Part, chosen: npt.NDArray[np.uint8], experts: int
) -> dict[str, list[list[float]]]:
    """Of each label, for each layer: information in bits, and the mean of its null.

    Labels of whole documents are permuted among documents; those of tokens are shifted in a circle, each sequence by
    a number of its own.
    """
    rng, found = np.random.default_rng(19), {}
    valid, (n, size) = part.valid.numpy(), part.valid.shape
    document = np.unique(part.document, return_inverse=True)[1]
    first = np.unique(document, return_index=True)[1]

    def drawn(name: str) -> Ints:
        if name in part.each:
            shift = rng.integers(size, size=(n, 1))
            return np.take_along_axis(part.each[name], (np.arange(size) + shift) % size, 1)
        moved = rng.permutation(part.whole[name][first])[document]
        return np.repeat(moved[:, None], size, 1)

    given = {k: np.repeat(v[:, None], size, 1) for k, v in part.whole.items()} | part.each
    for name, label in given.items():
        nulls = [drawn(name)[valid] for _ in range(DRAWS)]
        found[name] = []
        for layer in range(chosen.shape[2]):
            own = chosen[valid][:, layer].astype(np.int64)
            null = fmean(information(other, own, experts) for other in nulls)
            found[name].append([round(information(label[valid], own, experts), 4), round(null, 4)])
    return found


def orders(routing: Routing, generator: torch.Generator) -> dict[str, Tensor]:
    """Three orders in which the T tokens of a batch may take places."""
    assert routing.probs is not None
    return {
        "arrival": torch.arange(routing.num_tokens),
        "random": torch.randperm(routing.num_tokens, generator=generator),
        "priority": routing.probs.amax(-1).argsort(descending=True),
    }


def at_capacity(model: VectorModel, part: Part) -> dict[str, dict[str, float]]:
    """The share of wrong images by order and capacity factor, all images of the part in one batch."""
    found: dict[str, dict[str, float]] = {}
    for name, factor in itertools.product(("arrival", "random", "priority"), (1.0, 0.5, 0.25, 0.1)):
        generator = torch.Generator().manual_seed(19)

        def order(r: Routing, name: str = name, g: torch.Generator = generator) -> Tensor:
            return orders(r, g)[name]

        out, _ = with_capacity(model, part.x, factor, order)
        wrong = (out.argmax(-1) != part.y).double().mean().item()
        found.setdefault(name, {})[f"{factor:g}"] = round(wrong, 5)
    return found


def train(config: ModelConfig, training: Training, field: Field, final: bool) -> dict[str, Any]:
    """One run, and what a piece stores of it: of tuning the loss on validation, of the rest what the test part says."""
    model = build(config, field, training.seed)
    curve = fit(model, training, field.batch(training.batch_size), field.loss)
    part = field.parts["test" if final else "validation"]
    out, chosen = answers(model, part)
    by = part.whole.get("series")
    found: dict[str, Any] = {"seconds": curve[-1][2], "curve": curve}
    one = np.zeros(0)
    for name, judge in field.judge.items():
        one = judge(out, part).double().numpy()
        own = over_groups(one, part.unit, by)
        found |= {name: round(fmean(own), 6)} | ({f"{name}_by_unit": own} if final else {})
    if final and chosen.shape[2]:
        found["information"] = by_depth(part, chosen, config.num_experts)
        if field.pooled:
            found["capacity"] = at_capacity(model, part)
        if training.seed == 0:
            path = FOLDER / f"choices-{training.field}.npz"
            np.savez_compressed(path, expert=chosen, **shown(training.field, part))  # pyright: ignore[reportArgumentType]
    if final and not field.pooled:
        ((label, of),) = part.whole.items()
        found["by_label"] = {label: over(one, of)}
        if by is not None:
            ago = {"a day ago": 24 // HOURS, "a week ago": WEEK}
            errors = {k: field.judge["mse"](part.x.roll(n - 1, 1), part) for k, n in ago.items()}
            found["naive"] = {k: over(v.double().numpy(), by) for k, v in errors.items()}
    return found


def read_plan(path: Path) -> list[Piece]:
    """The pieces of the plan."""
    stages, shared = read_tables(path, "model")

    def made(arm: str, own: Numbers, chosen: Numbers) -> tuple[ModelConfig, Training]:
        dense = tuple(range(shared["num_hidden_layers"])) if arm == "dense" else ()
        return ModelConfig(vocab_size=1, mlp_only_layers=dense, **shared, **own), Training(**chosen)

    return read_pieces(path, stages, made)


def run_plan(path: Path) -> None:
    """Run the pieces that have no file yet."""
    fields: dict[str, Field] = {}

    def run(piece: Piece) -> Numbers:
        name = piece.training.field
        field = fields.get(name) or fields.setdefault(name, MAKERS[name]())
        final = not piece.path.parent.name.startswith("tuning")
        return train(piece.model, piece.training, field, final)

    run_missing(read_plan(path), recipe, run)


def difference(pieces: Sequence[dict[str, Any]], measure: str) -> Band:
    """Sparse less dense of a field: the wider of two 95 % intervals, Student's over seeds and a bootstrap of units."""
    runs = {(p["recipe"]["arm"], p["recipe"]["training"]["seed"]): p for p in pieces}
    seeds = sorted({s for _, s in runs if all((arm, s) in runs for arm in ARMS)})
    if len(seeds) < 2:
        return Band(float("nan"))
    over_seeds = paired(*({s: runs[arm, s][measure] for s in seeds} for arm in ("moe", "dense")))
    units = np.mean(
        [
            np.subtract(*(runs[arm, s][f"{measure}_by_unit"] for arm in ("moe", "dense")))
            for s in seeds
        ],
        axis=0,
    )
    rng = np.random.default_rng(19)
    drawn = units[rng.integers(len(units), size=(2000, len(units)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    wide = high - low > over_seeds.high - over_seeds.low
    return Band(over_seeds.value, low, high) if wide else over_seeds


MEASURES = {"digits": "wrong", "speech": "l1", "series": "mse"}


def finding(bands: dict[str, Band]) -> say.Finding:
    """The verdict, from each field's difference."""
    margin = say.limits("C18")["margin"]
    parts, short = list[say.Part](), list[str]()
    for field, what in FIELDS.items():
        band = bands[field]
        said = f"{band.value:+.4f} [{band.low:+.4f} to {band.high:+.4f}]"
        verdict = say.inside(band, most=margin)
        parts.append(say.Part(f"{field}: {what}", said, verdict, True, band))
        short.append(f"{said} for {field}")
    return say.finding("C18", parts, "sparse less dense: " + ", ".join(short))


def main() -> None:
    """Run what is missing, and store the runs' results and the verdict."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    if sys.argv[1:] != ["--stored"]:
        run_plan(FOLDER / "plan.toml")
        print(f"{time.perf_counter() - started:.0f} s")
    tuning = {f: stored(FOLDER, f"tuning-{f}*") for f in FIELDS}
    runs = {f: stored(FOLDER, f) for f in FIELDS}
    every = [piece for part in (*tuning.values(), *runs.values()) for piece in part]

    def row(piece: dict[str, Any]) -> dict[str, Any]:
        training = piece["recipe"]["training"]
        extra = ("nats", "wrong", "l1", "mse", "seconds", "information", "capacity")
        own = {name: piece[name] for name in (*extra, "by_label", "naive") if name in piece}
        return {
            "arm": piece["recipe"]["arm"],
            "lr": training["lr"],
            "seed": training["seed"],
            **own,
        }

    bands = {f: difference(runs[f], MEASURES[f]) for f in FIELDS}
    whole = all(
        sum(p["recipe"]["arm"] == arm for p in runs[f]) >= 3 for f in FIELDS for arm in ARMS
    )
    result = {
        **about(every, "python -m book.beyond"),
        "seconds": round(sum(p["seconds"] for p in every)),
        "findings": [as_object(finding(bands))] if whole else [],
        "differences": {f: [b.value, b.low, b.high] for f, b in bands.items()},
        "tuning": {f: [row(p) for p in pieces] for f, pieces in tuning.items()},
        "runs": {f: [row(p) for p in pieces] for f, pieces in runs.items()},
    }
    text = json.dumps(result, ensure_ascii=False).replace(', {"arm"', ',\n{"arm"')
    write_text(RESULT, text + "\n")


if __name__ == "__main__":
    main()
