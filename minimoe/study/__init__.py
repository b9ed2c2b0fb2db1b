"""The routing study: record which experts a model gives every token of real text, and say what can be read off it.

`trace` holds what was recorded, `recorder` records it, `stream` does so on disk, `statistics` counts, `figures` draws,
`report` and `real` write.
"""

from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter

__all__ = ["RoutingTrace", "TraceDocument", "TraceWriter"]
