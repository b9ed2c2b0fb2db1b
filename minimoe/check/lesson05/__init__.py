"""Checks of lesson 05: a zoo of routers. One file for each task."""

from minimoe.check.lesson05.causality import causality_test
from minimoe.check.lesson05.choice import expert_choice
from minimoe.check.lesson05.museum import group_limited
from minimoe.check.lesson05.table import dealt_table
from minimoe.check.lesson05.transport import transport_plan

__all__ = [
    "causality_test",
    "dealt_table",
    "expert_choice",
    "group_limited",
    "transport_plan",
]
