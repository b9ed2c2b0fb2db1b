"""The explorable of capacity and drops gives out places as the library does."""

import random
from typing import Any

import pytest
import torch

from minimoe.routing import DropStats, Routing, expert_capacity, limit_capacity
from minimoe.widgets import EXPLORABLES
from minimoe.widgets.capacity_drops import EXAMPLES, FACTORS, limited
from tests.node import in_node

NAME = "capacity_drops"


def routing_of(chosen: list[list[int]], experts: int) -> Routing:
    """Token choice with equal weights."""
    k = len(chosen[0])
    expert = torch.tensor(chosen).flatten()
    token = torch.arange(len(chosen)).repeat_interleave(k)
    return Routing(
        token, expert, torch.full((len(expert),), 1 / k), (len(chosen), experts), k=k
    ).check()


def cases() -> list[dict[str, Any]]:
    """Random routings: all sizes that the sliders offer, from places for nobody to places for all."""
    draw = random.Random(0)
    made: list[dict[str, Any]] = []
    for _ in range(200):
        experts = draw.choice([1, 4, 8, 16])
        k = draw.randint(1, min(4, experts))
        tokens = draw.randint(1, 64)
        favourites = range(draw.randint(k, experts))  # some experts may never be asked
        made.append(
            {
                "chosen": [draw.sample(favourites, k) for _ in range(tokens)],
                "experts": experts,
                "places": draw.choice([0, 1, draw.randint(1, 2 * k * tokens)]),
                "arrived": draw.randint(0, tokens),
            }
        )
    return made


def test_same_choices_same_kept_and_same_statistics() -> None:
    given = cases()
    got = in_node(
        NAME,
        "given.map((c) => ({ ...m.fall(c.chosen, c.experts, c.places), "
        "end: m.drops(c.chosen, c.experts, c.places), "
        "part: m.drops(c.chosen, c.experts, c.places, c.arrived) }))",
        given,
    )
    some = all_kept = 0
    for case, answer in zip(given, got, strict=True):
        routing = limit_capacity(routing_of(case["chosen"], case["experts"]), case["places"])
        assert routing.kept is not None
        k = len(case["chosen"][0])
        assert answer["kept"] == routing.kept.view(-1, k).tolist()
        stats = DropStats.of(routing)
        end = answer["end"]
        assert (end["assignments"], end["dropped"]) == (stats.assignments, stats.dropped)
        assert end["share"] == pytest.approx(stats.share)
        assert len(end["lost"]) == stats.tokens_lost
        assert tuple(end["byExpert"]) == stats.by_expert
        assert end["asked"] == routing.load().tolist()
        assert end["empty"] == case["experts"] * case["places"] - int(routing.kept.sum())
        # what the first tokens got does not depend on those who come later, at the same C
        if case["arrived"]:
            few = limit_capacity(
                routing_of(case["chosen"][: case["arrived"]], case["experts"]), case["places"]
            )
            assert answer["part"]["dropped"] == DropStats.of(few).dropped
            assert len(answer["part"]["lost"]) == DropStats.of(few).tokens_lost
        else:
            assert (answer["part"]["assignments"], answer["part"]["share"]) == (0, 0)
        some += 0 < stats.share < 1
        all_kept += stats.dropped == 0
    assert some > 30 and all_kept > 30  # the cases show both


def test_places_are_those_of_the_library() -> None:
    draw = random.Random(1)
    factors = [0.25 + 0.05 * i for i in range(76)]
    given = [
        (draw.randint(0, 64), draw.choice([4, 8, 16]), draw.randint(1, 4), round(f, 2))
        for f in factors * 5
    ]
    given += [(100, 1, 1, 1.1), (1, 8, 2, 1.25), (1000, 10, 3, 1.1), (16, 16, 1, 1.0)]
    got = in_node(NAME, "given.map((c) => m.capacity(...c))", given)
    assert got == [expert_capacity(*c) for c in given]
    assert got[-4] == 110  # not the 111 of the binary number 1.1


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_choices_repeat_and_are_as_skewed_as_they_say(skew: float) -> None:
    options = f"{{tokens: 20000, experts: 8, k: 1, skew: {skew}, seed: 5}}"
    once = in_node(NAME, f"m.choose({options})")
    share = torch.tensor(once).flatten().bincount(minlength=8) / 20000
    popularity = torch.arange(1, 9).double() ** -skew
    torch.testing.assert_close(share.double(), popularity / popularity.sum(), atol=0.012, rtol=0)
    small = {"tokens": 40, "experts": 8, "k": 3, "skew": skew, "seed": 5}
    first, again, fewer, other = in_node(
        NAME,
        "[m.choose(given), m.choose(given), m.choose({...given, tokens: 10, k: 2}), m.choose({...given, seed: 6})]",
        small,
    )
    assert first == again != other
    assert [row[:2] for row in first[:10]] == fewer  # T and K take away, and change nothing else
    assert all(len(set(row)) == 3 for row in first)


def test_the_words_of_the_static_figure_are_the_library_s() -> None:
    made = EXPLORABLES[NAME]()
    previous = 1.0
    for factor in FACTORS:
        places, kept, drops = limited(factor)
        assert sum(kept) + drops.dropped == drops.assignments == 48
        assert max(kept) <= places
        assert (
            f"{places} places each: dropped assignments {drops.dropped} of 48, tokens without any expert "
            f"{drops.tokens_lost}," in made.alt
        )
        assert drops.share < previous
        previous = drops.share
    assert all(len(example) == 3 for example in EXAMPLES)
