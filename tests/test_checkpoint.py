"""Checkpoints: bit-exact to disk and back, strict in what they read, and old ones survive a failed write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.checkpoint import read_tensors, write_tensors
from minimoe.config import ROUTER_TYPES
from minimoe.errors import CheckpointError, MinimoeError
from minimoe.model import MixtralModel
from minimoe.train.state import digest
from tests.small import TINY, chosen, edit_json, edited, random_ids, refuses, tiny_model

read = MixtralModel.from_pretrained


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        *({"router_type": r, "num_experts_per_tok": chosen(r)} for r in ROUTER_TYPES),
        {"tie_word_embeddings": False},
        {"mlp_only_layers": (1,), "moe_intermediate_size": 10},
        {"router_jitter_noise": 0.1, "head_dim": 6},
        {"attention_type": "moa", "attention_norm_topk_prob": True, "router_type": "sigmoid"},
        {"attention_type": "switchhead", "attention_norm_topk_prob": True},
    ],
    ids=str,
)
def test_trap_20_disk_and_back_is_bit_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What is not read would be uninitialised memory: every router and every attention is read whole."""
    model = tiny_model(3, **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
        if name.endswith("table"):
            buffer.random_(5)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    again = read(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "random values were drawn, to be overwritten"
    assert again.config == model.config and not again.training
    theirs = model.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    assert {name for name, _ in again.named_buffers()} <= set(theirs)
    ids = random_ids(2, 10)
    logits: list[Tensor] = []
    for m in (again, model):
        torch.manual_seed(0)  # the uniform router draws
        logits.append(m(ids).logits)
    assert torch.equal(*logits)
    # and once more to disk: the same bytes
    again.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_trap_20_bf16_rounds_once_and_then_keeps_every_bit(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    wide = read(tmp_path / "a")
    for name, value in wide.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].bfloat16().float())
    narrow = read(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    wide.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    names = [tmp_path / x / "model.safetensors" for x in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_tied_file_may_hold_the_matrix_twice_but_not_two_matrices(saved: Path) -> None:
    with edited(saved) as tensors:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    assert digest(read(saved)) == digest(tiny_model())
    with edited(saved) as tensors:
        tensors["lm_head.weight"] += 1
    refuses(CheckpointError, r"lm_head\.weight of its own", read, saved)


def test_trap_20_missing_unexpected_and_misshapen_tensors_are_named(saved: Path) -> None:
    with edited(saved) as tensors:
        del tensors["norm.weight"]
        tensors["layers.0.mlp.gate.bias"] = torch.zeros(5)
        tensors["layers.1.mlp.gate.weight"] = torch.zeros(6, 16)
    message = refuses(CheckpointError, r"missing: norm\.weight \(1\)", read, saved)
    assert "unexpected: layers.0.mlp.gate.bias (1)" in message
    assert "wrong shape: layers.1.mlp.gate.weight is (6, 16), expected (5, 16) (1)" in message
    assert "model.safetensors" in message


def test_trap_20_another_configuration_is_refused(saved: Path) -> None:
    edit_json(saved / "config.json", num_experts=6)
    refuses(CheckpointError, "wrong shape", read, saved)
    edit_json(saved / "config.json", num_experts_per_tok=9)
    refuses(CheckpointError, "num_experts_per_tok is 9", read, saved)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda data, n=n: data[:n] for n in (0, 5, 8, 300, -4000, -1)),
        lambda data: b"PK\x03\x04 a zip", lambda data: b"\x80\x02} a pickle", lambda data: b"x" * 4096,
        lambda data: data[:9] + b"\xff\xff\xff" + data[12:],
        b"[" * 10**5, b'{"a":' * 10**5, b"[]", b"null", b"{}", b'{"norm.weight": 3}',
        b'{"norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"norm.weight": {"dtype": "F32", "shape": [18446744073709551615, 16], "data_offsets": [0, 4]}}',
        b'{"norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64000000]}}',
    ],
    ids=range(19),
)  # fmt: skip
def test_trap_20_a_damaged_or_foreign_file_is_refused_by_name(saved: Path, damage: Any) -> None:
    """Of bytes it is the header of a file that is damaged."""
    path = saved / "model.safetensors"
    if isinstance(damage, bytes):
        path.write_bytes(len(damage).to_bytes(8, "little") + damage + bytes(64))
    else:
        path.write_bytes(damage(path.read_bytes()))
    named = "" if isinstance(damage, bytes) else "not a complete safetensors file"
    refuses(CheckpointError, rf"model\.safetensors.*{named}", read, saved)


def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path: Path, saved: Path) -> None:
    refuses(CheckpointError, r"'nowhere' is neither a shipped model \(mini\) nor", read, "nowhere")
    refuses(CheckpointError, r"has no config\.json", read, tmp_path)
    (saved / "model.safetensors").unlink()
    refuses(CheckpointError, r"has no model\.safetensors", read, saved)
    refuses(CheckpointError, "not a complete safetensors file", read_tensors, tmp_path / "none")
    assert issubclass(CheckpointError, MinimoeError)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    place, said = tmp_path / "file" / "new", r"json could not be written \(Not a directory"
    refuses(CheckpointError, said, tiny_model().save_pretrained, place)
    refuses(CheckpointError, "could not be written", write_tensors, place, {"a": torch.zeros(1)})


def test_tensors_of_any_stride_are_written_as_their_values(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"a": value.t(), "b": value[:, ::2]}, {"k": "v"})
    back = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], value.t())
    assert torch.equal(back["b"], value[:, ::2])


def test_loading_into_a_tiny_configuration_leaves_no_file_open(saved: Path) -> None:
    model = read(saved)
    before = digest(model)
    # overwriting the file must not reach into a model that was loaded from it
    tiny_model(seed=9).save_pretrained(saved)
    (saved / "model.safetensors").write_bytes(b"gone")
    assert digest(model) == before
    assert model.config == TINY
