"""The other routers and layers of the literature; the core reaches them by name, when a configuration asks.

Importing this package registers its routers under their names in `minimoe.routers.ROUTERS`.
"""

from minimoe.zoo import balanced, expert_choice, relu, simple

__all__ = ["balanced", "expert_choice", "relu", "simple"]
