"""Checkpoints: a folder with config.json and safetensors, written atomically, read strictly, never pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, MinimoeError, WriteError, explained
from minimoe.io import atomic_write, read_object, sha256_of

if TYPE_CHECKING:
    from minimoe.hf.translate import Family
    from minimoe.model import Block, MixtralModel

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("mini",)
LAYOUTS = ("minimoe", "huggingface")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHARD_SIZE = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth")
SCALES = "experts.gate_up_scale"  # which a model has alone whose experts are in int8
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# the types that weights are stored in, by safetensors' names
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def complete(path: Path) -> contextlib.AbstractContextManager[None]:
    """Within, what safetensors says of a file that it cannot read becomes an error that names the file."""
    why = "it may be truncated or of another format: fetch or save it again"
    text = f"{path} is not a complete safetensors file"
    return explained(CheckpointError, lambda e: f"{text} ({e}); {why}", SafetensorError, OSError)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; a CheckpointError if it is missing, truncated or another format."""
    with complete(path):
        return load_file(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file atomically: where that fails (CheckpointError), the old file survives."""
    with explained(CheckpointError, str, WriteError), atomic_write(path) as temporary:
        _save(temporary, tensors, metadata)


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Write tensors that may share memory, which safetensors refuses; those that do are written once for each name."""
    taken: dict[int, list[tuple[int, int]]] = {}  # of each storage, from where to where
    apart: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        begin, end = value.data_ptr(), value.data_ptr() + value.nbytes
        places = taken.setdefault(value.untyped_storage().data_ptr(), [])
        if any(begin < last and first < end for first, last in places):
            value = value.clone()
        else:
            places.append((begin, end))
        apart[name] = value
    with explained(OSError, str, SafetensorError):
        save_file(apart, path, metadata)


class TensorFiles(contextlib.ExitStack):
    """The tensors of a folder: of model.safetensors, or of the shards that model.safetensors.index.json names.

    Opening reads names only; a shard is opened when one of its tensors is asked for, so that others may be absent. A
    context manager: leaving it closes the files.

    Args:
        shards: file name of each tensor, where it is known already.

    Attributes:
        folder: where they are.
        source: the file that lists the tensors, for messages.

    Raises:
        CheckpointError: here and in every method, names the file that is missing, truncated or of another format.
    """

    def __init__(self, folder: Path, shards: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._open: dict[str, Any] = {}
        if shards is not None:
            self.source, self.shards = folder, dict(shards)
        elif (folder / SINGLE).is_file():  # as in transformers, it comes before an index
            self.source = folder / SINGLE
            self.shards = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            self.source = folder / INDEX
            self.shards = _read_index(self.source)

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor."""
        header = self._header(name)
        if (stored := str(header.get_dtype())) not in TYPES:
            raise CheckpointError(
                f"{self.path(name)}: {name} has the type {stored}; known are {', '.join(TYPES)}"
            )
        return tuple(header.get_shape()), TYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. It may be a view of the file: copy it if it is to outlive this object."""
        self._header(name)  # which says it where the file lacks the tensor
        with complete(self.path(name)):
            return self._file(self.shards[name]).get_tensor(name)

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.folder / self.shards[name]

    def _header(self, name: str) -> Any:
        shard = self.shards[name]
        fault = f"{self.source} says that {shard} holds {name}, but it does not"
        with explained(CheckpointError, f"{fault}: fetch or save both again", SafetensorError):
            return self._file(shard).get_slice(name)

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            path = self.folder / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{self.source} names {shard}, which is not in the folder: fetch it too"
                )
            with complete(path):
                self._open[shard] = self.enter_context(safe_open(path, "pt"))  # pyright: ignore
        return self._open[shard]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    fault = f"{INDEX} is not an index of shards"
    with explained(CheckpointError, lambda e: f"{fault}: {e}", MinimoeError):
        places: Any = read_object(path).get("weight_map")
    if not isinstance(places, dict) or {type(name) for name in places.values()} - {str}:
        raise CheckpointError(
            f"{path} is not an index of shards; expected an object with 'weight_map': tensor name -> file name"
        )
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise CheckpointError(
                f"{path} names what is no safetensors file of its folder: {file!r}"
            )
    return places


# a tensor on disk, and the part of the model's tensor that it is: tensor[index]
Piece = tuple[str, tuple[int | slice, ...]]


def pieces_of(
    name: str, shape: tuple[int, ...], family: Family | None, *, fused: bool = False
) -> list[Piece]:
    """The tensors on disk that make up the model's tensor `name`; family None: minimoe's own layout, one to one.

    `fused` is the layout of transformers 5, where the experts of a layer are one tensor.
    """
    if family is None or name == "lm_head.weight":
        return [(name, ())]
    key = f"model.{name}"
    key = key.replace(".mlp.shared_experts.gate.", ".mlp.shared_expert_gate.")
    key = key.replace(".mlp.shared_experts.mlp.", ".mlp.shared_expert.")
    if not fused:
        key = key.replace(".mlp.", f".{family.block}.")
    owner, _, last = key.rpartition(".")
    stacked = owner.endswith(".experts")
    if last not in ("gate_up_proj", "down_proj") or (stacked and fused):
        return [(key, ())]
    gate, up, down = family.projections
    half = shape[-2] // 2
    parts = {gate: (slice(None, half),), up: (slice(half, None),)}
    if last == "down_proj":
        parts = {down: ()}
    experts = [(f"{owner}.{e}", (e,)) for e in range(shape[0])] if stacked else [(owner, ())]
    return [
        (f"{prefix}.{part}.weight", (*expert, *rows))
        for prefix, expert in experts
        for part, rows in parts.items()
    ]


def find(
    targets: Mapping[str, Tensor],
    files: TensorFiles,
    family: Family | None,
    *,
    prefix: str = "",
) -> dict[str, list[Piece]]:
    """Where each target lies. Every name, shape and kind of type must agree, before any tensor is read.

    Args:
        prefix: of the targets in the model; tensors elsewhere are not looked at.

    Raises:
        CheckpointError: lists what is missing, unexpected, or of another shape or type.
    """
    names, used = {*files.shards}, set[str]()
    found: dict[str, list[Piece]] = {}
    wrong = {kind: list[str]() for kind in ("missing", "unexpected", "wrong shape", "wrong type")}
    for name, target in targets.items():
        fused = pieces_of(prefix + name, tuple(target.shape), family, fused=True)
        split = pieces_of(prefix + name, tuple(target.shape), family)
        found[name] = fused if fused[0][0] in names else split
        for key, index in found[name]:
            used.add(key)
            if key not in names:
                wrong["missing"].append(key)
                continue
            (shape, dtype), part = files.header(key), target[index]
            if shape != tuple(part.shape):
                wrong["wrong shape"].append(f"{key} is {shape}, expected {tuple(part.shape)}")
            elif dtype.is_floating_point != part.is_floating_point():
                expected = f"{part.dtype} or one of its kind"
                wrong["wrong type"].append(f"{key} is {dtype}, expected {expected}")
    head, embedding = "lm_head.weight", pieces_of("embed_tokens.weight", (), family)[0][0]
    tied = "embed_tokens.weight" in targets and head not in targets
    if tied and {head, embedding} <= names:
        # other libraries may store the shared matrix twice; two different ones do not fit one place
        if not torch.equal(files.read(head), files.read(embedding)):
            raise CheckpointError(
                f"{files.source} holds an lm_head.weight of its own, but tie_word_embeddings is true in the "
                "configuration beside it: set it to false, or save the weights tied"
            )
        used.add(head)
    stem = prefix if family is None or not prefix else f"model.{prefix}"
    wrong["unexpected"] = [name for name in names - used if name.startswith(stem)]
    problems = [
        f"{what}: {', '.join(sorted(which)[:4])}{' …' if len(which) > 4 else ''} ({len(which)})"
        for what, which in wrong.items()
        if which
    ]
    if problems:
        raise CheckpointError(
            f"{files.source} does not fit the configuration beside it; {'; '.join(problems)}"
        )
    return found


def _load(
    module: Module,
    found: Mapping[str, list[Piece]],
    files: TensorFiles,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give a module on the meta device its memory, and read into it tensor by tensor: nothing is held twice.

    Floating types become `dtype`; None: that of the first tensor that has one.
    """
    stored = (files.header(key)[1] for parts in found.values() for key, _ in parts)
    dtype = dtype or next(kind for kind in stored if kind.is_floating_point)
    module.to(dtype=dtype).to_empty(device=device)
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, pieces in found.items():
            for key, index in pieces if name in targets else ():  # offloaded experts are none
                targets[name][index].copy_(files.read(key))


def _write_folder(
    folder: Path,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: int,
    targets: Mapping[str, Tensor],
    family: Family | None,
) -> None:
    """Write texts, config.json among them, and the tensors in shards of at most `max_shard_size` bytes.

    Floating types become `dtype`, None: stay. All files are written beside their places, and the weights are read back
    from there before the first one moves, as the `targets` that they will be loaded into: on a full disk, and where
    what was written could not be loaded, the old checkpoint survives whole. Weights of an older checkpoint in the
    folder are removed, its index before the new shards move in, so that no index ever names a mixture.
    """
    types, sizes = dict[str, torch.dtype](), dict[str, int]()
    shards, held = list[list[str]]([[]]), 0
    for name, value in tensors.items():
        # a short type would lose the steps of a selection bias, and merge edges of bins: see Router._apply
        keeps = name.endswith(("e_score_correction_bias", "gate.edges", "_scale"))
        rounds = value.is_floating_point() and not keeps
        types[name] = dtype if dtype is not None and rounds else value.dtype
        sizes[name] = value.numel() * types[name].itemsize
        if shards[-1] and held + sizes[name] > max_shard_size:  # a larger one has its own
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += sizes[name]
    names, count = [SINGLE], len(shards)
    if count > 1:
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        texts = {INDEX: _json(index), **texts}
    moving, written = False, dict[str, str]()
    try:
        # the stack unwinds from its end, so the shards move first, then config.json, then the index
        with contextlib.ExitStack() as stack:
            for name, content in (*texts.items(), *zip(names, shards, strict=True)):
                temporary = stack.enter_context(atomic_write(folder / name))
                if isinstance(content, str):
                    temporary.write_text(content, encoding="utf-8")
                    continue
                written |= dict.fromkeys(content, temporary.name)
                whole = {key: tensors[key].to(types[key]) for key in content}
                _save(temporary, whole, {"format": "pt"})
                with temporary.open("rb+") as file:  # a disk may say only now that it is full
                    os.fsync(file.fileno())
                del whole
            with TensorFiles(folder, written) as files:
                find(targets, files, family)
                for name, value in tensors.items():
                    pair = files.read(name), value.detach().to(types[name]).cpu()
                    a, b = (x.contiguous().flatten().view(torch.uint8) for x in pair)
                    if not torch.equal(a, b):
                        raise CheckpointError(
                            f"{name} was read back from {folder} with other values than were written: the disk or its "
                            "file system is at fault; what was there before is unchanged"
                        )
            moving = True
            for old in [*folder.glob("*.safetensors"), folder / INDEX]:
                ours = old.name in (SINGLE, INDEX) or SHARD.fullmatch(old.name)
                if ours and old.name not in names:
                    old.unlink(missing_ok=True)
    except WriteError as error:
        if not moving:
            raise CheckpointError(str(error)) from error
        raise CheckpointError(
            f"a file of {folder} could not be put in its place ({error.strerror}); the folder is not whole: save again"
        ) from error


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 of the folder's weights: of the name and every byte of each file of safetensors, and of their index.

    Nothing is left out, because one changed router among gigabytes is another model. Files are read side by side, at
    the speed of the disk or of sha256 (a gigabyte a second and core): about as long as loading them takes, which is
    quicker afterwards where the system keeps them in memory. Pickles count where there is no safetensors file.
    """
    found: list[Path] = []
    safe = ("*.safetensors", "*.safetensors.index.json")
    for kinds in (safe, (*PICKLES, "*.bin.index.json")):
        found = found or sorted(path for kind in kinds for path in Path(folder).glob(kind))
    fault = "{0.filename} cannot be read ({0.strerror})".format
    with explained(CheckpointError, fault), ThreadPoolExecutor(max_workers=8) as pool:
        sums = pool.map(sha256_of, found)  # hashlib lets other threads run
        lines = (f"{path.name} {total}\n" for path, total in zip(found, sums, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def pretrained_path(name_or_path: str | Path) -> Path:
    """The folder of a shipped model ('mini'), of a checkpoint on disk, or of a local copy of one of the hub.

    It has config.json and safetensors; a CheckpointError says what else it is, and what to do.
    """
    path = WEIGHTS / str(name_or_path) if str(name_or_path) in SHIPPED else Path(name_or_path)
    if HUB_ID.fullmatch(str(name_or_path)) and not path.exists() and not path.parent.is_dir():
        from minimoe.hf.hub import fetched

        path = fetched(str(name_or_path))
    refuse_gguf(path)
    pickles = sorted(p.name for kind in PICKLES for p in path.glob(kind))
    if not path.is_dir():
        fault = (
            f"{str(name_or_path)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor a folder; give the folder "
            "that holds config.json and model.safetensors, or a model of the Hugging Face hub as OWNER/NAME"
        )
    elif not (path / "config.json").is_file():
        fault = f"the folder {path} has no config.json; a checkpoint holds config.json and model.safetensors"
    elif (path / SINGLE).is_file() or (path / INDEX).is_file():
        return path
    elif pickles:
        fault = (
            f"the folder {path} has no {SINGLE}, only {pickles[0]}: a pickle can run any program while it is read, "
            "so it is not. Where you trust it, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
        )
    else:
        fault = f"the folder {path} has no {SINGLE}, nor {INDEX} with its shards; a checkpoint holds one of them"
    raise CheckpointError(fault)


def refuse_gguf(path: Path) -> None:
    """A CheckpointError for a file of llama.cpp, or a folder that has such files and no others with weights."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    others = [p for kind in ("*.safetensors", *PICKLES) for p in path.glob(kind)]
    if found and found[0].suffix == ".gguf" and not others:
        raise CheckpointError(
            f"{found[0]} is a GGUF file, which llama.cpp reads and minimoe does not: fetch the folder with "
            "config.json and *.safetensors that it was converted from"
        )


def read_config(path: Path, *, counted: bool = False) -> tuple[ModelConfig, Family | None]:
    """The configuration in a config.json, or a folder's, and the family of transformers that it is of; None: minimoe's.

    Args:
        counted: for `minimoe.cost`: also of models that `MixtralModel` does not build (see `minimoe.hf.counted`).

    Raises:
        CheckpointError: not JSON, or no valid configuration; the message names the file and the field.
    """
    refuse_gguf(path)
    path = path / "config.json" if path.is_dir() else path
    values = read_object(path, CheckpointError)
    kinds = ConfigError, TypeError, AttributeError
    with explained(CheckpointError, lambda e: f"{path}: {e}", *kinds):
        if "model_type" not in values:
            return ModelConfig.from_dict(values), None
        from minimoe.hf.counted import counted_config
        from minimoe.hf.translate import FAMILIES, from_huggingface

        read = counted_config if counted else from_huggingface
        return read(values), FAMILIES.get(values["model_type"])


def model_tensors(model: MixtralModel) -> dict[str, Tensor]:
    """The tensors that go to disk: a tied output projection is stored once, as the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def save_model(
    model: MixtralModel,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "minimoe",
    max_shard_size: int | None = None,
) -> None:
    """Write config.json and the weights to the folder `path`; what is there survives a write that fails.

    Files are read back before they replace older ones. Weights that the model shares, other than a tied output
    projection, are written once for each use, and are no longer shared when they are read.

    Args:
        dtype: rounds the weights; None: as they are.
        layout: 'minimoe', or 'huggingface' for transformers, as the family that computes what this model does (see
            `minimoe.hf.translate.to_huggingface`). A tokenizer is not written; generation_config.json is, where the
            model has one.
        max_shard_size: bytes of one file of weights; None: 5 GB with 'huggingface', else one file.

    Raises:
        ConfigError: no family of transformers can have this configuration; the message names the fields.
        CheckpointError: a file could not be written, or what is read back would be another model.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ConfigError(f"max_shard_size is {max_shard_size} bytes; it must be positive")
    with shapes_only():
        plain = type(model)(model.config)
    plain = _in_int8(plain, model.state_dict() if layout == "minimoe" else ())
    for fault in _faults(model, plain):
        raise CheckpointError(fault)
    tensors, values, limit = model_tensors(model), model.config.to_dict(), max_shard_size
    family: Family | None = None
    if layout == "huggingface":
        from minimoe.hf.translate import FAMILIES, to_huggingface

        values = to_huggingface(model.config, dtype or model.embed_tokens.weight.dtype)
        values |= {k: v for k, v in model.generation_config.items() if k in TOKEN_IDS}
        family = FAMILIES[values["model_type"]]
        tensors = {
            key: value[index]
            for name, value in tensors.items()
            for key, index in pieces_of(name, tuple(value.shape), family)
        }
        limit = limit or SHARD_SIZE
    texts = {"config.json": _json(values)}
    if model.generation_config:
        texts[GENERATION] = _json(model.generation_config)
    if any(name.endswith(SCALES) for name in tensors):
        from minimoe.hf.lazy import int8_card

        texts["README.md"] = int8_card(model, Path(path) / "README.md")
    size, targets = limit or sys.maxsize, model_tensors(plain)
    _write_folder(Path(path), texts, tensors, dtype, size, targets, family)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _in_int8(model: MixtralModel, names: Iterable[str]) -> MixtralModel:
    """The model, with its experts in int8 where the tensors of these names have theirs so."""
    if not any(name.endswith(SCALES) for name in names):
        return model
    from minimoe.hf.lazy import quantize_experts

    return quantize_experts(model)


def _faults(model: MixtralModel, plain: MixtralModel) -> Iterator[str]:
    """Why a model could not be read back; `plain` is one of its configuration."""
    if strange := sorted({*plain.state_dict()} ^ {*model.state_dict()}):
        yield (
            f"the model has other tensors than its configuration says ({', '.join(strange[:4])}) and could not be read "
            "back: name a router of your own by router_type, offload experts after loading, and save experts in int8 "
            "with layout='minimoe'"
        )
    if empty := sorted(name for name, value in model.state_dict().items() if value.is_meta):
        yield f"{', '.join(empty[:4])} have no values yet, being on the meta device: load weights before saving"
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    own = head is not embedding and not torch.equal(head, embedding)
    if own and model.config.tie_word_embeddings:
        yield (
            "the model has an lm_head.weight of its own, but tie_word_embeddings is true in its configuration, with "
            "which only the embedding is saved: set model.config to model.config.replace(tie_word_embeddings=False)"
        )


def load_model(
    cls: type[MixtralModel],
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    cache_experts: int | None = None,
) -> MixtralModel:
    """Load 'mini' (shipped with the library), a folder or a model of the Hugging Face hub ('owner/name'), in eval mode.

    The folder is one that `save_pretrained` wrote, experts in int8 included, or one of transformers: Mixtral, OLMoE,
    Qwen2-MoE, Qwen3-MoE, and dense Mistral, Llama, Qwen2 and Qwen3. A model of the hub needs huggingface_hub, which
    fetches it into its own cache and reads it from there without a network. Weights go straight into their place.

    Args:
        dtype: of the weights; None: as stored.
        cache_experts: leave the experts on disk, and have each layer keep this many in memory (see
            `OffloadedExperts`); for inference. None: all are loaded.

    Raises:
        CheckpointError: no such model; a file that is missing, truncated, or does not fit its configuration; a
            configuration that the model cannot have.
    """
    folder, family, model = _empty_model(cls, name_or_path)
    # the settings of text generation: of their own file, and ids of config.json that are not there
    values = read_object(folder / "config.json", CheckpointError)
    model.generation_config = {k: values[k] for k in TOKEN_IDS if values.get(k) is not None}
    if (folder / GENERATION).is_file():
        model.generation_config |= read_object(folder / GENERATION, CheckpointError)
    with TensorFiles(folder) as files:
        if absent := sorted(x for x in {*files.shards.values()} if not (folder / x).is_file()):
            raise CheckpointError(
                f"{files.source} names {', '.join(absent)}, not in the folder: fetch them too"
            )
        model = _in_int8(model, files.shards)
        found = find(model_tensors(model), files, family)
        if cache_experts is not None:
            from minimoe.hf.lazy import offload_experts

            model = offload_experts(model, folder, cache_experts=cache_experts)
        _load(model, found, files, dtype, device)
    if model.config.tie_word_embeddings:  # each was given memory of its own
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def load_layer(
    name_or_path: str | Path,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
) -> Block:
    """One block of the model in a folder, in eval mode; the rest is not read, and shards without it may be absent.

    Its `mlp` is the sparse layer: of Mixtral 8x7B in bfloat16 a block is 2.9 GB of 93.

    Args:
        layer: from 0.
        dtype: of the weights; None: as stored.

    Raises:
        CheckpointError: as `MixtralModel.from_pretrained`, or no such layer.
    """
    from minimoe.model import Block, MixtralModel

    folder, family, model = _empty_model(MixtralModel, name_or_path)
    if not 0 <= layer < len(model.layers):
        raise CheckpointError(
            f"layer is {layer}, but the model in {folder} has layers 0 to {len(model.layers) - 1}"
        )
    with TensorFiles(folder) as files:
        block = _in_int8(model, files.shards).layers[layer]
        assert isinstance(block, Block)
        found = find(block.state_dict(), files, family, prefix=f"layers.{layer}.")
        _load(block, found, files, dtype, "cpu")
    return block.eval()


class NothingDrawn(TorchFunctionMode):
    """Random initial values are left out: what is made within has memory and no values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return (*args, *kwargs.values())[0]
        func = torch.empty if func is torch.randn else func
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Generator[None]:
    """Modules made here are on the meta device. To draw values there would import torch's compiler: seconds."""
    with torch.device("meta"), NothingDrawn():
        yield


def _empty_model(
    cls: type[MixtralModel], name_or_path: str | Path
) -> tuple[Path, Family | None, MixtralModel]:
    """A folder, its layout, and its model on the meta device: shapes, and no memory behind them."""
    folder = pretrained_path(name_or_path)
    config, family = read_config(folder)
    kinds = ConfigError, RuntimeError  # torch: sizes whose product no address can count
    fault = f"{folder / 'config.json'}: "
    with explained(CheckpointError, lambda e: f"{fault}{e}", *kinds), shapes_only():
        return folder, family, cls(config)
