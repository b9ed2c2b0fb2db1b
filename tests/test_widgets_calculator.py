"""The calculator's JavaScript gives the numbers of minimoe.cost: of every preset, and of what the sliders can make."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from minimoe.config import ModelConfig
from minimoe.cost.device import DEVICES
from minimoe.cost.flops import decode_flops, forward_flops, kv_cache_bytes
from minimoe.cost.parameters import count_parameters
from minimoe.cost.time import training
from minimoe.presets import PRESETS
from minimoe.widgets.calculator import calculator
from tests.node import in_node

BUDGET: dict[str, Any] = {"tokens": 2e12, "utilisation": 0.35, "gpus": 512}
CHIP = DEVICES["a100"]
NUMBERS = (
    "({parameters: m.parameters(c), forward: m.flops(c, S), last: m.flops(c, S, {decode: true}), "
    "cache: m.cacheBytes(c, S), training: m.training(c, budget)})"
)


def config(values: dict[str, Any]) -> ModelConfig:
    """The configuration that JavaScript speaks of; ModelConfig refuses what cannot be."""
    return ModelConfig.from_dict(values)


def agree(got: dict[str, Any], c: ModelConfig, context: int) -> None:
    """Counts are equal, floating-point numbers to 1e-12."""
    found = count_parameters(c)
    assert got["parameters"]["total"] == found.total
    assert got["parameters"]["active"] == found.active
    assert got["parameters"]["parts"] == {
        name: count._asdict() for name, count in found.by_component.items()
    }
    assert got["forward"] == pytest.approx(forward_flops(c, context), rel=1e-12, abs=0)
    assert got["last"] == pytest.approx(decode_flops(c, context), rel=1e-12, abs=0)
    assert got["cache"] == kv_cache_bytes(c, context)
    run = training(
        c, BUDGET["tokens"], CHIP, gpus=BUDGET["gpus"], utilisation=BUDGET["utilisation"]
    )
    expected = {"flops": run.flops, "hours": run.gpu_hours, "days": run.days}
    assert got["training"] == pytest.approx(expected, rel=1e-12, abs=0)


def given(cases: Sequence[Any]) -> dict[str, Any]:
    data = calculator().data
    presets = {name: data["plain"] | own for name, own in data["presets"].items()}
    return {
        "presets": presets,
        "cases": cases,
        "budget": BUDGET | {"peak": CHIP.flops_per_second},
    }


def test_every_preset_has_the_library_s_numbers() -> None:
    cases = [
        (name, context)
        for name, c in PRESETS.items()
        for context in (1, 100, 4096, c.max_position_embeddings)
    ]
    got = in_node(
        "calculator",
        "given.cases.map(([name, S]) => { const [c, budget] = [given.presets[name], given.budget]; "
        f"return [c, {NUMBERS}]; }})",
        given(cases),
    )
    for (name, context), (values, numbers) in zip(cases, got, strict=True):
        assert config(values) == PRESETS[name]
        agree(numbers, PRESETS[name], context)


def test_sliders_begin_at_the_published_sizes() -> None:
    got = in_node(
        "calculator",
        """Object.fromEntries(Object.entries(given.presets).map(([name, c]) => [name, {
             within: Object.entries(m.sizes(c)).every(([key, size]) => m.REACH[key].includes(size))
               && m.REACH.S.includes(c.max_position_embeddings),
             parameters: m.parameters(m.changed(c, m.sizes(c))), cache: m.cacheBytes(m.changed(c, m.sizes(c)), 77),
           }]))""",
        given([]),
    )
    for name, c in PRESETS.items():
        assert got[name]["within"], f"a size of {name} is not on its slider"
        assert got[name]["parameters"]["total"] == count_parameters(c).total
        assert got[name]["parameters"]["active"] == count_parameters(c).active
        assert got[name]["cache"] == kv_cache_bytes(c, 77)


def test_whatever_the_sliders_say_is_a_model_with_the_library_s_numbers() -> None:
    draw = random.Random(0)
    reach = in_node("calculator", "m.REACH")
    cases: list[tuple[str, dict[str, Any]]] = [
        (draw.choice(list(PRESETS)), {key: draw.choice(values) for key, values in reach.items()})
        for _ in range(300)
    ]
    got = in_node(
        "calculator",
        "given.cases.map(([name, said]) => { "
        "const [c, budget, S] = [m.changed(given.presets[name], said), given.budget, said.S]; "
        "const kept = Object.entries(m.sizes(c)).every(([key, size]) => m.REACH[key].includes(size)); "
        f"return [c, kept, {NUMBERS}]; }})",
        given(cases),
    )
    for (name, said), (values, kept, numbers) in zip(cases, got, strict=True):
        c = config(values)
        assert kept
        assert (c.hidden_size, c.num_hidden_layers) == (said["D"], said["L"])
        assert c.num_attention_heads == said["heads"]
        assert c.num_experts_per_tok == min(said["K"], said["E"])
        published = PRESETS[name]
        assert c.head_size == published.head_size
        if types := published.layer_types:
            assert c.layer_types == tuple(types[i % len(types)] for i in range(said["L"]))
        if len(published.mlp_only_layers) < published.num_hidden_layers:
            assert c.mlp_only_layers == tuple(i for i in published.mlp_only_layers if i < said["L"])
        if any(map(c.is_sparse, range(said["L"]))):
            assert (c.num_experts, c.expert_size) == (said["E"], said["F"])
        agree(numbers, c, said["S"])


def test_what_it_has_no_arithmetic_for_is_said() -> None:
    for changes, message in (
        ({"router_type": "soft"}, "no arithmetic for the router soft"),
        ({"attention_type": "moa"}, "no arithmetic for attention of type moa"),
    ):
        with pytest.raises(AssertionError, match=message):
            in_node("calculator", "m.parameters(given)", ModelConfig().to_dict() | changes)


def test_the_nine_billion() -> None:
    # The invitation and lesson 01 say so: one expert 7.24 B, eight of them 57.9 B, together 46.7 B.
    one, eight = (
        count_parameters(PRESETS["mixtral-8x7b"].replace(num_experts=e, num_experts_per_tok=1)).total
        for e in (1, 8)
    )  # fmt: skip
    assert round(one / 1e9, 2) == 7.24
    assert round(8 * one / 1e9, 1) == 57.9
    assert round(eight / 1e9, 1) == 46.7
    assert round((8 * one - eight) / 1e9, 1) == 11.2
    assert 9 <= (56e9 - eight) / 1e9 < 10


def test_the_figure_says_what_it_shows() -> None:
    alt = calculator().alt
    found = count_parameters(PRESETS["mixtral-8x7b"])
    for number in (found.total, found.active):
        assert f"{number / 1e9:.1f} B" in alt
    assert f"experts {found.by_component['experts'].total / 1e9:.2g}" in alt
