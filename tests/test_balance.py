"""Balancing losses and load, against closed forms and hand-computed cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimoe.balance import Load, importance_loss, load_loss, sequence_loss, switch_loss, z_loss
from minimoe.errors import MinimoeError
from minimoe.routers import NoisyTopKRouter, SigmoidRouter, TopKRouter
from minimoe.zoo.switchhead import ProjectionRouter
from tests.small import random_ids, refuses, tiny_model, topk_routing


def test_trap_3_even_routing_gives_one_and_collapse_the_number_of_experts() -> None:
    for k in (1, 2, 4):
        choice = (torch.arange(8 * k) % 4).view(8, k)
        routing = topk_routing(choice, probs=torch.full((8, 4), 1 / 4))
        torch.testing.assert_close(switch_loss(routing), torch.tensor(1.0))
    for e in (2, 8):
        probs = F.one_hot(torch.ones(6, dtype=torch.int64), e).float()
        routing = topk_routing([[1]] * 6, num_experts=e, probs=probs)
        torch.testing.assert_close(switch_loss(routing), torch.tensor(float(e)))


def test_trap_3_one_is_not_a_lower_bound() -> None:
    # three tokens lean to expert 0 by a hair; one leans to 1 by a lot: f and P disagree
    probs = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]])
    routing = topk_routing([[0], [0], [0], [1]], num_experts=2, probs=probs)
    share = (3 * 0.51 + 0.01) / 4
    expected = 2 * (0.75 * share + 0.25 * (1 - share))
    assert expected < 1
    torch.testing.assert_close(switch_loss(routing), torch.tensor(expected))


def test_trap_3_gradient_flows_through_probabilities_only() -> None:
    torch.manual_seed(0)
    gate = TopKRouter(8, 4, 1, initializer_range=1.0)
    x = torch.randn(50, 8)
    routing = gate(x)
    f = torch.bincount(routing.expert, minlength=4) / 50
    own = 4 * (f * (x @ gate.weight.T).softmax(-1).mean(0)).sum()
    found, expected = (torch.autograd.grad(y, gate.weight)[0] for y in (switch_loss(routing), own))
    torch.testing.assert_close(found, expected)
    # the full softmax gives a gradient at K = 1; a renormalised one would not
    assert float(found.abs().max()) > 1e-4


def test_trap_4_layers_are_averaged_not_pooled() -> None:
    model = tiny_model(num_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            # the router sees one coordinate, which is always positive: every token of layer i goes to expert i
            gate, norm = (
                layer.mlp.gate.weight.zero_(),
                layer.post_attention_layernorm.weight.zero_(),
            )
            gate[i, 0], gate[1 - i, 0], norm[0] = 1e4, -1e4, 1
        model.embed_tokens.weight[:, 0] = 5.0
    ids = random_ids(2, 8)
    out = model(ids, labels=ids)
    # opposite directions: pooled, they would look even
    assert [r.load().tolist() for r in out.routings] == [[16, 0], [0, 16]]
    torch.testing.assert_close(out.aux_loss, torch.tensor(2.0))


def test_trap_5_zeroed_logits_would_still_add() -> None:
    # four experts, all logits zero: the loss of a *valid* token is (ln 4)²
    routing = topk_routing([[0]], logits=torch.zeros(1, 4))
    torch.testing.assert_close(z_loss(routing), torch.tensor(math.log(4) ** 2))


def test_trap_22_load_of_a_hand_computed_case_and_no_zero_over_zero() -> None:
    load = Load.from_counts(torch.tensor([6, 2, 0, 0]))
    assert load.share == (0.75, 0.25, 0.0, 0.0)
    assert load.max_min == math.inf
    assert load.max_vio == pytest.approx(2.0)  # (6 - 2) / 2
    # population variance of 6, 2, 0, 0 is (16 + 0 + 4 + 4) / 4 = 6; the mean is 2
    assert load.cv2 == pytest.approx(1.5)
    assert Load.from_counts(torch.tensor([4, 2])).max_min == 2.0
    refuses(MinimoeError, "zero assignments", Load.from_counts, torch.zeros(4))
    # one expert: no deviation, where a sample variance has none
    assert Load.from_counts(torch.tensor([3])).cv2 == 0


@pytest.mark.parametrize("dense", [0, 1])
def test_a_dense_layer_has_no_part_in_the_balancing_loss(dense: int) -> None:
    ids = random_ids(2, 12)
    out = tiny_model(num_hidden_layers=3, mlp_only_layers=(dense,)).train()(ids, labels=ids)
    assert len(out.routings) == 2 and out.aux_loss is not None and out.loss is not None
    mean = sum(switch_loss(routing) for routing in out.routings) / 2
    torch.testing.assert_close(out.aux_loss, mean)
    out.loss.backward()


@pytest.mark.parametrize("level", [-10.0, -60.0, -80.0])
def test_a_collapse_of_sigmoid_scores_is_seen_however_small_they_are(level: float) -> None:
    """With an ε beside Σ s the shares, and the balancing loss, would fall to 0 where the router is collapsed."""
    logits = level - torch.arange(4.0)  # every token prefers expert 0
    router = SigmoidRouter(1, 4, 1)
    heads = ProjectionRouter(1, 2, 2, 1, norm_topk_prob=True)
    with torch.no_grad():
        router.weight.copy_(logits[:, None])
        heads.weight.copy_(logits[:, None])
    p = F.logsigmoid(logits.double()).softmax(0)
    routing = router(torch.ones(8, 1))
    for loss in (switch_loss(routing), sequence_loss(routing)):
        assert loss.item() == pytest.approx(4 * float(p[0]), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, router.weight, retain_graph=True)
        assert bool(gradient.isfinite().all()) and bool(gradient.any())
    both = heads(torch.ones(8, 1))
    assert both.probs is not None and both.probs.sum(1).tolist() == pytest.approx([1] * 8)
    assert both.weight.tolist() == [1] * 16, "one renormalised expert a head weighs 1"


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-25])
def test_cv2_does_not_depend_on_the_size_of_the_weights(scale: float) -> None:
    weight = (torch.tensor([[0.75], [0.25]]) * scale).requires_grad_()
    loss = importance_loss(topk_routing([[0], [1]], weight, 2))
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


@pytest.mark.parametrize(("weight", "num_experts"), [(0.5, 4), (0.0, 4), (0.5, 1)])
def test_even_importance_costs_nothing_and_pulls_nowhere(weight: float, num_experts: int) -> None:
    """The gradient of a standard deviation is 0/0 there; that of the variance is 0."""
    w = torch.full((4, 1), weight, requires_grad=True)
    loss = importance_loss(topk_routing((torch.arange(4) % num_experts)[:, None], w, num_experts))
    loss.backward()
    assert loss.item() == 0
    assert w.grad is not None and w.grad.tolist() == [[0.0]] * 4


@pytest.mark.parametrize("level", [-5.0, -30.0, -45.0, -60.0, -110.0])
def test_the_load_loss_is_finite_where_the_noise_underflows(level: float) -> None:
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 4, 2).train()
    with torch.no_grad():
        router.noise_weight.fill_(level / 4)
    loss = load_loss(router(1 + 0.1 * torch.randn(8, 4)))
    loss.backward()
    assert bool(loss.isfinite())
    for parameter in router.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
