"""Checks of lesson 06: dispatch. One file for each task."""

from minimoe.check.lesson06.dispatch import dispatch_by_sorting
from minimoe.check.lesson06.museum import dropped_adds_nothing
from minimoe.check.lesson06.plan import plan_of_dispatch
from minimoe.check.lesson06.slots import slots_of_assignments
from minimoe.check.lesson06.touched import experts_touched

__all__ = [
    "dispatch_by_sorting",
    "dropped_adds_nothing",
    "experts_touched",
    "plan_of_dispatch",
    "slots_of_assignments",
]
