"""Figures: each draws from results of a small trace, and its words hold the numbers that it shows."""

import dataclasses
import functools
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
from minimoe.study import depth, domains, load, paths, vocabulary
from minimoe.study.claims import bracket, claims, listed, percent, times
from minimoe.study.drawing import Figure, expert_ticks
from minimoe.study.trace import RoutingTrace, TraceDocument
from tests.small import even_trace, small_disk

EXPERTS, K, LAYERS, VOCABULARY = 4, 2, (1, 2, 3), 12


def make_trace(documents=60, tokens=30, experts=EXPERTS, seed=0) -> RoutingTrace:
    """Documents of two domains; a token prefers expert token % E, the more so the higher the layer."""
    rng = np.random.default_rng(seed)
    sources, subjects = ("law", "wiki_en"), ("Arts", "History", "Geography")
    kinds = [TraceDocument(sources[i % 2], str(i), subjects[i % 3]) for i in range(documents)]
    token = rng.integers(0, VOCABULARY, documents * tokens)
    logits = rng.gumbel(size=(len(token), len(LAYERS), experts))
    for column in range(len(LAYERS)):
        logits[np.arange(len(token)), column, token % experts] += column
    document, position = np.divmod(np.arange(len(token)), tokens)
    chosen = np.argsort(-logits, axis=2)[..., :K]
    return even_trace(token, document, position, chosen, kinds, experts)


TRACE = make_trace()
FEW: Any = {"resamples": 60}
MANY = make_trace(experts=64)


@functools.cache
def loads(trace=TRACE):
    return [load.expert_load(trace, x, **FEW) for x in LAYERS]


@functools.cache
def topics(trace=TRACE):
    return [domains.domain_load(trace, x, by="topic", **FEW) for x in LAYERS]


def ranked(trace, layer, write=" t{}".format, top=5):
    """The figure of what an expert takes most, and of what is characteristic of it."""
    frequent = vocabulary.frequent_tokens(trace, layer, top=top)
    characteristic = vocabulary.characteristic_tokens(trace, layer, top=top, groups=6)
    return vocabulary.draw_ranked(frequent, characteristic, write, 3)


def studied(text, token):
    return vocabulary.StudiedToken("token", text, token, text, 0, {})


BEFORE = dict(matplotlib.rcParams)
NAMES = "load load-by-depth topics domains skew tokens token information repeats coactivation paths"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """One of each, by name."""
    shares = [vocabulary.token_shares(TRACE, x, [0, 1]) for x in LAYERS]
    bits = depth.information(TRACE, **FEW)
    ways = [paths.paths(TRACE, kind=kind, permutations=5) for kind in ("first", "set")]
    made = [
        load.draw_load(loads(), 3),
        load.draw_load_by_depth({"held-out text": loads(), "questions": loads(make_trace(seed=1))}),
        domains.draw_labels(topics(), ["Arts", "History"], 3, {}),
        domains.draw_labels(topics()[-1:], (), 3, {}, name="domains"),
        domains.draw_skew(topics(), 3, {}),
        dataclasses.replace(ranked(TRACE, 3), name="tokens"),
        vocabulary.draw_token(shares, studied("':'", 1), shares, 3),
        depth.draw_information(bits, within=bits),
        paths.draw_repeats([paths.repeats(TRACE, x) for x in LAYERS]),
        paths.draw_coactivation([paths.coactivation(TRACE, x, permutations=10) for x in LAYERS], 3),
        paths.draw_paths(ways),
    ]
    return {figure.name: figure for figure in made}


@pytest.mark.parametrize("name", NAMES.split())
def test_draws_at_page_width_legibly_and_has_words(drawn, name):
    figure = drawn[name]
    assert figure.png(dpi=50).startswith(b"\x89PNG")
    assert figure.figure.get_size_inches()[0] == 7.0
    assert len(figure.alt) > 60 and len(figure.caption) > 60
    assert re.search(r"\d", figure.alt)
    assert not re.search(r"nan|None", figure.alt + figure.caption, re.IGNORECASE)
    for ax in figure.figure.axes:
        labels = [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts = [*labels, *ax.get_xticklabels(), *ax.get_yticklabels()]
        assert all(text.get_fontsize() >= SMALL for text in texts if text.get_text())
    assert name == "tokens" or any(ax.get_xlabel() for ax in figure.figure.axes)


def test_every_caption_has_a_drawing(drawn):
    for name, entry in claims()["figures"].items():
        start = entry["caption"].split("{")[0]
        assert any(f.caption.startswith(start) for f in drawn.values()), name


def test_the_same_numbers_give_the_same_bytes_and_leave_global_state_alone(drawn):
    assert drawn["load"].png(dpi=50) == load.draw_load(loads(), 3).png(dpi=50)
    assert dict(matplotlib.rcParams) == BEFORE


def test_words_of_a_figure_hold_its_numbers(drawn):
    alt = drawn["load"].alt
    for one in loads():
        assert percent(one.share.value.max()) in alt and percent(one.share.value.min()) in alt
        assert times(one.ratio.value) + bracket(one.ratio.low, one.ratio.high) in alt
        assert f"expert {int(one.share.value.argmax()) + 1}" in alt
    for one in topics():  # ratio and chance
        ratio = one.ratio[one.names.index("Arts")]
        said = f"max/min {times(ratio.value)}, chance up to {times(ratio.null_high)}"
        assert said in drawn["topics"].alt
    assert f"{len(topics()[-1].beyond)} of 3 lie beyond their null" in drawn["skew"].alt
    share = vocabulary.token_shares(TRACE, 3, [5])
    best, alt = share.share.value[0], vocabulary.draw_token([share], studied("'.'", 5), (), 3).alt
    assert f"expert {best.argmax() + 1} {percent(best.max(), 0)}" in alt
    assert f"{share.occurrences[0]:,} occurrences" in alt


def test_few_documents_and_labels_an_idle_expert_and_many_experts_are_drawn():
    few = load.draw_load([load.expert_load(make_trace(documents=12), 1, **FEW)], 3)
    assert "Only 12 works: no intervals" in few.caption
    labels = domains.draw_labels(topics()[-1:], ["Arts", "History"], 3, {})
    assert len(labels.figure.axes) == 2  # no column is empty
    rows = np.where(TRACE.expert == 3, -1, TRACE.expert)
    idle = domains.draw_skew(topics(dataclasses.replace(TRACE, expert=rows)), 3, {})
    assert "∞" in idle.alt
    many = load.draw_load([load.expert_load(MANY, x, **FEW) for x in LAYERS], 3)
    assert "12 of 64 experts are shown" in ranked(MANY, 1, top=3).caption
    assert all(figure.png(dpi=40) for figure in (few, labels, idle, many))


def test_equal_band_covers_equal_loads():
    like = make_trace(documents=100, tokens=40, experts=8)
    inside = []
    for seed in range(12):
        order = np.random.default_rng(seed).random((4000, 1, 8)).argsort(axis=2)[..., :2]
        expert = np.repeat(order.astype(np.int16), 3, axis=1)
        share = load.expert_load(dataclasses.replace(like, expert=expert), 1, **FEW).share
        inside += list((share.value >= share.null_low) & (share.value <= share.null_high))
    assert 0.85 <= np.mean(inside) <= 1.0


def test_shows_itself_in_a_notebook_with_its_words(drawn):
    bundle = drawn["load"]._repr_mimebundle_()
    assert "data:image/png;base64," in bundle["text/html"]
    assert f'alt="{drawn["load"].alt}"' in html.unescape(bundle["text/html"]).replace("\u00a0", " ")
    assert drawn["load"].alt in bundle["text/plain"]


def test_words_and_tokens_that_show_their_spaces():
    tokens = {" the": "␣the", "\n": "↵", "internat": "internat", "international": "interna…"}
    assert {token: vocabulary.shown(token, longest=8) for token in tokens} == tokens
    assert vocabulary.shown("$x$") == r"\$x\$"
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
    each = enumerate(trace.documents)
    named = (d._replace(domain=MARKUP[3 + i % 3], topic=MARKUP[i % 6]) for i, d in each)
    return dataclasses.replace(trace, documents=tuple(named))


def test_names_are_drawn_as_they_are_and_not_read_as_mathematics():
    trace = renamed(TRACE)
    made = [
        load.draw_load(loads(trace), 3, text=MARKUP[1]),
        load.draw_load_by_depth({name: loads(trace) for name in MARKUP[:2]}),
        domains.draw_labels(topics(trace), MARKUP[:4], 3, {}),
        domains.draw_labels(topics(trace)[-1:], (), 3, {}),
        domains.draw_skew(topics(trace), 3, {name: f"${name}" for name in MARKUP}),
        ranked(trace, 3, lambda token: MARKUP[token % 6]),
    ]
    drawn = ""
    for figure in made:
        assert "<b>" not in figure.to_html(dpi=40).partition("<figcaption>")[2]
        for text in figure.figure.findobj(Text):
            written = text.get_text()
            # the powers of ten at a logarithmic axis are mathematics, and nothing else is
            assert "mathdefault" in written or not is_math_text(written), written
            drawn += written.replace(r"\$", "$") + "\n"
    assert all(name in drawn for name in MARKUP[:4])
    assert "pay␣$x_$…" in drawn and all(f"${name}" in drawn for name in MARKUP)


def test_a_figure_is_saved_whole_or_not_at_all(drawn, tmp_path):
    drawn["load"].save(tmp_path / "load.png", dpi=40)
    before = (tmp_path / "load.png").read_bytes()
    refused = pytest.raises(MinimoeError, match=r"load\.png could not be written")
    with small_disk(1000), refused:
        drawn["load"].save(tmp_path / "load.png", dpi=40)
    assert (tmp_path / "load.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["load.png"]
