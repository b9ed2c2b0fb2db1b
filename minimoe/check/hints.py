"""Hints in stages."""

from __future__ import annotations

from minimoe.check.task import find
from minimoe.errors import ConfigError

_given: dict[str, int] = {}  # how many hints this kernel has given, by task


def hint(task_id: str, stage: int | None = None) -> None:
    """Print a hint for a task: the next one at each call, the last one again at the end.

    Args:
        task_id: such as '03.2'.
        stage: a particular hint, from 1; None: the next.

    Raises:
        ConfigError: there is no such task or stage.
    """
    hints = find(task_id).hints
    if stage is None:
        stage = min(_given.get(task_id, 0) + 1, len(hints))
    if not 1 <= stage <= len(hints):
        raise ConfigError(f"task {task_id} has hints 1 to {len(hints)}; {stage} was asked for")
    _given[task_id] = stage
    print(f"Hint {stage} of {len(hints)} for {task_id}: {hints[stage - 1]}")
