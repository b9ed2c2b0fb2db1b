"""What the stored runs of lesson 15c measure of single neurons."""

import numpy as np
import pytest
import torch

from book import neurons
from minimoe.experts import ACTIVATIONS, MLP
from minimoe.model import MixtralModel
from tests.small import random_ids, tiny_model


@pytest.mark.parametrize("dense", [(), (0, 1)])
@torch.no_grad()
def test_neurons_times_their_columns_are_what_the_layer_adds(dense: tuple[int, ...]) -> None:
    model, ids = tiny_model(num_hidden_layers=2, mlp_only_layers=dense), random_ids(2, 9)
    after: list[torch.Tensor] = []
    for block in model.layers:
        mlp = block.get_submodule("mlp")
        is_dense = isinstance(mlp, MLP)
        mlp.register_forward_hook(
            lambda _, x, y, d=is_dense: after.append((y if d else y[0]).flatten(0, -2))
        )
    read, weights = neurons.inputs(model, ids)
    for block, x, w, y in zip(model.layers, read, weights, after, strict=True):
        gate_up, down = neurons.weights_of(block.get_submodule("mlp"))
        a = neurons.activations(x, gate_up, w, ACTIVATIONS[model.config.hidden_act])
        columns = down.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(a @ columns, y, atol=1e-5, rtol=1e-4)


def test_the_best_threshold_is_that_of_all_thresholds() -> None:
    a = torch.randint(0, 5, (40, 6), generator=torch.Generator().manual_seed(0)).float()
    truth = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    f1, threshold = neurons.best_f1(a, truth)
    for c in range(2):
        for j in range(6):
            every = [
                2 * (said & truth[c]).sum() / (said.sum() + truth[c].sum())
                for said in (a[:, j] > t for t in (-1, 0, 1, 2, 3))
            ]
            assert float(f1[c, j]) == pytest.approx(float(max(every)))
            said = a[:, j] > threshold[c, j]
            again = 2 * (said & truth[c]).sum() / (said.sum() + truth[c].sum())
            assert float(again) == pytest.approx(float(f1[c, j]))


def test_a_class_is_in_the_token_where_its_match_begins() -> None:
    found = neurons.classes_of(["", "In ", "19", "14", " (", "the", " Ti", "mes", ") A"])
    assert np.flatnonzero(found["digits"]).tolist() == [2, 3]
    assert np.flatnonzero(found["brackets"]).tolist() == [4, 8]
    assert np.flatnonzero(found["names"]).tolist() == [6]


def test_switching_neurons_off_leaves_the_model_as_it_was() -> None:
    model, ids = tiny_model(num_hidden_layers=2), random_ids(6, 12)
    rng = np.random.default_rng(0)
    second = np.arange(6) % 2 == 1
    texts = neurons.Texts(
        ids, {"some": rng.random((6, 12)) < 0.4}, second, np.tile(second * 1.0, (5, 1))
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    neurons.decide(model, texts)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_plan_asks_for_twins_of_equal_work() -> None:
    pieces, _ = neurons.read_plan(neurons.FOLDER / "plan.toml")
    by = {p.arm: MixtralModel(p.model) for p in pieces if p.path.parent.name == "main"}
    up = {arm: neurons.weights_of(m.layers[0].get_submodule("mlp"))[0] for arm, m in by.items()}
    k = by["moe"].config.num_experts_per_tok
    assert up["work"].shape[1] == k * up["moe"].shape[1]
