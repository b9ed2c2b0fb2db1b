"""Twenty-seven bugs that shipped somewhere public: each is held by a test that carries its number, `test_trap_N_…`."""

import ast
import re
from pathlib import Path

TRAPS = {
    1: "the order of softmax, top-k and renormalisation",
    2: "one renormalised expert a token: its weight is 1, and the router learns nothing",
    3: "the balancing loss: E·Σ f·P with the full softmax, no gradient through f, and no bound at 1",
    4: "layers are averaged, not pooled: opposite collapses must not cancel",
    5: "padding changes no loss and no statistic; zeroed logits would still cost z-loss",
    6: "balance of a global batch: counts are summed over ranks and parts, then multiplied",
    7: "load is what was asked for, before capacity drops",
    8: "the selection bias: selects and does not weigh, moves once an optimiser step, in training only",
    9: "groups of experts are masked with −∞, since a biased score can be below 0",
    10: "sigmoid scores that all underflow: 0/0",
    11: "router arithmetic in float32: near ties flip in bfloat16",
    12: "noise and jitter in training only",
    13: "capacity is rounded up: one token must find a place",
    14: "a dropped assignment contributes nothing; the residual carries the token",
    15: "causality: appending tokens must not change what came before; each router says whether it holds",
    16: "batch invariance: a row alone equals the row in its batch",
    17: "all dispatchers are one function, forward and in every gradient, in the awkward cases too",
    18: "identical experts with normalised weights are one dense MLP",
    19: "the combine accumulates in float32",
    20: "checkpoints: bit-exact, strict, w1 and w3 not swapped, both layouts, shards, bfloat16",
    21: "cached decoding equals the full forward pass, routing included",
    22: "CV² states its variance, and is no 0/0",
    23: "drops by position: first come, first served",
    24: "SwitchHead with one expert: its gate still scales",
    25: "the auxiliary loss is in the loss when training, whatever is asked to be returned",
    26: "strides: odd ones, and expanded gradients whose strides are 0",
    27: "Triton's interpreter multiplies bfloat16 wrongly",
}
NAME = re.compile(r"test_trap_(\d+(?:_and_\d+)*)_\w+")


def held() -> dict[int, list[str]]:
    """The tests of each trap, by number, as 'file::name'."""
    tests: dict[int, list[str]] = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (match := NAME.fullmatch(node.name)):
                for number in match[1].split("_and_"):
                    tests.setdefault(int(number), []).append(f"{path.name}::{node.name}")
    return tests


def test_every_trap_is_held_by_a_test_and_no_test_names_another() -> None:
    tests = held()
    missing = [f"{n} ({what})" for n, what in TRAPS.items() if n not in tests]
    assert not missing, f"no test named test_trap_N_… for {', '.join(missing)}"
    strange = {n: names for n, names in tests.items() if n not in TRAPS}
    assert not strange, "give the trap a line here first"
    assert len(TRAPS) == 27
