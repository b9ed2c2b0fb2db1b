"""The article's experiment on a model of one's own: from the command line to the report, interrupted, and refused."""

import functools
import importlib.util
import itertools
import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.__main__ import main
from minimoe.checkpoint import save_model
from minimoe.errors import CheckpointError, CorpusError, MinimoeError
from minimoe.study import questions as sets
from minimoe.study import report as drawing
from minimoe.study.drawing import Figure
from minimoe.study.models import _load, find_model
from minimoe.study.questions import found_and_asked, question_set
from minimoe.study.record import RoutingRecorder
from minimoe.study.report import run_study
from minimoe.study.trace import TraceWriter
from minimoe.text.documents import Document
from minimoe.text.tokenizer import train_tokenizer
from tests.small import refuses, same_trace, tiny_model
from tests.test_recorder_families import build
from tests.test_recorder_transformers import SMALL

transformers = pytest.importorskip("transformers")

SUBJECTS = {"algebra": "root field ring sum", "law": "court shall tort sum", "faith": "king soul sum"}  # fmt: skip
VOCABULARY = 300
DRAW = drawing.draw


def questions(count: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    made: list[dict[str, str]] = []
    for i in range(count):
        subject = list(SUBJECTS)[i % 3]
        words = " ".join(rng.choice([*SUBJECTS[subject].split(), "the", "of"], size=8 + i % 5))
        made.append({"subject": subject, "text": f"What is it: {words}. Who knows?\nAnswer:"})
    return made


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    path.write_text("\n".join(json.dumps(q) for q in questions(165)) + "\n\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of random weights with a tokenizer, as transformers saves them, and one as minimoe does."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([q["text"] for q in questions(60)], VOCABULARY)
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        folder = root / f"tiny-{family}"
        build(family, vocab_size=VOCABULARY, eos_token_id=0).save_pretrained(folder)
        _wrapped(tokenizer, begin=family == "mixtral").save_pretrained(folder)
    sizes = SMALL | {"vocab_size": VOCABULARY, "eos_token_id": 0}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    llama.save_pretrained(root / "dense")
    _wrapped(tokenizer, begin=False).save_pretrained(root / "dense")
    save_model(tiny_model(vocab_size=VOCABULARY), root / "own")
    tokenizer.save(str(root / "own" / "tokenizer.json"))
    return {path.name: path for path in root.iterdir()}


def _wrapped(tokenizer: Any, begin: bool) -> Any:
    """As transformers keeps it; one that begins every text with a token of its own, like Mixtral's, or not."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    copy = Tokenizer.from_str(tokenizer.to_str())
    if begin:
        copy.post_processor = TemplateProcessing(single="<|eot|> $A", special_tokens=[("<|eot|>", 0)])  # type: ignore[assignment]  # fmt: skip
    # settings that would spoil a study if they were taken over
    copy.enable_truncation(5)
    copy.enable_padding(length=9)
    marks = dict.fromkeys(("bos_token", "eos_token"), "<|eot|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=copy, **marks)


def command(folder: str | Path, quiz: Path, out: Path, *more: str) -> list[str]:
    options = {"--model": folder, "--questions": quiz, "--out": out, "--device": "cpu"}
    return ["study", *(str(x) for pair in options.items() for x in pair), *more]


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("the weights were loaded")


def same(one: Path, other: Path) -> bool:
    """Whether two studies recorded the same."""
    return same_trace(*(TraceWriter.read(out / "trace") for out in (one, other)))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fewer draws, and no figures: they have tests of their own, and some studies here draw them (`drawn`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.study.measurements.SUBJECT_DRAWS", 200)
        patch.setattr(drawing, "draw", lambda *_: {})
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not as pictures."""
    monkeypatch.setattr(drawing, "draw", DRAW)
    monkeypatch.setattr(Figure, "png", lambda self, dpi=0: b"")


@pytest.fixture(scope="module")
def studied(folders, quiz, tmp_path_factory, quick) -> dict[str, Path]:
    """One study of each library and family, in chunks of 500 tokens; pictures are rendered in test_report.py."""
    out = tmp_path_factory.mktemp("studies")
    for name, layers in (("tiny-mixtral", "1,3"), ("tiny-deepseek_v3", "all"), ("own", "2")):
        with pytest.MonkeyPatch.context() as patch:
            if name != "tiny-mixtral":
                patch.setattr(drawing, "draw", DRAW)
            patch.setattr(Figure, "png", lambda self, dpi=0: b"")
            run_study(
                folders[name], out / name, questions=quiz, chunk_tokens=500, batch_tokens=400, progress=False,
                layers=layers if layers == "all" else [int(x) for x in layers.split(",")],
            )  # fmt: skip
    return {path.name: path for path in out.iterdir()}


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-deepseek_v3", "own"])
def test_the_report_has_load_subjects_tokens_and_what_is_left_out(studied, name) -> None:
    out = studied[name]
    page = (out / "report.html").read_text(encoding="utf-8")
    for part in ("C12", "C13", "C14", "C15", "C16"):
        assert f'id="{part}"' in page
    assert ('id="C10"' in page) == (name == "tiny-deepseek_v3")  # paths go through all layers
    assert "Left out: C11" in page and "Control: random routers" in page
    assert f"What the experts of {name} do" in page
    assert not re.findall(r'src="(?!data:image/png;base64,)', page) and "<script" not in page
    drawn = {"load", "load-by-depth", "topics", "skew", "information", "colon", "repeats"}
    assert name == "tiny-mixtral" or drawn <= {p.stem for p in out.glob("*.png")}
    assert all(re.search(r'alt="[^"]{60,}"', image) for image in re.findall(r"<img [^>]*>", page))
    text = (out / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=pytest.fail)
    m = summary["measurements"]
    shares = m["load"]["texts of quiz.jsonl"][0]["share"]["value"]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert m["topics"][0]["names"] and m["topics"][0]["documents"] == [55, 55, 55]
    assert all(x["domain"]["null_high"] and x["by"] == "topic" for x in m["information"])
    assert m["topics"][0]["share"]["low"][0][0] is not None  # 55 questions: intervals are given
    assert str(out) not in page and str(out) not in text
    assert summary["control"]["load"] and summary["questions"] == "own"
    assert "Random routers: " in json.dumps(summary["findings"])


def test_the_trace_holds_every_token_with_the_choices_of_the_model(studied, folders, quiz) -> None:
    for name in ("tiny-mixtral", "tiny-deepseek_v3"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).eval()
        # as its own tokenizer would have it, were it not told to cut and to pad
        tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        trace = TraceWriter.read(studied[name] / "trace")
        texts = {str(i + 1): q for i, q in enumerate(questions(165))}
        assert {d.id for d in trace.documents} == set(texts)
        for g in range(0, 165, 40):
            document = trace.documents[g]
            assert document.topic == texts[document.id]["subject"]
            ids = tokenizer.backend_tokenizer.encode(texts[document.id]["text"]).ids
            begins = name == "tiny-mixtral"
            assert (ids[0] == 0) == begins
            rows = trace.document == g
            assert trace.token[rows].tolist() == ids[begins:]
            with torch.no_grad(), RoutingRecorder(model, layers=trace.layers) as recorder:
                model(torch.tensor([ids]))
            assert (trace.expert[rows] == recorder.pop().expert[begins:]).all()


def test_a_stopped_study_goes_on(folders, studied, quiz, tmp_path, monkeypatch, capsys) -> None:
    options = ("--layers", "1,3", "--chunk-tokens", "500", "--batch-tokens", "400")
    line = command(folders["tiny-mixtral"], quiz, tmp_path, *options)
    append, calls = TraceWriter.append, itertools.count(1)

    def interrupted(self: TraceWriter, chunk: Any) -> Path:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return append(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "append", interrupted)
        assert main(line) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "minimoe: interrupted"
    assert len(list((tmp_path / "trace").glob("chunk-*.npz"))) == 3
    assert not (tmp_path / "report.html").exists()

    assert main(line) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "report.html")
    assert re.search(r"recording ([\d,]+) of ([\d,]+) tokens", captured.err)
    assert same(tmp_path, studied["tiny-mixtral"])
    # the report of a complete trace needs no weights
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    # nor does one that a kill left half-written
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / ".report.html.ab12_xyz.tmp").write_text(page[:100], encoding="utf-8")
    (tmp_path / "report.html").unlink()
    assert main(line) == 0
    assert "there already" in capsys.readouterr().err
    assert len((tmp_path / "report.html").read_text(encoding="utf-8")) == len(page)
    assert not list(tmp_path.glob(".*"))


def test_another_study_there_is_refused(folders, studied, quiz, refused, monkeypatch) -> None:
    out = studied["tiny-mixtral"]
    before = {p.name: p.read_bytes() for p in (out / "trace").iterdir()}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    for more, named in (
        (("--layers", "1,3", "--dtype", "bfloat16"), "dtype was as stored (float32), is bfloat16"),
        (("--layers", "all"), "layers was [1, 3], is [1, 2, 3]"),
        (("--layers", "1,3", "--max-tokens", "40"), "max_tokens was null, is 40"),
    ):
        assert named in refused(*command(folders["tiny-mixtral"], quiz, out, *more))
    line = refused(*command(folders["tiny-gpt_oss"], quiz, out, "--layers", "1,3"))
    assert "model was tiny-mixtral, is tiny-gpt_oss" in line and "config_sha256 was" in line
    assert {p.name: p.read_bytes() for p in (out / "trace").iterdir()} == before


def test_gpt_oss_in_bfloat16_on_the_default_layers(folders, quiz, tmp_path) -> None:
    options: Any = {"questions": quiz, "dtype": "bfloat16", "max_tokens": 300, "progress": False}
    run_study(folders["tiny-gpt_oss"], tmp_path, **options)
    trace = TraceWriter.read(tmp_path / "trace")
    assert trace.layers == (1, 2, 3) and trace.experts_per_token == 2
    assert {d.topic for d in trace.documents} == set(SUBJECTS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dtype"] == "bfloat16"
    # few questions: nulls, no intervals, and the page says so
    assert any("no interval" in line for line in summary["left_out"])
    assert summary["measurements"]["topics"][0]["share"]["low"][0][0] is None
    subject = np.array([list(SUBJECTS).index(str(d.topic)) for d in trace.documents])
    tokens = np.bincount(subject[trace.document])
    assert tokens.max() <= 300 and tokens.min() > 200


@pytest.mark.parametrize("count", [0, 4], ids=["the shortest text there is", "a handful"])
def test_few_questions_still_make_a_report(folders, tmp_path, count, drawn) -> None:
    path = tmp_path / "few.jsonl"
    given = questions(count) or [{"subject": "a", "text": "x"}]
    path.write_text("\n".join(json.dumps(q) for q in given))
    report = run_study(folders["own"], tmp_path / "out", questions=path, progress=False)
    page = report.read_text(encoding="utf-8")
    assert not count or "fewer than 50" in page
    assert ("Left out: neighbouring tokens" in page) == (not count)
    assert "generated questions: questions were asked for." in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub and no cache of it."""
    constants = sys.modules["huggingface_hub.constants"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("model", "more", "named"),
    [
        ("./nowhere", (), "'./nowhere' is neither a folder, nor a shipped model (mini), nor an id"),
        ("nowhere", (), "'nowhere' is neither a folder"),
        ("somebody/nothing", (), "somebody/nothing cannot be loaded"),
        ("dense", (), "dense: LlamaForCausalLM has no sparse layer that the recorder knows"),
        ("tiny-deepseek_v3", ("--layers", "1,2"), "1: no such layer with experts; the model has them in layers 2 to 3"),
        ("tiny-mixtral", ("--layers", "0"), "0: no such layer"),
        ("tiny-mixtral", ("--layers", "1,x"), "--layers is '1,x'; give numbers"),
        ("tiny-mixtral", ("--layers", ","), "no layer at all"),
        ("tiny-mixtral", ("--dtype", "int3"), "unknown dtype 'int3'"),
        ("tiny-mixtral", ("--device", "toaster"), "unknown device 'toaster'"),
        ("tiny-mixtral", ("--batch-tokens", "0"), "--batch-tokens is 0; it must be at least 1"),
        ("tiny-mixtral", ("--questions", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        ("tiny-mixtral", ("--questions", "riddles"), "unknown questions 'riddles'; give mmlu"),
        ("tiny-mixtral", ("--train",), "--train trains a model to study"),
        ("own", ("--revision", "main"), "a revision is of a model on the hub"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    folders, quiz, tmp_path, monkeypatch, refused, offline, model, more, named
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(*command(folders.get(model, model), quiz, tmp_path / "out", *more))
    assert not list(tmp_path.rglob("chunk-*.npz"))


def test_trap_harness_4063_a_model_of_the_hub_is_known_by_its_commit_or_refused(
    folders, tmp_path, offline, monkeypatch
) -> None:
    """The hub's local cache, as a download leaves it; 'main' alone is another model tomorrow."""
    cache = tmp_path / "hub" / "models--somebody--tiny"
    commits = ("a" * 40, "b" * 40)
    for commit, source in zip(commits, ("tiny-mixtral", "tiny-gpt_oss"), strict=True):
        shutil.copytree(folders[source], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commits[0])
    found = find_model("somebody/tiny", device="cpu")
    assert found.name == "somebody/tiny" and found.identity["revision"] == commits[0]
    assert found.num_experts == 6 and next(found.load().parameters()).device.type == "cpu"
    other = find_model("somebody/tiny", device="cpu", revision=commits[1])
    assert other.identity["revision"] == commits[1]
    assert type(other.load()).__name__ == "GptOssForCausalLM"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="commit of somebody/tiny cannot be read"):
        find_model("somebody/tiny", device="cpu")


def test_trap_harness_4063_a_model_is_known_by_all_that_can_change_its_choices(
    folders, tmp_path
) -> None:
    folder = shutil.copytree(folders["tiny-mixtral"], tmp_path / "model")
    found = [find_model(folder, device="cpu").identity]
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in weights if "gate.weight" in name)][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found.append(find_model(folder, device="cpu").identity)
    for name, old, new in (
        ("config.json", '"num_experts_per_tok": 2', '"num_experts_per_tok": 3'),
        ("tokenizer.json", '"content": "<|eot|>"', '"content": "<|end|>"'),
    ):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
        found.append(find_model(folder, device="cpu").identity)
    found.append(find_model(folder, device="cpu", dtype="float16").identity)
    assert len({json.dumps(identity, sort_keys=True) for identity in found}) == 5


def test_the_same_folder_is_the_same_experiment_unless_questions_or_domains_say_which(
    folders, quiz, tmp_path, refused, monkeypatch
) -> None:
    def read(*_: Any) -> Any:
        raise CorpusError("held-out text is read")

    def asked(name: Any) -> Any:
        raise CorpusError(f"{name} is asked")

    monkeypatch.setattr(sets, "heldout_text", read)
    monkeypatch.setattr(sets, "question_set", asked)
    for model, more, named in (
        ("own", (), "held-out text is read"),
        ("own", ("--questions", "mmlu-dev"), "mmlu-dev is asked"),
        ("tiny-mixtral", (), "mmlu is asked"),
        ("tiny-mixtral", ("--domains", "law"), "held-out text is read"),
        ("own", ("--layers", "1"), "--layers belongs to the study of questions: give --questions"),
        ("own", ("--device", "cpu"), "--device belongs to the study of questions"),
        ("own", ("--domains", "law", "--questions", "mmlu"), "two experiments"),
    ):
        line = refused("study", "--model", folders[model], "--out", tmp_path / "out", *more)
        assert named in line, (model, more)


def test_a_file_that_holds_no_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for text, named in (
        ("", "holds no text"),
        ("\n \n", "holds no text"),
        ('{"subject": "a"}', "line 1: expected an object"),
        ('{"subject": "a", "text": "b"}\nnot JSON', "line 2: expected a JSON object"),
        ('{"subject": "a", "text": " "}', "line 1"),
        ('{"subject": 3, "text": "b"}', "line 1"),
        ('["a", "b"]', "line 1"),
        ('{"text": "a"}', "line 1: expected an object"),
        ('{"domain": "a", "topic": 1, "text": "b"}', "line 1: expected an object"),
        ('{"domain": "a", "text": "\\ud800"}', "line 1: the text of document '1'"),
        ('{"subject": "a", "text": "b", "id": "1"}\n' * 2, "the id '1' stands for several"),
    ):
        path.write_text(text)
        with pytest.raises(CorpusError, match=re.escape(named)) as caught:
            question_set(path)
        assert str(path) in str(caught.value)
    refuses(CorpusError, "cannot be read", question_set, tmp_path)


def test_a_line_may_hold_any_character_of_json(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    # U+2028 ends a line to Python's splitlines, not to JSON lines
    path.write_text('{"subject": "a", "text": "one\u2028two"}\r\n', encoding="utf-8")
    assert [q.text for q in question_set(path).questions] == ["one\u2028two"]
    rows = [{"domain": domain, "id": "1", "text": "x"} for domain in "ab"]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = {(q.domain, q.id, q.topic) for q in question_set(path).questions}
    assert found == {("a", "1", None), ("b", "1", None)}


def test_folders_that_lack_something(folders, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()

    def lacks(
        named: str, weights: bool = False, error: type[MinimoeError] = CheckpointError
    ) -> None:
        """What is missing shows when a model is found, or only when its weights are read."""
        find = functools.partial(find_model, copy, device="cpu")
        refuses(error, named, find().load if weights else find)

    def write(**changes: Any) -> None:
        (copy / "config.json").write_text(json.dumps(config | changes))

    lacks(r"has no config\.json")
    for text in ("{", "[" * 10**5):
        (copy / "config.json").write_text(text)
        lacks(r"config\.json cannot be read as JSON")
    shutil.copytree(folders["tiny-mixtral"], copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    del weights[next(name for name in weights if "gate.weight" in name)]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    lacks(r"lacks weights.*gate\.weight.*would be random", weights=True)
    write(intermediate_size=5)
    sizes = r"experts\.down_proj is \(\d+, \d+, \d+\), expected \(\d+, \d+, 5\)"
    lacks(f"weights of other sizes .*{sizes}", weights=True)
    write(hidden_size="wide")
    lacks(r"'hidden_size' expected int, got str.*fetch or save")
    if importlib.util.find_spec("accelerate") is None:
        write(quantization_config={"quant_method": "fp8"})
        lacks("pip install accelerate", weights=True)
    write()
    (copy / "model.safetensors").write_bytes(b"half")
    lacks("copy cannot be loaded", weights=True)
    (copy / "tokenizer.json").unlink()
    lacks("copy cannot be loaded")
    monkeypatch.setitem(sys.modules, "transformers", None)
    lacks("pip install 'transformers", error=MinimoeError)


DEV = [Document("mmlu", f"law/{i}", f"Question: {i}?", "law") for i in range(4)]


def test_mmlu_is_all_of_it_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_of_two = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    rows = [sum_of_two | {"subject": s} for s in ("abstract_algebra", "law", "law")]
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    found = question_set("mmlu")
    assert asked == [(("cais/mmlu", "all"), {"split": "test"})]
    assert found.name == "mmlu-test" and not found.note
    assert found.subjects == ("abstract_algebra", "law")
    ids = {"abstract_algebra/test/1", "law/test/1", "law/test/2"}
    assert {q.id for q in found.questions} == ids
    assert found.questions[0].text == "Question: 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert found.sha256 != question_set("mmlu-test").sha256 or len(asked) == 2


@pytest.mark.parametrize("why", ["package", "network"])
def test_mmlu_falls_back_to_the_development_questions_and_says_so(monkeypatch, capsys, why) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub")

    library = types.SimpleNamespace(load_dataset=load_dataset) if why == "network" else None
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    monkeypatch.setattr(sets, "mmlu_dev_questions", lambda: list(DEV))
    found = question_set("mmlu")
    assert found.name == "mmlu-dev" and len(found.questions) == 4
    reason = {"package": "pip install datasets", "network": "Couldn't reach 'cais/mmlu'"}[why]
    said = capsys.readouterr().err
    assert said.strip() == found.note and "development questions" in said and reason in said
    refuses(CorpusError, re.escape(reason), question_set, "mmlu-test")
    assert question_set("mmlu-dev").sha256 == found.sha256


def test_the_order_of_questions_is_their_ids_and_their_hash_the_texts() -> None:
    changed = [Document("mmlu", d.id, d.text + "!", d.topic) for d in DEV]
    given = (sets.QuestionSet("own", documents) for documents in (DEV, DEV[::-1], changed))
    one, other, third = given
    assert one.questions == other.questions and one.sha256 == other.sha256 != third.sha256


def test_max_tokens_takes_the_first_questions_of_each_subject(folders, tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    rows = ({"subject": x, "text": "sum " * (3 + i)} for x in "ab" for i in range(5))
    path.write_text("\n".join(map(json.dumps, rows)))

    def asked(most: int | None) -> sets.Reading:
        return found_and_asked(folders["own"], path, "all", most)[1]

    every = asked(None)
    assert not every.left_out and len(every.documents) == 10
    lengths = {d.id: len(ids) for d, ids in zip(every.documents, every.tokens, strict=True)}
    order = [q.id for q in question_set(path).questions if q.topic == "a"]
    budget = lengths[order[0]] + lengths[order[1]]
    assert [d.id for d in asked(budget).documents if d.topic == "a"] == order[:2]
    assert sorted(str(d.topic) for d in asked(1).documents) == ["a", "b"]


@pytest.mark.corpus
def test_the_real_questions_and_those_made_from_articles() -> None:
    real = question_set("mmlu-dev")
    assert len(real.questions) == 282 and len(real.subjects) == 57
    assert all(q.text.endswith("\nAnswer:") for q in real.questions)
    made = question_set("generated")
    assert len(made.subjects) == 11 and 500 < len(made.questions) < 1500
    assert all(re.search(r"\nAnswer: [A-D]$", q.text) for q in made.questions)


def test_only_where_no_device_is_named_is_a_model_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def load(source: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        seen.append("device_map" in options)
        return torch.nn.Linear(1, 1), {"mismatched_keys": (), "missing_keys": ()}

    named = types.SimpleNamespace
    library = named(AutoModelForCausalLM=named(from_pretrained=load))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "accelerate" or None)
    for device in (None, torch.device("cpu")):
        _load(library, "a", named(), device)
    assert seen == [True, False]
