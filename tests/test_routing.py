"""Routing: the sparse matrix, its column sums, and what check() finds."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from minimoe.errors import MinimoeError
from minimoe.routing import Routing
from tests.small import refuses, routings, topk_routing


@given(routings())
@settings(max_examples=60, deadline=None)
def test_load_and_dense_are_sums_over_the_assignments(routing: Routing) -> None:
    routing.check()
    load = [0] * routing.num_experts
    matrix = torch.zeros(routing.shape)
    for n in range(routing.num_assignments):
        t, e = int(routing.token[n]), int(routing.expert[n])
        load[e] += routing.valid is None or bool(routing.valid[t])
        matrix[t, e] += routing.weight[n] * (routing.kept is None or bool(routing.kept[n]))
    assert routing.load().tolist() == load
    torch.testing.assert_close(routing.dense(), matrix)


def test_a_routing_is_frozen() -> None:
    routing: Any = topk_routing([[0, 1]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.k = 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expert": torch.tensor([0, 1, 2])}, "routing.expert has shape (3,)"),
        ({"expert": torch.tensor([0, 1, 4, 0])}, "routing.expert holds ids from 0 to 4; expected 0 to 3"),
        ({"token": torch.tensor([-1, 0, 1, 1])}, "routing.token holds ids from -1"),
        ({"expert": torch.tensor([0, 1, 2, 3], dtype=torch.int32)}, "routing.expert has type torch.int32"),
        ({"weight": torch.tensor([0.5, float("nan"), 0.5, 0.5])}, "not finite"),
        ({"weight": torch.ones(4, dtype=torch.bfloat16)}, "routing.weight has type torch.bfloat16"),
        ({"kept": torch.ones(4, dtype=torch.int64)}, "routing.kept has type torch.int64"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, "routing.valid has shape (4,)"),
        ({"probs": torch.ones(2, 3)}, "routing.probs has shape (2, 3); expected (2, 4)"),
        ({"sequence": torch.zeros(2)}, "routing.sequence has type torch.float32; expected torch.int64"),
        ({"probs": torch.ones(2, 4, device="meta")}, "routing.probs is on meta, but routing.token on cpu"),
        ({"token": torch.tensor([0, 1, 0, 1])}, "routing.k is 2"),
        ({"k": 3}, "routing.k is 3"),
    ],
)  # fmt: skip
def test_check_names_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    routing = topk_routing([[0, 1], [2, 3]]).check()
    refuses(MinimoeError, re.escape(named), dataclasses.replace(routing, **changes).check)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["logits", "probs", "weight"])
def test_check_names_the_first_value_that_is_not_finite(name: str, bad: float) -> None:
    routing = topk_routing([[0, 1], [2, 3], [1, 0]], torch.rand(3, 2))
    values = torch.rand(3, 2 if name == "weight" else 4)
    values[1:, 1] = bad
    changes: Any = {name: values.flatten() if name == "weight" else values}
    routing = dataclasses.replace(routing, **changes)
    # the second choice of token 1 is expert 3
    expert = 3 if name == "weight" else 1
    said = f"routing.{name} is {bad} for token 1 and expert {expert}, the first of 2 values"
    refuses(MinimoeError, said, routing.check)
