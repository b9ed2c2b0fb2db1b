"""Checkpoints: bit-exact to disk and back, strict in what they read, and old ones survive a failed write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.checkpoint import SHIPPED, WEIGHTS, pretrained_path, read_tensors, write_tensors
from minimoe.errors import CheckpointError, MinimoeError
from minimoe.model import MixtralModel
from tests.small import TINY, random_ids, tiny_model, weights_digest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Any) -> None:
    """Load the tensors, let `change` alter the dictionary, and write them back."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"mlp_only_layers": (1,), "moe_intermediate_size": 10},
        {"router_jitter_noise": 0.1, "head_dim": 6},
        {"attention_type": "moa", "attention_norm_topk_prob": True},
        {"attention_type": "switchhead", "attention_norm_topk_prob": True},
    ],
)
def test_trap_20_disk_and_back_is_bit_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(3, **changes)
    model.save_pretrained(tmp_path)
    again = MixtralModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert weights_digest(again) == weights_digest(model)
    assert not again.training
    ids = random_ids(2, 8)
    assert torch.equal(again(ids).logits, model(ids).logits)
    # and once more to disk: the same bytes
    again.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_trap_20_bf16_rounds_once_and_then_keeps_every_bit(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    wide = MixtralModel.from_pretrained(tmp_path / "a")
    for name, value in wide.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].bfloat16().float())
    narrow = MixtralModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    wide.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    names = [tmp_path / x / "model.safetensors" for x in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_tied_projection_is_stored_once_and_stays_tied(saved: Path) -> None:
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    model = MixtralModel.from_pretrained(saved)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tied_file_may_hold_the_matrix_twice_but_not_two_matrices(saved: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()

    rewrite(saved, twice)
    assert weights_digest(MixtralModel.from_pretrained(saved)) == weights_digest(tiny_model())
    rewrite(saved, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of its own"):
        MixtralModel.from_pretrained(saved)


def test_trap_20_missing_unexpected_and_misshapen_tensors_are_named(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["layers.0.mlp.gate.bias"] = torch.zeros(5)
        tensors["layers.1.mlp.gate.weight"] = torch.zeros(6, 16)

    rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        MixtralModel.from_pretrained(saved)
    message = str(caught.value)
    assert "missing: norm.weight (1)" in message
    assert "unexpected: layers.0.mlp.gate.bias (1)" in message
    assert "wrong shape: layers.1.mlp.gate.weight is (6, 16), expected (5, 16) (1)" in message
    assert "model.safetensors" in message


def test_trap_20_another_configuration_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_experts": 6}))
    with pytest.raises(CheckpointError, match="wrong shape"):
        MixtralModel.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 9"):
        MixtralModel.from_pretrained(saved)


WHOLE = "not a complete safetensors file"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: b"", WHOLE),
        (lambda data: data[:5], WHOLE),
        (lambda data: data[:8], WHOLE),
        (lambda data: data[:300], WHOLE),
        (lambda data: data[: len(data) // 2], WHOLE),
        (lambda data: data[:-1], WHOLE),
        (lambda data: b"PK\x03\x04 a zip", WHOLE),
        (lambda data: b"\x80\x02} a pickle", WHOLE),
        (lambda data: b"x" * 4096, WHOLE),
        (lambda data: data[:9] + b"\xff\xff\xff" + data[12:], ""),
        (b"[" * 10**5, ""), (b'{"a":' * 10**5, ""), (b"[]", ""), (b"null", ""), (b"{}", ""),
        (b'{"norm.weight": 3}', ""),
        (b'{"norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', ""),
        (b'{"norm.weight": {"dtype": "F32", "shape": [18446744073709551615, 16], "data_offsets": [0, 4]}}', ""),
        (b'{"norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64000000]}}', ""),
    ],
    ids=range(19),
)  # fmt: skip
def test_trap_20_a_damaged_or_foreign_file_is_refused_by_name(
    saved: Path, damage: Any, named: str
) -> None:
    """Of bytes it is the header of a file that is damaged."""
    path = saved / "model.safetensors"
    if isinstance(damage, bytes):
        path.write_bytes(len(damage).to_bytes(8, "little") + damage + bytes(64))
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{named}"):
        MixtralModel.from_pretrained(saved)


def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'nowhere' is neither a shipped model \(mini\) nor a folder"
    ):
        MixtralModel.from_pretrained("nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        MixtralModel.from_pretrained(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        MixtralModel.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_tensors(tmp_path / "none.safetensors")
    assert issubclass(CheckpointError, MinimoeError)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load_and_read(name: str) -> None:
    if not (WEIGHTS / name / "model.safetensors").is_file():
        pytest.skip(f"the weights of {name} are not in this checkout")
    assert pretrained_path(name) == WEIGHTS / name
    model = MixtralModel.from_pretrained(name)
    ids = random_ids(1, 8)
    assert bool(torch.isfinite(model(ids).logits).all())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"config\.json could not be written \(Not a directory"
    ):
        tiny_model().save_pretrained(tmp_path / "file" / "model")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)})


def test_tensors_of_any_stride_are_written_as_their_values(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"a": value.t(), "b": value[:, ::2]}, {"k": "v"})
    back = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], value.t())
    assert torch.equal(back["b"], value[:, ::2])


def test_loading_into_a_tiny_configuration_leaves_no_file_open(saved: Path) -> None:
    model = MixtralModel.from_pretrained(saved)
    digest = weights_digest(model)
    # overwriting the file must not reach into a model that was loaded from it
    tiny_model(seed=9).save_pretrained(saved)
    (saved / "model.safetensors").write_bytes(b"gone")
    assert weights_digest(model) == digest
    assert model.config == TINY
