"""Figures: each draws from results of a small trace, and its words hold the numbers that it shows."""

import dataclasses
import html
import re
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

from minimoe.course.style import SMALL
from minimoe.errors import MinimoeError
from minimoe.study.claims import bracket, claims, listed, percent, times
from minimoe.study.depth import draw_information, information
from minimoe.study.domains import domain_load, draw_labels, draw_skew
from minimoe.study.drawing import Figure, expert_ticks
from minimoe.study.load import draw_load, draw_load_by_depth, expert_load
from minimoe.study.paths import (
    coactivation,
    draw_coactivation,
    draw_paths,
    draw_repeats,
    paths,
    repeats,
)
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.study.vocabulary import (
    characteristic_tokens,
    draw_ranked,
    draw_token,
    frequent_tokens,
    shown,
    token_shares,
)
from tests.small import small_disk

EXPERTS, K, LAYERS, VOCABULARY = 4, 2, (1, 2, 3), 12


def make_trace(documents=60, tokens=30, experts=EXPERTS, seed=0) -> RoutingTrace:
    """Documents of two domains; a token prefers expert token % E, the more so the higher the layer."""
    rng = np.random.default_rng(seed)
    kinds = [
        TraceDocument(
            "wiki_en" if i % 2 else "law", str(i), ("Arts", "History", "Geography")[i % 3]
        )
        for i in range(documents)
    ]
    token = rng.integers(0, VOCABULARY, documents * tokens)
    logits = rng.gumbel(size=(len(token), len(LAYERS), experts))
    for column in range(len(LAYERS)):
        logits[np.arange(len(token)), column, token % experts] += column
    return RoutingTrace(
        token=token.astype(np.int32),
        document=np.repeat(np.arange(documents, dtype=np.int32), tokens),
        position=np.tile(np.arange(tokens, dtype=np.int32), documents),
        expert=np.argsort(-logits, axis=2)[..., :K].astype(np.int16),
        weight=np.full((len(token), len(LAYERS), K), 0.5, np.float32),
        documents=tuple(kinds),
        num_experts=experts,
        layers=LAYERS,
    )


TRACE = make_trace()
FEW: Any = {"resamples": 60}


def loads(trace=TRACE):
    return [expert_load(trace, x, **FEW) for x in LAYERS]


def topics():
    return [domain_load(TRACE, x, by="topic", **FEW) for x in LAYERS]


def decode(token: int) -> str:
    return f" t{token}"


def all_figures() -> dict[str, Figure]:
    shares = [token_shares(TRACE, x, [0, 1]) for x in LAYERS]
    bits = information(TRACE, groups=6, **FEW)
    made = [
        draw_load(loads(), num_layers=3),
        draw_load_by_depth({"held-out text": loads(), "questions": loads(make_trace(seed=1))}),
        draw_labels(topics(), ["Arts", "History"], num_layers=3),
        draw_labels(topics()[-1:], num_layers=3, name="domains"),
        draw_skew(topics(), num_layers=3),
        draw_ranked(
            frequent_tokens(TRACE, 3, top=5),
            characteristic_tokens(TRACE, 3, top=5, groups=6),
            decode,
        ),
        draw_token(shares, 1, "':'", apart=shares, apart_token=0, num_layers=3),
        draw_information(bits, within=bits),
        draw_repeats([repeats(TRACE, x, **FEW) for x in LAYERS]),
        draw_coactivation([coactivation(TRACE, x, permutations=10) for x in LAYERS]),
        draw_paths(
            [
                paths(TRACE, permutations=5, **FEW),
                paths(TRACE, kind="set", permutations=5, **FEW),
            ]
        ),
    ]
    return {figure.name: figure for figure in made}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return all_figures()


NAMES = (
    "load", "load-by-depth", "topics", "domains", "skew", "tokens", "token", "information", "repeats", "coactivation",
    "paths",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_draws_at_page_width_and_has_words(drawn, name):
    figure = drawn[name]
    png = figure.png(dpi=50)
    assert png.startswith(b"\x89PNG")
    assert figure.figure.get_size_inches()[0] == 7.0
    assert len(figure.alt) > 60 and len(figure.caption) > 60
    assert re.search(r"\d", figure.alt)
    assert "nan" not in figure.alt.lower() and "nan" not in figure.caption.lower()
    assert "None" not in figure.alt + figure.caption


@pytest.mark.parametrize("name", NAMES)
def test_letters_are_legible_and_axes_have_units(drawn, name):
    figure = drawn[name]
    for ax in figure.figure.axes:
        texts = [
            ax.title,
            ax.xaxis.label,
            ax.yaxis.label,
            *ax.texts,
            *ax.get_xticklabels(),
            *ax.get_yticklabels(),
        ]
        assert all(text.get_fontsize() >= SMALL for text in texts if text.get_text())
        left = ax.get_title(loc="left")
        assert not left or ax._left_title.get_fontsize() >= SMALL
    if name != "tokens":
        assert any(ax.get_xlabel() for ax in figure.figure.axes)


def test_every_caption_has_a_drawing(drawn):
    words = {name: entry["caption"].split("{")[0] for name, entry in claims()["figures"].items()}
    for name, start in words.items():
        assert any(f.caption.startswith(start) for f in drawn.values()), name


def test_the_same_numbers_give_the_same_bytes():
    again = draw_load(loads(), num_layers=3)
    assert again.png(dpi=50) == draw_load(loads(), num_layers=3).png(dpi=50)


def test_drawing_leaves_global_state_alone():
    before = dict(matplotlib.rcParams)
    all_figures()["load"].png(dpi=40)
    assert dict(matplotlib.rcParams) == before


def test_alt_of_load_holds_its_numbers():
    results = loads()
    alt = draw_load(results, num_layers=3).alt
    for one in results:
        assert percent(one.share.value.max()) in alt and percent(one.share.value.min()) in alt
        assert times(one.ratio.value) + bracket(one.ratio.low, one.ratio.high) in alt
        assert f"expert {int(one.share.value.argmax()) + 1}" in alt


def test_alt_of_labels_holds_ratio_and_chance():
    results = topics()
    alt = draw_labels(results, ["Arts"], num_layers=3).alt
    i = results[0].names.index("Arts")
    for one in results:
        assert (
            f"max/min {times(one.ratio[i].value)}, chance up to {times(one.ratio[i].null_high)}"
            in alt
        )


def test_alt_of_a_token_holds_share_and_interval():
    shares = [token_shares(TRACE, 3, [5])]
    alt = draw_token(shares, 5, "'.'").alt
    best = int(shares[0].share.value[0].argmax())
    assert f"expert {best + 1} {percent(shares[0].share.value[0, best], 0)}" in alt
    assert f"{shares[0].occurrences[0]:,} occurrences" in alt


def test_alt_of_skew_counts_the_labels_beyond_chance():
    results = topics()
    beyond = len(results[-1].beyond)
    assert f"{beyond} of 3 lie beyond their null" in draw_skew(results).alt


def test_few_documents_have_no_whiskers_and_say_so():
    small = make_trace(documents=12)
    figure = draw_load([expert_load(small, 1, **FEW)])
    assert "Only 12 works: no intervals" in figure.caption
    assert figure.png(dpi=40)


def test_fewer_labels_than_columns_leave_no_column_empty():
    figure = draw_labels(topics()[-1:], ["Arts", "History"], num_layers=3)
    assert len(figure.figure.axes) == 2 and figure.png(dpi=40)


def test_an_expert_without_tokens_is_drawn():
    rows = TRACE.expert.copy()
    rows[rows == 3] = -1
    silent = dataclasses.replace(TRACE, expert=rows)
    results = [domain_load(silent, x, by="topic", **FEW) for x in LAYERS]
    figure = draw_skew(results)
    assert figure.png(dpi=40) and "∞" in figure.alt


def test_many_experts_fit():
    many = make_trace(experts=64)
    assert draw_load([expert_load(many, x, **FEW) for x in LAYERS]).png(dpi=40)
    ranked = draw_ranked(
        frequent_tokens(many, 1, top=3),
        characteristic_tokens(many, 1, top=3, groups=6),
        decode,
    )
    assert "12 of 64 experts are shown" in ranked.caption


def test_equal_band_covers_equal_loads():
    """Under equal loads and independent tokens about 95 % of the shares lie in the band."""
    inside = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        expert = np.argsort(rng.random((4000, 1, 8)), axis=2)[..., :2].astype(np.int16)
        trace = dataclasses.replace(
            make_trace(documents=100, tokens=40, experts=8), expert=np.repeat(expert, 3, axis=1)
        )
        one = expert_load(trace, 1, **FEW)
        share = one.share
        inside += list((share.value >= share.null_low) & (share.value <= share.null_high))
    assert 0.85 <= np.mean(inside) <= 1.0


def test_shows_itself_in_a_notebook_with_its_words(drawn):
    bundle = drawn["load"]._repr_mimebundle_()
    assert "data:image/png;base64," in bundle["text/html"]
    assert f'alt="{drawn["load"].alt}"' in html.unescape(bundle["text/html"]).replace("\u00a0", " ")
    assert drawn["load"].alt in bundle["text/plain"]


def test_saves_atomically(drawn, tmp_path):
    drawn["load"].save(tmp_path / "load.png", dpi=40)
    assert [p.name for p in tmp_path.iterdir()] == ["load.png"]


def test_tokens_are_written_so_that_spaces_show():
    assert shown(" the") == "␣the"
    assert shown("\n") == "↵"
    assert shown("international", longest=8) == "interna…"
    assert shown("$x$") == r"\$x\$"


def test_words():
    assert listed(["a", "b", "c"]) == "a, b and c" and listed(["a"]) == "a"
    assert times(float("inf")) == "∞" and times(float("nan")) == "–" and times(13.12) == "13.1"
    assert bracket(float("nan"), 2.0) == "" and bracket(1.0, 2.0) == " [1.00–2.00]"


def test_many_experts_are_numbered_by_about_five_round_numbers() -> None:
    for count in range(1, 400):
        ticks = expert_ticks(count)
        assert ticks[0] == 1 and ticks[-1] <= count
        assert ticks == list(range(1, count + 1)) if count <= 10 else 2 <= len(ticks) <= 5
    assert expert_ticks(64) == [1, 16, 32, 48, 64]


MARKUP = ("cost $$", "pay $x_$ more", r"\$ a \frac{ $", "<b>&amp;</b>", "a_b^c {d} %s", "$")


def renamed(trace: RoutingTrace) -> RoutingTrace:
    """The same trace; its topics and domains are called what matplotlib and HTML read as markup."""
    documents = tuple(
        TraceDocument(MARKUP[3 + i % 3], str(i), MARKUP[i % 6]) for i in range(len(trace.documents))
    )
    return dataclasses.replace(trace, documents=documents)


def test_names_are_drawn_as_they_are_and_not_read_as_mathematics():
    trace = renamed(TRACE)
    topics = [domain_load(trace, x, by="topic", **FEW) for x in LAYERS]
    made = [
        draw_load(loads(trace), num_layers=3, text=MARKUP[1]),
        draw_load_by_depth({name: loads(trace) for name in MARKUP[:2]}),
        draw_labels(topics, MARKUP[:4], num_layers=3),
        draw_labels(topics[-1:], num_layers=3),
        draw_skew(topics, titles={name: f"${name}" for name in MARKUP}, num_layers=3),
        draw_ranked(
            frequent_tokens(trace, 3, top=5),
            characteristic_tokens(trace, 3, top=5, groups=6),
            lambda token: MARKUP[token % 6],
        ),
    ]
    drawn = ""
    for figure in made:
        assert figure.png(dpi=40).startswith(b"\x89PNG")
        for text in figure.figure.findobj(Text):
            written = text.get_text()
            # the powers of ten at a logarithmic axis are mathematics, and nothing else is
            assert "mathdefault" in written or not is_math_text(written), written
            drawn += written.replace(r"\$", "$") + "\n"
        assert "<b>" not in figure.to_html(dpi=40).partition("<figcaption>")[2]
    assert all(name in drawn for name in MARKUP[:4])
    assert "pay␣$x_$…" in drawn and all(f"${name}" in drawn for name in MARKUP)


def test_a_full_disk_while_a_figure_is_saved_is_an_error_of_minimoe(drawn, tmp_path):
    drawn["load"].save(tmp_path / "load.png", dpi=40)
    before = (tmp_path / "load.png").read_bytes()
    with (
        small_disk(1000),
        pytest.raises(MinimoeError, match=r"load\.png could not be written"),
    ):
        drawn["load"].save(tmp_path / "load.png", dpi=40)
    assert (tmp_path / "load.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["load.png"]
