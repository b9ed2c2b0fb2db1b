"""The live router's JavaScript: texts are cut as `tokenizers` cuts them, and routed as PyTorch routes them in int8."""

import copy
import json
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save

from book.live_router import alone
from minimoe.checkpoint import pretrained_path
from minimoe.config import ModelConfig
from minimoe.errors import MinimoeError
from minimoe.hf.lazy import quantize_experts
from minimoe.model import MixtralModel
from minimoe.routers import Router
from minimoe.text.tokenizer import load_tokenizer, train_tokenizer
from minimoe.widgets.live_router import EXAMPLES, RESULT, live_router
from minimoe.widgets.live_router.export import export, vocabulary, weights
from tests.node import in_node
from tests.small import tiny_model

ROOT = Path(__file__).resolve().parent.parent
Floats = npt.NDArray[np.float32]

# Of every probability: PyTorch sums in float32, in an order that depends on the processor; the page sums in float64.
# 6e-7 is what was seen on one machine.
CLOSE = 1e-5
# Where the second and the third probability are further apart than this, no error within CLOSE can swap them.
MARGIN = 2 * CLOSE
LIMIT = 255  # tokens: 256 positions, the first of which end-of-text takes

# Our own words: the domains of the training text, other languages, code, numbers, and what is unlikely.
TEXTS = [
    'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, express or implied.',
    "And it came to pass in those days, that the king went up unto the mountain with all his servants.",
    "Preheat the oven to 180 °C. Mix flour, sugar and butter, add two eggs, and bake for 35 minutes.",
    "Question: Which of these is a mammal?\nA. Trout\nB. Whale\nC. Lizard\nD. Wren\nAnswer: B",
    "L'été dernier, elle a écrit un roman dont l'héroïne élève des chevaux près de la forêt.",
    "¿Dónde está la biblioteca? Mañana jugará el niño con su pequeño perro en la montaña.",
    "Ночью над рекой поднялся туман, и лодки стояли тихо.",
    "في الصباح يشرب الناس القهوة ويقرأون الأخبار.",
    "春になると川辺に人が集まり、桜を見る。",
    'class Stack(list):\n    """Last in, first out."""\n\n    def push(self, item):\n        self.append(item)\n',
    "3.14159 26535 89793 23846; 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987",
    "∑ᵢ xᵢ² ≤ ∥x∥²; ∀ε > 0 ∃δ > 0: |x − a| < δ ⇒ |f(x) − f(a)| < ε",
    "  \t\n\n   \r\n  .  \u00a0 \u3000 ...   !!!???   \n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e\u0301 \u200b\u202e\u0000\u0007\ufeff\ufffd",
    "<|eot|> is text here, and so is </s>.",
    "x",
]

Routed = list[tuple[list[int], Floats]]

# m.reader on texts one after the other, or (`together`) all asked for at once.
READ = """(async () => {
  const bytes = readFileSync(given.file);
  const found = [];
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
  const keep = ({text, only, tokens, cut, probs, costs, logits, next}) =>
    found.push({text, tokens, cut, probs: [...probs], ...(given.more ? {only, costs, logits: [...logits], next} : {})});
  const read = m.reader(buffer, keep, given.slice);
  const one = (text) => read(typeof text === "string" ? {text} : text);
  if (given.together) await Promise.all(given.texts.map(one));
  else for (const text of given.texts) await one(text);
  return found;
})()"""
TOKENIZE = """(() => {
  const bytes = readFileSync(given.file);
  const {tensors} = m.readWeights(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const tokenizer = new m.Tokenizer(tensors);
  return given.texts.map((text) => tokenizer.encode(text));
})()"""


def in_router(expression: str, given: Any = None) -> Any:
    """The value of an expression of the live router's module."""
    return in_node("live_router", expression, given)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported weights."""
    path = tmp_path_factory.mktemp("live_router") / "router.safetensors"
    path.write_bytes(export())
    return path


@pytest.fixture(scope="module")
def full() -> MixtralModel:
    """The shipped model."""
    return MixtralModel.from_pretrained("mini")


@pytest.fixture(scope="module")
def int8(full: MixtralModel) -> MixtralModel:
    """The same, its experts in int8."""
    return quantize_experts(full)


def tokenized(texts: list[str]) -> list[list[int]]:
    """Tokens by the library `tokenizers`; text that spells a special token is text."""
    tokenizer = load_tokenizer(pretrained_path("mini"))
    tokenizer.encode_special_tokens = True
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


@torch.no_grad()
def in_torch(model: MixtralModel, texts: list[str]) -> Routed:
    """Of each text its tokens, at most LIMIT, and their probabilities [S, L, E]."""
    found: Routed = []
    for ids in tokenized(texts):
        cut = ids[:LIMIT]
        routings = model(torch.tensor([[0, *cut]]), logits_to_keep=1).routings
        probs = [r.probs[1:] for r in routings if r.probs is not None]
        found.append((cut, torch.stack(probs, dim=1).numpy()))
    return found


def in_page(
    path: Path, texts: Sequence[str | dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    """What the JavaScript posts for each text; costs and logits with `more`, all asked for at once with `together`."""
    return in_router(READ, {"file": str(path), "texts": texts, "slice": 1e9, **options})


def routed(found: list[dict[str, Any]]) -> Routed:
    """The same as `in_torch` gives, from what the page posted."""
    shapes = ((one["tokens"], np.array(one["probs"], np.float32)) for one in found)
    return [(tokens, probs.reshape(len(tokens), 6, 8)) for tokens, probs in shapes]


def differences(expected: Routed, found: Routed) -> dict[str, float]:
    """Largest difference of probabilities and of weights; choices compared, chosen differently, and left out.

    What is left out are ties: a choice within MARGIN that the two sides make differently changes what this token
    hands on, and so the later layers of it and of all tokens after it.
    """
    names = ("probs", "weights", "compared", "different", "left out")
    out: dict[str, float] = dict.fromkeys(names, 0.0)
    for (ids, a), (tokens, b) in zip(expected, found, strict=True):
        assert ids == tokens
        ordered = -np.sort(-a, axis=-1)
        first, second = (np.sort(np.argsort(-p, axis=-1, kind="stable")[..., :2]) for p in (a, b))
        differs = (first != second).any(axis=-1)  # [S, L]
        swapped = differs & (ordered[..., 1] - ordered[..., 2] <= MARGIN)
        # after[t, l]: a tie fell differently in an earlier layer, at this token or one before it
        earlier = np.logical_or.accumulate(np.logical_or.accumulate(swapped, axis=0), axis=1)
        after = np.zeros_like(swapped)
        after[:, 1:] = earlier[:, :-1]
        counted = ~after & ~swapped
        out["left out"] += int((~counted).sum())
        out["compared"] += int(counted.sum())
        out["different"] += int((differs & counted).sum())
        wa, wb = (np.take_along_axis(p, first, -1) for p in (a, b))
        wa, wb = (w / w.sum(axis=-1, keepdims=True) for w in (wa, wb))
        for what, gap in (("probs", np.abs(a - b)[~after]), ("weights", np.abs(wa - wb)[counted])):
            out[what] = max(out[what], float(gap.max(initial=0)))
    return out


def test_the_file_holds_what_the_quantised_model_holds(int8: MixtralModel, file: Path) -> None:
    stored = load_file(file)
    state = int8.state_dict()
    own = {name: t for name, t in stored.items() if not name.startswith("tokenizer.")}
    # the output projection is the embedding
    assert set(own) == set(state) - {"lm_head.weight"}
    assert live_router().data["bytes"] == sum(t.nbytes for t in own.values())
    original = load_file(pretrained_path("mini") / "model.safetensors")
    for name, tensor in own.items():
        if ".experts." in name:
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor, state[name])
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, original[name])
    assert file.read_bytes() == export(), "the same bytes every time"
    assert file.stat().st_size < 4_800_000


def test_other_models_and_tokenizers_are_refused() -> None:
    with pytest.raises(MinimoeError, match="differs in router_type"):
        weights(tiny_model(router_type="switch", num_experts_per_tok=1))
    with pytest.raises(MinimoeError, match="is not stored as bf16"):
        weights(tiny_model())
    tokenizer = train_tokenizer(["some text, and some more text"], 300)
    assert set(vocabulary(tokenizer)) >= {"tokenizer.bytes", "tokenizer.merges"}
    tokenizer.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(MinimoeError, match="and no other"):
        vocabulary(tokenizer)


# --- tokens ---------------------------------------------------------------------------------------


# what the tokenizer joins, or does not
WORDS = "the 's 'S 're n't ' 1 ² Ⅷ ½ é e\u0301 ß = --- 👩‍🚀"


def random_texts(count: int) -> list[str]:
    """Texts of all Unicode, of spaces, of words, and of what the tokenizer joins, one or mixed."""
    draw, tokenizer = random.Random(0), load_tokenizer(pretrained_path("mini"))
    spaces = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u180e\u2003\u2028\u200b\u3000\ufeff"
    spelled = [tokenizer.decode([i]) for i in range(1, 4096)]
    scripts = [
        *((0x20, 0x7F), (0, 0x250), (0x300, 0x900), (0x2000, 0x2C00)),
        *((0x3000, 0xD800), (0xE000, 0x20000)),
    ]
    kinds: list[Sequence[str]] = [[chr(c) for c in range(*points)] for points in scripts]
    kinds += [spaces, WORDS.split(" "), spelled, "etaoin"] * 3
    texts: list[str] = []
    for _ in range(count):
        chosen = draw.sample(kinds, draw.randrange(1, 4))
        parts = [draw.choice(draw.choice(chosen)) for _ in range(draw.randrange(1, 60))]
        texts.append("".join(parts))
    return texts


def one_by_one(points: Iterable[int]) -> list[str]:
    """Texts in which each character stands where letters, numbers, spaces and all else are told apart."""
    text = [f"a{chr(c)}1" for c in points if not 0xD800 <= c < 0xE000]
    return ["".join(text[i : i + 2000]) for i in range(0, len(text), 2000)]


def cut_otherwise(file: Path, texts: list[str]) -> list[str]:
    """The texts that the page and the library `tokenizers` cut differently."""
    found = in_router(TOKENIZE, {"file": str(file), "texts": texts})
    return [t for t, a, b in zip(texts, tokenized(texts), found, strict=True) if a != b]


def test_any_text_is_cut_as_the_tokenizer_cuts_it(file: Path) -> None:
    texts = [*TEXTS, *random_texts(2000)]
    texts += ["", "a" * 3000, "ab" * 2000, " " * 3000, "!" * 999, "\n" * 500]
    texts += ["".join(random.Random(n).choices("abehinorst", k=2000)) for n in range(3)]
    # where the kind of character changes, by this Python's Unicode
    edges = [c for c in range(1, 0x3FFFF) if len({category(chr(c + i))[0] for i in (-1, 0, 1)}) > 1]
    texts += one_by_one([*range(0x600), *edges, *range(0xE0000, 0xE0200)])
    assert cut_otherwise(file, texts) == []


@pytest.mark.slow
def test_every_character_is_of_the_kind_that_the_tokenizer_takes_it_for(file: Path) -> None:
    assert cut_otherwise(file, one_by_one(range(0x110000))) == []


def test_halves_of_surrogate_pairs_are_replacement_characters(file: Path) -> None:
    halves = ["\ud83d", "x\udc69y", "\udc69\ud83d", " \ud800 \ud800"]
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in halves]
    assert whole[1] == "x\ufffdy"
    assert in_router(TOKENIZE, {"file": str(file), "texts": halves}) == tokenized(whole)


def test_how_tokens_are_written() -> None:
    texts = {
        " the": "␣the", "\n\t ": "↵⇥␣", "é": "é", "\x00": "⟨U+0000⟩", "\u202e": "⟨U+202E⟩", "\u200d": "⟨U+200D⟩",
        "\u0301": "◌\u0301", "👩": "👩", "\ufeff": "⟨U+FEFF⟩", "": "",
    }  # fmt: skip
    parts = {
        b"\xe2\x80": "⟨E2⟩⟨80⟩", b"a\xf0\x9f": "a⟨F0⟩⟨9F⟩", b"\x80b\xc3\xa9": "⟨80⟩bé",
        b"\xff\xc0\x80": "⟨FF⟩⟨C0⟩⟨80⟩",
    }  # fmt: skip
    given = [list(t.encode()) for t in texts] + [list(b) for b in parts]
    assert in_router("given.map(m.written)", given) == [*texts.values(), *parts.values()]


# --- routing --------------------------------------------------------------------------------------


def test_routing_equals_pytorch_with_the_same_int8_weights(int8: MixtralModel, file: Path) -> None:
    texts = [*TEXTS, " ".join(TEXTS)]  # the last is as long as the model reads
    found = in_page(file, texts)
    assert [one["cut"] for one in found] == [False] * len(TEXTS) + [True]
    result = differences(in_torch(int8, texts), routed(found))
    assert result["probs"] <= CLOSE
    assert result["different"] == 0
    assert result["weights"] <= 1e-4
    assert result["left out"] <= 0.01 * result["compared"]


def test_a_wrong_scale_would_be_noticed(
    full: MixtralModel, int8: MixtralModel, file: Path, tmp_path: Path
) -> None:
    """One scale of one channel of one expert, off by two hundredths."""
    whole = load_tensors(file.read_bytes())
    scale = whole["layers.1.mlp.experts.gate_up_scale"]
    scale[2, 7] *= 1.02
    config = (pretrained_path("mini") / "config.json").read_text()
    other = tmp_path / "wrong.safetensors"
    other.write_bytes(save(whole, {"config": json.dumps({**json.loads(config), "end_of_text": 0})}))
    some = TEXTS[:8]
    assert differences(in_torch(int8, some), routed(in_page(other, some)))["probs"] > CLOSE
    # and the full weights are not the int8 weights
    assert differences(in_torch(full, some), routed(in_page(file, some)))["probs"] > 100 * CLOSE


def test_reading_on_from_a_common_beginning_is_reading_anew(file: Path) -> None:
    whole = "The river rises in the north."
    texts = ["The river rises", whole, "The river", "", whole]
    once = in_page(file, texts)
    assert once[1:3] == in_page(file, texts[1:2]) + in_page(file, texts[2:3])
    assert in_page(file, texts, slice=0) == once  # with a pause after every token


def test_a_newer_text_ends_the_reading_of_an_older_one(file: Path) -> None:
    texts = [TEXTS[0], " ".join(TEXTS), TEXTS[1], TEXTS[1]]
    found = in_page(file, texts, slice=0, together=True)
    assert [one["text"] for one in found] == [TEXTS[1]]
    assert found == in_page(file, [TEXTS[1]])


def test_of_a_long_text_the_beginning_is_read(file: Path) -> None:
    texts = ["", "👩‍🚀" * 1500]
    for text, found in zip(texts, in_page(file, texts), strict=True):
        ids = tokenized([text])[0]
        assert found["tokens"] == ids[:LIMIT]
        assert found["cut"] == (len(ids) > LIMIT)
        assert len(found["probs"]) == len(found["tokens"]) * 6 * 8
    given = [[[0x61], [0xC3]], [[0xF0, 0x9F, 0x91, 0xA9], [0x62]], []]
    assert in_router("given.map(m.beginning)", given) == ["a", "👩b", ""]


# m.engine with a worker that reads, or keeps silent; the clock is turned by hand.
WORKER = """(async () => {
  const { mock } = await import('node:test');
  mock.timers.enable({ apis: ['setTimeout'] });
  const said = [];
  let worker;
  class Silent {
    constructor() { worker = this; }
    postMessage(message) {
      said.push(message);
      if (!Silent.mute) queueMicrotask(() => this.onmessage({ data: message === given.buffer ? "ready" : message }));
    }
    terminate() { said.push("terminated"); }
  }
  globalThis.Worker = Silent;
  const read = await m.engine(given.buffer, (answer) => said.push(`read ${answer}`), () => said.push("lost"));
  const later = async (seconds) => { mock.timers.tick(1000 * seconds); await null; };
  const ask = async (text, mute) => { Silent.mute = mute; read.ask(text); await null; };
  await later(60);
  await ask("one");
  await later(60);
  for (const step of given.steps) await eval(step);
  return said;
})()"""


def test_a_worker_that_has_started_is_left_alone_and_a_lost_one_is_noticed() -> None:
    def said(*steps: str) -> list[str]:
        return in_router(WORKER, {"buffer": "weights", "steps": steps})

    begun = ["weights", "one", "read one"]
    assert said() == begun
    assert said("ask('two', true)", "later(4)") == [*begun, "two"]
    assert said("ask('two', true)", "later(6)") == [*begun, "two", "terminated", "lost"]
    # a reader who leaves is told nothing, and asks nothing any more
    left = ["ask('two', true)", "read.stop()", "later(60)", "ask('three')"]
    assert said(*left) == [*begun, "two", "terminated"]
    # a sign of life is enough, and its lack after that is noticed
    alive = ["ask('two', true)", "later(4)", "worker.onmessage({data: 'reading'})", "later(4)"]
    assert said(*alive) == [*begun, "two"]
    assert said(*alive, "later(2)") == [*begun, "two", "terminated", "lost"]


def test_damaged_weights_are_an_error(file: Path, tmp_path: Path) -> None:
    for damaged in (file.read_bytes()[:100_000], b"<!doctype html><p>not found", b""):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(AssertionError, match="Error"):
            in_page(tmp_path / "bad", ["x"])


class Limited(torch.nn.Module):
    """A router of which only some experts may be chosen: the logits of all others are −∞."""

    def __init__(self, router: Router, allowed: list[int]) -> None:
        super().__init__()
        self.router, self.allowed = router, allowed

    def forward(self, x: torch.Tensor, **context: Any) -> Any:
        logits = self.router(x, **context).logits
        other = torch.ones(logits.shape[1], dtype=torch.bool)
        other[self.allowed] = False
        probs = logits.masked_fill(other, -torch.inf).softmax(dim=-1)
        weight, expert = probs.topk(2)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        return self.router.token_choice(expert, weight, logits=logits, probs=probs)


@torch.no_grad()
def costs_in_torch(model: MixtralModel, text: str, only: dict[str, list[int]]) -> tuple[Any, Any]:
    """Nats of each token of a text, and the logits after it, with the experts that are allowed."""
    model = copy.deepcopy(model)
    for layer, allowed in only.items():
        block: Any = model.layers[int(layer)].mlp
        name = next(n for n, m in block.named_children() if isinstance(m, Router))
        setattr(block, name, Limited(getattr(block, name), allowed))
    (ids,) = tokenized([text])
    logits = model(torch.tensor([[0, *ids]])).logits[0]
    cost = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids), reduction="none")
    return cost.numpy(), logits[-1].numpy()


def test_costs_and_next_tokens_equal_pytorch_with_experts_off_or_forced(
    int8: MixtralModel, file: Path
) -> None:
    off = [0, 2, 3, 4, 5, 6, 7]
    rules: list[Any] = [{}, {"5": off}, {"2": [3]}, {str(layer): off for layer in range(6)}]
    broken = [[0, 4], [0, 7], *([3, e] for e in range(8) if e != 6), [5, 2]]
    rules.append(in_router("m.switched(given, 8)", broken))
    asked = [(text, only) for text in (EXAMPLES[0]["text"], TEXTS[1], TEXTS[9]) for only in rules]
    # what was read under other rules is not taken for the next reading, of the same text
    told = in_page(file, [{"text": text, "only": only or None} for text, only in asked], more=True)
    for (text, only), one in zip(asked, told, strict=True):
        cost, logits = costs_in_torch(int8, text, only)
        np.testing.assert_allclose(one["costs"], cost, atol=2e-4)
        np.testing.assert_allclose(one["logits"], logits, atol=2e-4)
        likeliest = np.argsort(-logits, kind="stable")[:8].tolist()
        assert [n["token"] for n in one["next"]] == likeliest


def test_probabilities_at_a_temperature_and_allowed_experts() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.1, 1.0, 2.0):
        found = in_router(f"[...m.distribution(given, {temperature})]", logits.tolist())
        expected = (logits / temperature).softmax(dim=0)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)
    off = in_router("m.allowed({how: 'off', expert: 2}, [1, 3], 4)")
    assert off == {"1": [0, 1, 3], "3": [0, 1, 3]}
    assert in_router("m.allowed({how: 'forced', expert: 2}, [0], 4)") == {"0": [2]}
    assert in_router("m.switched([[1, 0], [1, 3], [3, 1]], 4)") == {"1": [1, 2], "3": [0, 2, 3]}
    # beside a rule, and never without an expert
    assert in_router("m.switched([[0, 2], [1, 0]], 3, {0: [2]})") == {"0": [2], "1": [1, 2]}
    assert in_router("m.switched([], 3)") == {}


def test_the_recorded_run_is_what_the_page_finds(file: Path) -> None:
    recorded = live_router().data["recorded"]
    (found,) = in_page(file, [recorded["text"]], more=True)
    assert found["tokens"] == recorded["tokens"]
    np.testing.assert_allclose(recorded["probs"], found["probs"], atol=1e-4)
    np.testing.assert_allclose(recorded["costs"], found["costs"], atol=1e-3)
    likely = [(n["token"], n["bytes"]) for n in recorded["next"]]
    assert likely == [(n["token"], n["bytes"]) for n in found["next"]]
    probs = torch.tensor(found["logits"]).softmax(dim=0)
    for entry in recorded["next"]:
        assert entry["p"] == pytest.approx(probs[entry["token"]].item(), abs=1e-4)


def test_the_tour_shows_what_its_titles_say(file: Path) -> None:
    steps = in_router("m.TOUR.map(([title, said]) => [title, said])")
    assert len(steps) == 6
    titles = [title for title, _ in steps]
    assert titles[:3] == ["One token", "Layer 1 is a dictionary", "Later layers look around"]
    # repeated tokens keep their first expert at layer 1, and lose it at the last
    (found,) = in_page(file, [steps[1][1]["text"]])
    run = """(() => {
      const size = 8;
      const choices = given.tokens.map((_, t) => Array.from({length: 6}, (_, l) =>
        m.choose(Float32Array.from(given.probs.slice((t * 6 + l) * size, (t * 6 + l + 1) * size)), 2)));
      return [0, 5].map((layer) => m.again(given.tokens, choices, layer));
    })()"""
    (first, all_), (last, _) = in_router(run, found)
    probs = np.array(found["probs"]).reshape(-1, 6, 8).argmax(axis=2)
    seen: dict[int, int] = {}
    same = 0
    for token, expert in zip(found["tokens"], probs[:, 0], strict=True):
        same += seen.get(token) == expert
        seen.setdefault(token, expert)
    assert (first, all_) == (same, len(found["tokens"]) - len(seen))
    assert first >= 0.8 * all_ > 1.3 * last


def test_loads_and_their_distance(full: MixtralModel) -> None:
    (_, probs), *_ = in_torch(full, [TEXTS[0]])
    top = np.argsort(-probs, axis=-1)[..., :2]  # [S, L, K]
    shares = [
        np.bincount(chosen.ravel(), minlength=8) / chosen.size for chosen in top.swapaxes(0, 1)
    ]
    loads = "m.loads(given.map((t) => t.map((p) => m.choose(Float32Array.from(p), 2))), 6, 8)"
    np.testing.assert_allclose(in_router(loads, probs.tolist()), np.stack(shares))
    # by hand: a half of the choices has to move; the nearer of two
    assert in_router("m.apart([1, 0, 0], [0.5, 0.5, 0])") == 0.5
    near = "m.nearest([[1, 0]], [{name: 'a', load: [[0.5, 0.5]]}, {name: 'b', load: [[0.8, 0.2]]}]).name"
    assert in_router(near) == "b"


def test_stored_measurement_is_of_these_weights_and_agrees_with_the_study(
    full: MixtralModel, int8: MixtralModel
) -> None:
    result, study = (
        json.loads((ROOT / "book/results" / name).read_text())
        for name in ("live_router.json", "study.json")
    )
    for key in ("checkpoint_sha256", "data_sha256"):
        assert result[key] == study[key]
    domains = {d["name"]: d for d in result["domains"]}
    compared = 0
    for layer in study["measurements"]["domains"]:
        shares = zip(layer["names"], layer["tokens"], layer["share"]["value"], strict=True)
        for name, tokens, share in shares:
            # the study reads more of two domains, and cuts there within a document
            exact = domains[name]["tokens"] == tokens
            compared += exact
            mine = domains[name]["load_full"][layer["layer"] - 1]
            np.testing.assert_allclose(mine, share, atol=2e-6 if exact else 1e-3)
    assert compared >= 20
    for d in domains.values():
        assert np.abs(np.array(d["load"]) - d["load_full"]).max() < 2e-3
        np.testing.assert_allclose(np.sum(d["load"], axis=1), 1, atol=1e-5)
    # the same on the held-out text that is shipped with the weights
    token = load_file(pretrained_path("mini") / "probe.safetensors")["token"].long()
    chosen: list[Floats] = []
    for model in (full, int8):
        with torch.no_grad():
            routings = model(token, logits_to_keep=1).routings
        chosen.append(np.stack([r.expert.view(-1, 2).numpy() for r in routings], axis=1))
    same = (np.sort(chosen[0]) == np.sort(chosen[1])).all(axis=-1).mean(axis=0)
    np.testing.assert_allclose(result["same_set"], same, atol=0.005)
    assert same[0] == result["same_set"][0] == 1, "no expert comes before the first router"


def test_the_static_figure_shows_what_the_page_shows(file: Path) -> None:
    shown = live_router()
    (_, probs), *_ = routed(in_page(file, [EXAMPLES[0]["text"]]))
    first = probs.argmax(axis=-1) + 1
    for layer in (1, 3, 6):  # 'The 2, river 6, 120 4.': the last word of each part
        told = shown.alt.split(f"Layer {layer}: ")[1].split(". Layer")[0].split(", ")
        assert [int(part.rstrip(".").split()[-1]) for part in told] == first[:, layer - 1].tolist()
    domains = {d["name"] for d in shown.data["domains"]}
    assert {e["domain"] for e in shown.data["examples"]} - {""} <= domains


def test_without_its_measurement_it_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = sys.modules["minimoe.widgets.live_router"]  # hidden by the function of this name
    monkeypatch.setattr(module, "RESULT", tmp_path / "none.json")
    with pytest.raises(MinimoeError, match=r"python book/live_router\.py"):
        live_router()
    assert RESULT.is_file()


def test_a_model_of_ones_own_with_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_experts": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    own = MixtralModel(ModelConfig.from_dict(sizes)).bfloat16()
    folder = tmp_path / "mine"
    own.save_pretrained(folder)
    shutil.copy(pretrained_path("mini") / "tokenizer.json", folder)
    with pytest.raises(MinimoeError, match=r"python book/live_router.py --checkpoint .*mine"):
        live_router(folder)
    result = json.loads(RESULT.read_text())
    for d in result["domains"]:
        d["load"] = [[0.2] * 5] * 3
    (folder / "live_router.json").write_text(json.dumps(result))
    shown = live_router(folder)
    assert (shown.data["layers"], shown.data["experts"], shown.data["name"]) == (3, 5, "mine")
    file = tmp_path / "mine.safetensors"
    file.write_bytes(shown.files["router.safetensors"]())
    int8, text = quantize_experts(own.float()), TEXTS[1]
    (plain, broken) = in_page(file, [text, {"text": text, "only": {"1": [0, 4]}}], more=True)
    for one, only in ((plain, {}), (broken, {"1": [0, 4]})):
        np.testing.assert_allclose(one["costs"], costs_in_torch(int8, text, only)[0], atol=2e-4)
    page = alone(shown)
    assert "minimoe.live_router = (" in page and "live_router/router.safetensors" in page
