"""Training with every router: what moves once a step, gradients in parts, numbers that stop being numbers, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.__main__ import main
from minimoe.config import ROUTER_TYPES, ModelConfig
from minimoe.errors import ConfigError, TrainingError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.routers import SigmoidRouter
from minimoe.text.corpus import Corpus
from minimoe.train.card import write_card
from minimoe.train.loop import Run
from minimoe.train.settings import with_router
from minimoe.train.step import accumulate_gradients, count_experts
from tests.small import TINY, log_of, random_ids, tiny_run, weights_digest

SIGMOID: dict[str, Any] = {"router_type": "sigmoid", "router_bias_update_rate": 0.05}
RELU: dict[str, Any] = {
    "router_type": "relu", "router_aux_loss_type": "l1", "router_aux_loss_coef": 1e-3
}  # fmt: skip

QUIET: dict[str, Any] = {"router_jitter_noise": 0.0}
NO_Z: dict[str, Any] = {"router_z_loss_coef": 0.0}


def biases(run: Run) -> list[Tensor]:
    sigmoid = (m for m in run.model.modules() if isinstance(m, SigmoidRouter))
    return [router.e_score_correction_bias.clone() for router in sigmoid]


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_every_router_trains_as_its_paper_has_it(
    router_type: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = with_router(TINY, router_type).to_dict() | {"vocab_size": 300}
    run = tiny_run(tmp_path, corpus, model=options, steps=2, eval_every=2)
    assert set(run.train(progress=False)) == set(corpus.domains)
    first = log_of(tmp_path)[0]
    layers = 0 if router_type == "soft" else 2
    assert len(first["max_vio"]) == layers
    assert ("aux_loss" in first) == (run.model.config.router_aux_loss_type != "none")
    monkeypatch.setattr("minimoe.train.card.attributions", "Texts\n{}".format)
    words = {
        "sigmoid": "Sequence balancing loss 0.0001 (mean over layers), selection bias moved by 0.001 a step",
        "noisy_top_k": "Importance and load balancing loss 0.1 (mean over layers)",
        "relu": "L1 balancing loss 1e-08 (mean over layers) at the start, moved towards the wanted number",
        "switch": "Switch balancing loss 0.01 (mean over layers), z-loss",
        "hash": "no balancing loss, z-loss",
    }
    assert words.get(router_type, "balancing loss") in " ".join(write_card(tmp_path).split())
    # the probe follows tokens of K experts each
    assert (tmp_path / "probe").exists() == (router_type not in ("soft", "relu", "expert_choice"))


def test_options_of_routers_name_their_router() -> None:
    assert with_router(TINY, "switch").num_experts_per_tok == 1
    assert with_router(TINY, "dense").num_experts_per_tok == TINY.num_experts
    assert with_router(TINY, "top_k") == TINY
    with pytest.raises(ConfigError, match="router_type is 'best'; known are top_k"):
        with_router(TINY, "best")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_trap_8_the_bias_moves_once_a_step_against_the_load_of_the_whole_step(
    corpus: Corpus, tmp_path: Path, accumulate: int
) -> None:
    run = tiny_run(tmp_path, corpus, model=SIGMOID | QUIET, accumulate=accumulate)  # fmt: skip
    for step in range(3):
        before = biases(run)
        with torch.no_grad():  # the load of the batch as one, by the weights before the step
            loads = [r.load() for r in run.model(torch.from_numpy(run.batches(step))).routings]
        run.train(progress=False, stop_after=1)
        for old, new, load in zip(before, biases(run), loads, strict=True):
            direction = (load.double().mean() - load.double()).sign()
            torch.testing.assert_close(new - old, (0.05 * direction).float())
            assert bool(direction.any())


def test_trap_8_recomputation_does_not_move_the_bias_again() -> None:
    """A layer under activation checkpointing runs twice; what a forward pass returned counts once."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = MixtralModel(TINY.replace(**SIGMOID)).train()
    plain, calls = MoELayer.forward, 0

    def recomputed(self: MoELayer, x: Tensor, **known: Tensor) -> Any:
        nonlocal calls

        def run(x: Tensor) -> Any:
            nonlocal calls
            calls += 1
            return plain(self, x, **known)

        return checkpoint(run, x, use_reentrant=False)

    ids = random_ids(2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoELayer, "forward", recomputed)
        seen = accumulate_gradients(model, [ids], seed=0)
    assert calls == 4  # two layers, each forward and again for its gradient
    assert [int(counts.sum()) for counts in seen.counts] == 2 * [16 * TINY.num_experts_per_tok]


def test_relu_routing_is_pressed_towards_k_experts_a_token(corpus: Corpus, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, corpus, model=RELU, accumulate=3)
    coefs, logged = [1e-3], {}
    for record in range(10):
        run.train(progress=False, stop_after=1)
        logged = [r for r in log_of(tmp_path) if "lm_loss" in r][record]
        assert logged["aux_loss_coef"] == pytest.approx(coefs[-1])
        # one λ for the model, by the mean over its layers and all three parts
        more = logged["experts_per_token"] > 2
        coefs.append(coefs[-1] * 1.2 if more else coefs[-1] / 1.2)
        assert run.balancing.aux_loss_coef == pytest.approx(coefs[-1])
    assert logged["experts_per_token"] != 2


def test_the_moved_coefficient_weighs_the_loss() -> None:
    torch.manual_seed(0)
    model = MixtralModel(TINY.replace(**RELU, router_z_loss_coef=0.0)).train()
    ids = random_ids(2, 8)
    out = model.losses(model(ids), ids, aux_loss_coef=0.25)
    assert out.loss is not None and out.lm_loss is not None and out.aux_loss is not None
    torch.testing.assert_close(out.loss, out.lm_loss + 0.25 * out.aux_loss)


def gradients(
    config: ModelConfig, parts: int, *, global_balance: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and losses of one batch of 6 sequences, in float64."""
    torch.manual_seed(0)
    model = MixtralModel(config).double().train()
    batch = random_ids(6, 9).chunk(parts)
    step = accumulate_gradients(model, batch, seed=3, global_balance=global_balance)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads, step.losses


@pytest.mark.parametrize("kind", ["switch", "l1"])
def test_trap_6_accumulation_with_counts_of_the_step_is_the_whole_batch_exactly(kind: str) -> None:
    config = TINY.replace(router_aux_loss_type=kind, router_aux_loss_coef=1.0, router_jitter_noise=0.0)  # fmt: skip
    whole, losses = gradients(config, 1)
    for parts in (2, 3, 6):
        grads, again = gradients(config, parts, global_balance=True)
        assert grads.keys() == whole.keys() and again.keys() == losses.keys()
        for name, value in whole.items():
            # norms and rotations are computed in float32
            torch.testing.assert_close(grads[name], value, atol=1e-6, rtol=1e-4, msg=name)
        for name, value in losses.items():
            torch.testing.assert_close(again[name], value)
    # each part for itself is another loss, and another gradient of the routers
    grads, again = gradients(config, 3)
    torch.testing.assert_close(again["lm_loss"], losses["lm_loss"])
    assert abs(float(again["aux_loss"] - losses["aux_loss"])) > 1e-3
    gate = "layers.0.mlp.gate.weight"
    assert float((grads[gate] - whole[gate]).norm() / whole[gate].norm()) > 1e-3


def test_trap_6_the_mean_of_the_parts_is_what_parts_balance() -> None:
    config = TINY.replace(router_aux_loss_coef=1.0, router_jitter_noise=0.0)
    _, losses = gradients(config, 3)
    torch.manual_seed(0)
    model = MixtralModel(config).double().train()
    local = [model(ids, labels=ids).aux_loss for ids in random_ids(6, 9).chunk(3)]
    torch.testing.assert_close(losses["aux_loss"], torch.stack(local).mean().detach())


def test_what_is_counted_beforehand_is_what_is_routed() -> None:
    """Noise is drawn again from the same seed, so the counts are those of the pass that has gradients."""
    torch.manual_seed(0)
    model = MixtralModel(TINY.replace(router_type="noisy_top_k")).train()
    parts = random_ids(6, 9).chunk(3)
    torch.manual_seed(5)
    counted = count_experts(model, parts)
    step = accumulate_gradients(model, parts, seed=5, global_balance=True)
    for a, b in zip(counted, step.counts, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(6)
    again = count_experts(model, parts)
    assert not all(torch.equal(a, b) for a, b in zip(again, counted, strict=True))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (SIGMOID, {}),
        (SIGMOID | {"capacity_factor": 1.0}, {"accumulate": 3}),
        (RELU, {"accumulate": 3}),
        ({"router_type": "noisy_top_k"}, {"accumulate": 3, "balance_scope": "step"}),
    ],
    ids=["bias", "bias, in parts", "relu, in parts", "noise, counted beforehand"],
)
def test_a_killed_run_goes_on_exactly_with_what_its_controllers_had(
    corpus: Corpus, tmp_path: Path, model: dict[str, Any], options: dict[str, Any]
) -> None:
    whole = tiny_run(tmp_path / "whole", corpus, model=model, **options)
    whole.train(progress=False)

    class Killed(BaseException):
        pass

    def killed() -> None:
        raise Killed

    # the checkpoint is of step 6; in the middle of step 8, between gradient and weights, everything is dropped
    run = tiny_run(tmp_path / "killed", corpus, model=model, **options)
    run.train(progress=False, stop_after=3)
    run.train(progress=False, stop_after=3)
    run.optimizer.step = killed  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Killed):
        run.train(progress=False)
    again = tiny_run(tmp_path / "killed", corpus, resume=True, model=model, **options)
    assert again.step == 6
    again.train(progress=False)
    assert weights_digest(again.model) == weights_digest(whole.model)
    assert again.balancing.aux_loss_coef == whole.balancing.aux_loss_coef
    assert log_of(again.out) == log_of(whole.out)
    if "router_bias_update_rate" in model:
        for a, b in zip(biases(again), biases(whole), strict=True):
            assert torch.equal(a, b) and bool(a.any())
    if model is RELU:
        assert again.balancing.aux_loss_coef not in (None, model["router_aux_loss_coef"])


@pytest.mark.parametrize("model", [SIGMOID, RELU], ids=["bias", "relu"])
def test_a_step_broken_off_between_its_parts_leaves_nothing_behind(
    corpus: Corpus, tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(tmp_path / "whole", corpus, model=model, accumulate=3)
    whole.train(progress=False)
    run = tiny_run(tmp_path / "broken", corpus, model=model, accumulate=3)
    run.train(progress=False, stop_after=5)
    forward, calls = run.model.forward, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the third part of step 6: two have been counted
            raise KeyboardInterrupt
        return forward(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.model, "forward", interrupted)
        run.train(progress=False)
    step, seen = run.balancing.step, set[int]()

    def counting(counts: list[Tensor], tokens: int) -> None:
        seen.update([int(of.sum()) for of in counts] if run.balancing.biases else [2 * tokens])
        step(counts, tokens)

    monkeypatch.setattr(run.balancing, "step", counting)
    run.train(progress=False)  # the same object goes on
    # K assignments of each token in a layer, or the tokens of both layers: each counted once
    assert seen == {3 * 16 * 2}
    assert weights_digest(run.model) == weights_digest(whole.model)
    assert run.balancing.aux_loss_coef == whole.balancing.aux_loss_coef


def router_weight(run: Run, layer: int) -> Tensor:
    return run.model.get_parameter(f"layers.{layer}.mlp.gate.weight").detach()


@pytest.mark.parametrize(("layer", "accumulate"), [(0, 3), (1, 1)])
def test_router_logits_that_are_not_finite_stop_a_run_before_the_weights(
    corpus: Corpus, tmp_path: Path, layer: int, accumulate: int
) -> None:
    run = tiny_run(tmp_path, corpus, accumulate=accumulate)
    run.train(progress=False, stop_after=4)
    run.train(progress=False, stop_after=1)
    router_weight(run, layer)[1, 0] = float("nan")
    before = weights_digest(run.model)
    with pytest.raises(TrainingError) as caught:
        run.train(progress=False)
    message = str(caught.value)
    assert f"step 6 failed: the router logits of layer {layer + 1} are not finite" in message
    assert f"the last checkpoint in {tmp_path} is of step 5" in message
    assert weights_digest(run.model) == before


@pytest.mark.parametrize(
    ("model", "value"),
    [
        ({"mlp_only_layers": (0,)}, float("nan")),  # dense layers are counted too
        # σ of ±inf is 0 or 1: the weights are finite although the logits are not
        (SIGMOID | NO_Z, 3e38),
        ({"router_type": "base", "num_experts_per_tok": 1}, float("nan")),  # no balanced assignment
    ],
    ids=["dense layers", "sigmoid", "base"],
)
def test_a_run_without_a_checkpoint_names_the_layer_whose_logits_are_not_finite(
    corpus: Corpus, tmp_path: Path, model: dict[str, Any], value: float
) -> None:
    run = tiny_run(tmp_path, corpus, model=model)
    router_weight(run, 1)[1] = value
    named = "step 1 failed: the router logits of layer 2 are not finite; there is no checkpoint"
    with pytest.raises(TrainingError, match=named):
        run.train(progress=False)


@pytest.mark.parametrize("attention", ["switchhead", "moa"])
def test_routers_of_the_attention_are_watched_too(
    corpus: Corpus, tmp_path: Path, attention: str
) -> None:
    model: dict[str, Any] = {"attention_type": attention, "attention_num_experts": 4}
    run = tiny_run(tmp_path, corpus, model=model, accumulate=3)
    routers = [n for n, _ in run.model.layers[1].named_parameters() if "attn" in n and "gate" in n]
    assert routers
    run.model.layers[1].get_parameter(routers[-1]).detach()[-1, 0] = float("nan")
    named = "step 1 failed: the router logits of the attention of layer 2 are not"
    with pytest.raises(TrainingError, match=named):
        run.train(progress=False)


def test_a_layer_that_uses_no_expert_is_logged_as_having_no_load(
    corpus: Corpus, tmp_path: Path
) -> None:
    model: dict[str, Any] = RELU | NO_Z  # whose gradient would bring the router back
    run = tiny_run(tmp_path, corpus, model=model, steps=2, eval_every=2)
    router_weight(run, 1).zero_()  # ReLU(0) is 0 for every token
    run.train(progress=False)
    records = log_of(tmp_path)
    assert records[0]["max_vio"][1] is None and records[0]["max_vio"][0] is not None
    assert records[-1]["load"][1] is None and sum(records[-1]["load"][0]) == pytest.approx(1)


def test_the_command_line_takes_a_router_and_parts(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr("minimoe.text.corpus.load_corpus", lambda *a, **k: corpus)
    monkeypatch.setattr("minimoe.train.card.attributions", lambda names: "# Title\n\nmade up")
    short = ["train", "--preset=nano", "--quiet", "--steps=2", "--batch-size=4", "--seq-len=16"]
    relu = ["--router", "relu", "--accumulate", "2", "--balance-scope", "step"]
    assert main([*short, *relu, "--out", str(tmp_path / "run")]) == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    made = recipe["model"]
    assert made["router_type"] == "relu" and made["router_aux_loss_type"] == "l1"
    assert (recipe["training"]["accumulate"], recipe["training"]["balance_scope"]) == (2, "step")
    card = (tmp_path / "run" / "README.md").read_text().replace("\n", " ")
    assert "--preset=nano --quiet --steps=2 --batch-size=4 --seq-len=16 --router relu" in card
    assert "L1 balancing loss 1e-08" in card
    for wrong, named in (
        (["--router", "best"], "router_type is 'best'"),
        (["--accumulate", "3"], "accumulate is 3, which does not divide batch_size = 4"),
    ):
        assert named in refused(*short, *wrong, "--out", tmp_path / "wrong")
