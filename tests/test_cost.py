"""Costs: the floors of one layer, and the arithmetic of whole models against counting and published figures."""

import itertools
from fractions import Fraction

import pytest
import torch

from minimoe.cost import (
    DEVICES,
    Device,
    crossover_tokens,
    experts_touched,
    get_device,
    layer_bytes,
    layer_floor,
    layer_flops,
    layer_limit,
)
from minimoe.errors import ConfigError

# --- one layer -----------------------------------------------------------------------------------

# D, F, E, K of the three models whose layers the benchmark uses
LAYERS = {
    "mixtral": (4096, 14336, 8, 2),
    "olmoe": (2048, 1024, 64, 8),
    "qwen3": (2048, 768, 128, 8),
}


@pytest.mark.parametrize(("e", "k", "tokens"), [(4, 1, 3), (4, 2, 2), (5, 3, 2), (3, 3, 1)])
def test_experts_touched_is_the_mean_over_all_routings(e: int, k: int, tokens: int) -> None:
    sets = list(itertools.combinations(range(e), k))
    met = [len(set().union(*choice)) for choice in itertools.product(sets, repeat=tokens)]
    assert experts_touched(tokens, e, k) == pytest.approx(float(Fraction(sum(met), len(met))))


def test_experts_touched_at_its_ends() -> None:
    assert experts_touched(0, 8, 2) == 0
    assert experts_touched(1, 8, 2) == pytest.approx(2)
    assert experts_touched(10**6, 8, 2) == pytest.approx(8)
    assert experts_touched(1, 8, 8) == 8


def test_layer_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from minimoe.experts import Experts

    d, f, k, tokens = 8, 12, 2, 5
    # in float64, which no backend hides from the counter
    experts = Experts(4, d, f).double()
    x = torch.randn(tokens, d, dtype=torch.float64, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        y = sum(experts(x, e) for e in range(k))
        forward = counter.get_total_flops()
        assert isinstance(y, torch.Tensor)
        y.sum().backward()
    assert forward == layer_flops(tokens, d, f, k)
    assert counter.get_total_flops() == layer_flops(tokens, d, f, k, backward=True)


def test_layer_bytes_by_hand() -> None:
    # 2 tokens, D = 3, F = 5, both of 2 experts: weights 2·45 elements, tokens 2·3
    assert layer_bytes(2, 3, 5, 2, 2) == 2 * (90 + 2 * 6)
    # backward: weights read and their gradients written, x, dy and dx, gate and up of 4 assignments
    assert layer_bytes(2, 3, 5, 2, 2, backward=True) == 2 * (90 + 12 + 180 + 18 + 40)
    assert layer_bytes(2, 3, 5, 2, 2, bytes_per_element=4) == 4 * (90 + 2 * 6)


# Microseconds on an H200, forward and forward+backward, worked out apart from the library (T: Mixtral, OLMoE, Qwen3).
FLOORS = {
    1: ((164, 983), (23, 234), (18, 316)),
    64: ((656, 1969), (187, 563), (277, 834)),
    1024: ((913, 2740), (189, 575), (283, 853)),
    8192: ((7307, 21921), (1044, 3132), (783, 2349)),
    32768: ((29228, 87683), (4175, 12526), (3132, 9395)),
}


@pytest.mark.parametrize("tokens", FLOORS)
def test_floors_of_an_h200(tokens: int) -> None:
    for layer, (forward, both) in zip(LAYERS.values(), FLOORS[tokens], strict=True):
        device = DEVICES["h200"]
        assert round(layer_floor(device, tokens, *layer) * 1e6) == forward
        assert round(layer_floor(device, tokens, *layer, backward=True) * 1e6) == both


def test_crossovers_of_an_h200() -> None:
    found = [crossover_tokens(DEVICES["h200"], e, k) for _, _, e, k in LAYERS.values()]
    assert [round(t, -1) for t in found] == [730, 1470, 2940]
    assert found[0] == pytest.approx(735, abs=0.5)


def test_the_limit_changes_at_the_crossover() -> None:
    device = Device("even", 1e12, 1e12)
    assert crossover_tokens(device, 4, 2) == 2
    assert crossover_tokens(device, 4, 2, bytes_per_element=4) == 4
    h200, mixtral = DEVICES["h200"], LAYERS["mixtral"]
    assert layer_limit(h200, 700, *mixtral) == "memory"
    assert layer_limit(h200, 800, *mixtral) == "compute"


@pytest.mark.parametrize(
    "call",
    [
        lambda: experts_touched(-1, 8, 2),
        lambda: experts_touched(1, 8, 9),
        lambda: experts_touched(1, 8, 0),
        lambda: layer_flops(1, 0, 4, 2),
        lambda: layer_bytes(1, 4, 0, 8, 2),
        lambda: crossover_tokens(DEVICES["h200"], 4, 5),
    ],
)
def test_impossible_layers_are_refused(call) -> None:
    with pytest.raises(ConfigError, match="expected at least 0 tokens"):
        call()


def test_an_unknown_device_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'h20'; did you mean h200\? known are"):
        get_device("h20")
    with pytest.raises(ConfigError, match="both must be positive"):
        Device("none", 0, 1)
