"""The weights of the live router: the shipped model, its experts in int8, as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from minimoe.checkpoint import pretrained_path
from minimoe.errors import MinimoeError
from minimoe.hf.lazy import quantize_experts
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import begin_of_text_id, load_tokenizer

FILE = "router.safetensors"
# What the pre-tokenizer tells apart; in Unicode's current version or an older one, as the tokenizer's library has it.
CLASSES = {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}

# Fields of a configuration that the JavaScript reads, or that change nothing outside of training.
FREE = {
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings",
    "rope_theta", "rms_norm_eps", "initializer_range", "router_aux_loss_type", "router_aux_loss_coef",
    "router_z_loss_coef", "router_jitter_noise", "experts_implementation",
}  # fmt: skip


def export(checkpoint: str | Path = "mini") -> bytes:
    """The file's bytes, the same every time: tensors under the names that the quantised model's state dict gives them.

    Experts are int8 with a float32 scale for each output channel (`minimoe.hf.lazy.quantize`); all else is bf16,
    which is how it is stored, so nothing but the experts is rounded. Beside them, so that a browser can cut a text as
    the tokenizer does: `tokenizer.bytes` [256], the token of each byte; `tokenizer.merges` [M, 2], the pairs in the
    order in which they merge, pair i into token 257 + i; `tokenizer.letters`, `.numbers` and `.spaces` [n, 2], first
    and last of each run of such code points. The metadata's `config` is the model's configuration as JSON, with
    `end_of_text`.

    Raises:
        MinimoeError: a model or a tokenizer of another kind than the shipped one's.
    """
    path = pretrained_path(checkpoint)
    model = MixtralModel.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    tensors = weights(model) | vocabulary(tokenizer)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["end_of_text"] = begin_of_text_id(tokenizer, own=True)
    return save(tensors, {"config": json.dumps(config, sort_keys=True)})


def weights(model: MixtralModel) -> dict[str, Tensor]:
    """The quantised model's tensors, the tied output projection once.

    Raises:
        MinimoeError: a model that is built in another way, or weights that bf16 does not hold.
    """
    config = model.config
    other = [
        f.name
        for f in fields(config)
        if f.name not in FREE and getattr(config, f.name) != f.default
    ]
    if other:
        raise MinimoeError(
            f"the live router runs models built as the shipped one is; this one differs in {', '.join(other)}"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in quantize_experts(model).state_dict().items():
        if name.startswith("lm_head."):
            continue
        if ".experts." not in name:
            short = tensor.bfloat16()
            if not torch.equal(short.float(), tensor):
                raise MinimoeError(f"{name} is not stored as bf16, so the file would round it")
            tensor = short
        found[name] = tensor.contiguous()
    return found


def vocabulary(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The tables of a byte-level BPE, as `export` describes them.

    Raises:
        MinimoeError: the tokenizer is none, or its tokens are not numbered in the order of the merges.
    """
    whole = json.loads(tokenizer.to_str())
    vocab, merges = whole["model"]["vocab"], whole["model"].get("merges", [])
    plain = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    made = [vocab.get(left + right) for left, right in merges]
    if (
        whole["pre_tokenizer"] != plain
        or whole["normalizer"]
        or made != list(range(257, 257 + len(merges)))
    ):
        raise MinimoeError(
            "the live router reads the tokenizer that minimoe.train.train_tokenizer makes, and no other"
        )
    spelled = byte_letters()
    tables = {
        "bytes": torch.tensor([vocab[spelled[b]] for b in range(256)], dtype=torch.uint16),
        "merges": torch.tensor([[vocab[a], vocab[b]] for a, b in merges], dtype=torch.uint16),
        **{
            name: torch.tensor(runs(pattern), dtype=torch.int32)
            for name, pattern in CLASSES.items()
        },
    }
    return {f"tokenizer.{name}": table for name, table in tables.items()}


def byte_letters() -> list[str]:
    """What byte-level tokenizers write for each byte [256]: itself if it can be seen, else a letter from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(b if b in seen else next(hidden)) for b in range(256)]


def spellings(tokenizer: Tokenizer) -> list[list[int]]:
    """The bytes of every token of a byte-level tokenizer [V]; end-of-text, the first, has none."""
    byte_of = {letter: b for b, letter in enumerate(byte_letters())}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [[], *([byte_of[letter] for letter in name] for name, _ in vocabulary[1:])]


def runs(pattern: str) -> list[tuple[int, int]]:
    """First and last of each run of code points that match `pattern` in the tokenizer library's regular expressions."""
    # surrogates are not text, and beyond plane 3 Unicode has no letters, numbers or spaces
    every = [*range(0xD800), *range(0xE000, 0x40000)]
    split = pre_tokenizers.Split(Regex(f"(?:{pattern})+"), "removed", invert=True)
    spans = [span for _, span in split.pre_tokenize_str("".join(map(chr, every)))]
    return [(every[start], every[end - 1]) for start, end in spans]
