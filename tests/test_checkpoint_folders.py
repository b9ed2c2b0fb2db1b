"""Folders of weights: shards, one layer alone, what is missing or foreign, lean reading, and writes that fail."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.checkpoint import load_layer, weights_fingerprint
from minimoe.errors import CheckpointError, ConfigError
from minimoe.hf.lazy import quantize_experts
from minimoe.model import MixtralModel
from minimoe.presets import PRESETS
from minimoe.study.models import find_model
from minimoe.train.state import digest
from tests.huggingface import library
from tests.small import TINY, edit_json, edited, random_ids, refuses, small_disk, tiny_model

INDEX = "model.safetensors.index.json"
read = MixtralModel.from_pretrained


def shards(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Mixtral folder of one expert or so a shard."""
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, layout="huggingface", max_shard_size=8000)
    assert len(shards(folder)) > 5
    return folder


@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_trap_20_shards_hold_each_tensor_once_and_to_the_limit(tmp_path: Path, layout: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "one", layout=layout)
    model.save_pretrained(tmp_path / "many", layout=layout, max_shard_size=6000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    found: dict[str, Tensor] = {}
    for name in shards(tmp_path / "many"):
        part = load_file(tmp_path / "many" / name)
        assert all(index["weight_map"][key] == name for key in part)
        assert len(part) == 1 or sum(v.nbytes for v in part.values()) <= 6000
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    count = len(shards(tmp_path / "many"))
    assert shards(tmp_path / "many")[0] == f"model-00001-of-{count:05}.safetensors"
    for folder in ("one", "many"):
        again = read(tmp_path / folder)
        assert digest(again) == digest(model)


def test_a_limit_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    model = tiny_model()
    half = sum(p.numel() for p in model.parameters()) * 2
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16, max_shard_size=half)
    assert shards(tmp_path / "half") == ["model.safetensors"]
    model.save_pretrained(tmp_path / "less", dtype=torch.bfloat16, max_shard_size=half - 1)
    assert len(shards(tmp_path / "less")) == 2


def test_older_weights_in_the_folder_are_not_left_to_be_read(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"not ours")
    for seed, size in enumerate((None, 8000, 20000, None)):
        model = tiny_model(seed)
        model.save_pretrained(tmp_path, layout="huggingface", max_shard_size=size)
        assert digest(read(tmp_path)) == digest(model)
        named = {"model.safetensors"}
        if size is not None:
            named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert set(shards(tmp_path)) - {"state.safetensors"} == named
        assert (tmp_path / INDEX).exists() == (size is not None)
    assert (tmp_path / "state.safetensors").read_bytes() == b"not ours"


def test_arguments_that_cannot_be_are_refused(tmp_path: Path) -> None:
    save, place = tiny_model().save_pretrained, tmp_path / "new"
    refuses(ConfigError, "'gguf'; known are minimoe, huggingface", save, place, layout="gguf")
    refuses(ConfigError, "max_shard_size is 0", save, place, max_shard_size=0)
    assert not place.exists()


@pytest.mark.parametrize("before", [None, 8000])
def test_a_disk_that_fills_up_between_shards_keeps_the_old(tmp_path: Path, before: Any) -> None:
    tiny_model().save_pretrained(tmp_path, layout="huggingface", max_shard_size=before)
    files = contents(tmp_path)
    # the experts' shards still fit, the first one with the embedding does not: it is written last
    new = tiny_model(1, vocab_size=400, tie_word_embeddings=False)
    unchanged = "what was there before is unchanged"
    with small_disk(20_000), pytest.raises(CheckpointError, match=unchanged):
        new.save_pretrained(tmp_path, layout="huggingface", max_shard_size=16_000)
    assert contents(tmp_path) == files


def test_an_interrupted_exchange_of_shards_is_refused(sharded, tmp_path, monkeypatch) -> None:
    """The index goes before the first new shard moves in and comes after the last one."""
    other: dict[str, Any] = {"layout": "huggingface", "max_shard_size": 8000}
    tiny_model(1).save_pretrained(tmp_path / "other", **other)
    assert shards(sharded) == shards(tmp_path / "other")  # so that names alone would not tell
    moved: list[Path] = []
    replace = Path.replace

    def twice(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError("the power is cut")
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", twice)
    with pytest.raises(CheckpointError, match="the folder is not whole: save again"):
        tiny_model(1).save_pretrained(sharded, **other)
    monkeypatch.undo()
    refuses(CheckpointError, r"has no model\.safetensors", read, sharded)


def test_trap_safetensors_98_shared_weights_are_written_for_each_use(tmp_path: Path) -> None:
    """safetensors #98, Megatron-Bridge #919: 'Some tensors share memory'."""
    layers = tiny_model(num_hidden_layers=3)
    first, last = layers.layers[0], layers.layers[2]
    last.mlp, last.self_attn = first.mlp, first.self_attn
    head = tiny_model(tie_word_embeddings=False)
    head.lm_head.weight = head.embed_tokens.weight
    overlap = tiny_model(tie_word_embeddings=False)
    rows = torch.randn(65, 16)
    overlap.embed_tokens.weight = torch.nn.Parameter(rows[:64])
    overlap.lm_head.weight = torch.nn.Parameter(rows[1:])
    ids = random_ids(2, 9)
    ways = itertools.product((layers, head, overlap), ("minimoe", "huggingface"), (None, 4000))
    for model, layout, size in ways:
        model.save_pretrained(tmp_path, layout=layout, max_shard_size=size)
        again = read(tmp_path)
        assert digest(again) == digest(model)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not list(tmp_path.glob(".*"))


def new_head(model: MixtralModel, rows: int, *, tied: bool = False) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(rows, 16))
    if tied:
        model.embed_tokens.weight = model.lm_head.weight


LARGE = partial(new_head, rows=70, tied=True)


@pytest.mark.parametrize(
    ("change", "dtype", "named"),
    [
        (partial(new_head, rows=64), None, r"has an lm_head\.weight of its own, but tie_word"),
        (LARGE, None, r"wrong shape: \S*embed_\S+ is \(70, 16\), expected \(64, 16\)"),
        (lambda m: m.layers[0].to("meta"), None, "have no values yet"),
        (id, torch.int8, r"wrong type: .* is torch\.int8"),
        (id, torch.float8_e4m3fn, "has the type F8_E4M3; known are"),
    ],
)
@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_nothing_that_cannot_be_read_replaces_a_folder(
    tmp_path: Path, layout: str, change: Any, dtype: torch.dtype | None, named: str
) -> None:
    tiny_model(5).save_pretrained(tmp_path, layout=layout, max_shard_size=8000)
    before = contents(tmp_path)
    change(model := tiny_model())
    refuses(CheckpointError, named, model.save_pretrained, tmp_path, layout=layout, dtype=dtype)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_a_head_that_equals_the_embedding_is_saved_as_tied(tmp_path: Path, layout: str) -> None:
    model = tiny_model(5)
    model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path, layout=layout)
    again = read(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_what_the_disk_did_not_keep_replaces_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_model(5).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def forgetful(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr("minimoe.checkpoint.save_file", forgetful)
    with pytest.raises(CheckpointError, match=r"norm\.weight was read back from .* other values"):
        tiny_model(1).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_trap_colibri_1478_settings_of_generation_survive(tmp_path: Path, layout: str) -> None:
    """colibri #1478: eos_token_id dropped by a conversion, so that generation never ends."""
    settings = {"eos_token_id": [7, 9], "bos_token_id": 1, "temperature": 0.6, "do_sample": True}
    a, b, c = (tmp_path / name for name in "abc")
    tiny_model().save_pretrained(a, layout="huggingface")
    edit_json(a / "config.json", eos_token_id=7, pad_token_id=0)
    (a / "generation_config.json").write_text(json.dumps(settings))
    settings["pad_token_id"] = 0
    read(a).save_pretrained(b, layout=layout)
    model = read(b)
    assert quantize_experts(model).generation_config == settings
    model.save_pretrained(c, layout="huggingface")
    theirs = library().AutoModelForCausalLM.from_pretrained(c).generation_config
    assert {name: getattr(theirs, name) for name in settings} == settings
    assert json.loads((c / "config.json").read_text())["eos_token_id"] == [7, 9]
    # without the file, ids of config.json are the settings
    (a / "generation_config.json").unlink()
    model = read(a)
    assert model.generation_config == {"eos_token_id": 7, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_one_layer_is_read_without_the_rest(tmp_path: Path, layout: str) -> None:
    model = tiny_model(num_hidden_layers=4, mlp_only_layers=(2,) if layout == "minimoe" else ())
    model.save_pretrained(tmp_path, layout=layout, max_shard_size=4000)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for layer in (1, 2):
        folder = tmp_path / str(layer)
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("1", "2"))
        needed = {name for key, name in places.items() if f"layers.{layer}." in key}
        for name in shards(folder):
            if name not in needed:
                (folder / name).unlink()
        assert 0 < len(needed) < len(set(places.values())) / 2
        block = load_layer(folder, layer)
        assert not block.training
        assert digest(block) == digest(model.layers[layer])
        refuses(CheckpointError, r"not in the folder: fetch them too", read, folder)
        refuses(CheckpointError, r"which is not in the folder: fetch it too", load_layer, folder, 0)


@pytest.mark.parametrize("layer", [-1, 2, 10])
def test_a_layer_that_is_not_there_is_refused(sharded: Path, layer: int) -> None:
    refuses(CheckpointError, f"layer is {layer}, .* has layers 0 to 1", load_layer, sharded, layer)


def test_a_layer_that_does_not_fit_is_refused_and_others_are_not_looked_at(tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=12).save_pretrained(tmp_path, layout="huggingface")
    with edited(tmp_path) as tensors:  # layers 1 and 11 must not be taken for one another
        del tensors["model.layers.11.self_attn.q_proj.weight"]
        tensors["model.layers.1.mlp.extra"] = torch.zeros(1)
    load_layer(tmp_path, 0)
    refuses(CheckpointError, r"unexpected: \S+\.1\.mlp\.extra \(1\)$", load_layer, tmp_path, 1)
    refuses(CheckpointError, r"missing: \S+\.11\.\S+q_proj\S+ \(1\)$", load_layer, tmp_path, 11)


def test_a_block_of_mixtral_8x7b_has_the_size_that_the_documentation_names() -> None:
    with torch.device("meta"):
        model = MixtralModel(PRESETS["mixtral-8x7b"])
    block = sum(p.numel() for p in model.layers[0].parameters())
    assert round(2 * block / 1e9, 1) == 2.9
    assert round(2 * model.num_parameters() / 1e9) == 93


def place_norm(folder: Path, place: str | None) -> None:
    """Have the index say that the last norm is in this file; None: that there is no such tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    if place is None:
        del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def test_trap_20_a_shard_that_is_absent_or_not_whole_is_named(sharded: Path) -> None:
    path = sharded / shards(sharded)[3]
    path.write_bytes(path.read_bytes()[:-10])
    refuses(CheckpointError, f"{path.name} is not a complete safetensors file", read, sharded)
    path.unlink()
    refuses(CheckpointError, f"{re.escape(str(sharded / INDEX))}.*{path.name}", read, sharded)


def test_trap_20_an_index_that_is_wrong_about_a_shard(sharded: Path) -> None:
    first, last = shards(sharded)[0], shards(sharded)[-1]
    place_norm(sharded, first)
    refuses(CheckpointError, rf"says that {first} holds model\.norm\.weight", read, sharded)
    place_norm(sharded, last)
    read(sharded)
    place_norm(sharded, None)
    refuses(CheckpointError, r"missing: model\.norm\.weight \(1\)$", read, sharded)
    # and it reaches nothing outside of its folder
    for place in ("../x.safetensors", "/tmp/x.safetensors", "..", "x.bin", "\0.safetensors"):
        place_norm(sharded, place)
        refuses(CheckpointError, "what is no safetensors file of its folder", read, sharded)


DAMAGED = ["[" * 10**5, "[1]", "", "\xff"]
NO_INDEX = ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', *DAMAGED]
NAMES = ("config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("name", "bad"),
    [*itertools.product(NAMES, DAMAGED), *itertools.product([INDEX], NO_INDEX)],
)
def test_damaged_json_is_refused_by_name(sharded: Path, name: str, bad: str) -> None:
    (sharded / name).write_bytes(bad.encode("latin-1"))
    said = refuses(CheckpointError, re.escape(str(sharded / name)), read, sharded)
    assert len(said) < 400 and "\n" not in said
    assert ("is not an index of shards" in said) == (name == INDEX)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("w1", None, r"missing: NAME \(1\)$"),
        ("w4", torch.zeros(2), r"unexpected: NAME \(1\)$"),
        ("w2", torch.zeros(24, 16), r"wrong shape: NAME is \(24, 16\), expected \(16, 24\) \(1\)$"),
        ("w1", torch.zeros(24, 16, dtype=torch.int8),
         r"wrong type: NAME is torch\.int8, expected torch\.float32 or one of its kind \(1\)$"),
        ("w1", torch.zeros(24, 16).to(torch.float8_e4m3fn), r"NAME has the type F8_E4M3; known are F64"),
        ("lm_head", torch.zeros(64, 16), "holds an NAME of its own"),
        ("lm_head", None, r"missing: NAME \(1\)$"),
    ],
)  # fmt: skip
def test_trap_20_a_foreign_tensor_or_none_is_named(tmp_path, name, value, said) -> None:
    """In the head, or of the expert 3 of the layer 1."""
    name = ("model.layers.1.block_sparse_moe.experts.3." * (name != "lm_head")) + f"{name}.weight"
    tiny_model(tie_word_embeddings=value is not None).save_pretrained(
        tmp_path, layout="huggingface"
    )
    with edited(tmp_path) as tensors:
        tensors.pop(name, None)
        tensors |= {} if value is None else {name: value}
    said = refuses(CheckpointError, said.replace("NAME", re.escape(name)), read, tmp_path)
    assert str(tmp_path) in said


def test_a_base_model_without_its_head_whose_names_lack_the_prefix(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, layout="huggingface")
    with edited(tmp_path) as tensors:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
    refuses(CheckpointError, r"missing: model\..* \(\d+\); unexpected: .*", read, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_not_read(tmp_path: Path, name: str) -> None:
    tiny_model().save_pretrained(tmp_path, layout="huggingface")
    (tmp_path / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save(Bomb(), tmp_path / name)
    said = refuses(CheckpointError, f"only {name}: a pickle can run any program", read, tmp_path)
    assert "save_pretrained(NEW_FOLDER)" in said
    assert not (tmp_path / "exploded").exists()


def test_a_gguf_file_gets_the_way_to_its_original(tmp_path: Path, refused: Any) -> None:
    path = tmp_path / "model-Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    readers: Any = (read, find_model)
    for place in (tmp_path, path):
        for reader in readers:
            refuses(CheckpointError, r"Q4_K_M\.gguf is a GGUF file.*safetensors", reader, place)
        assert "is a GGUF file" in refused("cost", place)
    tiny_model().save_pretrained(tmp_path)  # beside weights that can be read it does no harm
    read(tmp_path)


HUB = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's cache of a machine without a network, as the download of one model leaves it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "models--somebody--tiny"
    tiny_model().save_pretrained(cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    return tmp_path


def test_a_model_of_the_hub_is_read_from_its_cache_after_folders(hub, monkeypatch) -> None:
    """A folder of that name, and where `somebody/` is a folder a name in it that is not there: nobody is asked."""
    assert digest(read(HUB)) == digest(tiny_model())
    monkeypatch.chdir(hub)
    tiny_model(seed=1).save_pretrained(HUB)
    assert digest(read(HUB)) == digest(tiny_model(seed=1))
    refuses(CheckpointError, "neither a shipped model", read, "somebody/small")


def test_what_the_hub_cannot_give_gets_one_sentence(hub: Path, monkeypatch: Any) -> None:
    name = "mistralai/Mixtral-8x7B-v0.1"
    said = refuses(CheckpointError, "could not be had from the Hugging Face hub", read, name)
    assert name in said and "\n" not in said
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(CheckpointError, "pip install huggingface_hub", read, HUB)


# In a process of its own: the memory that other tests gave back would hide what is taken, or be counted as taken.
READING = """
import json, re, sys
from pathlib import Path
from minimoe import MixtralModel
from minimoe.checkpoint import TensorFiles
from minimoe.train.state import digest

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

seen, read = [], TensorFiles.read
def watched(self, name):
    seen.append(anonymous_bytes())
    return read(self, name)

MixtralModel.from_pretrained(sys.argv[1])  # a small one brings what is imported late
TensorFiles.read = watched
before = anonymous_bytes()
model = MixtralModel.from_pretrained(sys.argv[2])
print(json.dumps([digest(model), seen[0] - before, max(seen) - before]))
"""


def test_reading_holds_nothing_twice(tmp_path: Path) -> None:
    """Memory that is not a view of a file, when the first tensor is read and at its peak."""
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text():
        pytest.skip("the system does not count anonymous memory in /proc")
    wide = TINY.replace(hidden_size=256, intermediate_size=512, num_experts=8, num_hidden_layers=4)
    model = MixtralModel(wide)
    model.save_pretrained(tmp_path / "wide", layout="huggingface", max_shard_size=2**24)
    tiny_model().save_pretrained(tmp_path / "tiny", layout="huggingface")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 5e7
    command = [sys.executable, "-c", READING, str(tmp_path / "tiny"), str(tmp_path / "wide")]
    done = subprocess.check_output(command, cwd=Path(__file__).parent.parent, text=True)
    found, at_first, at_most = json.loads(done)
    assert found == digest(model)
    # nothing is there when reading begins: no random weights, no copy of the files
    assert at_first < 0.1 * size
    assert 0.5 * size < at_most < 1.15 * size


def test_trap_eval_harness_4063_any_byte_of_any_shard_is_another_folder(sharded: Path) -> None:
    """lm-evaluation-harness #4063: a result is found again for other weights."""
    found = {weights_fingerprint(sharded)}
    for name in (shards(sharded)[0], shards(sharded)[-1]):
        data = bytearray((sharded / name).read_bytes())
        data[-1] ^= 1
        (sharded / name).write_bytes(data)
        found.add(weights_fingerprint(sharded))
    place_norm(sharded, None)
    found.add(weights_fingerprint(sharded))
    (sharded / shards(sharded)[0]).rename(sharded / "model-00000.safetensors")
    found.add(weights_fingerprint(sharded))
    assert len(found) == 5
    assert weights_fingerprint(sharded) in found


def test_one_changed_router_among_megabytes_is_another_folder(tmp_path: Path) -> None:
    wide = MixtralModel(TINY.replace(hidden_size=256, intermediate_size=512, num_experts=16))
    wide.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 25e6
    first = weights_fingerprint(tmp_path)
    for name, value in wide.state_dict().items():
        if name.endswith("gate.weight"):
            value[3, 5] += 1e-3
            wide.save_pretrained(tmp_path)
            assert weights_fingerprint(tmp_path) != first
            value[3, 5] -= 1e-3


def test_pickles_are_told_apart_too(tmp_path: Path) -> None:
    found: list[str] = []
    for pickle in (b"one", b"two"):
        (tmp_path / "pytorch_model.bin").write_bytes(pickle)
        found.append(weights_fingerprint(tmp_path))
    assert found[0] != found[1]


@pytest.mark.parametrize("written", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_trap_8_the_selection_bias_keeps_every_bit_on_disk(written, dtype, tmp_path) -> None:
    model = tiny_model(router_type="sigmoid")
    bias = torch.tensor([0.5003, 0.5001, -0.3333, 0.001, 0])
    model.get_buffer("layers.1.mlp.gate.e_score_correction_bias").copy_(bias)
    model.save_pretrained(tmp_path, dtype=written)
    again = read(tmp_path, dtype=dtype)
    one = load_layer(tmp_path, 1, dtype=dtype)
    assert {p.dtype for p in one.parameters()} == {dtype or written or torch.float32}
    for found in (
        again.get_buffer("layers.1.mlp.gate.e_score_correction_bias"),
        one.get_buffer("mlp.gate.e_score_correction_bias"),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, bias)
