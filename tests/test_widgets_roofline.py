"""The roofline's JavaScript gives the floors of minimoe.cost."""

import itertools
import random
from typing import Any

import pytest

from minimoe.cost.device import DEVICES
from minimoe.cost.layer import (
    crossover_tokens,
    experts_touched,
    layer_bytes,
    layer_floor,
    layer_flops,
)
from minimoe.presets import PRESETS
from minimoe.widgets.roofline import MOST, roofline
from tests.node import in_node

DATA = roofline().data


def cases() -> list[tuple[int, str, str, int, int, bool]]:
    """Every layer on every device at its own E and K, and layers with others."""
    draw = random.Random(0)
    names = list(DATA["layers"])
    own = [
        (tokens, name, chip, DATA["layers"][name]["E"], DATA["layers"][name]["K"], backward)
        for name, chip in itertools.product(names, DEVICES)
        for tokens, backward in ((1, False), (64, True), (1000, False), (MOST, True))
    ]
    turned: list[Any] = []
    for _ in range(300):
        e = draw.choice([1, 2, 4, 8, 60, 128, 1024])
        k = draw.randint(1, min(e, 32))
        turned.append(
            (int(2 ** draw.uniform(0, 15)), draw.choice(names), draw.choice(list(DEVICES)), e, k, draw.random() < 0.5)
        )  # fmt: skip
    return own + turned


def test_floors_are_those_of_the_library() -> None:
    given = [
        (
            tokens,
            DATA["layers"][name] | {"E": e, "K": k},
            {"peak": DEVICES[chip].flops_per_second, "bandwidth": DEVICES[chip].bytes_per_second},
            backward,
        )
        for tokens, name, chip, e, k, backward in cases()
    ]
    got = in_node(
        "roofline",
        "given.map(([T, layer, chip, both]) => "
        "({...m.floor(T, layer, chip, both), touched: m.touched(T, layer), rule: m.crossover(layer, chip)}))",
        given,
    )
    exact: Any = {"rel": 1e-12, "abs": 0}
    for (tokens, name, chip, e, k, backward), found in zip(cases(), got, strict=True):
        d, f = PRESETS[name].hidden_size, PRESETS[name].expert_size
        device, both = DEVICES[chip], {"backward": backward}
        assert found["flops"] == layer_flops(tokens, d, f, k, **both)
        assert found["bytes"] == pytest.approx(layer_bytes(tokens, d, f, e, k, **both), **exact)
        floor = layer_floor(device, tokens, d, f, e, k, **both)
        assert found["seconds"] == pytest.approx(floor.seconds, **exact)
        assert found["limit"] == floor.limit
        assert found["touched"] == pytest.approx(experts_touched(tokens, e, k), **exact)
        assert found["rule"] == pytest.approx(crossover_tokens(device, e, k), **exact)


def test_the_layers_and_devices_are_all_of_the_library() -> None:
    sparse = {n for n, c in PRESETS.items() if len(c.mlp_only_layers) < c.num_hidden_layers}
    assert set(DATA["layers"]) == sparse
    for name, layer in DATA["layers"].items():
        c = PRESETS[name]
        sizes = (c.hidden_size, c.expert_size, c.num_experts, c.num_experts_per_tok)
        assert layer == dict(zip("DFEK", sizes, strict=True))
    assert [(d["name"], d["peak"], d["bandwidth"]) for d in DATA["devices"]] == [
        (d.name, d.flops_per_second, d.bytes_per_second) for d in DEVICES.values()
    ]
    reach = in_node("roofline", "m.REACH")
    for layer in DATA["layers"].values():
        assert layer["E"] in reach["E"]
        assert layer["K"] in reach["K"]


def test_the_crossing_is_where_the_library_changes_sides() -> None:
    given = [
        (layer, chip, backward)
        for layer, chip, backward in itertools.product(
            DATA["layers"].values(), DATA["devices"], (False, True)
        )
    ]
    got = in_node(
        "roofline", f"given.map(([layer, chip, both]) => m.crossing(layer, chip, both, {MOST}))", given
    )  # fmt: skip
    met = set()
    for (layer, chip, backward), cross in zip(given, got, strict=True):
        device = next(d for d in DEVICES.values() if d.name == chip["name"])
        sizes = (layer["D"], layer["F"], layer["E"], layer["K"])
        at = {t: layer_floor(device, t, *sizes, backward=backward).limit for t in (1, MOST)}
        if cross is None:
            assert set(at.values()) == {"memory"}
            met.add("never")
        else:
            assert 1 < cross < MOST
            assert layer_floor(device, int(cross), *sizes, backward=backward).limit == "memory"
            assert layer_floor(device, int(cross) + 1, *sizes, backward=backward).limit == "compute"
            met.add("somewhere")
            large = layer["D"] > 1024 and not backward
            if large and cross < MOST / 4:
                rule = crossover_tokens(device, layer["E"], layer["K"])
                assert rule < cross < 2 * rule
    assert met == {"never", "somewhere"}


def test_the_figure_says_what_it_shows() -> None:
    c = PRESETS["mixtral-8x7b"]
    for tokens in (1, 64, MOST):
        floor = layer_floor(DEVICES["h200"], tokens, c.hidden_size, c.expert_size, 8, 2)
        assert f"{1e6 * floor.seconds:,.0f} µs for {tokens:,}" in roofline().alt


def test_no_count_of_experts_is_rounded_past_those_that_there_are() -> None:
    counts = [1, 2, 8, 30, 64, 100, 128, 200, 256, 400, 700, 4096]
    given = [
        {"T": t, "E": e, "K": k} for e in (1, 8, 60, 128, 256, 1024) for k in (1, 8) for t in counts if k <= e
    ]  # fmt: skip
    said = in_node("roofline", "given.map(({T, E, K}) => m.met(T, {E, K}))", given)
    for case, text in zip(given, said, strict=True):
        expected = experts_touched(case["T"], case["E"], case["K"])
        if text == "the only expert":
            assert case["E"] == 1
        elif text.startswith("all"):
            assert expected == pytest.approx(case["E"], abs=0.05)
        else:
            shown, of, there, _ = text.split()
            assert of == "of" and int(there) == case["E"]
            assert float(shown) == pytest.approx(expected, abs=0.0501)
            assert float(shown) < case["E"]
