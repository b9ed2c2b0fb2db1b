"""minimoe: a compact library of Mixture-of-Experts language models, built step by step by its course.

The one idea of the library is `Routing`: a sparse matrix of tokens by experts. A router builds it, a dispatcher
multiplies by it, a balancing loss sums its columns, and the routing study is a summary of it.
"""

from minimoe.config import ModelConfig
from minimoe.errors import MinimoeError
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routing import Routing

__version__ = "0.1.0"

__all__ = ["MinimoeError", "MixtralModel", "ModelConfig", "ModelOutput", "Routing", "__version__"]
