"""The suites of the benchmark, whole but tiny, on any machine; their goals; and the command."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe import __main__ as cli
from minimoe.bench import choices, models, suites, tables
from minimoe.bench.goals import Goal, cpu_goals, gpu_goals
from minimoe.bench.layer import DENSE, LayerCase, make_experts
from minimoe.bench.peers import DENSE_TORCH, EAGER, FLAG, dense, participants
from minimoe.bench.suites import Options, run_and_write
from minimoe.config import ModelConfig
from minimoe.cost import layer_flops
from minimoe.errors import ConfigError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from tests.small import refuses

TINY = Options(rounds=1, tiny=True, device="cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few implementations and sizes: the others have tests of their own."""

    def gather(device: torch.device, peers: tuple[str, ...] = ()) -> Any:
        found, absent = participants(device, peers)
        names = {DENSE, "loop", "grouped", EAGER, "mine"}
        return tuple(i for i in found if i.name in names), absent

    monkeypatch.setattr(suites, "participants", gather)
    monkeypatch.setattr(suites, "TINY_CPU", {8: (16, 32, 4, 2)})
    monkeypatch.setattr(suites, "TINY_GPU", {"Mixtral": (16, 32, 4, 2), "Qwen3": (16, 16, 4, 2)})


def check_schema(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for key in ("date", "hardware", "torch", "versions", "load_average", "load_average_after"):
        assert result[key]
    for case in result["cases"]:
        assert case["rows"]
        assert case["floor"]["seconds"] > 0
        for row in case["rows"]:
            assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            assert row["to_floor"] > 0 and row["to_dense"]["median"] > 0
            assert (row["saved_bytes"] is not None) == (case["work"] == "forward+backward")
    for goal in result["goals"]:
        assert (goal["measured"] is None) == (goal["ratio"] is None) == (goal["met"] is None)


def test_the_cpu_suite(few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "sub" / "result.json"
    options = Options(rounds=1, threads=1, tiny=True)
    (result,) = run_and_write("cpu", options, path, tmp_path / "out")
    check_schema(result)
    assert result["thread_counts"] == [1]
    seen = [f"{c['work']}, {c['load']}, {c['tokens']}" for c in result["cases"]]
    both = "forward+backward, uniform, 8; forward+backward, skewed, 8"
    assert "; ".join(seen) == f"forward, uniform, 8; {both}; forward, uniform, 1"
    out = capsys.readouterr().out
    assert out.endswith(tables.goals_table(result) + "\n") and out.count("× floor") == 4
    assert len(result["goals"]) == 8
    assert [s["work"] for s in result["splits"]] == ["forward", "forward+backward"]
    for parted in result["splits"]:
        parts = {r["part"]: r["to_dense"]["median"] for r in parted["rows"]}
        assert parts["dense layer"] == 1 and len(parts) == 4
    stored = json.loads(path.read_text())
    assert stored == json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert stored == tables.five_digits(result)


def test_one_thread_then_two(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    result = suites.cpu_suite(Options(rounds=1, quick=True, tiny=True))
    assert result["thread_counts"] == [1, 2]
    assert [p["threads"] for p in result["peaks"]] == [1, 2]
    timed = [(c["threads"], c["clock"]) for c in result["cases"]]
    assert timed == [(1, "cpu")] * 3 + [(2, "wall")] * 2
    assert len(result["goals"]) == 16
    assert result["onednn_kernels"] == "16384"


def test_the_gpu_suite_on_whatever_there_is(few, capsys, monkeypatch) -> None:
    made: list[str] = []
    noted = lambda c, d: made.append(c.name) or make_experts(c, d)  # noqa: E731
    monkeypatch.setattr(suites, "make_experts", noted)
    (result,) = run_and_write("gpu", TINY)
    assert made == ["Mixtral", "Qwen3"]  # weights are made once for all cases of a shape
    check_schema(result)
    assert {c["dtype"] for c in result["cases"]} == {"bfloat16"}
    seen = [(c["name"], c["work"], c["load"], c["tokens"]) for c in result["cases"]]
    work, both = "forward", "forward+backward"
    for name in ("Mixtral", "Qwen3"):
        even = [
            (one, "uniform", t) for one, ts in ((work, (1, 4, 16)), (both, (16, 4, 1))) for t in ts
        ]
        skewed = [(work, "skewed", 16), (both, "skewed", 16)]
        assert [s[1:] for s in seen if s[0] == name] == even + skewed
    assert result["out_of_time"] == []
    assert capsys.readouterr().out.endswith(tables.goals_table(result) + "\n")
    assert len(result["goals"]) == 24


def test_the_gpu_programme_is_the_design(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = suites.gpu_cases(Options())
    assert {c.name for c in cases} == {"Mixtral", "OLMoE", "Qwen3"}
    assert len(cases) == 3 * (5 + 5 + 2)
    assert {c.tokens for c in cases} == {1, 64, 1024, 8192, 32768}
    assert all(c.dtype == torch.bfloat16 for c in cases)
    assert [c.replay for c in cases[:3]] == [True, False, False]
    assert {c.tokens for c in cases if c.skew} == {8192}
    assert {c.tokens for c in suites.gpu_cases(Options(quick=True))} == {1, 64, 8192}


def test_what_there_was_no_time_for_is_said(few, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suites, "GPU_SECONDS", 0.0)
    result = suites.gpu_suite(TINY)
    assert result["cases"] == []
    assert len(result["out_of_time"]) == 16
    out = capsys.readouterr().out
    assert "the eight minutes were over: forward, Mixtral T1 D16 F32 E4 K2, uniform" in out
    assert all(g["measured"] is None for g in result["goals"])


def test_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    result = suites.decode_suite(TINY)
    assert json.loads(json.dumps(result)) == result
    named = [r["implementation"] for r in result["rows"]]
    assert named == ["dense", "loop", "capacity", "grouped"]
    assert result["rows"][0]["to_dense"]["median"] == 1
    for row in result["rows"]:
        rate, seconds = row["tokens_per_second"]["median"], row["seconds_per_token"]["median"]
        assert rate * seconds == pytest.approx(1)
    assert "tokens/s" in capsys.readouterr().out


def test_decoding_dispatches_as_it_says_with_the_same_weights() -> None:
    model = MixtralModel(ModelConfig.preset("nano"))
    again = models.dispatched(model, "loop")
    for one, uses in ((again, True), (model, False)):
        layers = [m for m in one.modules() if isinstance(m, MoELayer)]
        assert [layer.dispatch is models.DISPATCHERS["loop"] for layer in layers] == [uses] * 2
    assert all(a is b for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_models_compiled_and_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The graph is made, and no code for it; calls of one round read the same ids, of another round others."""
    result = suites.compile_suite(TINY)
    assert json.loads(json.dumps(result)) == result
    rows = [(r["preset"], r["backward"]) for r in result["rows"]]
    assert rows == [("nano", False), ("nano", True)]
    for row in result["rows"]:
        assert row["seconds"].keys() == {"eager", "compiled"}
        assert row["first_call"] > row["seconds"]["compiled"]["median"] > 0
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert capsys.readouterr().out.count("forward+backward |") == 1
    model = MixtralModel(ModelConfig.preset("nano"))
    models.reads(model, (2, 8), False)(0)()
    assert model.embed_tokens.weight.grad is None
    grads: list[torch.Tensor] = []
    for i in (0, 0, 1):
        model.zero_grad()
        models.reads(model, (2, 8), True)(i)()
        grads.append(torch.as_tensor(model.embed_tokens.weight.grad).clone())
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


def test_serving_beside_two_dense_models(capsys: pytest.CaptureFixture[str]) -> None:
    result = suites.serve_suite(TINY)
    assert json.loads(json.dumps(result)) == result
    moe, work, held = (result["models"][name] for name in ("moe", "work", "held"))
    router = 2 * 4 * 32  # layers · E · D
    assert moe["parameters"] - held["parameters"] == router
    assert moe["active_parameters"] - work["active_parameters"] == router
    assert moe["flops"] - work["flops"] == 2 * 4 * router  # of a step of four sequences
    assert [(p["what"], p["batch"], p["tokens"]) for p in result["points"]] == [
        ("decode", 1, 16), ("decode", 4, 16), ("prefill", 1, 8), ("prefill", 2, 4)
    ]  # fmt: skip
    for point in result["points"]:
        floors = point["floor"]
        assert floors["work"] <= floors["moe"] * 1.0001 and floors["work"] < floors["held"]
    assert result["touched"][0]["means"] == [2.0] * 8  # one token uses K
    assert "a step of 4 sequences" in capsys.readouterr().out


def test_a_cache_of_keys_is_as_long_in_every_round() -> None:
    model = MixtralModel(ModelConfig.preset("nano")).eval()
    setup = models.Point("decode", 2, 5).setup(model)
    logits = [setup(i)().logits for i in range(2)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_the_interval_of_a_median_is_of_order_statistics() -> None:
    assert models.median_interval([3, 1, 2, 5, 4]) is None  # 2 · 0.5⁵ is more than 5 %
    assert models.median_interval([6, 3, 1, 2, 5, 4]) == [1, 6]
    assert models.median_interval(range(15)) == [3, 11]  # 4th of 15: 96.5 %
    draws = torch.rand(4000, 15, generator=torch.Generator().manual_seed(0)).tolist()
    held = [(i := models.median_interval(d)) and i[0] <= 0.5 <= i[1] for d in draws]
    assert sum(map(bool, held)) / 4000 == pytest.approx(0.965, abs=0.01)


def test_choices_compare_ways_of_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    result = suites.choices_suite(TINY)
    assert json.loads(json.dumps(result)) == result
    questions = [c["question"] for c in result["choices"]]
    assert len(questions) == len(set(questions)) == 8
    for choice in result["choices"]:
        taken = [r for r in choice["rows"] if r["way"] == choice["taken"]]
        assert len(taken) == 1 and taken[0]["to_taken"]["median"] == 1
        assert len(choice["rows"]) > 1
    assert "embedding_bag" in capsys.readouterr().out


def test_ways_of_combining_give_the_same() -> None:
    case = choices.LayerCase("", 40, 8, 16, 4, 2)
    routings = choices.make_routings(case, choices.CPU, count=choices.MANY_ROUTINGS)
    ways = choices.combining(case, routings).ways
    for i in (0, 9):  # the ninth round has the second routing
        results: list[Any] = [way(i)() for way in ways.values()]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])


def test_training_is_a_suite_too() -> None:
    (result,) = run_and_write("train", TINY)
    assert result["suite"] == "train" and result["preset"] == "nano"


def test_what_cannot_be_written_is_found_before_measuring(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {"cpu": lambda options: pytest.fail("measured")})
    (tmp_path / "file").write_text("in the way")
    within = tmp_path / "file"
    for paths in ((within / "x.json", None), (tmp_path, None), (None, within / "out")):
        refuses(ConfigError, "cannot be written", run_and_write, "cpu", Options(), *paths)


def test_all_is_what_this_machine_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def suite(name: str, options: Options) -> dict[str, Any]:
        ran.append(name)
        return {"suite": name}

    every = {name: functools.partial(suite, name) for name in suites.SUITES}
    monkeypatch.setattr(suites, "SUITES", every)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suites.timing, "load_average", lambda: [1.0])
    run_and_write("all", Options(), tmp_path / "all.json", tmp_path)
    assert ran == ["cpu", "train", "decode", "compile", "choices", "serve"]
    command = "python -m minimoe bench --suite"
    after = {"load_average_after": [1.0]}
    stored = [{"suite": n, "command": f"{command} {n}"} | after for n in ran]
    assert json.loads((tmp_path / "all.json").read_text()) == stored
    assert json.loads((tmp_path / "train_rate.json").read_text()) == stored[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run_and_write("all", Options())
    assert ran[6:] == ["cpu", "train", "decode", "compile", "choices", "serve", "gpu"]
    assert set(tables.FILES) == set(suites.SUITES)


def test_the_command_hands_everything_on(tmp_path, monkeypatch, capsys) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(suites, "run_and_write", lambda *arguments: seen.append(arguments))
    assert cli.main(["bench"]) == 0
    command = "bench --suite gpu --quick --rounds 3 --threads 2 --peer a=b.py --peer c=d.py --json x.json --out y"
    assert cli.main([*command.split(), "--device", "cuda:1"]) == 0
    given = Options(3, 2, True, ("a=b.py", "c=d.py"), "cuda:1")
    assert seen == [("cpu", Options(), None, None), ("gpu", given, Path("x.json"), Path("y"))]


def test_the_command_is_stored_as_it_can_be_given_again() -> None:
    given = Options(3, 2, True, ("mine=peers/peer.py",), "cuda:1")
    command, options = "python -m minimoe bench --suite", "--rounds 3 --threads 2 --device cuda:1"
    assert given.command("gpu") == f"{command} gpu {options} --quick --peer mine=PATH"
    assert Options().command("cpu") == f"{command} cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "fast"], "unknown suite 'fast'; give cpu, train, decode, compile, choices, serve, gpu, profile"),
        (["--suite", "gpu"], "needs a CUDA device"),
        (["--suite", "gpu", "--device", "cpu"], "too large for a CPU"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--threads", "-1"], "--threads is -1"),
        (["--peer", "nonsense"], "--peer is 'nonsense'; expected NAME=PATH of a Python file"),
        (["--peer", "a=/no/such/file.py"], "there is no file /no/such/file.py"),
        (["--suite", "decode", "--device", "abacus"], "unknown device 'abacus'"),
        (["--json", "/dev/null/x.json"], "cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused("bench", *arguments)


def made_case(seconds: dict[str, float], name: str = "", tokens: int = 2048, **more: Any) -> Any:
    """A measured case with these times, as `measure_case` gives it."""

    saved = more.pop("saved", 0.0)

    def row(n: str, s: float) -> dict[str, Any]:
        ratios = {o: {"median": s / other} for o, other in seconds.items()}
        rates = {"to_floor": s / 0.5, "flops_per_second": 1e12 / s, "saved_bytes": saved}
        return {"implementation": n, "seconds": {"median": s}, "ratios": ratios} | rates

    kind = {"work": "forward", "load": "uniform", "threads": 1} | more
    rows = [row(n, s) for n, s in seconds.items()]
    return {"case": f"{name}T{tokens}", "name": name, "tokens": tokens, "rows": rows} | kind


def found(results: list[Goal], start: str) -> Goal:
    exact = [g for g in results if g["goal"] == start]
    (goal,) = exact or [g for g in results if g["goal"].startswith(start)]
    return goal


def test_cpu_goals_take_the_worst_case_and_leave_skewed_ones_out() -> None:
    times = {DENSE: 1.0, DENSE_TORCH: 2.0, "grouped": 1.1, EAGER: 1.5, EAGER + FLAG: 1.2}
    worse = times | {"grouped": 1.2, EAGER: 1.1}
    slow = times | {"grouped": 9.0}
    cases = [made_case(times), made_case(worse, tokens=4096)]
    cases += [made_case(slow, load="skewed"), made_case(slow, tokens=1)]
    results = cpu_goals(cases, {"mkl": 1.0, "onednn": 2.0})
    dense = found(results, "grouped / dense MLP through the same backend, forward, 1 thread")
    assert (dense["measured"], dense["met"], dense["note"]) == (1.2, False, "worst: T4096")
    eager = found(results, f"{EAGER} / grouped, forward, 1")
    assert eager["measured"] == pytest.approx(1.1 / 1.2) and eager["met"] is False
    flagged = found(results, f"{EAGER}{FLAG} / grouped, forward, 1")
    assert flagged["measured"] == pytest.approx(1.0) and flagged["met"]
    gain = found(results, "grouped / dense MLP through plain torch, forward, 1")
    assert (gain["limit"], gain["measured"], gain["met"]) == (0.6, 0.6, True)
    both = found(results, "grouped / dense MLP through the same backend, forward+backward")
    assert both["measured"] is None and both["met"] is None


def test_the_gain_of_the_backend_is_a_goal_only_where_there_can_be_one() -> None:
    cases = [made_case({DENSE: 1.0, DENSE_TORCH: 1.1, "grouped": 1.1})]
    text = "grouped / dense MLP through plain torch, forward, 1"
    gain = found(cpu_goals(cases, {"mkl": 1.0, "onednn": 1.1}), text)
    assert gain["measured"] is None
    assert gain["note"] == "applies where oneDNN is 1.9 times as fast as MKL; here 1.10"
    gain = found(cpu_goals(cases, {"mkl": 1.0}), text)
    assert gain["note"] == "oneDNN is not used on this processor"


def test_gpu_goals_by_hand() -> None:
    cases = [
        *(made_case({"triton": s}, name=n, tokens=1) for n, s in (("Mixtral", 200e-6), ("OLMoE", 50e-6))),
        *(made_case({"triton": s}, name=n, tokens=64) for n, s in (("Mixtral", 0.6), ("Qwen3", 0.7))),
        # 1e12 FLOPs in 2 ms: 500 TFLOP/s; in 1.6 ms: 625
        made_case({"triton": 2e-3, "Liger-Kernel": 3e-3, "SonicMoE": 1.6e-3}, name="Mixtral", tokens=8192),
        made_case({"triton": 1.6e-3, "transformers grouped_mm": 3.2e-3}, name="Mixtral", tokens=32768),
        made_case(
            {"triton": 1e-3, "scattermoe b": 2e-3, "ScatterMoE a": 1.2e-3},
            name="Qwen3", tokens=8192, work="forward+backward", saved=250e6,
        ),
        made_case({"triton": 1.0, "SonicMoE": 0.95}, name="OLMoE", tokens=1024),
    ]  # fmt: skip
    results = gpu_goals(cases, "triton")
    assert len(results) == 24
    latency = found(results, "Mixtral, T = 1")
    assert (latency["measured"], latency["met"]) == (pytest.approx(200), True)
    assert found(results, "OLMoE, T = 1")["met"] is False
    assert found(results, "Qwen3, T = 1")["measured"] is None
    floor = found(results, "T = 64 forward")
    assert (floor["note"], floor["met"]) == ("worst: Qwen3T64", False)
    assert floor["measured"] == pytest.approx(1.4)
    rate = found(results, "Mixtral, T from 8k to 32k, forward")
    assert (rate["measured"], rate["met"]) == (pytest.approx(500), False)
    assert rate["ratio"] == pytest.approx(500 / 580)
    assert found(results, "Qwen3, T from 8k to 32k, forward+backward")["met"] is True
    liger = found(results, "Liger-Kernel / triton, forward, ")
    assert (liger["measured"], liger["met"]) == (pytest.approx(1.5), True)
    assert found(results, "transformers grouped_mm / triton, forward, ")["measured"] == 2.0
    # of two peers of that name the faster one counts
    scatter = found(results, "ScatterMoE / triton, forward+backward")
    assert (scatter["measured"], scatter["met"]) == (pytest.approx(1.2), False)
    assert found(results, "SonicMoE / triton, forward, T up to 1k")["met"] is False
    assert found(results, "SonicMoE / triton, forward, T from 8k")["measured"] == pytest.approx(0.8)
    saved = found(results, "Qwen3, T = 8k, saved")
    assert (saved["measured"], saved["met"]) == (250.0, True)
    missing = found(results, "vLLM / triton")
    assert missing["note"] == "vLLM was not measured"


@pytest.mark.parametrize("backward", [False, True])
def test_the_products_alone_have_the_flops_of_the_layer(backward, monkeypatch) -> None:
    flops: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flops.append(2 * x.shape[0] * x.shape[1] * weight.shape[0])
        return x @ weight.t()

    monkeypatch.setattr(choices, "multiply", counted)
    t, d, f, e, k = 16, 8, 12, 4, 2
    case = LayerCase("", t, d, f, e, k, backward=backward)
    experts = make_experts(case, torch.device("cpu"))
    choices.products(case, e, t * k // e, f)(experts.gate_up_proj, experts.down_proj)
    assert len(flops) == e * (6 if backward else 2)
    assert sum(flops) == layer_flops(t, d, f, k, backward=backward)
    del flops[:]
    gate_up, down = dense(case, experts).leaves
    choices.products(case, 1, t, k * f)(gate_up, down)
    assert sum(flops) == layer_flops(t, d, f, k, backward=backward)


def test_durations_have_units_that_fit() -> None:
    values = (2.5, 0.0125, 3.2e-5, 4e-8)
    assert [tables.duration(s) for s in values] == ["2.5 s", "12.5 ms", "32 us", "0.04 us"]
    assert tables.megabytes(1_500_000) == "1.5 MB" and tables.megabytes(None) == ""
    rounded = tables.five_digits({"a": [1.23456789], "b": ("c", None, 3)})
    assert rounded == {"a": [1.2346], "b": ["c", None, 3]}


def test_a_busy_machine_is_said() -> None:
    values = dict.fromkeys(("hardware", "torch", "date", "cpu_products"), "x")
    values |= {"device": "cpu", "threads": 1, "load_average": [1.6, 1.0, 1.0]}
    assert "others use this machine" in tables.heading(values)
    assert "others" not in tables.heading(values | {"load_average": [1.2, 1.0, 1.0]})
    assert "others" not in tables.heading(values | {"load_average": None})
    assert "others" not in tables.heading(values | {"device": "cuda"})


@pytest.mark.slow
def test_the_gpu_programme_runs_through_on_a_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "TRAINING_SECONDS", 30.0)
    (found,) = run_and_write("profile", TINY)
    both = [row for row in found["cases"] if row["work"] == "forward+backward"]
    assert both and all(row["seconds"] == sum(row["kernels"].values()) for row in both)
    (found,) = run_and_write("training", TINY, out=Path("out"))
    assert found["hardware"] and found["date"]
    assert all(0 < nats < 6 for nats in found["nats_per_byte"].values())
    assert found["recipe"]["training"]["steps"] >= 20 and found["log"]
    assert Path("out", "training.json").exists()
