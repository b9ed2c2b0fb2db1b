"""Dense against sparse: the twins, what a plan asks for, and a comparison that is stopped and goes on."""

import json
from pathlib import Path

import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.cost import count_parameters
from minimoe.course import compare
from minimoe.course.compare import arm_config, read_plan
from minimoe.errors import ConfigError
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.train.settings import dense_twin
from tests.small import TINY, random_ids

CPU = torch.device("cpu")
PLAN = """
preset = "nano"
[first]
arms = ["moe", "work"]
seeds = [3, 4]
lr = [1e-3, 2e-3]
steps = { moe = 2, work = 3 }
seq_len = 16
batch_size = 3
[second]
arms = ["hash"]
seeds = [3]
steps = 1
"""


@pytest.fixture
def plan(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare, "load_corpus", lambda: corpus)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_a_twin_is_equal_in_what_it_says() -> None:
    for sparse in (ModelConfig.preset("mini"), TINY.replace(n_shared_experts=1)):
        work, held = (count_parameters(dense_twin(sparse, equal)) for equal in ("work", "held"))
        seen = count_parameters(sparse)
        routers = sparse.num_hidden_layers * sparse.num_experts * sparse.hidden_size
        assert (seen.active - work.total, seen.total - held.total) == (routers, routers)
        assert (work.total, held.total) == (work.active, held.active)
        assert not MixtralModel(dense_twin(sparse, "held"))(random_ids(1, 4)).routings
    with pytest.raises(
        ConfigError, match="unknown kind of equal size 'time'; known are work, held"
    ):
        dense_twin(TINY, "time")  # pyright: ignore[reportArgumentType]


def test_one_expert_trains_as_the_dense_model_does_bit_for_bit() -> None:
    alone = {"num_experts": 1, "num_experts_per_tok": 1}
    one = TINY.replace(**alone, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    torch.manual_seed(0)
    sparse, dense = MixtralModel(one), MixtralModel(dense_twin(one, "work"))
    shared = {k: v for k, v in sparse.state_dict().items() if k in dense.state_dict()}
    missing = dense.load_state_dict(shared, strict=False).missing_keys
    for name in missing:  # of the dense MLP: the one expert's
        source = name.replace("mlp.", "mlp.experts.")
        dense.get_parameter(name).data.copy_(sparse.get_parameter(source)[0])
    losses: list[list[float]] = []
    for model in (sparse, dense):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(10):
            loss = model(ids := random_ids(2, 16, seed=step), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


def test_a_plan_is_every_arm_with_every_value_seed_by_seed(plan: Path) -> None:
    pieces = read_plan(plan)
    names = [piece.path.relative_to(plan.parent).as_posix() for piece in pieces]
    assert names[:4] == [
        f"first/{arm}-{lr}-3.json" for arm in ("moe", "work") for lr in (0.001, 0.002)
    ]
    assert names[4:] == [name.replace("-3.", "-4.") for name in names[:4]] + ["second/hash-3.json"]
    assert [piece.training.steps for piece in pieces] == [2, 2, 3, 3, 2, 2, 3, 3, 1]
    assert [piece.training.lr for piece in pieces[:2]] == [1e-3, 2e-3]
    assert pieces[2].model == arm_config(ModelConfig.preset("nano"), "work")
    assert pieces[-1].model.router_type == "hash"
    assert pieces[-1].training.lr == 5e-3  # the preset's


def test_a_plan_may_vary_the_model_as_well_as_its_training(plan: Path) -> None:
    stage = """preset = "mini"
    [a]
    arms = ["work", "moe"]
    seeds = [0]
    hidden_size = 64
    num_experts = { work = 8, moe = [4, 16] }
    """
    plan.write_text(stage)
    pieces = read_plan(plan)
    assert [piece.path.stem for piece in pieces] == ["work-0", "moe-4-0", "moe-16-0"]
    assert [piece.model.num_experts for piece in pieces] == [8, 4, 16]
    assert {piece.model.hidden_size for piece in pieces} == {64}
    assert pieces[0].model == dense_twin(ModelConfig.preset("mini").replace(hidden_size=64), "work")
    plan.write_text(stage.replace("= 64", "= -64"))
    with pytest.raises(ConfigError, match=r"hidden_size.*-64"):
        read_plan(plan)


def test_what_is_there_is_not_run_again(
    plan: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.compare(plan, CPU, progress=False)
    pieces = [piece.path for piece in read_plan(plan)]
    before = [path.read_text() for path in pieces]
    assert capsys.readouterr().out.count("of 9: ") == 9
    pieces[3].unlink()  # as if the run had been killed there
    compare.compare(plan, CPU, progress=False)
    assert capsys.readouterr().out == f"4 of 9: {pieces[3]}\n"
    was, now = (json.loads(text) for text in (before[3], pieces[3].read_text()))
    assert [path.read_text() for path in pieces if path != pieces[3]] == before[:3] + before[4:]
    assert (was["works"], was["recipe"]) == (now["works"], now["recipe"])
    # the losses by work are those of the log, and cover the text
    for domain, loss in now["log"][-1]["heldout"].items():
        works = now["works"][domain]
        assert sum(works["nats"]) / sum(works["tokens"]) == pytest.approx(
            loss["nats_per_token"], abs=1e-3
        )
        assert sum(works["tokens"]) == loss["tokens"]
        assert len(works["nats"]) == len(
            {d.work for d in corpus.heldout.documents if d.domain == domain}
        )


def test_a_plan_that_cannot_be_run_says_where(plan: Path) -> None:
    for text, fault in (
        ("preset = ", "no plan of a comparison"),
        ('preset = "mini"\n[a]\nsteps = 3', "stage 'a' is not whole; .*'seeds'"),
        ('preset = "mini"\n[a]\narms = ["moe"]\nseeds = [0]\nstep = 3', "stage 'a' .*'step'"),
        (
            'preset = "mini"\n[a]\narms = ["moe"]\nseeds = [0]\nsteps = {work = 1}',
            "stage 'a' .*'moe'",
        ),
        ('preset = "mini"\n[a]\narms = ["bert"]\nseeds = [0]\nsteps = 1', "bert"),
        ('preset = "mini"\na = 3', "stage 'a' is not whole"),
        ('preset = "mine"', "mine"),
    ):
        plan.write_text(text)
        with pytest.raises(ConfigError, match=fault):
            read_plan(plan)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_plan(plan.with_name("missing.toml"))


def test_a_result_of_another_plan_stays(plan: Path) -> None:
    plan.write_text(
        PLAN.split("[second]")[0].replace("[3, 4]", "[3]").replace('["moe", "work"]', '["moe"]')
    )
    compare.compare(plan, CPU, progress=False)
    path = read_plan(plan)[0].path
    before = path.read_text()
    plan.write_text(plan.read_text().replace("seq_len = 16", "seq_len = 8"))
    with pytest.raises(
        ConfigError,
        match=r"moe-0\.001-3\.json is of another run; different: training\.seq_len was 16, is 8",
    ):
        compare.compare(plan, CPU, progress=False)
    assert path.read_text() == before
