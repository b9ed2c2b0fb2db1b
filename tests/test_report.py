"""The study from end to end on a tiny model and corpus, and the rules that reach its verdicts."""

import base64
import dataclasses
import functools
import json
import re
import shutil
import tomllib

import numpy as np
import pytest
import torch

from minimoe.checkpoint import save_model
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, CorpusError, MinimoeError
from minimoe.model import MixtralModel
from minimoe.study import chance, measurements, report
from minimoe.study import claims as judged
from minimoe.study import questions as sets
from minimoe.study.chance import TEXT
from minimoe.study.drawing import DPI, Figure
from minimoe.study.measurements import chosen_topics, first_tokens, measure, three_layers
from minimoe.study.models import Stages, find_minimoe
from minimoe.study.report import findings, run_study
from minimoe.study.trace import TraceWriter, first_documents
from minimoe.text.corpus import Corpus
from minimoe.text.documents import Document
from minimoe.text.tokenizer import encode, train_tokenizer
from tests.small import refuses

WORDS = re.findall(r"\S+", "the of and a in river king music cell law shall What Who is : .")
TOPICS = ("Arts", "History", *measurements.TOPICS)


def documents(domain: str, count: int, seed: int, topics: tuple[str, ...] = ()) -> list[Document]:
    rng = np.random.default_rng(seed)
    made: list[Document] = []
    for i in range(count):
        weight = np.ones(len(WORDS))
        weight[(seed * 5 + i % 3) % len(WORDS)] = 8
        words = rng.choice(WORDS, size=40, p=weight / weight.sum())
        text = "What is it: Who knows? " + " ".join(words)
        topic = topics[i % len(topics)] if topics else None
        made.append(Document(domain, f"{domain}-{i}", text, topic))
    return made


TEXTS = documents("law", 55, 1) + documents("drama", 20, 2)
TEXTS.extend(documents("wiki_en", 60, 3, TOPICS) + documents("questions", 55, 4, TOPICS))
REAL = documents("mmlu", 57, 5, ("abstract_algebra", "professional_law", "world_religions"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([d.text for d in TEXTS], 400)


@pytest.fixture(scope="module")
def corpus(tokenizer) -> Corpus:
    heldout = encode(tokenizer, TEXTS)
    names = ("law", "drama", "wiki_en", "questions")
    return Corpus(names, tokenizer, heldout, heldout, {"math": "the package was withdrawn"})


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = ModelConfig.preset("nano")
    torch.manual_seed(0)
    save_model(MixtralModel(config), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def small(patch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    """A corpus of four small domains in place of the fetched one, and fewer draws."""
    patch.setattr(sets, "load_corpus", lambda domains=None, **_: corpus)
    patch.setattr(sets, "mmlu_dev_questions", lambda: list(REAL))
    patch.setattr("minimoe.study.measurements.LABEL_DRAWS", 200)


@pytest.fixture
def offline(monkeypatch, corpus):
    small(monkeypatch, corpus)


@pytest.fixture(scope="module")
def rendered() -> list[str]:
    """Names of the figures that the run of `studied` rendered, one by one."""
    return []


@pytest.fixture(scope="module")
def studied(checkpoint, corpus, rendered, tmp_path_factory):
    """One run, read by several tests; its figures are rendered with few dots."""
    png = Figure.png

    def counted(self, dpi=DPI):
        if dpi not in self.rendered:
            rendered.append(self.name)
            self.rendered[dpi] = png(self, 40)
        return self.rendered[dpi]

    with pytest.MonkeyPatch.context() as patch:
        small(patch, corpus)
        patch.setattr(Figure, "png", counted)
        out = tmp_path_factory.mktemp("study") / "new" / "folder"
        path = run_study(checkpoint, out, max_tokens=2000, progress=False)
    return path


@pytest.fixture(scope="module")
def measured(studied, tokenizer):
    return measure(heldout(studied), tokenizer, equal_tokens=2000)[0]


def heldout(studied):
    """The trace without the real questions."""
    trace = TraceWriter.read(studied.parent / "trace")
    return trace.select(domains=[d for d in trace.domains if d != "mmlu"])


def test_writes_everything_and_nothing_else(studied):
    names = {p.name for p in studied.parent.iterdir()}
    assert studied.name == "report.html" and {"report.html", "summary.json", "trace"} <= names
    drawn = "load load-by-depth topics skew colon full-stop information coactivation paths repeats"
    assert {f"{name}.png" for name in drawn.split()} <= names
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_page_needs_no_other_file(studied):
    page = studied.read_text(encoding="utf-8")
    assert not re.findall(r'src="(?!data:image/png;base64,)', page)
    assert not [x for x in ("<script", "@import", "<link", "url(") if x in page]
    links = re.findall(r'href="([^"]+)"', page)
    known = ("#", "https://arxiv.org/", "https://developer.nvidia.com/")
    assert all(link.startswith(known) for link in links)
    assert all(f'id="{link[1:]}"' in page for link in links if link.startswith("#"))
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 12
    assert all(re.search(r'alt="[^"]{60,}"', image) for image in images)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_the_page_says_what_it_must(studied):
    page = studied.read_text(encoding="utf-8")
    for claim in ("C10", "C11", "C12", "C13", "C14", "C15", "C16"):
        assert f'id="{claim}"' in page
    assert "Control: random weights" in page
    assert "math: the package was withdrawn" in page
    assert "fewer than 50" in page
    assert str(studied.parent) not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_summary_is_plain_json(studied, corpus):
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in summary.json")

    text = (studied.parent / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=refuse)
    assert len(summary["checkpoint_sha256"]) == 64 and summary["data_sha256"] == corpus.sha256
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    assert summary["hardware"] and summary["torch"]
    assert {f["claim"] for f in summary["findings"]} >= {"C10", "C12", "C13", "C15", "C16"}
    verdicts = {f["verdict"] for f in summary["findings"]}
    assert verdicts <= {"agrees", "disagrees", "cannot be told", "material"}
    loads = summary["measurements"]["load"][TEXT]
    assert sum(loads[0]["share"]["value"]) == pytest.approx(1, abs=1e-4)
    assert summary["control"]["load"]
    learnt = next(f for f in summary["findings"] if f["claim"] == "C14")
    assert all("Random weights: " in part["found"] for part in learnt["parts"])
    assert str(studied.parent) not in text


@pytest.fixture
def recorded(monkeypatch, offline) -> list[int]:
    """Tokens of every recording that is made, of the model and of random weights."""
    made: list[int] = []
    record = sets.record_documents

    def counting(model, documents, tokens, **options):
        made.append(sum(map(len, tokens)))
        return record(model, documents, tokens, **options)

    monkeypatch.setattr(sets, "record_documents", counting)
    return made


def test_trace_is_used_again_only_for_the_same_study(studied, checkpoint, tmp_path, recorded):
    """One of another text, of other options, or a damaged one is replaced: held-out text is read in minutes."""
    found = find_minimoe(checkpoint)
    folder = tmp_path / "trace"
    shutil.copytree(studied.parent / "trace", folder)
    (folder / "mine.txt").write_text("not of the study")

    def record(**changes):
        recorded.clear()
        read = sets.heldout_text(checkpoint, found, None, 2000)
        read = dataclasses.replace(read, identity=read.identity | changes)
        sizes = {"batch_tokens": 8192, "chunk_tokens": 10**6}
        trace = sets.recorded(found, read, folder, Stages(quiet=True), **sizes)
        assert len(trace) == sum(map(len, read.tokens))
        return sum(recorded), len(trace)

    assert record() == (0, record()[1])
    for changed in ({"data_sha256": "1" * 64}, {"options": "other"}):
        again, size = record(**changed)
        assert again == size and record(**changed)[0] == 0
    next(folder.glob("chunk-*.npz")).write_bytes(b"not a trace")
    again, size = record(options="other")
    assert again == size
    assert (folder / "mine.txt").exists()


def test_each_figure_is_rendered_once_and_no_id_stands_twice(studied, rendered):
    page = studied.read_text(encoding="utf-8")
    names = re.findall(r'id="([^"]+)"', page)
    assert len(names) == len(set(names))
    pictures = {p.stem: p.read_bytes() for p in studied.parent.glob("*.png")}
    assert sorted(rendered) == sorted(pictures) and set(pictures) <= set(names)
    shown = re.findall(r'<figure id="([^"]+)">.*?base64,([^"]+)"', page, re.DOTALL)
    assert {name: base64.b64decode(data) for name, data in shown} == pictures
    assert 'See the <a href="#load-by-depth">figure above</a>' in page  # C12 and C16 both name it


def test_mixtral_itself_stands_beside_its_claims(studied):
    summary = json.loads((studied.parent / "summary.json").read_text(encoding="utf-8"))
    balance = summary["mixtral_itself"]["C12"]
    assert balance["cells"][0].startswith("layer 1: max/min 1.39.")
    assert balance["cells"][1].startswith("layer 32: max/min 1.40.")
    assert all("cannot be told" in cell for cell in balance["cells"])
    subjects = summary["mixtral_itself"]["C13"]
    assert "6 of 7 subjects less even" in subjects["short"] and "5e5ed673" in subjects["source"]
    assert any("largest max/min 2.27 (High school US history)" in x for x in subjects["cells"])
    page = studied.read_text(encoding="utf-8")
    assert page.count("<th>Mixtral itself</th>") == 3  # the overview, C12 and C13


def test_trap_harness_4063_a_trace_is_known_by_all_that_can_change_it(
    checkpoint, tmp_path, monkeypatch
):
    """lm-evaluation-harness #4063: sharded folders of other weights had one identity, and one trace."""
    model = MixtralModel.from_pretrained(checkpoint)
    text = dataclasses.make_dataclass("Text", ["sha256", "domains"])
    found = []

    def see(sha256="0", domains=("law", "drama"), max_tokens=None):
        identity = sets.identity_of(tmp_path, text(sha256, domains), max_tokens)
        found.append(json.dumps(identity))

    with torch.no_grad():
        for shift in (0, 1e-3):
            model.get_parameter("layers.1.mlp.gate.weight")[0, 0] += shift
            model.save_pretrained(tmp_path, max_shard_size=100_000)
            assert not (tmp_path / "model.safetensors").exists()
            see()
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    see()
    (tmp_path / "tokenizer.json").write_text("{}")
    see()
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    see()
    see(max_tokens=9)
    see(sha256="1")
    see(domains=("law",))
    monkeypatch.setitem(sets.MORE_TOKENS, "drama", 5)
    see()
    assert len(set(found)) == len(found) == 9
    see()
    assert found[-1] == found[-2]


# A statistic as somebody adds it: one file with what is computed, drawn and judged, and its words in claims.toml.
FILE = """
from dataclasses import dataclass
import numpy as np
from minimoe.study import chance, claims, drawing

@dataclass(frozen=True, eq=False)
class InUse(chance.Result):
    layer: int
    experts: int  # of which some token makes use

def in_use(trace, layer, *, seed):
    return InUse(layer, len(np.unique(chance.choices(trace, layer).expert)))

def draw(m):
    canvas, ((ax,),) = drawing.panels(1, 1, height=2)
    ax.plot([x.layer for x in m.own["in-use"]], [x.experts for x in m.own["in-use"]])
    return drawing.figure("in-use", canvas, "in-use", ["all"])

def judge(m):
    part = lambda x: claims.Part(claims.where(m, x), f"{x.experts} experts", claims.AGREES)
    return claims.finding("C99", [part(x) for x in m.own["in-use"]], "every expert is used")

chance.STATISTICS["in-use"] = chance.Statistic(in_use, "experts in use", draw, judge)
"""
WORDS_OF_IT = """
[C99]
title = "Every expert has its use"
article = "-"
words = "-"
original = "-"
published = "-"
measure = "Experts that some token chooses."
confirms = "Agrees if these are all."
refutes = "Disagrees if not."
figures = ["in-use"]
[figures.in-use]
caption = "Experts in use."
alt = "A line: {said}."
"""


def test_without_mmlu_the_page_says_why_and_a_statistic_is_one_file_and_its_words(
    checkpoint, offline, monkeypatch, tmp_path, capsys
):
    def missing():
        raise CorpusError("the MMLU questions need lm-eval 0.4.13: no network")

    monkeypatch.setattr(sets, "mmlu_dev_questions", missing)
    monkeypatch.setattr(Figure, "png", lambda self, dpi=0: b"")  # pictures are rendered above
    monkeypatch.setattr(chance, "STATISTICS", dict(chance.STATISTICS))
    monkeypatch.setattr(report, "STATISTICS", chance.STATISTICS)
    words = tomllib.loads(WORDS_OF_IT)
    monkeypatch.setitem(judged.claims(), "C99", words["C99"])
    monkeypatch.setitem(judged.claims()["figures"], "in-use", words["figures"]["in-use"])
    exec(FILE, {"__name__": "in_use"})
    page = run_study(checkpoint, tmp_path, max_tokens=600).read_text(encoding="utf-8")
    assert "The real MMLU questions are left out: the MMLU questions need lm-eval" in page
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    stages = [line for line in lines if line.startswith("[")]
    bar = [line for line in lines if "tok" in line and "|" in line]  # of the recording
    assert len(stages) >= 8 and not set(lines) - set(stages) - set(bar)

    assert page.count('id="in-use"') == 1 and page.index('id="C99"') > page.index('id="C16"')
    summary = json.loads((tmp_path / "summary.json").read_text())
    (finding,) = [f for f in summary["findings"] if f["claim"] == "C99"]
    assert finding["verdict"] == "agrees"
    assert [x["layer"] for x in summary["measurements"]["in-use"]] == [1, 2]
    assert {x["experts"] for x in summary["measurements"]["in-use"]} <= {3, 4}
    assert len(summary["control"]["in-use"]) == 2


def test_bad_input_and_a_blocked_folder_are_found_first(checkpoint, tmp_path, monkeypatch):
    worked = lambda *_, **__: pytest.fail("worked before looking at the folder")  # noqa: E731
    monkeypatch.setattr(sets, "load_corpus", worked)
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    refuses(MinimoeError, "file", run_study, checkpoint, blocked / "study", progress=False)

    refuses(CheckpointError, "no-such-model", run_study, "no-such-model", tmp_path, progress=False)
    study = functools.partial(run_study, checkpoint, tmp_path, progress=False)
    refuses(MinimoeError, "max_tokens", study, max_tokens=0)


def test_three_layers_and_topics():
    assert three_layers(tuple(range(1, 33))) == (1, 16, 32)
    assert three_layers((1, 2, 3, 4, 5, 6)) == (1, 3, 6)
    assert all(three_layers(few) == few for few in ((1, 2), (4,), (2, 4, 6)))
    assert chosen_topics(dict.fromkeys(TOPICS, 60)) == TOPICS[2:]
    assert chosen_topics({"A": 3, "B": 9, "C": 9, "D": 1}) == ("B", "C", "A")


def test_first_tokens_keeps_every_domain(studied):
    trace = heldout(studied)
    few = first_tokens(trace, 1)
    assert few.domains == trace.domains and len(few.documents) == len(trace.domains)
    part = first_tokens(trace, 500)
    assert np.bincount(part.domain).max() <= 500
    assert first_tokens(trace, None) is trace


def test_a_domain_ends_at_the_first_document_that_does_not_fit():
    for limit, second in ((12, True), (10, True), (9, False)):
        kept = first_documents(["a"] * 6, [5, 5, 20, 1, 1, 1], limit)
        assert kept.tolist() == [True, second, False, False, False, False]
    mixed = first_documents(["a", "b", "a", "b", "b"], [9, 99, 9, 1, 1], 12)
    assert mixed.tolist() == [True, True, False, False, False]
    assert first_documents(["a", None], [9, 9], None).all()


def test_no_claim_is_lost_on_a_model_of_two_layers(measured):
    made = findings(measured, {})
    assert [f.claim for f in made] == ["C10", "C11", "C12", "C13", "C14", "C15", "C16"]
    assert all(f.short and f.rule and f.parts for f in made if f.claim != "C11")
    assert sum(int(n) for n in re.findall(r"\d+", judged.counted(made))) == 7
