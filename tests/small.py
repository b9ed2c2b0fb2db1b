"""Small models, texts and training runs that several test files share; nothing here needs the fetched text."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from minimoe.config import ROUTER_TYPES, ModelConfig
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routing import Routing
from minimoe.study.trace import RoutingTrace
from minimoe.text.corpus import Corpus
from minimoe.text.documents import Document
from minimoe.text.tokenizer import encode, train_tokenizer
from minimoe.train import state
from minimoe.train.loop import Run
from minimoe.train.settings import TrainConfig

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)

EXPERTS: dict[str, Any] = {"attention_num_experts": 5, "attention_num_experts_per_tok": 2}
MOA: dict[str, Any] = EXPERTS | {"attention_type": "moa"}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "switchhead": EXPERTS | {"attention_type": "switchhead", "attention_num_experts": 3},
    "moa": MOA,
    "moa, one key/value head": MOA | {"num_key_value_heads": 1, "num_attention_heads": 2},
}

in_every_model = pytest.mark.parametrize("kind", ATTENTIONS)

# a step is a few milliseconds; validation at 4, 8 and 10, checkpoints at 3, 6, 9 and 10
TRAIN = TrainConfig(
    steps=10, batch_size=3, seq_len=16, lr=5e-3, warmup=3, eval_every=4, eval_windows=2, save_every=3, log_every=1
)  # fmt: skip


weights_digest = state.digest
P = ParamSpec("P")


def refuses(
    error: type[Exception], match: str, call: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
) -> str:
    """That a call raises this error, with `match` in its message, which it returns."""
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def tiny_model(seed: int = 0, **changes: object) -> Any:
    """A model of random weights, in eval mode."""
    torch.manual_seed(seed)
    return MixtralModel(TINY.replace(**changes)).eval()


def every_routing(out: ModelOutput) -> list[Routing]:
    """Of the feed-forward layers and of the attention."""
    return [*out.routings, *(r for routings in out.attention_routings for r in routings)]


def chosen(router_type: str, e: int = TINY.num_experts, k: int = 2) -> int:
    """How many of E experts a kind of router takes for each token: all, one, or the K wanted."""
    return {"one": 1, "all": e}.get(ROUTER_TYPES[router_type], k)


def random_ids(batch: int, length: int, seed: int = 0, vocab: int = TINY.vocab_size) -> Tensor:
    """[B, S] random ids that do not depend on the state of torch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=generator)


@torch.no_grad()
def continued(model: Any, ids: Tensor, n: int) -> Tensor:
    """ids and n more: each is the most likely one after a forward pass of all that is before it."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def pad(rows: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask [B, S] of rows of different length."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, True
    return ids, mask


def topk_routing(
    choice: list[list[int]] | Tensor,
    weight: Tensor | None = None,
    num_experts: int = 4,
    *,
    kept: Tensor | None = None,
    valid: Tensor | None = None,
    probs: Tensor | None = None,
    logits: Tensor | None = None,
) -> Routing:
    """A token-choice routing from experts [T, K]."""
    expert = torch.as_tensor(choice, dtype=torch.int64)
    t, k = expert.shape
    if weight is None:
        weight = torch.full((t, k), 1 / k)
    return Routing(
        token=torch.arange(t).repeat_interleave(k),
        expert=expert.reshape(-1),
        weight=weight.reshape(-1),
        shape=(t, num_experts),
        k=k,
        kept=kept,
        valid=valid,
        probs=probs,
        logits=logits,
    )


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Assignments in any order, with or without padding and drops."""
    t, e, n = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(0, 20))
    ids = st.lists(st.integers(0, 10**6), min_size=n, max_size=n)
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    token, expert = (torch.tensor(draw(ids), dtype=torch.int64) for _ in range(2))
    valid = draw(st.none() | st.lists(st.booleans(), min_size=t, max_size=t))
    kept = draw(st.none() | flags)
    return Routing(
        token=token % t,
        expert=expert % e,
        weight=torch.tensor([1.0 + i for i in range(n)]),
        shape=(t, e),
        valid=None if valid is None else torch.tensor(valid),
        kept=None if kept is None else torch.tensor(kept, dtype=torch.bool),
    )


def text_corpus(domains: tuple[str, ...] = ("rain", "snow", "wind"), size: int = 300) -> Corpus:
    """Made-up text of a few domains, each with its own words."""
    train: list[Document] = []
    heldout: list[Document] = []
    for name in domains:
        for i in range(8):
            words = [f"{name[:2]}{(i * 7 + j * j) % 53}" for j in range(60)]
            side = heldout if i < 2 else train
            side.append(Document(name, f"{name}{i}", " ".join(words)))
    tokenizer = train_tokenizer((d.text for d in train), size)
    splits = encode(tokenizer, train), encode(tokenizer, heldout)
    return Corpus(domains, tokenizer, *splits, {})


def bytes_tokenizer(template: str | None = None) -> Tokenizer:
    """One token a byte, after <unk>, <s> and </s>; `template` is what it puts around a text: '<s> $A'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template is not None:
        names = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=names)
    return tokenizer


def tiny_run(
    out: Path,
    corpus: Corpus,
    *,
    resume: bool = False,
    model: dict[str, object] | None = None,
    **options: object,
) -> Run:
    """A run of TRAIN on a tiny model whose router draws noise, so that the noise must be resumed too."""
    config = TINY.replace(**{"vocab_size": 300, "router_jitter_noise": 0.1} | (model or {}))
    names = ("start", "frozen", "whole", "recompute")
    own: Any = {name: options.pop(name) for name in names if name in options}
    training = dataclasses.replace(TRAIN, **options)
    return Run(out, config, training, corpus, resume=resume, name="tiny", **own)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run without its clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@contextlib.contextmanager
def edited(folder: Path) -> Generator[dict[str, Tensor]]:
    """The tensors of a folder's one file of weights, written back as they are left."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    yield tensors
    save_file(tensors, path)


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of an object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gradients_hold(module: torch.nn.Module, x: Tensor, *more: Any) -> bool:
    """Whether gradients of x and of every parameter are the derivatives of what the module gives; all in float64."""
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the same noise at every call
        given = dict(zip(names, parameters, strict=True))
        found = torch.func.functional_call(module, given, (x, *more))
        if isinstance(found, Routing):
            found = found.dense(), found.logits, found.probs
        return tuple(part for part in found if isinstance(part, Tensor))

    return torch.autograd.gradcheck(outputs, (x, *values), fast_mode=True)


@contextlib.contextmanager
def small_disk(size: int) -> Generator[None]:
    """No file of this process can grow beyond `size` bytes: writing fails as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of POSIX systems")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def same_trace(a: RoutingTrace, b: RoutingTrace) -> bool:
    """Whether two traces hold the same of the same documents, in arrays of the same types."""
    rest = all(x == y for x, y in zip(a.header, b.header, strict=True))
    pairs = [(x, b.arrays()[name]) for name, x in a.arrays().items()]
    return rest and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def even_trace(token, document, position, expert, documents, num_experts, first=1) -> RoutingTrace:
    """A trace of experts [N, L, K] in the layers from `first` on, each of a token's choices with the same weight."""
    weight = np.full(np.shape(expert), 1 / np.shape(expert)[2], np.float32)
    layers = tuple(range(first, first + np.shape(expert)[1]))
    names = tuple(documents)
    return RoutingTrace(token, document, position, expert, weight, names, num_experts, layers)
