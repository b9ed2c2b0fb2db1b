"""The routing study: record which experts a model gives every token of real text, and say what can be read off it.

`record` reads documents and `trace` stores the choices, `load`, `domains`, `depth`, `vocabulary` and `paths` hold a
statistic, its figure and its verdict each, `questions` says what is read, `report` writes; `counts` is for what others
counted, `engines` for models that run elsewhere.
"""

from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter

__all__ = ["RoutingTrace", "TraceDocument", "TraceWriter"]
