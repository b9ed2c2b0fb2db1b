"""Counterfactual routing, saturation, one token in other meanings, output tokens, parallel texts: known answers."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minimoe.course import further as fu
from minimoe.errors import TraceError
from minimoe.study.trace import TraceDocument
from tests.small import TINY, random_ids, refuses, tiny_model
from tests.test_statistics_simulated import E, simulate


def losses(model, ids, changes):
    with fu.overruled(model, changes):
        return fu.token_losses(model, ids)[0]


@torch.no_grad()
def exchange_experts(model, layer, a, b):
    """Exchange two experts (from 0) of a layer with their rows of the router: what the model computes stays the same.

    Every counterfactual needs this control; a result that moves under it measures the numbering.
    """
    mlp = model.get_submodule(f"layers.{layer - 1}.mlp")
    order = torch.arange(model.config.num_experts)
    order[[a, b]] = order[[b, a]]
    for parameter in mlp.parameters():
        if len(parameter) == len(order):
            parameter.copy_(parameter[order.to(parameter.device)])


def test_the_models_own_choice_put_back_changes_nothing() -> None:
    model, ids = tiny_model(), random_ids(3, 12)
    nats, own = fu.token_losses(model, ids)
    for change in (fu.by_rank(1), lambda r: fu.replayed(fu.own_choice(r))(r)):
        assert torch.allclose(losses(model, ids, {1: change, 2: change}), nats, atol=1e-6)
    assert torch.allclose(losses(model, ids, {1: fu.replayed(own[0])}), nats, atol=1e-6)
    assert torch.allclose(fu.token_losses(model, ids)[0], nats)  # and no hook is left
    assert not torch.allclose(losses(model, ids, {1: fu.renumbered}), nats, atol=1e-3)


def test_exchanging_experts_with_their_rows_changes_nothing_and_without_them_much() -> None:
    for changes in ({}, {"n_shared_experts": 1}):
        model, ids = tiny_model(**changes), random_ids(3, 12)
        nats, own = fu.token_losses(model, ids)
        exchange_experts(model, 2, 0, 3)
        again, moved = fu.token_losses(model, ids)
        assert torch.allclose(again, nats, atol=1e-5)
        names = torch.tensor([3, 1, 2, 0, 4])
        assert torch.equal(names[own[1]], moved[1]) and not torch.equal(own[1], moved[1])
        rows = model.layers[1].mlp.gate.weight
        rows.data[[0, 3]] = rows.data[[3, 0]]
        assert not torch.allclose(fu.token_losses(model, ids)[0], nats, atol=1e-3)


def test_an_expert_that_is_off_gets_nothing_and_its_tokens_take_the_next_best() -> None:
    model, ids = tiny_model(), random_ids(2, 16)
    seen = {}

    def watch(routing):
        seen["before"], seen["after"] = routing, fu.without(3)(routing)
        return seen["after"]

    losses(model, ids, {2: watch})
    before, after = seen["before"], seen["after"]
    assert before.load()[3] > 0 == after.load()[3]
    assert after.weight.view(-1, 2).sum(dim=1).allclose(torch.ones(32))
    order = before.logits.argsort(dim=1, descending=True)
    for ranked, chosen in zip(order.tolist(), fu.own_choice(after).tolist(), strict=True):
        assert chosen == [x for x in ranked if x != 3][:2]


def test_an_expert_is_off_where_all_its_choices_are_refused() -> None:
    model, ids = tiny_model(), random_ids(2, 16)
    routing = model(ids).routings[1]
    own = fu.own_choice(routing)
    off, refused = fu.without(3)(routing), fu.refused(own == 3)(routing)
    assert torch.equal(off.expert, refused.expert) and torch.equal(off.weight, refused.weight)
    one = torch.zeros_like(own, dtype=torch.bool)
    one[5, 1] = True
    order = routing.logits.argsort(dim=1, descending=True)
    expected = torch.where(torch.arange(32)[:, None] == 5, order[:, [0, 2]], order[:, :2])
    assert torch.equal(fu.own_choice(fu.refused(one)(routing)), expected)


def test_ranks_and_evenness() -> None:
    model, ids = tiny_model(), random_ids(2, 8)
    routing = model(ids).routings[0]
    order = routing.logits.argsort(dim=1, descending=True)
    assert torch.equal(fu.own_choice(fu.by_rank(2)(routing)), order[:, 1:3])
    assert torch.equal(fu.own_choice(fu.by_rank(-1)(routing)), order[:, -2:])
    assert set(fu.by_rank(1, even=True)(routing).weight.tolist()) == {0.5}
    assert torch.equal(fu.own_choice(fu.renumbered(routing)), (fu.own_choice(routing) + 1) % 5)


def test_usual_experts_are_read_elsewhere_and_unseen_ids_keep_their_own() -> None:
    read = torch.tensor([4, 4, 4, 7]), torch.tensor([[0, 2], [2, 1], [2, 0], [3, 4]])
    asked = torch.tensor([4, 7, 9]), torch.tensor([[1, 1], [1, 2], [4, 3]])
    usual = fu.usual_experts(*read, *asked, 5)
    assert [set(row) for row in usual.tolist()] == [{0, 2}, {3, 4}, {3, 4}]


def test_every_change_is_priced_by_works() -> None:
    model, ids = tiny_model(), random_ids(60, 10).view(3, 20, 10)
    work = np.arange(60).reshape(3, 20)
    rows = fu.counterfactuals(model, ids, work, random_ids(8, 10, seed=1), layers=(1, 2))
    assert len(rows) == 8 * 3 + 5 * 2
    by = {(r.change, r.layer): r.loss for r in rows}
    everywhere = by["every expert's tokens to the next expert", None]
    texts = ids.flatten(0, 1)
    renumbered = losses(model, texts, {1: fu.renumbered, 2: fu.renumbered})
    moved = float((renumbered - fu.token_losses(model, texts)[0]).mean())
    assert everywhere.value == pytest.approx(moved, abs=1e-6)
    assert everywhere.low < everywhere.value < everywhere.high
    # a work of several texts is one unit, and few works give no interval
    few = fu.counterfactuals(model, ids, work // 2, random_ids(8, 10), layers=(1,))
    assert not any(row.loss.known for row in few)
    soft = tiny_model(router_type="expert_choice", router_aux_loss_type="none")
    with pytest.raises(TraceError, match="only routers that give every token K experts"):
        fu.counterfactuals(soft, ids, work, random_ids(8, 10), layers=(1,))


def test_saturation_is_one_at_the_end_and_chance_where_routing_starts_anew() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((2, 4000, 2, E)) * np.r_[3.0, np.ones(E - 1)]
    final, anew = np.argsort(scores, axis=3)[..., -3:]
    half = np.where(np.arange(4000)[:, None, None] % 2, final, anew)
    seen = fu.saturation(np.array([0, 5, 10]), np.stack([anew, half, final[..., ::-1]]), 10, E)
    assert seen.overlap[-1].tolist() == [1, 1]  # the order of a set does not matter
    assert (abs(seen.beyond[0]) < 0.03).all() and (seen.chance[0] > 3 / E + 0.02).all()
    assert seen.beyond[1] == pytest.approx([0.5, 0.5], abs=0.03)
    assert seen.next[1] == pytest.approx(seen.overlap[1]) and np.isnan(seen.next[-1]).all()
    every = np.tile(np.arange(E), (2, 40, 1, 1))
    assert np.isnan(fu.saturation(np.arange(2), every, 4, E).beyond).all()
    with pytest.raises(TraceError, match="40 tokens at 2 validations are not 3 windows"):
        fu.saturation(np.arange(2), every, 3, E)


def topical(seed: int, **changes: float):
    trace = simulate(seed, works=60, words=20, **{"word_effect": 1.0, **changes})  # pyright: ignore
    documents = tuple(TraceDocument("wiki", d.id, d.domain) for d in trace.documents)
    return dataclasses.replace(trace, documents=documents)


def test_a_token_takes_other_experts_where_topics_move_them_not_where_documents_differ() -> None:
    assert fu.meaning(topical(1, effect=1.5), 1).difference.p <= 0.01
    # documents with loads of their own, alike in every topic
    alike = (topical(seed, concentration=15) for seed in range(60))
    alarms = [fu.meaning(trace, 1, draws=39).difference.p <= 0.05 for trace in alike]
    assert np.mean(alarms) <= 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / 60)


def test_overlap_is_that_of_all_pairs_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = topical(2)
    monkeypatch.setattr(fu, "HOLDERS", 5)
    found = fu.meaning(trace, 1, draws=5)
    chosen: dict[tuple[int, int], list[np.ndarray]] = {}
    rows = zip(trace.token, trace.document, trace.expert[:, 0], strict=True)
    for token, document, expert in rows:
        chosen.setdefault((token, document), []).append(np.isin(np.arange(E), expert))
    same, other, holders = [], [], []
    for token in range(20):
        means = {d: np.mean(x, axis=0) for (t, d), x in chosen.items() if t == token}
        pairs = {True: [], False: []}
        for a, b in itertools.combinations(means, 2):
            alike = trace.documents[a].topic == trace.documents[b].topic
            pairs[alike].append(means[a] @ means[b] / 2)
        same.append(np.mean(pairs[True]))
        other.append(np.mean(pairs[False]))
        holders.append(len(means))
    assert found.tokens == 20
    assert found.same == pytest.approx(np.average(same, weights=holders))
    assert found.other == pytest.approx(np.average(other, weights=holders))
    monkeypatch.setattr(fu, "HOLDERS", 500)
    refuses(TraceError, "no token stands in 500 documents", fu.meaning, trace, 1)
    refuses(TraceError, "no document of the trace has a topic", fu.meaning, simulate(0, works=8), 1)
    monkeypatch.setattr(fu, "HOLDERS", 5)
    one = tuple(d._replace(topic="one") for d in trace.documents)
    alone = "no token stands in documents of one topic and of two"
    refuses(TraceError, alone, fu.meaning, dataclasses.replace(trace, documents=one), 1)


def test_three_keys_of_one_text() -> None:
    model = tiny_model()
    texts = [np.array([5, 6, 7, 8]), np.array([9, 3])]
    documents = [TraceDocument("a", "1"), TraceDocument("a", "2")]
    keyed = fu.with_outputs(model, documents, texts, 0)
    assert keyed["read"].token.tolist() == [5, 6, 7, -1, 9, -1]
    assert keyed["next"].token.tolist() == [6, 7, 8, -1, 3, -1]
    said = model(torch.tensor([[0, 5, 6, 7, 8]])).logits[0].argmax(dim=1)[1:4].tolist()
    assert keyed["predicted"].token.tolist()[:4] == [*said, -1]
    long = fu.with_outputs(model, documents[:1], [np.arange(1, 60)], 0)
    assert len(long["read"]) == TINY.max_position_embeddings - 1


def test_matched_articles_are_nearer_where_the_thing_decides() -> None:
    rng = np.random.default_rng(0)
    thing = rng.dirichlet(np.ones(E), (80, 2))
    topic = np.arange(80) % 4
    noise = [0.7 * thing + 0.3 * rng.dirichlet(np.ones(E), (80, 2)) for _ in range(2)]
    found = fu.parallel(noise[0], noise[1], topic)
    assert (found.gap.low > 0).all() and (found.matched < found.unmatched).all()
    assert found.gap.value == pytest.approx(found.unmatched - found.matched)
    alone = fu.parallel(rng.dirichlet(np.ones(E), (80, 2)), thing, topic)
    assert (alone.gap.low < 0).all() and (alone.gap.high > 0).all()
    assert fu.parallel(thing[:9], thing[:9], np.r_[topic[:8], 9]).titles == 8
    with pytest.raises(TraceError, match="no two titles share a topic"):
        fu.parallel(thing[:3], thing[:3], np.arange(3))


def test_probabilities_are_means_over_the_tokens_of_a_text() -> None:
    model, ids = tiny_model(), np.array([5, 6, 7])
    probs = [r.probs[1:].mean(dim=0) for r in model(torch.tensor([[0, 5, 6, 7]])).routings]
    mean = fu.mean_probabilities(model, [ids], 0)
    assert mean.shape == (1, 2, 5)
    assert mean[0] == pytest.approx(torch.stack(probs).detach().numpy(), abs=1e-6)


def test_what_is_stored_is_whole(root: Path) -> None:
    stored = json.loads((root / "book/results/further.json").read_text())
    by = {(r["change"], r["layer"]): r["loss"]["value"] for r in stored["counterfactuals"]}
    assert len(by) == 8 * 7 + 8 * 6
    assert by["random experts", None] > by["the chosen ones, weighted evenly", None] > 0
