"""Checkpoints: a folder with config.json and safetensors, written atomically, read strictly, never pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.io import atomic_write, read_object
from minimoe.model import Block, MixtralModel

if TYPE_CHECKING:
    from minimoe.hf.families import Family

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("mini",)
LAYOUTS = ("minimoe", "huggingface")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SHARD_SIZE = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth")
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# the types that weights are stored in, by safetensors' names
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: missing, truncated, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file atomically: on a full disk the old file survives.

    Raises:
        CheckpointError: the file could not be written.
    """
    try:
        with atomic_write(path) as temporary:
            save_file(apart(tensors), temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from error


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: contiguous, and each in memory of its own where two of them share some.

    Weights that a model shares are written twice, and read back as two that are equal.
    """
    taken: dict[int, list[tuple[int, int]]] = {}  # of each storage, from where to where
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        begin, end = value.data_ptr(), value.data_ptr() + value.nbytes
        places = taken.setdefault(value.untyped_storage().data_ptr(), [])
        if any(begin < last and first < end for first, last in places):
            value = value.clone()
        else:
            places.append((begin, end))
        found[name] = value
    return found


class TensorFiles:
    """The tensors of a folder: of model.safetensors, or of the shards that model.safetensors.index.json names.

    Opening reads names only; a shard is opened when one of its tensors is asked for, so that others may be absent. A
    context manager: leaving it closes the files.

    Attributes:
        folder: where they are.
        source: the file that lists the tensors, for messages.

    Args:
        places: file name of each tensor, where they are known already.

    Raises:
        CheckpointError: here and in every method, names the file that is missing, truncated or of another format.
    """

    def __init__(self, folder: Path, places: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        if places is not None:
            self.source, self._shard = folder, dict(places)
        elif (folder / SINGLE).is_file():  # as in transformers, it comes before an index
            self.source = folder / SINGLE
            self._shard = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            self.source = folder / INDEX
            self._shard = _read_index(self.source)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._shard)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        return tuple(self._header(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header of its file."""
        stored = str(self._header(name).get_dtype())
        if stored not in TYPES:
            raise CheckpointError(
                f"{self.path(name)}: {name} has the type {stored}; known are {', '.join(TYPES)}"
            )
        return TYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. It may be a view of the file: copy it if it is to outlive this object."""
        self._header(name)
        try:
            return self._file(self._shard[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _incomplete(self.path(name), error) from error

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.folder / self._shard[name]

    def absent(self) -> list[str]:
        """Shards that the index names and the folder lacks."""
        return sorted(s for s in set(self._shard.values()) if not (self.folder / s).is_file())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def _header(self, name: str) -> Any:
        shard = self._shard[name]
        try:
            return self._file(shard).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.source} says that {shard} holds {name}, but it does not: fetch or save both again"
            ) from error

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            path = self.folder / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{self.source} names {shard}, which is not in the folder: fetch it too"
                )
            try:
                self._open[shard] = safe_open(path, "pt").__enter__()  # pyright: ignore
            except (SafetensorError, OSError) as error:
                raise _incomplete(path, error) from error
        return self._open[shard]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        places: Any = read_object(path).get("weight_map")
    except MinimoeError as error:
        raise CheckpointError(f"{INDEX} is not an index of shards: {error}") from error
    if not isinstance(places, dict) or {type(name) for name in places.values()} - {str}:
        raise CheckpointError(
            f"{path} is not an index of shards; expected an object with 'weight_map', which names the file of each "
            "tensor"
        )
    files = set(places.values())
    strange = sorted(f for f in files if Path(f).name != f or not f.endswith(".safetensors"))
    if strange or "\0" in "".join(files):
        raise CheckpointError(
            f"{path} names what is no safetensors file of its folder: {', '.join(map(repr, strange or sorted(files)))}"
        )
    return places


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a complete safetensors file ({error}); it may be truncated or of another format: "
        "fetch or save it again"
    )


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that could not be written."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path} could not be written ({reason}); what was there before is unchanged"
    )


# a tensor on disk, and the part of the model's tensor that it is: tensor[index]
Piece = tuple[str, tuple[int | slice, ...]]


def pieces_of(
    name: str, shape: tuple[int, ...], family: Family | None, *, fused: bool = False
) -> list[Piece]:
    """The tensors on disk that make up the model's tensor `name`; family None: minimoe's own layout, one to one."""
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
    found: list[Piece] = []
    for e in range(shape[0]) if stacked else (None,):
        prefix, at = (owner, ()) if e is None else (f"{owner}.{e}", (e,))
        if last == "down_proj":
            found.append((f"{prefix}.{down}.weight", at))
        else:
            f = shape[-2] // 2
            found.append((f"{prefix}.{gate}.weight", (*at, slice(None, f))))
            found.append((f"{prefix}.{up}.weight", (*at, slice(f, None))))
    return found


def pieces_in(
    name: str, shape: tuple[int, ...], family: Family | None, names: set[str]
) -> list[Piece]:
    """`pieces_of` a tensor in the layout that the folder has, which holds tensors of these names."""
    fused = pieces_of(name, shape, family, fused=True)
    return fused if fused[0][0] in names else pieces_of(name, shape, family)


class Memory(TensorFiles):
    """Tensors that are there already, by name; `source` names them in messages."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(Path(source), dict.fromkeys(tensors, ""))
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def find(
    targets: Mapping[str, Tensor],
    files: TensorFiles,
    family: Family | None,
    *,
    prefix: str = "",
    tied: bool = False,
) -> dict[str, list[Piece]]:
    """Where each target lies. Every name, shape and kind of type must agree, before any tensor is read.

    Args:
        prefix: of the targets in the model; tensors elsewhere are not looked at.
        tied: an lm_head.weight is allowed, if it equals the embedding.

    Raises:
        CheckpointError: lists what is missing, unexpected, or of another shape or type.
    """
    names, used = files.names, set[str]()
    found: dict[str, list[Piece]] = {}
    kinds = ("missing", "unexpected", "wrong shape", "wrong type")
    wrong: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, target in targets.items():
        found[name] = pieces_in(prefix + name, tuple(target.shape), family, names)
        for key, index in found[name]:
            used.add(key)
            if key not in names:
                wrong["missing"].append(key)
                continue
            shape, dtype = files.shape(key), files.dtype(key)
            if shape != (expected := tuple(target[index].shape)):
                wrong["wrong shape"].append(f"{key} is {shape}, expected {expected}")
            elif dtype.is_floating_point != target.is_floating_point():
                wrong["wrong type"].append(
                    f"{key} is {dtype}, expected {target.dtype} or one of its kind"
                )
    embedding = "embed_tokens.weight" if family is None else "model.embed_tokens.weight"
    if tied and "lm_head.weight" in names and embedding in names:
        # other libraries may store the shared matrix twice; two different ones do not fit one place
        if not torch.equal(files.read("lm_head.weight"), files.read(embedding)):
            raise CheckpointError(
                f"{files.source} holds an lm_head.weight of its own, but tie_word_embeddings is true in the "
                "configuration beside it: set it to false, or save the weights tied"
            )
        used.add("lm_head.weight")
    stem = prefix if family is None or not prefix else f"model.{prefix}"
    wrong["unexpected"] = [name for name in names - used if name.startswith(stem)]
    problems = "; ".join(
        f"{what}: {', '.join(sorted(which)[:4])}{' …' if len(which) > 4 else ''} ({len(which)})"
        for what, which in wrong.items()
        if which
    )
    if problems:
        raise CheckpointError(
            f"{files.source} does not fit the configuration beside it; {problems}"
        )
    return found


def stored_type(found: Mapping[str, list[Piece]], files: TensorFiles) -> torch.dtype:
    """The floating type of the first tensor that has one."""
    types = (files.dtype(key) for parts in found.values() for key, _ in parts)
    return next(dtype for dtype in types if dtype.is_floating_point)


@torch.no_grad()
def copy(
    targets: Mapping[str, Tensor], found: Mapping[str, list[Piece]], files: TensorFiles
) -> None:
    """Read tensor by tensor into memory that is there: nothing is held twice."""
    for name, target in targets.items():
        for key, index in found[name]:
            target[index].copy_(files.read(key))


def write_folder(
    folder: Path,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    max_shard_size: int,
    check: Callable[[TensorFiles], object],
) -> None:
    """Write small files of text, such as config.json, and the tensors in shards of at most `max_shard_size` bytes.

    Floating types become `dtype` (but for the selection bias), None: stay. All files are written beside their places,
    and the weights are read back from there, before the first one moves: on a full disk, and where what was written
    could not be loaded, the old checkpoint survives whole. Weights of an older checkpoint in the folder are removed,
    its index before the new shards move in, so that no index ever names a mixture.

    Args:
        folder: made if it does not exist.
        texts: file name -> content.
        check: is given the files before they move; what it raises leaves the folder as it was.

    Raises:
        CheckpointError: the folder cannot be made, a file could not be written, or it does not hold what was written.
    """
    types = {name: _stored_type(name, value, dtype) for name, value in tensors.items()}
    sizes = {name: value.numel() * types[name].itemsize for name, value in tensors.items()}
    shards = _split(sizes, max_shard_size)
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be made ({error}); give one that can be written"
        ) from error
    path, moving = folder, False
    try:
        with contextlib.ExitStack() as stack:
            # the stack unwinds from its end, so the shards move first, then config.json, then the index

            def begin(name: str) -> Path:
                nonlocal path
                path = folder / name
                return stack.enter_context(atomic_write(path))

            if count > 1:
                where = {
                    key: name for name, keys in zip(names, shards, strict=True) for key in keys
                }
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
                texts = {INDEX: json.dumps(index, indent=2) + "\n", **texts}
            for name, text in texts.items():
                begin(name).write_text(text, encoding="utf-8")
            written: dict[str, str] = {}
            for name, keys in zip(names, shards, strict=True):
                temporary = begin(name)
                written |= dict.fromkeys(keys, temporary.name)
                whole = apart({key: tensors[key].to(types[key]) for key in keys})
                save_file(whole, temporary, {"format": "pt"})
                with temporary.open("rb+") as file:  # a disk may say only now that it is full
                    os.fsync(file.fileno())
                del whole
            with TensorFiles(folder, written) as files:
                check(files)
                _compare(files, tensors, types)
            moving = True
            for old in [*folder.glob("*.safetensors"), folder / INDEX]:
                ours = old.name in (SINGLE, INDEX) or SHARD.fullmatch(old.name)
                if ours and old.name not in names:
                    old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        if moving:
            raise CheckpointError(
                f"a file of {folder} could not be put in its place ({error}); the folder is not whole: save again"
            ) from error
        raise unwritten(path, error) from error


def _compare(
    files: TensorFiles, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
) -> None:
    """Raise where the files do not hold the tensors bit for bit."""
    for name, value in tensors.items():
        pair = files.read(name), value.detach().to(types[name]).cpu()
        a, b = (x.contiguous().flatten().view(torch.uint8) for x in pair)
        if not torch.equal(a, b):
            raise CheckpointError(
                f"{name} was read back from {files.folder} with other values than were written: the disk or its file "
                "system is at fault; what was there before is unchanged"
            )


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, as many in a shard as fit; one that is larger than a shard has its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _stored_type(name: str, value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    # a short type would lose the steps of a selection bias, and merge edges of bins: see Router._apply
    keeps = name.endswith(("e_score_correction_bias", "gate.edges"))
    return value.dtype if dtype is None or keeps or not value.is_floating_point() else dtype


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 of the folder's weights: of the name and every byte of each file of safetensors, and of their index.

    Nothing is left out, because one changed router among gigabytes is another model. Files are read side by side, at
    the speed of the disk or of sha256 (a gigabyte a second and core): about as long as loading them takes, which is
    quicker afterwards where the system keeps them in memory. Pickles count where there is no safetensors file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: list[Path] = []
    safe = ("*.safetensors", "*.safetensors.index.json")
    for kinds in (safe, (*PICKLES, "*.bin.index.json")):
        found = found or sorted(path for kind in kinds for path in Path(folder).glob(kind))
    try:
        with ThreadPoolExecutor(max_workers=8) as pool:  # hashlib lets other threads run
            digests = list(pool.map(_digest, found))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror})") from error
    lines = [f"{path.name} {digest}\n" for path, digest in zip(found, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pretrained_path(name_or_path: str | Path) -> Path:
    """The folder of a shipped model ('mini') or of a checkpoint on disk.

    Raises:
        CheckpointError: neither a shipped name nor a folder with config.json and weights in safetensors.
    """
    path = WEIGHTS / str(name_or_path) if str(name_or_path) in SHIPPED else Path(name_or_path)
    refuse_gguf(path)
    pickles = sorted(p.name for kind in PICKLES for p in path.glob(kind))
    if not path.is_dir():
        fault = (
            f"{str(name_or_path)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor a folder; "
            "give the folder that holds config.json and model.safetensors. A model of the Hugging Face hub is fetched "
            "first: hf download OWNER/NAME --local-dir FOLDER"
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
        fault = (
            f"the folder {path} has no {SINGLE}, nor {INDEX} with its shards; a checkpoint holds config.json and one "
            "of them"
        )
    raise CheckpointError(fault)


def refuse_gguf(path: Path) -> None:
    """Raise where a path is a file of llama.cpp, or a folder that has such files and no others with weights.

    Raises:
        CheckpointError: says what to fetch instead.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    others = [p for kind in ("*.safetensors", *PICKLES) for p in path.glob(kind)]
    if found and found[0].suffix == ".gguf" and not others:
        raise CheckpointError(
            f"{found[0]} is a GGUF file, which llama.cpp reads and minimoe does not: fetch the folder with "
            "config.json and *.safetensors that it was converted from"
        )


def read_config(path: Path) -> tuple[ModelConfig, Family | None]:
    """The configuration in a config.json (or in a folder that has one), and the family of transformers whose layout the
    folder has; None: minimoe's own.

    Raises:
        CheckpointError: not JSON, or no valid configuration; the message names the file and the field.
    """
    path = path / "config.json" if path.is_dir() else path
    values = read_object(path, CheckpointError)
    try:
        if "model_type" in values:
            from minimoe.hf.families import FAMILIES
            from minimoe.hf.translate import from_huggingface

            return from_huggingface(values), FAMILIES[values["model_type"]]
        return ModelConfig.from_dict(values), None
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_counted(path: Path) -> ModelConfig:
    """The configuration in a config.json (or in a folder that has one), for `minimoe.cost`: also of models that
    `MixtralModel` does not build (see `minimoe.hf.counted`).

    Raises:
        CheckpointError: not JSON, an unknown kind of model, or a field that cannot be counted; the message names it.
    """
    from minimoe.hf.counted import counted_config

    path = path / "config.json" if path.is_dir() else path
    try:
        return counted_config(read_object(path, CheckpointError))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def model_tensors(model: MixtralModel) -> dict[str, Tensor]:
    """The tensors that go to disk: a tied output projection is stored once, as the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def restore_model(model: MixtralModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """The inverse of `model_tensors`, into an existing model.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape.
    """
    files, targets = Memory(tensors, source), model_tensors(model)
    copy(targets, find(targets, files, None, tied=model.config.tie_word_embeddings), files)


def save_model(
    model: MixtralModel,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "minimoe",
    max_shard_size: int | None = None,
) -> None:
    """Write the folder `path`: config.json and the weights (see `MixtralModel.save_pretrained`)."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ConfigError(
            f"max_shard_size is {max_shard_size}; it must be a positive count of bytes"
        )
    _check_tensors(model)
    tensors, values, limit = model_tensors(model), model.config.to_dict(), max_shard_size
    family: Family | None = None
    if layout == "huggingface":
        from minimoe.hf.families import FAMILIES
        from minimoe.hf.translate import to_huggingface

        values = to_huggingface(model.config, dtype or model.embed_tokens.weight.dtype)
        values |= {k: v for k, v in model.generation_config.items() if k in TOKEN_IDS}
        family = FAMILIES[values["model_type"]]
        tensors = {
            key: value[index]
            for name, value in tensors.items()
            for key, index in pieces_of(name, tuple(value.shape), family)
        }
        limit = limit or SHARD_SIZE
    # without a limit one file holds everything, however large
    size = limit or sum(v.nbytes for v in tensors.values()) + 1
    files = {"config.json": values}
    if model.generation_config:
        files[GENERATION] = model.generation_config
    with torch.device("meta"):
        targets = model_tensors(MixtralModel(model.config))
    write_folder(
        Path(path), {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}, tensors,
        dtype=dtype, max_shard_size=size, check=lambda files: find(targets, files, family),
    )  # fmt: skip


def _check_tensors(model: MixtralModel) -> None:
    """Raise where a model that is read back would be another one."""
    with torch.device("meta"):
        plain = set(MixtralModel(model.config).state_dict())
    strange = sorted(plain ^ set(model.state_dict()))
    if strange:
        raise CheckpointError(
            f"the model has other tensors than its configuration says ({', '.join(strange[:4])}), and could not be "
            "read back: save the model that its quantised or offloaded experts came from, and convert after loading"
        )
    empty = sorted(name for name, value in model.state_dict().items() if value.is_meta)
    if empty:
        raise CheckpointError(
            f"{', '.join(empty[:4])} {'has' if len(empty) == 1 else 'have'} no values yet (they are on the meta "
            "device): load weights into the model before saving it"
        )
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    if (
        model.config.tie_word_embeddings
        and head is not embedding
        and not torch.equal(head, embedding)
    ):
        raise CheckpointError(
            "the model has an lm_head.weight of its own, but tie_word_embeddings is true in its configuration, with "
            "which only the embedding is saved: set model.config to model.config.replace(tie_word_embeddings=False)"
        )


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    cache_experts: int | None = None,
) -> MixtralModel:
    """Read a folder of either layout (see `MixtralModel.from_pretrained`)."""
    folder = pretrained_path(name_or_path)
    config, family = read_config(folder)
    model = _without_memory(config, folder)
    model.generation_config = _generation_config(folder)
    with TensorFiles(folder) as files:
        if files.absent():
            raise CheckpointError(
                f"{files.source} names {', '.join(files.absent())}, not in the folder: fetch them too"
            )
        found = find(model_tensors(model), files, family, tied=config.tie_word_embeddings)
        if cache_experts is not None:
            from minimoe.hf.offload import offload_experts

            model = offload_experts(model, folder, cache_experts=cache_experts)
        model.to(dtype=dtype or stored_type(found, files)).to_empty(device=device)
        if config.tie_word_embeddings:  # each was given memory of its own
            model.lm_head.weight = model.embed_tokens.weight
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        copy(held, found, files)
    return model.eval()


def load_layer(
    name_or_path: str | Path,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Block:
    """One block of the model in a folder, in eval mode; the rest is not read, and shards without it may be absent.

    Its `mlp` is the sparse layer: of Mixtral 8x7B in bfloat16 a block is 2.9 GB of 93.

    Args:
        layer: from 0.
        dtype: of the weights; None: as stored.

    Raises:
        CheckpointError: as `MixtralModel.from_pretrained`, or no such layer.
    """
    folder = pretrained_path(name_or_path)
    config, family = read_config(folder)
    if not 0 <= layer < config.num_hidden_layers:
        raise CheckpointError(
            f"layer is {layer}, but the model in {folder} has layers 0 to {config.num_hidden_layers - 1}"
        )
    block = _without_memory(config, folder).layers[layer]
    assert isinstance(block, Block)
    with TensorFiles(folder) as files:
        found = find(block.state_dict(), files, family, prefix=f"layers.{layer}.")
        block.to(dtype=dtype or stored_type(found, files)).to_empty(device=device)
        copy(block.state_dict(), found, files)
    return block.eval()


def _generation_config(folder: Path) -> dict[str, Any]:
    """The settings of text generation that a folder has: of its own file, and ids of config.json that are not there."""
    values = read_object(folder / "config.json", CheckpointError)
    found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    path = folder / GENERATION
    return found | read_object(path, CheckpointError) if path.is_file() else found


def _without_memory(config: ModelConfig, folder: Path) -> MixtralModel:
    """The model on the meta device: shapes, and no memory behind them."""
    try:
        with torch.device("meta"):
            return MixtralModel(config)
    except (ConfigError, RuntimeError) as error:  # torch: sizes whose product no address can count
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
