"""A cache of experts: hits by hand, the bound by trying everything, and nulls that know chance from order."""

import itertools

import numpy as np
import pytest

from minimoe.course.caching import best_hits, cache_use, lru_hits
from minimoe.errors import TraceError
from minimoe.study.trace import RoutingTrace, TraceDocument

RNG = np.random.default_rng(0)


def trace_of(chosen: np.ndarray, experts: int = 8) -> RoutingTrace:
    """One layer of documents [G, S, K], each a work."""
    g, s, k = chosen.shape
    n = g * s
    return RoutingTrace(
        token=np.zeros(n, np.int32),
        document=np.repeat(np.arange(g, dtype=np.int32), s),
        position=np.tile(np.arange(s, dtype=np.int32), g),
        expert=chosen.reshape(n, 1, k).astype(np.int16),
        weight=np.full((n, 1, k), 1 / k, np.float32),
        documents=tuple(TraceDocument("text", str(i)) for i in range(g)),
        num_experts=experts,
        layers=(1,),
    )


def test_hits_by_hand() -> None:
    asked = np.array([[0, 1], [2, 0], [1, 2], [0, 1]])
    # with two places each expert is dropped just before it is asked for again
    assert lru_hits(asked, 2) == 0
    assert lru_hits(asked, 3) == 5
    # using makes young: 0 stays, 1 goes
    assert lru_hits(np.array([[0, 1], [0, 2], [0, 1]]), 2) == 2
    assert best_hits(asked, 2) == 4  # keeps 0 and 1, and uses 2 without keeping it


def most(asked: list[int], places: int) -> int:
    """Hits of the best of all ways to keep and to drop."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for expert in asked:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            for kept in itertools.combinations(held | {expert}, min(places, len(held | {expert}))):
                now = hits + (expert in held)
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
        states = after
    return max(states.values())


@pytest.mark.parametrize("places", [1, 2, 3])
def test_no_way_to_keep_and_drop_has_more_hits_than_the_bound(places: int) -> None:
    for _ in range(30):
        asked = RNG.integers(0, 5, (7, 2))
        best = best_hits(asked, places)
        assert best == most(asked.ravel().tolist(), places)
        assert lru_hits(asked, places) <= best


def test_the_null_knows_order_from_popularity() -> None:
    shape = (60, 40, 2)
    skewed = np.argsort(RNG.random((*shape[:2], 8)) ** (1 / np.arange(8, 0, -1)))[..., -2:]
    (popular,) = cache_use(trace_of(skewed), 1, [3])
    assert popular.lru.null_low < popular.lru.value < popular.lru.null_high
    assert popular.lru.low < popular.lru.value < popular.lru.high
    sticky = np.repeat(skewed[:, ::4], 4, axis=1)
    (ordered,) = cache_use(trace_of(sticky), 1, [3])
    assert ordered.lru.low > ordered.lru.null_high and ordered.lru.p == pytest.approx(1 / 40)
    for use in (popular, ordered):
        assert max(use.lru.value, use.popular) <= use.best + 0.05


def test_popular_experts_are_chosen_on_other_works() -> None:
    # each document uses two experts of its own: what the others use is never right
    own = np.stack([np.tile([2 * g, 2 * g + 1], (10, 1)) for g in range(4)])
    (use,) = cache_use(trace_of(own), 1, [2])
    assert use.popular == 0
    assert use.lru.value == use.best == 0.9  # all but the first token's
    assert use.to_dict()["places"] == 2


@pytest.mark.parametrize("places", [1, 9])
def test_a_cache_that_cannot_be_is_refused(places: int) -> None:
    trace = trace_of(np.tile([0, 1], (2, 5, 1)))
    with pytest.raises(
        TraceError, match=rf"has {places} places, .* 2 of 8 experts .* give 2 to 8$"
    ):
        cache_use(trace, 1, [places])
