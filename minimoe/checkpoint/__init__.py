"""Checkpoints: a folder with config.json and safetensors; written atomically, read strictly and lazily, never pickled.

Two layouts are read and written: minimoe's own, and that of Hugging Face transformers for the families of
`minimoe.checkpoint.families`. Which one a folder has, its config.json says: transformers' has a `model_type`.
"""

from minimoe.checkpoint.counted import COUNTED, counted_config
from minimoe.checkpoint.families import FAMILIES
from minimoe.checkpoint.fingerprint import weights_fingerprint
from minimoe.checkpoint.folder import (
    SHIPPED,
    WEIGHTS,
    load_into,
    load_layer,
    load_model,
    model_tensors,
    pretrained_path,
    read_config,
    read_counted,
    read_family,
    refuse_gguf,
    restore_model,
    save_model,
)
from minimoe.checkpoint.offload import ExpertFiles, offload_experts
from minimoe.checkpoint.tensors import TensorFiles, read_tensors, write_tensors
from minimoe.checkpoint.translate import from_huggingface, to_huggingface

__all__ = [
    "COUNTED",
    "FAMILIES",
    "SHIPPED",
    "WEIGHTS",
    "ExpertFiles",
    "TensorFiles",
    "counted_config",
    "from_huggingface",
    "load_into",
    "load_layer",
    "load_model",
    "model_tensors",
    "offload_experts",
    "pretrained_path",
    "read_config",
    "read_counted",
    "read_family",
    "read_tensors",
    "refuse_gguf",
    "restore_model",
    "save_model",
    "to_huggingface",
    "weights_fingerprint",
    "write_tensors",
]
