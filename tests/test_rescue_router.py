"""Rescue a router: its JavaScript computes what PyTorch computes, collapses by default, and can be rescued."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.balance import switch_loss
from minimoe.course.characters import Characters, NextCharacter
from minimoe.dispatch import grouped
from minimoe.experts import Experts
from minimoe.routers import SwitchRouter
from minimoe.routing import Routing, expert_capacity, limit_capacity
from minimoe.widgets import rescue_router
from minimoe.widgets.explorable import module
from minimoe.widgets.rescue_router import FIRST, RESCUED, RESULT, SIZES, film, text
from tests.node import in_node

B, S, D, E = (SIZES[key] for key in "BSDE")
LETTERS = 31


class Sparse(nn.Module):
    """The page's layer, of the library's parts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.gate, self.factor = SwitchRouter(D, E, initializer_range=1.0), factor
        self.experts = Experts(E, D, SIZES["F"], initializer_range=D**-0.5)

    def forward(self, h: Tensor) -> tuple[Tensor, Routing]:
        """h [T, D] -> [T, D] and its routing."""
        routing = self.gate(h)
        if self.factor:
            routing = limit_capacity(routing, expert_capacity(len(h), E, 1, self.factor))
        return grouped(h, routing, self.experts), routing


def parts(model: NextCharacter) -> dict[str, Tensor]:
    """Weights by the page's names."""
    layer: Any = model.layer
    return {
        "embedding": model.embedding,
        "head": model.head,
        "router": layer.gate.weight,
        "gateUp": layer.experts.gate_up_proj,
        "down": layer.experts.down_proj,
    }


def numbers(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Tensors as flat lists."""
    return {name: tensor.detach().flatten().tolist() for name, tensor in tensors.items()}


GRADIENTS = """(() => {
  const each = (named, f) => Object.fromEntries(Object.entries(named).map(([name, list]) => [name, f(list)]));
  const typed = (lists) => each(lists, (list) => Float64Array.from(list));
  const weights = typed(given.weights);
  const plain = (arrays) => each(arrays, (array) => [...array]);
  const found = m.backward(weights, given.shape, given.contexts, given.targets, given.settings);
  m.adam(weights, found.gradients, {step: 0}, given.rates);
  return {...found, gradients: plain(found.gradients), weights: plain(weights)};
})()"""


@pytest.mark.parametrize(("alpha", "factor"), [(0.0, 0.0), (0.3, 0.0), (0.1, 0.75)])
def test_loss_gradients_and_a_step_are_those_of_pytorch(alpha: float, factor: float) -> None:
    torch.manual_seed(0)
    model = NextCharacter(LETTERS, Sparse(factor), D, S)
    contexts, targets = torch.randint(LETTERS, (B, S)), torch.randint(LETTERS, (B,))
    weights = parts(model)
    rates = {name: 0.2 if name == "router" else 0.01 for name in weights}
    given = {
        "weights": numbers(weights),
        "shape": {**SIZES, "V": LETTERS},
        "contexts": contexts.flatten().tolist(),
        "targets": targets.tolist(),
        "settings": {"alpha": alpha, **({"places": expert_capacity(B, E, 1, factor)} if factor else {})},
        "rates": rates,
    }  # fmt: skip
    got = in_node("rescue_router", GRADIENTS, given)
    logits, routing = model(contexts)
    assert routing is not None
    loss, balance = F.cross_entropy(logits, targets), switch_loss(routing)
    optimizer = torch.optim.Adam(
        [{"params": [w], "lr": rates[name]} for name, w in weights.items()]
    )
    (loss + alpha * balance).backward()
    assert got["counts"] == routing.load().tolist()
    kept = routing.kept.sum().item() if routing.kept is not None else B
    assert got["dropped"] == B - kept and (kept < B) == bool(factor)
    assert got["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert got["balance"] == pytest.approx(balance.item(), abs=1e-5)
    for name, weight in weights.items():
        assert weight.grad is not None
        found = torch.tensor(got["gradients"][name]).view_as(weight)
        assert weight.grad.abs().max() > 1e-3  # so that 1e-6 is small
        torch.testing.assert_close(found, weight.grad, atol=1e-6, rtol=1e-4)
    optimizer.step()
    for name, weight in weights.items():
        assert weight.grad is not None
        # Adam's first step is by the sign: where the gradient is nearly nothing, so is what its sign is worth
        sure = (weight.grad == 0) | (weight.grad.abs() > 1e-4)
        stepped = torch.tensor(got["weights"][name]).view_as(weight)
        torch.testing.assert_close(stepped[sure], weight.detach()[sure], atol=1e-5, rtol=0)


def test_several_steps_of_adam_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50, dtype=torch.float64))
    gradients = torch.randn(6, 50, dtype=torch.float64) * torch.logspace(-9, 0, 50).double()
    given = {"weight": weight.tolist(), "gradients": gradients.tolist()}
    got = in_node(
        "rescue_router",
        """(() => { const [w, moments] = [Float64Array.from(given.weight), {step: 0}];
             for (const g of given.gradients) m.adam({w}, {w: g}, moments, {w: 0.03});
             return [...w]; })()""",
        given,
    )
    optimizer = torch.optim.Adam([weight], lr=0.03)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), weight.detach())


def test_characters_are_those_of_the_lessons() -> None:
    read = text()
    got = in_node(
        "rescue_router", "(({letters, ids}) => [letters, [...ids]])(m.characters(given))", read
    )
    right = Characters.of(read)
    assert "".join(got[0]) == right.letters and got[1] == right.ids.tolist()


def test_it_collapses_within_ten_seconds_and_is_rescued_within_twenty() -> None:
    """At the page's own pace. What is seen is the mean of the last twenty steps."""
    frames = {seconds: seconds * SIZES["pace"] // SIZES["frame"] for seconds in (10, 20)}
    # in the stored film, which stands in for the page's, and now
    share, _, turn = film()
    assert turn <= frames[10] and len(share) - turn <= frames[20]
    assert share[turn - 10 : turn].mean(0).max() > 0.9 and share[-10:].mean(0).max() < 0.45
    phases = [[turn, FIRST], [turn, RESCUED]]
    got = in_node(
        "rescue_router", "m.filmed(given.text, given.sizes, given.phases)",
        {"text": text(), "sizes": SIZES, "phases": phases},
    )  # fmt: skip
    counts = torch.tensor([one["counts"] for one in got]) / (B * SIZES["frame"])
    assert counts[turn - 10 : turn].mean(0).max() > 0.9
    assert counts[-10:].mean(0).max() < 0.45
    losses = [one["loss"] / one["steps"] for one in got]
    assert losses[0] > 4 and losses[-1] < 2.2


def test_frames_are_merged_without_loss_and_words_follow_the_load() -> None:
    frames = [{"steps": 4, "counts": [i, 1], "dropped": i, "loss": 0.5 * i} for i in range(5)]
    halved, before, after = in_node(
        "rescue_router",
        "[m.halved(given), m.together(given, 2), m.together(m.halved(given), 2)]",
        frames,
    )
    assert [one["steps"] for one in halved] == [8, 8, 4]
    assert before == after
    assert before["counts"] == [10, 5] and before["loss"] == pytest.approx(5 / 20)
    loads = [[0.97, 0.01, 0.01, 0.01], [0.3, 0.2, 0.25, 0.25], [0.38, 0.31, 0.3, 0.01]]
    said = in_node("rescue_router", "given.map(m.verdict)", loads)
    assert [words.split()[-1] for words in said] == ["collapsed", "even", "uneven"]


def test_worker_has_all_that_it_calls() -> None:
    """The worker's source, run where nothing else is: two frames come back."""
    run = """new Promise((resolve) => {
      const posted = [];
      const alone = `(function (postMessage) {
        let onmessage;
        ${m.workerSource()}
        return (data) => onmessage({data});
      })`;
      const tell = (0, eval)(alone)((one) => {
        if (posted.push(one) < 2) return;
        tell({running: false});
        resolve(posted);
      });
      tell([given.text, given.sizes]);
      tell({...given.first, running: true});
    })"""
    small = {**SIZES, "B": 8, "pace": 1000}
    posted = in_node("rescue_router", run, {"text": text()[:2000], "sizes": small, "first": FIRST})
    assert [sum(one["counts"]) for one in posted] == [8 * SIZES["frame"]] * 2


def test_it_is_small_and_its_film_is_of_its_settings() -> None:
    assert len(module("rescue_router").encode()) < 100_000
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    assert stored["sizes"] == SIZES and stored["settings"] == [FIRST, RESCUED]
    assert "% of the tokens at step" in rescue_router().alt
