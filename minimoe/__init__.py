"""minimoe: a compact library of Mixture-of-Experts language models, built step by step by its course.

The one idea of the library is `Routing`: a sparse matrix of tokens by experts. A router builds it, a dispatcher
multiplies by it, a balancing loss sums its columns, and the routing study is a summary of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minimoe.config import ModelConfig
from minimoe.errors import MinimoeError

if TYPE_CHECKING:
    from minimoe.layers import MoELayer
    from minimoe.model import MixtralModel, ModelOutput
    from minimoe.routing import Routing

__version__ = "0.2.0"

__all__ = [
    "MinimoeError", "MixtralModel", "MoELayer", "ModelConfig", "ModelOutput", "Routing", "__version__",
]  # fmt: skip

# Imported when they are asked for, because they need torch, which takes seconds: `minimoe --help` does not.
_LATE = {
    "MixtralModel": "model", "MoELayer": "layers", "ModelOutput": "model", "Routing": "routing",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
