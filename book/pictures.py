"""The pictures of the lessons, drawn anew: python book/pictures.py writes book/assets/pictures/*.svg.

Most of them show one case: a sentence of eight tokens, four experts, two experts for each token. The probabilities of
its router are made up, so that the load is uneven; all else is what the library makes of them.
"""

import itertools
import math
import random
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import mul
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.cost import count_parameters  # noqa: E402
from minimoe.course.draw import SMALL, WIDTH, Sheet  # noqa: E402
from minimoe.dispatch import plan  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.presets import PRESETS  # noqa: E402
from minimoe.routers import Router, TopKRouter  # noqa: E402
from minimoe.routing import Routing, expert_capacity, limit_capacity  # noqa: E402
from minimoe.zoo.expert_choice import ExpertChoiceRouter  # noqa: E402

FOLDER = ROOT / "book" / "assets" / "pictures"

TOKENS = ("The", "court", "held", "that", "the", "contract", "was", "void")
PROBABILITIES = torch.tensor([
    [0.52, 0.11, 0.31, 0.06],
    [0.44, 0.31, 0.21, 0.04],
    [0.07, 0.54, 0.12, 0.27],
    [0.36, 0.09, 0.32, 0.23],
    [0.44, 0.33, 0.15, 0.08],
    [0.27, 0.41, 0.08, 0.24],
    [0.08, 0.11, 0.48, 0.33],
    [0.30, 0.29, 0.20, 0.21],
])  # fmt: skip
T, E, K = 8, 4, 2
HUES = ("blue", "orange", "green", "purple")  # of the four experts
MIDDLE = WIDTH / 2
Cells = list[list[tuple[str, str]]]


def routed(router: Router) -> Routing:
    """What a router of the library makes of the case: with the identity as its matrix it sees the logits themselves."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        return router.eval()(PROBABILITIES.log())


def top_k() -> Routing:
    """Each token takes its two best experts."""
    return routed(TopKRouter(E, E, K))


def arrivals(routing: Routing) -> Iterator[tuple[int, int, bool]]:
    """Token, expert and 'kept' of each assignment, in order of arrival."""
    yield from zip(
        routing.token.tolist(), routing.expert.tolist(), routing.taken().tolist(), strict=True
    )


def entries(routing: Routing, shown: torch.Tensor) -> Cells:
    """What is `shown` [T, E], zeros left out, as cells; where an assignment stands they have its expert's colour."""
    return [
        [
            (f"{v:.2f}" if v else "", HUES[e] if r else "off")
            for e, (v, r) in enumerate(zip(*row, strict=True))
        ]
        for row in zip(shown.tolist(), routing.dense().tolist(), strict=True)
    ]


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def name_tokens(s: Sheet, x: float, y: float, h: float) -> None:
    """The tokens in front of the rows of a table, h high each; they end at x."""
    for t, token in enumerate(TOKENS):
        s.text((x, y + (t + 0.5) * h), token, anchor="end", size=SMALL)


def add(s: Sheet, x: float, y: float) -> None:
    """A sum of what comes in."""
    s.box((x - 10, y - 10, 20, 20), "+", rx=10)


# --- lesson 01 ------------------------------------------------------------------------------------


def block() -> Sheet:
    """Where the layer stands."""
    s = Sheet(
        392,
        "A transformer block, dense and sparse",
        """Two transformer blocks side by side, read from below. In both, the token vector goes through attention and
        then through a second half, and what each of them gives is added to what went in. The second half of the
        dense block is one MLP for all tokens. That of the sparse block is an MoE layer: a router and four experts,
        of which two run for this token; their outputs leave the layer together.""",
    )
    for x, name in ((90, "dense"), (270, "sparse")):
        side = x + 74
        s.text((x, 18), name)
        s.text((x, 376), "token vector x", "soft", size=SMALL)
        s.arrow((x, 364), (x, 335))
        s.box((x - 52, 311, 104, 24), "RMSNorm", size=SMALL)
        s.arrow((x, 311), (x, 299))
        s.box((x - 52, 273, 104, 26), "attention", size=SMALL)
        s.arrow((x, 273), (x, 261))
        s.arrow((x, 350), (side, 350), (side, 251), (x + 10, 251))
        add(s, x, 251)
        s.arrow((x, 241), (x, 214))
        s.arrow((x, 229), (side, 229), (side, 56), (x + 10, 56))
        s.box((x - 52, 190, 104, 24), "RMSNorm", size=SMALL)
        s.arrow((x, 82), (x, 66))
        add(s, x, 56)
        s.arrow((x, 46), (x, 30))
    s.arrow((90, 190), (90, 178))
    s.box((38, 82, 104, 96), "one MLP\nfor all tokens", "blue", SMALL)
    s.text((202, 72), "MoE layer", "soft", "start", SMALL)
    s.box((202, 82, 136, 96), css="off", stroke_dasharray=4)
    s.arrow((270, 190), (270, 172))
    s.box((238, 148, 64, 24), "router", size=SMALL)
    for e in range(E):
        left, runs = 208 + 33 * e, e in (1, 3)
        s.box((left, 102, 26, 24), str(e + 1), "blue" if runs else "off", SMALL)
        if runs:
            s.arrow((270, 148), (left + 13, 126), css="blue", width=2)
            s.line((left + 13, 102), (270, 83), css="blue", width=2)
    return s


def chosen_of_eight(layers: int) -> list[list[int]]:
    """Two experts of eight for each layer, drawn by lot, the same at every call."""
    dice = random.Random(4)
    return [sorted(sorted(range(8), key=lambda _: dice.random())[:2]) for _ in range(layers)]


def eight_models() -> Sheet:
    """What the article's Figs. 1 and 2 compare."""
    config = PRESETS["mixtral-8x7b"]
    layers, whole = config.num_hidden_layers, count_parameters(config)
    one = count_parameters(replace(config, num_experts=1, num_experts_per_tok=1))
    held, used, single = (n / 1e9 for n in (whole.total, whole.active, one.total))
    experts = whole.by_component["experts"]
    s = Sheet(
        434,
        "What 8x7B might mean, and what it means",
        f"""Left, what the name might mean and does not: eight whole models of {single:.0f} billion parameters side by
        side, of which a token goes through one. Right, the model: a stack of {layers} layers with eight experts
        each, of which a token goes through another two in every layer, and, beside it, what exists once for all
        tokens: attention, embeddings and norms. It holds {held:.1f} billion parameters, {experts.total / 1e9:.1f}
        of them in experts, and uses {used:.1f} billion for a token.""",
    )
    top, pitch = 78, 9
    bottom = top + layers * pitch
    s.text((86, 18), "not eight models", size=SMALL)
    s.text((86, 48), "a token goes through\none of them", "soft", size=SMALL)
    for m in range(8):
        s.box((18 + 18 * m, top, 12, layers * pitch), css="blue-head" if m == 4 else "off", rx=2)
    s.text((86, bottom + 16), f"8 × {single:.0f} B = {8 * round(single)} B", size=SMALL)
    s.text((270, 18), "but eight experts per layer", size=SMALL)
    s.text((270, 48), f"a token goes through two\nin each of {layers} layers", "soft", size=SMALL)
    s.box((196, top, 18, layers * pitch), css="blue-head", rx=2)
    for row, pair in enumerate(chosen_of_eight(layers)):
        for e in range(8):
            place = (222 + 16 * e, top + pitch * row + 1, 12, pitch - 2)
            s.box(place, css="blue-head" if e in pair else "off", rx=1)
    s.text((270, bottom + 16), f"{held:.1f} B held, {used:.1f} B used", size=SMALL)
    words = "bar: attention, embeddings,\nnorms, for all tokens"
    s.text((270, bottom + 46), words, "soft", size=SMALL)
    return s


# --- lesson 02 ------------------------------------------------------------------------------------


def wide_mlp() -> Sheet:
    """Equation (2): matrices side by side."""
    three, d, f = HUES[:3], 54, 40
    s = Sheet(
        424,
        "An average of experts is one wide MLP",
        """Above, three experts with matrices of their own: each makes its inner units h of the same vector x, and their
        outputs are averaged. Below, the same matrices in one MLP: the first ones are stacked on top of one another, so
        that their inner units form one column, and the second ones stand side by side, divided by three. Both give
        the same vector y.""",
    )
    s.text((MIDDLE, 18), "the average of three experts")
    for e, css in enumerate(three):
        y = 40 + 60 * e
        s.arrow((40, 40 + 60 + d / 2), (79, y + d / 2))
        s.box((80, y + 7, d, f), "W₁, W₃", css, SMALL, rx=0)
        s.box((152, y + 7, 14, f), "h", css, SMALL, rx=0)
        s.box((184, y, f, d), "W₂", css, SMALL, rx=0)
        for left in (134, 166):
            s.arrow((left, y + d / 2), (left + 17, y + d / 2))
        s.arrow((224, y + d / 2), (271, 40 + 60 + d / 2 + 8 * (e - 1)), css=css)
    s.box((272, 108, 42, 38), "÷ 3")
    s.text((MIDDLE, 240), "is one MLP, three times as wide")
    for e, css in enumerate(three):
        s.box((80, 264 + f * e, d, f), "W₁, W₃", css, SMALL, rx=0)
        s.box((152, 264 + f * e, 14, f), "h", css, SMALL, rx=0)
        s.box((184 + f * e, 297, f, d), "W₂/3", css, SMALL, rx=0)
    for left, right in ((40, 79), (134, 151), (166, 183)):
        s.arrow((left, 324), (right, 324))
    for y, left in ((127, 314), (324, 304)):
        s.text((28, y), "x")
        s.arrow((left, y), (334, y))
        s.text((344, y), "y")
    s.text((MIDDLE, 406), "h = silu(W₁x) ⊙ W₃x, y = W₂h", "soft", size=SMALL)
    return s


# --- lesson 03 ------------------------------------------------------------------------------------


def moe_layer() -> Sheet:
    """The layer, with the numbers of one token."""
    t = TOKENS.index("held")
    probs, weights = PROBABILITIES[t].tolist(), top_k().dense()[t].tolist()
    chosen = [e for e in range(E) if weights[e]]
    result = " + ".join(f"{weights[e]:.2f} f{chr(0x2081 + e)}(x)" for e in chosen)
    told = listed([f"{weights[e]:.2f} for expert {e + 1}" for e in chosen])
    s = Sheet(
        434,
        "An MoE layer at work on one token",
        f"""Read from below. The vector x of the token 'held' goes to the router and to the experts. The router's
        softmax gives the four experts {listed([f"{p:.2f}" for p in probs])}. The two largest are kept and divided
        by their sum: {told}. These two experts run, their outputs are multiplied by the weights and added. The
        other two do not run.""",
    )
    columns = [62 + 82 * e for e in range(E)]
    s.text((MIDDLE, 420), "vector x of the token 'held'", "soft", size=SMALL)
    s.arrow((MIDDLE, 408), (MIDDLE, 382))
    s.box((26, 350, 318, 32), "router: softmax(W x)")
    s.line((MIDDLE, 397), (10, 397), (10, 212), (columns[chosen[-1]], 212), css="blue", width=2)
    for e, x in enumerate(columns):
        css = "blue" if e in chosen else "off"
        s.arrow((x, 350), (x, 332))
        s.box((x - 30, 304, 60, 28), f"{probs[e]:.2f}", css)
        s.box((x - 36, 152, 72, 42), f"expert\n{e + 1}", css)
        if e in chosen:
            s.arrow((x, 304), (x, 266))
            s.box((x - 30, 238, 60, 28), f"{weights[e]:.2f}", css)
            s.arrow((x, 212), (x, 194), css="blue", width=2)
            s.line((x, 152), (x, 142), css="blue", width=2)
            s.box((x - 30, 120, 60, 22), f"× {weights[e]:.2f}", size=SMALL)
            s.line((x, 120), (x, 108), (MIDDLE, 108), css="blue", width=2)
    s.text((sum(columns[e] for e in chosen) / 2, 285), "÷ their sum", "soft", size=SMALL)
    s.arrow((MIDDLE, 108), (MIDDLE, 80), css="blue", width=2)
    add(s, MIDDLE, 70)
    s.arrow((MIDDLE, 60), (MIDDLE, 40))
    s.text((MIDDLE, 24), f"y = {result}")
    return s


def routing_matrix() -> Sheet:
    """Two arrays, and the matrix that they are."""
    routing = top_k()
    expert, weight = routing.expert.view(T, K).tolist(), routing.weight.view(T, K).tolist()
    load = [str(n) for n in routing.load().tolist()]
    s = Sheet(
        338,
        "A routing as two arrays and as a sparse matrix",
        f"""Eight tokens in rows. Left, two experts and two weights for each token. Right, the same as a matrix of eight
        tokens by four experts: two entries in each row, the weights, which sum to 1; all else is empty. Below it
        the load: the columns have {listed(load)} entries.""",
    )
    y, h = 64, 27
    for x, name, shape in ((93, "experts", f"[{T}, {K}]"), (159, "weights", f"[{T}, {K}]")):
        s.text((x, 22), name, size=SMALL)
        s.text((x, 46), shape, "soft", size=SMALL)
    s.text((278, 22), f"matrix [{T}, {E}]", size=SMALL)
    name_tokens(s, 64, y, h)
    s.matrix((71, y), (22, h), [[(str(e + 1), HUES[e]) for e in row] for row in expert])
    both = [zip(*row, strict=True) for row in zip(weight, expert, strict=True)]
    s.matrix((123, y), (36, h), [[(f"{w:.2f}", HUES[e]) for w, e in row] for row in both])
    s.matrix((206, y), (36, h), entries(routing, routing.dense()))
    for e in range(E):
        s.text((224 + 36 * e, 46), str(e + 1), "soft", size=SMALL)
        s.text((224 + 36 * e, y + T * h + 18), load[e], size=SMALL)
    s.text((196, y + T * h + 18), "load: entries in a column", "soft", "end", SMALL)
    s.text(
        (MIDDLE, y + T * h + 44),
        "experts count from 1; weights of a row sum to 1",
        "soft",
        size=SMALL,
    )
    return s


# --- lessons 05 and 06 ----------------------------------------------------------------------------


def who_chooses() -> Sheet:
    """Token choice and expert choice on the same probabilities."""
    places = expert_capacity(T, E, K, 1.0)
    by_tokens, by_experts = top_k(), routed(ExpertChoiceRouter(E, E, capacity_factor=float(K)))
    of_token = (by_experts.dense() > 0).sum(1).tolist()
    load = [[str(n) for n in routing.load().tolist()] for routing in (by_tokens, by_experts)]
    s = Sheet(
        356,
        "Who chooses: tokens or experts",
        f"""The same softmax of eight tokens by four experts, twice. Left, each token chooses: the {K} largest entries
        of each row are filled, and the columns have {listed(load[0])} of them. Right, each expert chooses: the
        {places} largest of each column are filled, and the rows have {listed([str(n) for n in of_token])} of them.""",
    )
    y, h, w = 76, 26, 33
    name_tokens(s, 60, y, h)
    for x, routing, counts, who, what in (
        (66, by_tokens, load[0], "each token chooses", f"its {K} best experts"),
        (206, by_experts, load[1], "each expert chooses", f"its {places} best tokens"),
    ):
        s.text((x + 2 * w, 18), who, size=SMALL)
        s.text((x + 2 * w, 36), what, "soft", size=SMALL)
        s.matrix((x, y), (w, h), entries(routing, PROBABILITIES))
        for e in range(E):
            s.text((x + (e + 0.5) * w, y - 13), str(e + 1), "soft", size=SMALL)
            s.text((x + (e + 0.5) * w, y + T * h + 16), counts[e], size=SMALL)
    for t, n in enumerate(of_token):
        s.text((347, y + (t + 0.5) * h), str(n), size=SMALL)
    s.text((60, y + T * h + 16), "load", "soft", "end", SMALL)
    words = f"right margin: how many experts a token gets;\non the left all have {K}"
    s.text((MIDDLE, y + T * h + 48), words, "soft", size=SMALL)
    return s


def capacity() -> Sheet:
    """Places in order of arrival; what finds none, and what stays empty."""
    places = expert_capacity(T, E, K, 1.0)
    limited = limit_capacity(top_k(), places)
    queues = [[(TOKENS[t], kept) for t, x, kept in arrivals(limited) if x == e] for e in range(E)]
    lost = [TOKENS[t] for t, row in enumerate(limited.dense().tolist()) if not any(row)]
    told = [
        f"Expert {e + 1} is asked for {len(queue)} times"
        + (f" and drops {listed([token for token, kept in queue if not kept])}." if len(queue) > places
           else f"; {places - len(queue)} of its places stay empty.")
        for e, queue in enumerate(queues)
    ]  # fmt: skip
    s = Sheet(
        336,
        "Capacity: places, drops and gaps",
        f"""Four experts with {places} places each, which are filled in order of arrival. {" ".join(told)} The token
        '{listed(lost)}' is dropped by both of its experts.""",
    )
    y, w, h = 76, 80, 28
    s.text((MIDDLE, 20), f"C = ⌈c T K / E⌉ = ⌈1 × {T} × {K} / {E}⌉ = {places}")
    s.box((5, y - 4, 350, places * h + 6))
    s.text((14, y + places * h + 18), "no place left: dropped", "soft", "start", SMALL)
    for e, queue in enumerate(queues):
        x = 10 + 86.5 * e
        s.text((x + w / 2, 56), f"expert {e + 1}", size=SMALL)
        for n in range(max(places, len(queue))):
            top = y + n * h + (32 if n >= places else 2)
            token, kept = queue[n] if n < len(queue) else ("empty", False)
            css = HUES[e] if kept else "plain" if n >= places else "off"
            s.box((x, top, w, h - 6), token, css, SMALL)
    words = f"'{listed(lost)}' loses both of its experts: only\nthe residual connection carries it past the layer"
    s.text((MIDDLE, 308), words, "soft", size=SMALL)
    return s


def sort_and_group() -> Sheet:
    """The plan of a dispatch."""
    made = plan(top_k())
    counts = made.counts.tolist()[:E]
    owner = [e for e in range(E) for _ in range(counts[e])]
    s = Sheet(
        468,
        "Dispatch by sorting",
        f"""Left, eight tokens in order of arrival. Lines lead from each to two of {len(owner)} rows in the middle,
        which are sorted by expert: {listed([f"{n} rows for expert {e + 1}" for e, n in enumerate(counts)])}. The
        tokens of an expert keep their order. Right, each expert multiplies its rows, all at once. On the way back
        each token adds up its two results.""",
    )
    y, h, gap = 60, 20, 10
    s.text((45, 28), f"tokens\n[{T}, D]", size=SMALL)
    s.text((203, 28), f"rows, sorted\n[{T * K}, D]", size=SMALL)
    s.text((309, 28), "one product\nper expert", size=SMALL)
    middles = [y + (2 * t + 1) * h + 1.5 * gap for t in range(T)]
    tops = [y + n * h + e * gap for n, e in enumerate(owner)]
    for token, e, top in zip(made.token.tolist(), owner, tops, strict=True):
        s.arrow((82, middles[token]), (159, top + h / 2), css=HUES[e])
        s.box((160, top, 86, h), TOKENS[token], HUES[e], SMALL, rx=0)
    for token, y_token in zip(TOKENS, middles, strict=True):
        s.box((8, y_token - 13, 74, 26), token, size=SMALL)
    for e, n in enumerate(counts):
        top = tops[owner.index(e)]
        s.arrow((246, top + n * h / 2), (266, top + n * h / 2), css=HUES[e])
        s.box((268, top, 84, n * h), f"expert {e + 1}\n{n} rows", HUES[e], SMALL)
    words = "back along the same lines: each token gathers\nits two results, times their weights, and adds"
    s.text((MIDDLE, 440), words, "soft", size=SMALL)
    return s


def tiles() -> Sheet:
    """The same routing where every expert begins at a new tile, lesson 07."""
    made, rows = plan(top_k()), 4
    words = iter(TOKENS[t] for t in made.token.tolist())
    cells = [
        (e, [next(words) if first + i < n else "–" for i in range(rows)])
        for e, n in enumerate(made.counts.tolist()[:E])
        for first in range(0, n, rows)
    ]
    bound = min(T * K, (T * K + E * (rows - 1)) // rows)
    filling = sum(row.count("–") for _, row in cells)
    s = Sheet(
        82 + 34 * bound,
        "A routing in tiles",
        f"""{bound} tiles of {rows} rows, one below the other. Their owners are
        {listed([f"expert {e + 1}" for e, _ in cells])}; tile {bound} has none. The rows of an expert are its tokens in
        order of arrival, and {filling} rows at the ends of tiles are filling.""",
    )
    s.text((178, 22), f"rows of tiles of {rows}; – is filling", size=SMALL)
    s.text((325, 22), "owner", size=SMALL)
    for m in range(bound):
        y = 42 + 34 * m
        e, row = cells[m] if m < len(cells) else (None, [""] * rows)
        s.text((6, y + 13), f"tile {m + 1}", anchor="start", size=SMALL)
        for i, word in enumerate(row):
            css = "off" if e is None or word == "–" else HUES[e]
            s.box((58 + 59 * i, y, 59, 26), word, css, SMALL, rx=0)
        owner = ("nobody", "off") if e is None else (f"expert {e + 1}", HUES[e])
        s.box((298, y, 56, 26), *owner, SMALL)
    words_below = f"{len(cells)} tiles are in use; memory is set aside for {bound}"
    s.text((MIDDLE, 62 + 34 * bound), words_below, "soft", size=SMALL)
    return s


def expert_parallelism() -> Sheet:
    """Rows that cross between two devices, there and back."""
    routing = top_k()
    load = routing.load().tolist()
    sent = torch.zeros(2, 2, dtype=torch.int64)  # from the token's device to the expert's
    for t, e, _ in arrivals(routing):
        sent[2 * t // T, 2 * e // E] += 1
    work = sent.sum(0).tolist()
    (stay_a, to_b), (to_a, stay_b) = sent.tolist()
    s = Sheet(
        452,
        "Expert parallelism on two devices",
        f"""Device A holds the first four tokens and experts 1 and 2, device B the last four tokens and experts 3 and 4.
        In a first all-to-all A keeps {stay_a} rows and sends {to_b} to B, B keeps {stay_b} and sends {to_a} to A.
        Then A multiplies {work[0]} rows and B {work[1]}: B is done first and waits. A second all-to-all brings the
        results back to the devices of their tokens.""",
    )
    for i, device in enumerate("AB"):
        x, mine = 6 + 178 * i, TOKENS[4 * i : 4 * i + 4]
        s.text((x + 85, 16), f"device {device}")
        s.box((x, 32, 170, 88), css="off")
        s.text((x + 85, 48), "its tokens and a router", "soft", size=SMALL)
        for n, token in enumerate(mine):
            s.box((x + 6 + 81 * (n % 2), 62 + 28 * (n // 2), 77, 24), token, size=SMALL)
        s.box((x, 220, 170, 84), css="off")
        for n in (0, 1):
            e = 2 * i + n
            s.box((x + 6 + 81 * n, 226, 77, 46), f"expert {e + 1}\n{load[e]} rows", HUES[e], SMALL)
        waits = ", then waits" if work[i] < max(work) else ""
        s.text((x + 85, 288), f"{work[i]} rows{waits}", "soft", size=SMALL)
        s.box((x, 404, 170, 42), "its tokens: weigh\nand add up", size=SMALL)
    for top, flow in ((120, sent), (304, sent.T)):
        mid, low = top + 50, top + 99
        (aa, ab), (ba, bb) = flow.tolist()
        for points, n in (((46, 46), aa), ((128, 232), ab), ((232, 128), ba), ((314, 314), bb)):
            s.arrow((points[0], top), (points[1], low), width=1 + 0.5 * n)
        s.text((54, mid), f"{aa} rows", anchor="start", size=SMALL)
        s.text((306, mid), f"{bb} rows", anchor="end", size=SMALL)
        s.text((124, top + 14), f"{ab} rows", anchor="end", size=SMALL)
        s.text((236, top + 14), f"{ba} rows", anchor="start", size=SMALL)
        s.text((MIDDLE, low - 9), "all-to-all", "soft", size=SMALL)
    return s


# --- lesson 12 ------------------------------------------------------------------------------------


def lattice() -> Sheet:
    """What a token can go through."""
    config = PRESETS["mixtral-8x7b"]
    layers, e, k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
    pairs = math.comb(e, k)
    power = math.floor(layers * math.log10(pairs))
    front = round(pairs**layers / 10**power)
    s = Sheet(
        600,
        f"One token's way through {layers} layers",
        f"""A lattice of {layers} rows, the layers, by {e} columns, the experts of a layer. In every row the {k} experts
        are filled that one token goes through, and lines join them to those of the next layer. There are {pairs}
        pairs in a layer, so {pairs} to the power of {layers} ways, about {front} times ten to the power of {power}.""",
    )
    left, top, w, pitch = 70, 40, 34, 16
    chosen = chosen_of_eight(layers)

    def at(layer: int, expert: int) -> tuple[float, float]:
        return left + (expert + 0.5) * w, top + (layers - layer - 0.5) * pitch

    for layer in range(1, layers):
        for a in chosen[layer - 1]:
            for b in chosen[layer]:
                s.line(at(layer - 1, a), at(layer, b), css="blue")
    for layer in range(layers):
        for expert in range(e):
            x, y = at(layer, expert)
            s.box(
                (x - 8, y - 4, 16, 8), css="blue-head" if expert in chosen[layer] else "off", rx=2
            )
        if layer == 0 or (layer + 1) % 8 == 0:
            s.text((left - 6, at(layer, 0)[1]), f"layer {layer + 1}", "soft", "end", SMALL)
    s.text((left - 6, 22), "expert", "soft", "end", SMALL)
    for expert in range(e):
        s.text((at(0, expert)[0], 22), str(expert + 1), "soft", size=SMALL)
    raised = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    ways = (
        f"{pairs}{str(layers).translate(raised)} ≈ {front} × 10{str(power).translate(raised)} ways"
    )
    s.text((MIDDLE, 578), f"{pairs} pairs in each layer: {ways}")
    return s


def works() -> Sheet:
    """A sample of works, the same without each of them, and draws with replacement."""
    taken, size = (2, 4, 6, 8), 10
    draw = random.Random(1)
    drawn = [sorted(draw.choices(range(4), k=3)) for _ in range(4)]
    without = [[g for g in range(4) if g != left] for left in range(4)]

    def share(members: Sequence[int]) -> str:
        return f"{sum(taken[g] for g in members) / (size * len(members)):.2f}"

    s = Sheet(
        348,
        "Jackknife and bootstrap of four works",
        f"""Four works of {size} tokens, of which an expert gets {listed(list(map(str, taken)))}: a share of
        {share(range(4))}. Below, the jackknife: four rows of three works, another one left out in each, with shares of
        {listed(list(map(share, without)))}. Below, the bootstrap: four rows of three works drawn with replacement, some
        of them more than once, with shares of {listed(list(map(share, drawn)))}.""",
    )
    y = 0
    for title, rows in (
        ("the sample, and the share of the expert", [range(4)]),
        ("jackknife: leave one out", without),
        ("bootstrap: draw three, with replacement", drawn),
    ):
        s.text((8, y + 18), title, "soft", "start", SMALL)
        for row in rows:
            y += 28
            places = row if title.startswith("jack") else range(len(row))
            for place, g in zip(places, row, strict=True):
                s.box((8 + 72 * place, y, 66, 24), f"{taken[g]} of {size}", HUES[g], SMALL)
            s.text((350, y + 12), share(row), anchor="end", size=SMALL)
        y += 32
    return s


# --- lesson 13 ------------------------------------------------------------------------------------


def sign_flips() -> Sheet:
    """The null of four works: all 16 ways to turn the signs of their residuals."""
    residual, shown = (3, 1, 2, 2), {"as it is": "++++", "flipped": "+-+-", "flipped again": "-++-"}
    ways = list(itertools.product((1, -1), repeat=len(residual)))
    total = sum(residual)
    reach = sum(abs(sum(map(mul, way, residual))) >= total for way in ways)
    s = Sheet(
        206,
        "Flipping the signs of four residuals",
        f"""Three times four arrows from a line. First all point up, with lengths {listed([*map(str, residual)])},
        a total of {total}. Then some of them are turned down, and the totals are smaller. Only {reach} of the
        {len(ways)} ways to turn them reach {total}.""",
    )
    for column, (name, signs) in enumerate(shown.items()):
        left, base, found = 18 + 114 * column, 96, 0
        s.text((left + 48, 18), name, size=SMALL)
        s.line((left, base), (left + 96, base))
        for i, (sign, length) in enumerate(zip(signs, residual, strict=True)):
            css, up = ("blue", length) if sign == "+" else ("orange", -length)
            x = left + 15 + 22 * i
            s.arrow((x, base), (x, base - 20 * up), css=css, width=3)
            found += up
        s.text((left + 48, 172), f"total {found:+d}")
    words = f"{reach} of {len(ways)} ways reach {total}, up or down: p = {reach / len(ways):.3f}"
    s.text((MIDDLE, 194), words, "soft", size=SMALL)
    return s


# --- lesson 08 ------------------------------------------------------------------------------------


def mixtral() -> Sheet:
    """The whole model, part by part."""
    config = PRESETS["mixtral-8x7b"]
    layers, parts = config.num_hidden_layers, count_parameters(config).by_component
    each = {name: part.total / layers for name, part in parts.items()}
    used = parts["experts"].active / layers
    s = Sheet(
        520,
        "Mixtral 8x7B, whole",
        f"""Read from below. Token ids go through the embedding of {parts["embedding"].total / 1e6:.0f} million
        parameters into {layers} equal layers, then through a last norm and the output matrix of
        {parts["head"].total / 1e6:.0f} million. A layer is a norm, attention with
        {each["attention"] / 1e6:.1f} million parameters, a norm, and the sparse layer: a router of
        {each["router"]:,.0f} parameters and {config.num_experts} experts of {each["experts"] / 8e6:.0f} million
        each, of which two run. What attention and experts give is added to what went in.""",
    )
    x, side, told = 112, 214, 236

    def tell(y: float, words: str) -> None:
        s.text((told, y), words, "soft", "start", SMALL)

    s.text((x, 506), "token ids", "soft", size=SMALL)
    s.arrow((x, 496), (x, 478))
    s.box((x - 60, 452, 120, 26), "embedding", "green", SMALL)
    tell(465, f"{parts['embedding'].total / 1e6:.0f} M")
    s.box((12, 104, 336, 330), css="off", stroke_dasharray=4)
    s.text((340, 118), f"{layers} times", "soft", "end", SMALL)
    s.arrow((x, 452), (x, 408))
    s.box((x - 60, 384, 120, 24), "RMSNorm", size=SMALL)
    s.arrow((x, 384), (x, 366))
    s.box((x - 60, 340, 120, 26), "attention", "purple", SMALL)
    tell(353, f"{each['attention'] / 1e6:.1f} M")
    s.arrow((x, 340), (x, 324))
    s.arrow((x, 422), (side, 422), (side, 314), (x + 10, 314))
    add(s, x, 314)
    s.arrow((x, 304), (x, 282))
    s.arrow((x, 294), (side, 294), (side, 128), (x + 10, 128))
    s.box((x - 60, 258, 120, 24), "RMSNorm", size=SMALL)
    s.arrow((x, 258), (x, 242))
    s.box((x - 36, 218, 72, 24), "router", size=SMALL)
    tell(230, f"{each['router']:,.0f}")
    for e in range(config.num_experts):
        left, runs = 22 + 23 * e, e in (2, 6)
        s.box((left, 172, 19, 24), str(e + 1), "blue" if runs else "off", SMALL)
        if runs:
            s.arrow((x, 218), (left + 9.5, 196), css="blue", width=2)
            s.line((left + 9.5, 172), (x, 150), css="blue", width=2)
    tell(176, f"8 × {each['experts'] / 8e6:.0f} M held")
    tell(194, f"2 × {used / 2e6:.0f} M used")
    s.arrow((x, 150), (x, 138))
    add(s, x, 128)
    s.arrow((x, 118), (x, 88))
    s.box((x - 60, 64, 120, 24), "RMSNorm", size=SMALL)
    s.arrow((x, 64), (x, 52))
    s.box((x - 60, 26, 120, 26), "output", "green", SMALL)
    tell(39, f"{parts['head'].total / 1e6:.0f} M")
    s.arrow((x, 26), (x, 8))
    tell(12, "logits")
    return s


def pairs() -> Sheet:
    """Which coordinates of a head are turned together."""
    s = Sheet(
        190,
        "Two pairings of the coordinates of a head",
        """Two rows of the coordinates 0 to 7. In the upper row, halves, the pairs are 0 and 4, 1 and 5, 2 and 6,
        3 and 7. In the lower row, neighbours, they are 0 and 1, 2 and 3, 4 and 5, 6 and 7. The pairs have the
        letters a to d, and a is turned fastest.""",
    )
    halves, neighbours = [j % 4 for j in range(8)], [j // 2 for j in range(8)]
    rows = ("halves: (i, i + d/2)", halves), ("neighbours: (2i, 2i + 1)", neighbours)
    for r, (name, of) in enumerate(rows):
        y = 18 + 92 * r
        s.text((MIDDLE, y), name, size=SMALL)
        s.matrix((MIDDLE - 144, y + 14), (36, 28), [[("abcd"[p], HUES[p]) for p in of]])
        for j in range(8):
            s.text((MIDDLE - 126 + 36 * j, y + 54), str(j), "soft", size=SMALL)
    return s


# --- lessons 09 and 10 -----------------------------------------------------------------------------


def rivals() -> Sheet:
    """The sparse layer of lesson 09 and the dense ones beside it, widths to scale."""
    plan = tomllib.loads((ROOT / "book/results/yardsticks/plan.toml").read_text(encoding="utf-8"))
    e, k = plan["model"]["num_experts"], plan["model"]["num_experts_per_tok"]
    f, steps = plan["model"]["intermediate_size"], plan["main"]["steps"]
    s = Sheet(
        292,
        "A sparse layer and its three dense rivals",
        f"""Four layers as bars, as long as they are wide, and beside them bars for the steps of training. The sparse
        layer has {e} experts of width {f}, of which {k} are coloured, the two that a token uses. The layer of equal
        work is one bar of width {k * f}, all of it used. That of equal size is one bar of width {e * f}, all of it
        used. These three train for {steps["moe"]} steps. The layer of equal time is as wide as that of equal work
        and trains for {steps["time"]:,} steps.""",
    )
    left, unit, right, pitch = 16, 26, 252, 66
    s.text((left, 16), "width of the layer", "soft", "start", SMALL)
    s.text((right, 16), "steps", "soft", "start", SMALL)
    rows = (
        ("sparse", [f] * e, "moe"),
        ("equal work", [k * f], "work"),
        ("equal size", [e * f], "held"),
        ("equal time", [k * f], "time"),
    )
    for i, (name, widths, arm) in enumerate(rows):
        y, x = 38 + i * pitch, float(left)
        s.text((left, y), name, anchor="start")
        for j, width in enumerate(widths):
            used = len(widths) == 1 or j in (2, 5)
            w = width / f * unit
            s.box((x, y + 12, w, 26), str(width), "blue" if used else "off", SMALL, rx=2)
            x += w
        s.box((right, y + 12, steps[arm] / 14, 26), f"{steps[arm]:,}", "plain", SMALL, rx=2)
    return s


def effective() -> Sheet:
    """How lesson 10 reads off what a routed model is worth."""
    s = Sheet(
        262,
        "The effective size of a routed model",
        """A falling line, the loss of dense models against their parameters, both in logarithms. Below the line, above
        the parameters that it uses, stands a routed model. An arrow goes from it at its own loss to the right, to the
        dense line, and another from there down to the axis: it meets the axis at the effective size, between what
        the model uses and what it holds.""",
    )
    left, top, bottom, right = 44.0, 26.0, 206.0, 344.0
    used, worth, held = 110.0, 205.0, 300.0

    def dense(x: float) -> float:
        return 50 + 0.56 * (x - 60)

    y = dense(worth)
    s.arrow((left, bottom), (left, top))
    s.arrow((left, bottom), (right, bottom))
    s.text((left, 14), "loss", "soft", size=SMALL)
    s.text((right - 4, 250), "parameters", "soft", "end", SMALL)
    s.line((60, dense(60)), (330, dense(330)), css="blue", width=2)
    s.text((122, 56), "dense models", anchor="start", size=SMALL)
    s.arrow((used + 8, y), (worth, y), css="orange")
    s.arrow((worth, y), (worth, bottom - 3), css="orange")
    s.box((used - 6, y - 6, 12, 12), css="orange-head", rx=6)
    s.text((used, y + 20), "routed", size=SMALL)
    for x, name in ((used, "used"), (worth, "effective"), (held, "held")):
        s.line((x, bottom - 3), (x, bottom + 5))
        s.text((x, bottom + 16), name, size=SMALL)
    return s


PICTURES: dict[str, Callable[[], Sheet]] = {
    "block": block,
    "eight-models": eight_models,
    "wide-mlp": wide_mlp,
    "moe-layer": moe_layer,
    "routing-matrix": routing_matrix,
    "who-chooses": who_chooses,
    "capacity": capacity,
    "sort-and-group": sort_and_group,
    "tiles": tiles,
    "expert-parallelism": expert_parallelism,
    "mixtral": mixtral,
    "pairs": pairs,
    "rivals": rivals,
    "effective": effective,
    "lattice": lattice,
    "works": works,
    "sign-flips": sign_flips,
}


def main() -> None:
    """Draw all of them."""
    for name, draw in PICTURES.items():
        write_text(FOLDER / f"{name}.svg", draw().svg())


if __name__ == "__main__":
    main()
