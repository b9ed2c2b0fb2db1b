"""The routing study: record which experts a model gives every token of real text, and say what can be read off it.

`trace` holds what was recorded, `recorder` records it, `statistics` counts, `figures` draws, `report` writes.
"""

from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter

__all__ = ["RoutingTrace", "TraceDocument", "TraceWriter"]
